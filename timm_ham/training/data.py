"""Datasets as uint8 tensors: each image is decoded once, all that follows happens in batches on the model's device."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Literal, Optional, Sequence, Tuple

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from timm_ham.errors import TimmHamError

__all__ = ['DATASETS', 'FROM_HUB', 'DataInfo', 'OpenDataset', 'Split', 'load_splits', 'open_dataset']

# What the two parts of a dataset are called, the best name first.
SPLIT_NAMES = {'train': ('train',), 'test': ('test', 'validation', 'val', 'valid')}
SPLIT_SEED = 0  # of the held-out part, and of the test part of the digits: the same images whatever a run's seed


@dataclass(frozen=True)
class Split:
    """Decoded images of one split.

    images: uint8, (N, H, W, 3), RGB. Channels stand last, so that batches come out in channels_last.
    labels: int64, (N,).
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> 'Split':
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataInfo:
    """What a run records about its dataset; no path of a person's machine is in it.

    name: Short name: of DATASETS, else the last part of the Hub id or of the folder's path.
    source: Where it came from, in words.
    mean, std: Of each channel over the training images, pixel values scaled to [0, 1].
    sizes: Images in each split.
    """

    name: str
    source: str
    image_column: str
    label_column: str
    label_names: Tuple[str, ...]
    image_size: Tuple[int, int]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    sizes: Dict[str, int]

    @classmethod
    def from_json(cls, values: Dict[str, Any]) -> 'DataInfo':
        """The facts whose `asdict` went through JSON, which has no tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _digits() -> datasets.DatasetDict:
    """The 1797 real handwritten digits of scikit-learn, 8x8 in 17 grey levels, resized to 32x32. Needs no network."""
    digits = load_digits()
    images = [
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        for pixels in digits.images
    ]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    table = datasets.Dataset.from_dict({'image': images, 'label': digits.target.tolist()}, features=features)
    return table.train_test_split(test_size=0.2, stratify_by_column='label', seed=SPLIT_SEED)


FROM_HUB = ' on the Hugging Face Hub'  # DataInfo.source after the id of a dataset from there

# Short names: a Hub id, or a function that makes the dataset.
DATASETS = {'digits': _digits, 'cifar10': 'uoft-cs/cifar10', 'cifar100': 'uoft-cs/cifar100'}


def _open_splits(name: str) -> Tuple[str, str, datasets.DatasetDict]:
    """By short name, Hub id or local folder: DataInfo's name and source, and the splits."""
    source = DATASETS.get(name, name)
    if callable(source):
        return name, 'scikit-learn', source()
    short = Path(source).resolve().name if name not in DATASETS else name
    if name not in DATASETS and not Path(source).is_dir() and source.count('/') != 1:
        raise TimmHamError(
            f'unknown dataset {name!r}: choose from {", ".join(DATASETS)}, the id of a dataset on the Hub '
            '(owner/name), or a local folder of parquet files'
        )
    try:
        where = 'a local folder' if Path(source).is_dir() else f'{source}{FROM_HUB}'
        return short, where, datasets.load_dataset(source)
    # A RuntimeError is what datasets has for a script beside the files: it runs none.
    except (FileNotFoundError, ValueError, RuntimeError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split('\n')[0]
        raise TimmHamError(
            f'dataset {name!r} could not be opened ({reason}): check the name, the network and the files, or give '
            'another local folder of parquet files'
        ) from error


def _column(split: datasets.Dataset, wanted: Optional[str], kind: str, candidates: list) -> str:
    """The column a person named, else the first candidate; an error that lists the columns if there is none."""
    columns = ', '.join(f'{name} ({type(feature).__name__})' for name, feature in split.features.items())
    if wanted is not None:
        if wanted not in split.features:
            raise TimmHamError(f'no {kind} column {wanted!r} in the dataset: choose from {columns}')
        return wanted
    if not candidates:
        raise TimmHamError(f'no {kind} column found in the dataset: name one of {columns} with --{kind}-column')
    return candidates[0]


def _find_columns(split: datasets.Dataset, image: Optional[str], label: Optional[str]) -> Tuple[str, str]:
    """Images by the Image type, labels by the ClassLabel type, or by the usual names where the type is missing."""
    features = split.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ('label', 'fine_label', 'labels') if name in features]
    # CIFAR-100 has a fine and a coarse label: the usual name comes first among several of the type.
    labels.sort(key=lambda name: name not in usual)
    images = images or [name for name in ('image', 'img') if name in features]
    return _column(split, image, 'image', images), _column(split, label, 'label', labels or usual)


def _class_indices(train: datasets.Dataset, label_column: str) -> Tuple[Tuple[str, ...], Dict[Any, int]]:
    """Class names, and the class index of each value that the label column may hold."""
    feature = train.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {index: index for index in range(feature.num_classes)}
    values = sorted(train.unique(label_column))
    return tuple(str(value) for value in values), {value: index for index, value in enumerate(values)}


def _decode_images(split: datasets.Dataset, name: str, column: str) -> torch.Tensor:
    decoder = datasets.Image()
    images = None
    try:
        stored = split.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow's errors derive from
        raise TimmHamError(f'column {column!r} does not hold images: name another with --image-column') from error
    rows = chain.from_iterable(batch[column] for batch in stored.iter(1000))
    # None: no bar where nobody watches.
    bar = tqdm(rows, f'decoding {name}', len(split), unit=' images', unit_scale=True, leave=False, disable=None)
    for row, encoded in enumerate(bar):
        try:
            pixels = np.asarray(decoder.decode_example(encoded).convert('RGB'))
        except (AttributeError, OSError, SyntaxError, TypeError, ValueError) as error:
            raise TimmHamError(
                f'image {row} of split {name!r} can not be read ({error}): replace or remove it'
            ) from error
        if images is None:
            images = np.empty((len(split), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[1:3]
            raise TimmHamError(
                f'image {row} of split {name!r} is {width}x{height}, but the first is {first_width}x{first_height}: '
                'resize the images to one size first'
            )
        images[row] = pixels
    return torch.from_numpy(images)


def _decode_labels(split: datasets.Dataset, name: str, column: str, classes: Dict[Any, int]) -> torch.Tensor:
    values = split[column][:]
    wrong = [row for row, value in enumerate(values) if value not in classes]
    if wrong:
        raise TimmHamError(
            f'label {values[wrong[0]]!r} of row {wrong[0]} in split {name!r} is not one of the {len(classes)} classes '
            f'({len(wrong)} such rows): correct or remove them'
        )
    return torch.tensor([classes[value] for value in values])


def _channel_statistics(images: torch.Tensor) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels scaled to [0, 1], from exact histograms."""
    histogram = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]
    ).double()
    share = histogram / histogram.sum(1, keepdim=True)  # C 256
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    # A channel that never changes keeps its scale instead of being divided by nothing.
    std = (share @ values.square() - mean.square()).clamp(min=255**-2).sqrt()
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())


@dataclass(frozen=True)
class OpenDataset:
    """A dataset that is found and understood, but not decoded. Fields as in DataInfo.

    splits: As the datasets library gives them.
    classes: The class index of each value that the label column may hold.
    """

    name: str
    source: str
    image_column: str
    label_column: str
    label_names: Tuple[str, ...]
    splits: datasets.DatasetDict
    classes: Dict[Any, int]

    def decode(self, part: Literal['train', 'test'], rows: Optional[Sequence[int]] = None) -> Split:
        """Decode the images of a split to RGB, once.

        Args:
            part: Which split.
            rows: Which of its rows, in this order; all if None. Messages then number the images in this order.

        Raises:
            TimmHamError: If there is no such split or row, it is empty, an image can't be read or has another size than
                the first, or a label is not one of the classes. The message names the split and the row.
        """
        name = next((name for name in SPLIT_NAMES[part] if name in self.splits), None)
        if name is None:
            raise TimmHamError(f'dataset {self.name!r} has no {part} split, only {", ".join(self.splits)}: add one')
        if len(self.splits[name]) == 0:
            raise TimmHamError(f'split {name!r} of dataset {self.name!r} is empty')
        split = self.splits[name]
        if rows is not None:
            missing = [row for row in rows if not 0 <= row < len(split)]
            if missing:
                raise TimmHamError(f'no row {missing[0]} in split {name!r}: choose from 0 to {len(split) - 1}')
            split = split.select(rows)
        return Split(
            _decode_images(split, name, self.image_column),
            _decode_labels(split, name, self.label_column, self.classes),
        )


def open_dataset(name: str, image_column: Optional[str] = None, label_column: Optional[str] = None) -> OpenDataset:
    """Find a dataset and its columns.

    Args:
        name: Short name, Hub id or local folder.
        image_column: Column of the images, found by type if None.
        label_column: Column of the labels, found by type if None.

    Raises:
        TimmHamError: If there is no such dataset or column.
    """
    short_name, source, splits = _open_splits(name)
    described = splits.get('train', next(iter(splits.values())))
    image_column, label_column = _find_columns(described, image_column, label_column)
    label_names, classes = _class_indices(described, label_column)
    return OpenDataset(short_name, source, image_column, label_column, label_names, splits, classes)


def load_splits(
    name: str, holdout: float = 0.0, image_column: Optional[str] = None, label_column: Optional[str] = None
) -> Tuple[DataInfo, Dict[str, Split]]:
    """Open a dataset and decode all of it.

    Args:
        name: As for `open_dataset`, like the columns.
        holdout: Share of the training split to hold out, stratified by class, 0 <= holdout < 1.
        image_column: Column of the images.
        label_column: Column of the labels.

    Returns:
        The facts about it, and its splits 'train', 'holdout' (only if holdout > 0) and 'test'.

    Raises:
        TimmHamError: If there is no such dataset, column, split, or something in it can't be used.
    """
    if not 0 <= holdout < 1:
        raise TimmHamError(f'holdout is {holdout}, but must be at least 0 and less than 1')
    opened = open_dataset(name, image_column, label_column)
    train, test = opened.decode('train'), opened.decode('test')
    decoded = {'train': train, 'test': test}
    if holdout > 0:
        train, held_out = _hold_out(train, holdout)
        decoded = {'train': train, 'holdout': held_out, 'test': test}
    mean, std = _channel_statistics(train.images)
    info = DataInfo(
        name=opened.name,
        source=opened.source,
        image_column=opened.image_column,
        label_column=opened.label_column,
        label_names=opened.label_names,
        image_size=tuple(train.images.shape[1:3]),
        mean=mean,
        std=std,
        sizes={part: len(split) for part, split in decoded.items()},
    )
    return info, decoded


def _hold_out(train: Split, share: float) -> Tuple[Split, Split]:
    """Split off a share of each class, the same images every time."""
    try:
        kept, held = train_test_split(
            np.arange(len(train)), test_size=share, stratify=train.labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise TimmHamError(
            f'can not hold out {share} of {len(train)} training images ({error}): change holdout'
        ) from error
    return tuple(Split(train.images[part], train.labels[part]) for part in (np.sort(kept), np.sort(held)))
