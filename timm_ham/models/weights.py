"""Pretrained weights: the folders `hub/<model>.<tag>/`, read into timm's pretrained cfgs.

A folder holds `config.json` in timm's format and `model.safetensors`. Nothing else registers weights: putting a folder
there is enough, taking it away is too.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Dict, Iterator, Mapping

from timm.models import PretrainedCfg

from timm_ham.errors import TimmHamError

__all__ = ['CONFIG_FILE', 'HASH_KEY', 'WEIGHTS_FILE', 'bundled_cfgs', 'check_weights', 'hub_folders']

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
HASH_KEY = 'weights_sha256'  # in config.json, beside timm's own keys

_PACKAGE = Path(__file__).resolve().parents[1]


def hub_folders() -> Iterator[Path]:
    """The folders of weights, those inside the package (an installed wheel) before those of a checkout."""
    roots = [_PACKAGE / 'hub']
    if (_PACKAGE.parent / 'pyproject.toml').is_file():
        roots.append(_PACKAGE.parent / 'hub')
    for root in roots:
        yield from sorted(config.parent for config in root.glob(f'*/{CONFIG_FILE}'))


def read_folder(folder: Path) -> PretrainedCfg:
    """The pretrained cfg of one folder, pointing to its weights if they are there.

    Raises:
        ValueError: If config.json is no such config, or of another architecture than the folder's name says.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
    architecture, _, tag = folder.name.partition('.')
    if config['architecture'] != architecture or not tag:
        raise ValueError(f"the folder's name is not {config['architecture']}.<tag>")
    weights = folder / WEIGHTS_FILE
    values = dict(
        config['pretrained_cfg'],
        num_classes=config['num_classes'],
        label_names=config.get('label_names'),
        tag=tag,
        file=str(weights) if weights.is_file() else None,
    )
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


def check_weights(weights: Path) -> None:
    """Hold a weights file against the SHA-256 in the config.json beside it.

    Args:
        weights: A safetensors file, or a folder with model.safetensors in it. A file without a config.json beside it,
            or with one that names no hash (one that timm wrote), has nothing to be held against and passes.

    Raises:
        TimmHamError: If a folder has no model.safetensors, or the file is not the one that config.json was written for.
    """
    if weights.is_dir():
        weights = weights / WEIGHTS_FILE
        if not weights.is_file():
            raise TimmHamError(f'{weights} is missing: only safetensors weights are loaded')
    config = weights.parent / CONFIG_FILE
    if not config.is_file() or not weights.is_file():
        return
    expected = json.loads(config.read_text(encoding='utf-8')).get(HASH_KEY)
    if expected and hashlib.sha256(weights.read_bytes()).hexdigest() != expected:
        raise TimmHamError(
            f'{weights} is not the file that {config.name} beside it describes (SHA-256 differs): '
            'it is truncated or altered, get it again'
        )
