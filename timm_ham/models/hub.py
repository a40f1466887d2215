"""Weights for `pretrained=True`, from a file or the Hugging Face Hub: safetensors alone, held against their SHA-256.

timm picks what to load by itself, pickles among it. So the entry points of this package settle on a file first, check
it, and hand timm nothing but that file.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from timm_ham.errors import TimmHamError
from timm_ham.models.weights import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    check_architecture,
    check_weights,
    registered_hash,
)

__all__ = ['checked_weights', 'download', 'hub_errors', 'with_checked_weights']

# By HTTP status.
ADVICE = {
    401: 'it does not exist, or no valid token was given: check the name, or log in by hf auth login',
    403: 'the token may not do that: take one with write access, https://huggingface.co/settings/tokens',
    404: 'there is no such repository, revision or file: check the name (only safetensors weights are loaded)',
}


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a TimmHamError of one line that names `where`."""
    try:
        yield
    except TimmHamError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # a RuntimeError is what a failed upload ends in
        told = error.__cause__ if isinstance(error, RuntimeError) else error
        status = told.response.status_code if isinstance(told, HfHubHTTPError) else None
        advice = ADVICE.get(status) or ' '.join(str(error).split())
        raise TimmHamError(f'{where}: {advice}') from error


def download(
    hub_id: str, filename: str, cache_dir: Union[str, Path, None] = None, max_bytes: Optional[int] = None
) -> Path:
    """A file of a model repository, from the cache if it is there.

    Args:
        hub_id: `<owner>/<name>` or `<owner>/<name>@<revision>`.
        filename: Path in the repository.
        cache_dir: huggingface_hub's own if None.
        max_bytes: Do not begin to download more than that.

    Raises:
        TimmHamError: If it can't be had.
    """
    repo_id, _, revision = hub_id.partition('@')
    where = dict(revision=revision or None, cache_dir=cache_dir)
    with hub_errors(f'hf-hub:{hub_id}/{filename}'):
        if max_bytes is not None:
            size = hf_hub_download(repo_id, filename, **where, dry_run=True).file_size
            if size is not None and size > max_bytes:
                raise TimmHamError(f'hf-hub:{hub_id}/{filename} has {size:,} bytes: it is not what its name says')
        return Path(hf_hub_download(repo_id, filename, **where))


def _hub_weights(hub_id: str, expected: Optional[str], cache_dir: Union[str, Path, None]) -> Path:
    config = download(hub_id, CONFIG_FILE, cache_dir, MAX_CONFIG_BYTES)
    # Both of the commit that the folder in the cache is called after, should a branch move in between.
    weights = download(f'{hub_id.partition("@")[0]}@{config.parent.name}', WEIGHTS_FILE, cache_dir)
    return check_weights(weights, expected)


def checked_weights(model: str, cfg: PretrainedCfg, cache_dir: Union[str, Path, None] = None) -> Optional[Path]:
    """The safetensors file that a pretrained cfg stands for, downloaded if need be and held against its SHA-256.

    Args:
        model: Registered name.
        cfg: Where the weights are, as timm has made it of a registered name, a folder or a Hub id.
        cache_dir: For what is downloaded; huggingface_hub's own if None.

    Returns:
        The file; None if the cfg holds the tensors themselves, or no weights at all.

    Raises:
        TimmHamError: If the weights can't be had, are not those described, of another model, or no safetensors.
    """
    if cfg.source == 'hf-hub':
        check_architecture(model, cfg.hf_hub_id.partition('@')[0].rpartition('/')[2])
        return _hub_weights(cfg.hf_hub_id, None, cache_dir)
    if cfg.source == 'local-dir':
        check_architecture(model, Path(cfg.file).resolve().name)
        return check_weights(Path(cfg.file))
    if cfg.state_dict:
        return None
    if cfg.file:
        return check_weights(Path(cfg.file))
    if cfg.hf_hub_id:
        return _hub_weights(cfg.hf_hub_id, registered_hash(f'{model}.{cfg.tag}'), cache_dir)
    if cfg.url:
        raise TimmHamError(f'{cfg.url} is not loaded: download it as safetensors and name it as file')
    return None


def with_checked_weights(model: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The keywords of timm's `build_model_with_cfg` for pretrained weights, bound to the file of `checked_weights`."""
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(model, kwargs.get('pretrained_cfg'), overlay)
    file = checked_weights(model, cfg, kwargs.get('cache_dir'))
    if file is None:
        return kwargs
    # `source` and `state_dict` would come before the file.
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': str(file), 'source': None, 'state_dict': None}}
