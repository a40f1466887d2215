"""Decoded splits in a file that is made once and mapped into memory: any number of processes share one copy of it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Dict, Optional, Tuple

import datasets
import safetensors.torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from timm_ham import __version__
from timm_ham.training.data import DataInfo, Split, load_splits, open_dataset
from timm_ham.training.run import write_file

__all__ = ['cached_splits']

Loaded = Tuple[DataInfo, Dict[str, Split]]


def cached_splits(
    name: str, holdout: float = 0.0, image_column: Optional[str] = None, label_column: Optional[str] = None
) -> Loaded:
    """`load_splits`, from the cache of the datasets library where that has been done before with the same data.

    The images are pages of one file, which the machine has in memory once. On each machine the first process makes the
    file, the others wait for it. Without room for the file each process decodes for itself.
    """
    arguments = name, holdout, image_column, label_column
    opened = open_dataset(name, image_column, label_column)
    if not all(split.cache_files for split in opened.splits.values()):  # made in memory, as the digits are
        return load_splits(*arguments)
    # The library's fingerprint changes with the files that a dataset is made of.
    known_by = [__version__, holdout, opened.name, opened.source, opened.image_column, opened.label_column]
    known_by += [(part, split._fingerprint) for part, split in opened.splits.items()]
    key = hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:16]
    file = Path(datasets.config.HF_DATASETS_CACHE, 'timm_ham', f'{key}.safetensors')
    with PartialState().local_main_process_first():
        loaded = _read(file)
        if loaded is None:
            loaded = load_splits(*arguments)
            loaded = _write(file, loaded) or loaded
    return loaded


def _write(file: Path, loaded: Loaded) -> Optional[Loaded]:
    """Write, and read it back as the mapping it will be; None if the disk does not take it."""
    info, splits = loaded
    tensors = {f'{part}.{field}': value for part, split in splits.items() for field, value in vars(split).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, safetensors.torch.save(tensors, {'info': json.dumps(asdict(info))}))
    except OSError:
        return None
    return _read(file)


def _read(file: Path) -> Optional[Loaded]:
    """Map the file; None if it is not there, or not whole."""
    try:
        with safe_open(file, 'pt') as opened:
            info = DataInfo.from_json(json.loads(opened.metadata()['info']))
            parts = {
                part: Split(opened.get_tensor(f'{part}.images'), opened.get_tensor(f'{part}.labels'))
                for part in info.sizes
            }
    except (OSError, SafetensorError):
        return None
    return info, parts
