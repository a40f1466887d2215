"""Decoded splits in a file that is made once and mapped into memory: any number of processes share one copy of it."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Dict, List, Literal, Optional, Tuple

import datasets
import safetensors.torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from timm_ham import __version__
from timm_ham.training.data import DataInfo, Split, decode_parts
from timm_ham.training.pipeline import eval_transform
from timm_ham.training.run import write_file
from timm_ham.training.sources import OpenDataset, Part

__all__ = ['cached_parts']

Loaded = Tuple[DataInfo, Dict[str, Split]]


def cached_parts(
    opened: OpenDataset,
    parts: Dict[str, Part],
    bad_images: Literal['stop', 'skip'] = 'stop',
    size: Optional[Tuple[int, int]] = None,
) -> Loaded:
    """`decode_parts`, from the cache of the datasets library where that has been done before with the same data.

    The images are pages of one file, which the machine has in memory once. On each machine the first process makes the
    file, the others wait for it. Without room for the file, and where images are left out, of which each run has to
    warn, each process decodes for itself.

    Args:
        opened: The dataset.
        parts: Parts of it.
        bad_images: As for `decode`.
        size: Height and width to bring images to; their own if None.
    """
    resize = eval_transform(size) if size else None
    if not all(split.cache_files for split in opened.splits.values()):  # made in memory, as the digits are
        return decode_parts(opened, parts, bad_images, resize)
    known_by = [__version__, size, opened.name, opened.source, opened.image_column, opened.label_column]
    known_by += [opened.label_names, {name: _fingerprint(part) for name, part in parts.items()}]
    key = hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:16]
    file = Path(datasets.config.HF_DATASETS_CACHE, 'timm_ham', f'{key}.safetensors')
    with PartialState().local_main_process_first():
        loaded = _read(file)
        if loaded is None:
            loaded = decode_parts(opened, parts, bad_images, resize)
            if loaded[0].sizes == {name: len(part) for name, part in parts.items()}:
                loaded = _write(file, loaded) or loaded
    return loaded


def _fingerprint(part: Part) -> List[str]:
    """What changes with the images of a part, and with their labels."""
    digest = hashlib.sha256(part.rows.tobytes() + part.labels.numpy().tobytes())
    (column,) = part.images.column_names
    if (part.images[0][column] or {}).get('bytes') is None:  # files of their own, which the library does not look at
        for encoded in part.images[column]:
            try:
                found = os.stat(encoded['path'])
            except (OSError, TypeError):  # reported where it is read
                continue
            digest.update(f'{encoded["path"]} {found.st_size} {found.st_mtime_ns}'.encode())
    return [part.images._fingerprint, digest.hexdigest()]  # the library's own is that of the dataset's files


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
