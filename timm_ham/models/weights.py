"""Pretrained weights: the folders `hub/<model>.<tag>/`, read into timm's pretrained cfgs.

A folder holds `config.json` in timm's format and `model.safetensors`. Nothing else registers weights: putting a folder
there is enough, taking it away is too. A folder whose weights were left out (of a wheel, say) stands for the commit on
the Hub that its `published.json` names.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional

from timm.models import PretrainedCfg, is_model_in_modules

from timm_ham.errors import TimmHamError

__all__ = [
    'CONFIG_FILE',
    'HASH_KEY',
    'MAX_CONFIG_BYTES',
    'NAMESPACE',
    'PUBLISHED_FILE',
    'WEIGHTS_FILE',
    'bundled_cfgs',
    'check_architecture',
    'check_weights',
    'hub_folders',
    'read_config',
    'registered_hash',
]

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
HASH_KEY = 'weights_sha256'  # in config.json, beside timm's own keys
PUBLISHED_FILE = 'published.json'  # the commit of the folder on the Hub; not on the Hub itself
MAX_CONFIG_BYTES = 10_000_000  # the names and descriptions of 22 thousand classes take two

# Owner of the repositories on the Hub that hold the registered weights; a mirror or a fork names its own.
NAMESPACE = os.environ.get('TIMM_HAM_NAMESPACE', 'timm-ham')

_PACKAGE = Path(__file__).resolve().parents[1]


def hub_folders() -> Iterator[Path]:
    """The folders of weights, those inside the package (an installed wheel) before those of a checkout."""
    roots = [_PACKAGE / 'hub']
    if (_PACKAGE.parent / 'pyproject.toml').is_file():
        roots.append(_PACKAGE.parent / 'hub')
    for root in roots:
        yield from sorted(config.parent for config in root.glob(f'*/{CONFIG_FILE}'))


def read_config(path: Path) -> Dict[str, Any]:
    """A config.json, whoever wrote it.

    Raises:
        TimmHamError: If it is no JSON object with an architecture, or too large or too deeply nested to be a config.
        OSError: If it can't be read.
    """
    with path.open('rb') as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise TimmHamError(f'{path} is larger than {MAX_CONFIG_BYTES // 10**6} MB: it is no config of a model')
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TimmHamError(f'{path} is not JSON ({error}): get it again') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise TimmHamError(f'{path} names no architecture: it is no config of a model')
    return config


def check_architecture(architecture: str, name: str) -> None:
    """Raise a TimmHamError if weights called `name`, `<model>.<tag>` of a model of ours, are of another model."""
    model, dot, _ = name.partition('.')
    if dot and model != architecture and is_model_in_modules(model, ['zoo']):  # timm's name for zoo.py
        raise TimmHamError(f'{name} holds weights of {architecture!r}, not of {model}: the name or the config is wrong')


def read_folder(folder: Path) -> PretrainedCfg:
    """The pretrained cfg of one folder, pointing to its weights if they are there, else to those on the Hub.

    Raises:
        ValueError: If config.json is no such config, or of another architecture than the folder's name says.
    """
    config = read_config(folder / CONFIG_FILE)
    architecture, _, tag = folder.name.partition('.')
    if config['architecture'] != architecture or not tag:
        raise ValueError(f"the folder's name is not {config['architecture']}.<tag>")
    weights, published = folder / WEIGHTS_FILE, folder / PUBLISHED_FILE
    values = dict(
        config['pretrained_cfg'],
        num_classes=config['num_classes'],
        label_names=config.get('label_names'),
        tag=tag,
        file=str(weights) if weights.is_file() else None,
    )
    if not weights.is_file() and published.is_file():
        revision = json.loads(published.read_text(encoding='utf-8'))['revision']
        values['hf_hub_id'] = f'{NAMESPACE}/{folder.name}@{revision}'
    # JSON has no tuples, timm's cfgs have no lists.
    return PretrainedCfg(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def bundled_cfgs(architectures: Mapping[str, object]) -> Dict[str, PretrainedCfg]:
    """`<model>.<tag>` to pretrained cfg, for every folder of one of the `architectures`; a broken one is a warning."""
    cfgs: Dict[str, PretrainedCfg] = {}
    for folder in hub_folders():
        try:
            cfg = read_folder(folder)
        except (ValueError, KeyError, TypeError, OSError) as error:
            warnings.warn(f'{folder / CONFIG_FILE} is left out: {error!r}', stacklevel=2)
            continue
        if folder.name.partition('.')[0] in architectures:
            cfgs.setdefault(folder.name, cfg)
    return cfgs


def registered_hash(name: str) -> Optional[str]:
    """The SHA-256 that the package expects of the registered weights `<model>.<tag>`, wherever they come from."""
    configs = [read_config(folder / CONFIG_FILE) for folder in hub_folders() if folder.name == name]
    return configs[0].get(HASH_KEY) if configs else None


def check_weights(weights: Path, expected: Optional[str] = None) -> Path:
    """Hold a weights file against its SHA-256.

    Args:
        weights: A safetensors file, or a folder with model.safetensors in it.
        expected: SHA-256 in hexadecimal; that in the config.json beside the file if None. A file without a config.json
            beside it, or with one that names no hash (one that timm wrote), has nothing to be held against and passes.

    Returns:
        The file.

    Raises:
        TimmHamError: If there is no such file, or it is no safetensors file, or not the one that the hash is of.
    """
    if weights.is_dir():
        weights = weights / WEIGHTS_FILE
    if not weights.is_file():
        raise TimmHamError(f'{weights} is missing: only safetensors weights are loaded')
    if weights.suffix != '.safetensors':
        raise TimmHamError(f'{weights} is not a .safetensors file: only safetensors weights are loaded')
    config = weights.parent / CONFIG_FILE
    if expected is None and config.is_file():
        expected = read_config(config).get(HASH_KEY)
    if expected and hashlib.sha256(weights.read_bytes()).hexdigest() != expected:
        raise TimmHamError(
            f'{weights.resolve()} is not the file that its {config.name} describes (SHA-256 differs): '
            'it is truncated or altered, remove it and get it again'
        )
    return weights
