"""Datasets found and understood, but not decoded: which files, which columns, which classes, which part is the test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Literal, Optional, Sequence, Tuple, Union

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from timm_ham.errors import TimmHamError

__all__ = ['DATASETS', 'FROM_HUB', 'OpenDataset', 'Part', 'UnreadableImage', 'open_dataset', 'read_image']

# What the parts of a dataset are called, the best name first.
SPLIT_NAMES = {
    'train': ('train',),
    'holdout': ('validation', 'val', 'valid', 'dev'),
    'test': ('test',),
}
SPLIT_SEED = 0  # of parts that are split off: the same images whatever a run's seed
TEST_SHARE = 0.2  # of the training images, where nobody has set a test part aside


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
DATASETS = {'digits': _digits, 'cifar10': 'uoft-cs/cifar10', 'cifar100': 'uoft-cs/cifar100', 'stl10': 'tanganke/stl10'}
KINDS = (
    'the id of a dataset on the Hub (owner/name), a local folder of images (<class>/*.jpg, or train/<class>/*.jpg with '
    'or without val/ and test/) or of parquet files, or a .csv file with the columns file_name and label'
)


class UnreadableImage(Exception):
    """An image that can't be opened; the message names it and the reason."""


def read_image(encoded: Optional[Dict[str, Any]], name: str) -> Image.Image:
    """An image as the datasets library stores it, upright, in RGB.

    Args:
        encoded: Its bytes, or the path to them.
        name: What it is called in the message where it has no path.

    Raises:
        UnreadableImage: If it is none, or damaged.
    """
    try:
        return datasets.Image().decode_example(encoded).convert('RGB')
    except (AttributeError, OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        path = encoded.get('path') if isinstance(encoded, dict) else None
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose text is the path, or an address in memory
            reason = 'no image that Pillow reads'
        raise UnreadableImage(f'{path or name}: {reason}') from error


@dataclass(frozen=True)
class Part:
    """Some images of a split, still encoded, and their classes.

    split: Name of the split, for messages.
    images: The split with the column of images alone, not decoded.
    rows: int64 array (N,), the rows of it.
    labels: int64 tensor (N,), class indices.
    """

    split: str
    images: datasets.Dataset
    rows: np.ndarray
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int]) -> 'Part':
        """The images at these places, in this order; a TimmHamError if there is no such place."""
        chosen = np.asarray(chosen, dtype=np.int64)
        missing = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(missing):
            raise TimmHamError(f'no row {missing[0]} in split {self.split!r}: choose from 0 to {len(self) - 1}')
        return Part(self.split, self.images, self.rows[chosen], self.labels[chosen])

    def divide(self, share: float) -> Tuple['Part', 'Part']:
        """Split off a share of each class, the same images every time: the rest, and the share."""
        try:
            kept, taken = train_test_split(
                np.arange(len(self)), test_size=share, stratify=self.labels.numpy(), random_state=SPLIT_SEED
            )
        except ValueError as error:
            raise TimmHamError(
                f'can not split off {share} of {len(self)} training images ({error}): change holdout or test_share'
            ) from error
        return self.take(np.sort(kept)), self.take(np.sort(taken))

    def name(self, index: int) -> str:
        """What an image is called that has no path."""
        return f'row {self.rows[index]} of split {self.split!r}'

    def open(self, index: int) -> Image.Image:
        """An image in RGB, as `read_image`."""
        (encoded,) = self.images[int(self.rows[index])].values()
        return read_image(encoded, self.name(index))


def _open_csv(file: Path) -> datasets.DatasetDict:
    """Images beside a table whose column file_name has their paths from there."""
    table = datasets.load_dataset('csv', data_files=str(file), split='train')
    if 'file_name' not in table.column_names:
        raise TimmHamError(
            f'{file.name} has no column file_name with the paths of images, only {", ".join(table.column_names)}: '
            'rename the column'
        )
    paths = [None if name is None else str(file.parent / name) for name in table['file_name']]
    images = datasets.Dataset.from_dict({'image': paths}).cast_column('image', datasets.Image())
    others = table.remove_columns([name for name in ('file_name', 'image') if name in table.column_names])
    return datasets.DatasetDict(train=datasets.concatenate_datasets([images, others], axis=1))


def _open_splits(
    name: str, config: Optional[str], revision: Optional[str], streaming: bool
) -> Tuple[str, str, Union[datasets.DatasetDict, datasets.IterableDatasetDict]]:
    """By short name, Hub id or path: DataInfo's name and source, and the splits."""
    source = DATASETS.get(name, name)
    local = callable(source) or (name not in DATASETS and Path(source).exists())
    if revision is not None and local:
        raise TimmHamError(f'dataset {name!r} is on this machine and has no revisions: leave the revision out')
    is_csv = local and not callable(source) and Path(source).suffix.lower() == '.csv'
    if (config is not None or streaming) and (callable(source) or is_csv):
        raise TimmHamError(f'dataset {name!r} has no configs and is not streamed: leave both options out')
    if callable(source):
        return name, 'scikit-learn', source()
    short = Path(source).resolve().name if name not in DATASETS else name
    if not local and source.count('/') != 1:
        raise TimmHamError(f'unknown dataset {name!r}: choose from {", ".join(DATASETS)}, {KINDS}')
    try:
        if is_csv:
            return Path(short).stem, 'a local table', _open_csv(Path(source))
        where = 'a local folder' if local else f'{source}{FROM_HUB}'
        return short, where, datasets.load_dataset(source, config, revision=revision, streaming=streaming)
    except TimmHamError:
        raise
    # A RuntimeError is what datasets has for a script beside the files: it runs none.
    except (FileNotFoundError, ValueError, RuntimeError, ConnectionError, DatasetsError) as error:
        reason = str(error).strip().split('\n')[0]
        raise TimmHamError(
            f'dataset {name!r} could not be opened ({reason}): check the name, the network and the files, or give '
            'another local folder of images or parquet files'
        ) from error


def _column(features: datasets.Features, wanted: Optional[str], kind: str, candidates: list) -> str:
    """The column a person named, else the first candidate; an error that lists the columns if there is none."""
    columns = ', '.join(f'{name} ({type(feature).__name__})' for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise TimmHamError(f'no {kind} column {wanted!r} in the dataset: choose from {columns}')
        return wanted
    if not candidates:
        raise TimmHamError(f'no {kind} column found in the dataset: name one of {columns} with --{kind}-column')
    return candidates[0]


def _find_columns(features: datasets.Features, image: Optional[str], label: Optional[str]) -> Tuple[str, str]:
    """Images by the Image type, labels by the ClassLabel type, or by the usual names where the type is missing.

    A single column beside the images is that of the labels, whatever its name.
    """
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ('label', 'fine_label', 'labels') if name in features]
    # CIFAR-100 has a fine and a coarse label: the usual name comes first among several of the type.
    labels.sort(key=lambda name: name not in usual)
    images = images or [name for name in ('image', 'img') if name in features]
    image = _column(features, image, 'image', images)
    others = [name for name in features if name != image]
    return image, _column(features, label, 'label', labels or usual or (others if len(others) == 1 else []))


def _class_indices(
    train: Union[datasets.Dataset, datasets.IterableDataset], label_column: str
) -> Tuple[Tuple[str, ...], Dict[Any, int]]:
    """Class names, and the class index of each value that the label column may hold."""
    feature = train.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {index: index for index in range(feature.num_classes)}
    if isinstance(train, datasets.IterableDataset):
        raise TimmHamError(
            f'column {label_column!r} does not list its classes (ClassLabel), which streaming needs: '
            'name another with --label-column, or leave streaming out'
        )
    try:
        values = sorted(value for value in train.unique(label_column) if value is not None)
    except (TypeError, NotImplementedError) as error:
        raise TimmHamError(f'column {label_column!r} does not hold labels: name another with --label-column') from error
    return tuple(str(value) for value in values), {value: index for index, value in enumerate(values)}


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
    splits: Union[datasets.DatasetDict, datasets.IterableDatasetDict]
    classes: Dict[Any, int]

    def find(self, part: str) -> Optional[str]:
        """The name of the split that is this part, if there is one."""
        return next((name for name in SPLIT_NAMES[part] if name in self.splits), None)

    def _part(self, name: str) -> Part:
        table = self.splits[name]
        if len(table) == 0:
            raise TimmHamError(f'split {name!r} of dataset {self.name!r} is empty')
        column = self.image_column
        try:
            images = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow's errors derive from
            raise TimmHamError(f'column {column!r} does not hold images: name another with --image-column') from error
        values = table[self.label_column][:]
        wrong = [row for row, value in enumerate(values) if value not in self.classes]
        if wrong:
            raise TimmHamError(
                f'label {values[wrong[0]]!r} of row {wrong[0]} in split {name!r} is not one of the {len(self.classes)} '
                f'classes ({len(wrong)} such rows): correct or remove them'
            )
        return Part(name, images, np.arange(len(values)), torch.tensor([self.classes[value] for value in values]))

    def _whole(self) -> Part:
        parts = [self._part(name) for name in map(self.find, SPLIT_NAMES) if name]
        return Part(
            '+'.join(part.split for part in parts),
            datasets.concatenate_datasets([part.images for part in parts]),
            np.arange(sum(map(len, parts))),
            torch.cat([part.labels for part in parts]),
        )

    def parts(self, holdout: float = 0.0, test_share: float = 0.0) -> Dict[str, Part]:
        """The parts 'train', 'holdout' (if there is one) and 'test'.

        The test part is the split of that name, else the validation split, else a fifth of the training images. The
        held-out part is a validation split beside a test split, else a share of the training images. What is split off
        is stratified by class, and the same for any seed.

        Args:
            holdout: Share of the training images to hold out, 0 <= holdout < 1.
            test_share: If not 0, all labelled images are put together and this share of them is the test part.

        Raises:
            TimmHamError: If there is no training split, a split is empty, or a label is not one of the classes.
        """
        for name, share in dict(holdout=holdout, test_share=test_share).items():
            if not 0 <= share < 1:
                raise TimmHamError(f'{name} is {share}, but must be at least 0 and less than 1')
        self._check_train()
        validation, test = self.find('holdout'), self.find('test') or self.find('holdout')
        if test_share > 0:
            train, tested = self._whole().divide(test_share)
            validation = None
        elif test is None:
            train, tested = self._part(self.find('train')).divide(TEST_SHARE)
        else:
            train, tested = self._part(self.find('train')), self._part(test)
        if validation not in (None, test):
            return {'train': train, 'holdout': self._part(validation), 'test': tested}
        if holdout > 0:
            train, held_out = train.divide(holdout)
            return {'train': train, 'holdout': held_out, 'test': tested}
        return {'train': train, 'test': tested}

    def part(self, part: Literal['train', 'test'], test_share: float = 0.0) -> Part:
        """One part of `parts`; a test split needs no training split beside it."""
        name = self.find('test') or self.find('holdout')
        if part == 'test' and name and not test_share:
            return self._part(name)
        return self.parts(test_share=test_share)[part]

    def streams(self) -> Dict[str, datasets.IterableDataset]:
        """The parts as `parts` finds them, of a dataset opened for streaming; there must be a test split.

        Raises:
            TimmHamError: If a split is missing.
        """
        self._check_train()
        names = {part: self.find(part) for part in SPLIT_NAMES}
        if names['test'] is None:
            names.update(holdout=None, test=names['holdout'])
        if names['test'] is None:
            raise TimmHamError(f'dataset {self.name!r} has no test split, which streaming needs: add one')
        raw = datasets.Image(decode=False)
        columns = [self.image_column, self.label_column]
        return {
            part: self.splits[name].select_columns(columns).cast_column(self.image_column, raw)
            for part, name in names.items()
            if name
        }

    def _check_train(self) -> None:
        if self.find('train') is None:
            raise TimmHamError(f'dataset {self.name!r} has no train split, only {", ".join(self.splits)}: add one')


def open_dataset(
    name: str,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
    config: Optional[str] = None,
    revision: Optional[str] = None,
    streaming: bool = False,
) -> OpenDataset:
    """Find a dataset and its columns.

    Args:
        name: Short name, Hub id, local folder of images or parquet files, or a CSV file beside images.
        image_column: Column of the images, found by type if None.
        label_column: Column of the labels, found by type if None.
        config: Config (subset) of a dataset that has several.
        revision: Branch, tag or commit of a dataset on the Hub.
        streaming: Read it while it is used, rather than to the disk first.

    Raises:
        TimmHamError: If there is no such dataset or column.
    """
    short_name, source, splits = _open_splits(name, config, revision, streaming)
    described = splits.get('train', next(iter(splits.values())))
    if described.features is None:
        raise TimmHamError(f'dataset {name!r} does not say what its columns hold: leave streaming out')
    image_column, label_column = _find_columns(described.features, image_column, label_column)
    label_names, classes = _class_indices(described, label_column)
    return OpenDataset(short_name, source, image_column, label_column, label_names, splits, classes)
