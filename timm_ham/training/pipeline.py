"""Images of any size, opened and transformed by workers as they are needed, to batches like those of memory."""

import random
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

from timm_ham.errors import TimmHamError
from timm_ham.training.batches import cutout, normalize
from timm_ham.training.data import Unusable
from timm_ham.training.recipes import Recipe
from timm_ham.training.sources import Part, UnreadableImage, read_image

__all__ = [
    'Loading',
    'PartBatches',
    'StreamBatches',
    'StreamImages',
    'drawn_from',
    'eval_transform',
    'part_batches',
    'stream_batches',
    'train_transform',
]

Batch = Tuple[torch.Tensor, torch.Tensor]


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from, Python's, numpy's and torch's, and put them back afterwards."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def eval_transform(size: Tuple[int, int], **kwargs) -> Callable[[Image.Image], torch.Tensor]:
    """timm's eval transform up to the pixels, uint8 (3, H, W): the shorter side resized, the center cropped."""
    return create_transform(size, **{**dict(crop_pct=1.0, interpolation='bicubic'), **kwargs}, use_prefetcher=True)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, but for the 0 bits that its strongest magnitude asks for: Pillow refuses them since version 13."""
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


def train_transform(recipe: Recipe, size: Tuple[int, int], mean: Tuple[float, ...]) -> transforms.Compose:
    """The recipe's augmentation of a single image, on timm's transforms: PIL to pixels, uint8 (3, H, W).

    Random resized crop if `crop_scale` is below 1, else as in `eval_transform` with a padded random crop; then the flip
    and the automatic augmentation.
    """
    crop_and_flip, colours, pixels = create_transform(
        size,
        is_training=True,
        scale=(recipe.crop_scale, 1.0),
        hflip=0.5 if recipe.flip else 0.0,
        color_jitter=None,
        auto_augment=recipe.auto_augment,
        interpolation='bicubic',
        mean=mean,
        use_prefetcher=True,
        separate=True,
    )
    for augment in colours.transforms:
        for op in [*getattr(augment, 'ops', []), *chain(*getattr(augment, 'policy', []))]:
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize
    if recipe.crop_scale == 1:
        whole = eval_transform(size).transforms[:-1]
        crop_and_flip = [*whole, transforms.RandomCrop(size, recipe.crop_padding), *crop_and_flip.transforms[1:]]
    else:
        crop_and_flip = crop_and_flip.transforms
    return transforms.Compose([*crop_and_flip, *colours.transforms, *pixels.transforms])


@dataclass(frozen=True)
class Loading:
    """How batches are made, the same for all parts.

    mean, std: For `normalize`.
    batch_size: Over all processes.
    workers: Processes that open images.
    device: Where batches are wanted.
    bad_images: What to do about images that can't be used.
    """

    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    batch_size: int
    workers: int
    device: torch.device
    unusable: Unusable
    rank: int = 0
    processes: int = 1

    def loader(self, images: Union[Dataset, IterableDataset], **kwargs) -> DataLoader:
        """torch's DataLoader of (pixels, label) pairs."""
        return DataLoader(
            images,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == 'cuda',
            generator=torch.Generator(),  # workers' seeds, which nothing here uses, leave the global one alone
            **kwargs,
        )

    def normalized(self, pixels: torch.Tensor, labels: torch.Tensor) -> Batch:
        """A batch of pixels (B, H, W, C) on the device, normalized."""
        pixels, labels = (tensor.to(self.device, non_blocking=True) for tensor in (pixels, labels))
        return normalize(pixels, self.mean, self.std), labels


def collate(items: List[Union[str, Tuple[torch.Tensor, int]]]) -> Tuple[Optional[Batch], List[str]]:
    """Pixels, uint8 (B, H, W, C), and labels of the usable images, and what is wrong with the others."""
    usable = [item for item in items if not isinstance(item, str)]
    problems = [item for item in items if isinstance(item, str)]
    if not usable:
        return None, problems
    pixels, labels = zip(*usable)
    return (torch.stack(pixels).permute(0, 2, 3, 1).contiguous(), torch.tensor(labels)), problems


def filled(batch: Optional[Batch], count: int, problems: List[str]) -> Batch:
    """Images of the batch once more in the place of those that are missing, so that all steps have the same size."""
    if batch is None:
        raise TimmHamError(f'a whole batch of images can not be used ({problems[0]}): look at the dataset')
    chosen = torch.arange(count) % len(batch[1])
    return batch[0][chosen], batch[1][chosen]


class PartImages(Dataset):
    """The images of a part by (index, seed): transformed pixels and label, or what is wrong."""

    def __init__(self, part: Part, transform: Callable[[Image.Image], torch.Tensor]):
        self.part, self.transform = part, transform

    def __getitem__(self, key: Tuple[int, int]) -> Union[str, Tuple[torch.Tensor, int]]:
        index, seed = key
        try:
            image = self.part.open(index)
        except UnreadableImage as error:
            return str(error)
        with drawn_from(seed):
            return self.transform(image), int(self.part.labels[index])


class PartBatches:
    """The training batches of each epoch, as TrainBatches yields them, the same for any number of workers.

    Args:
        part: The images.
        transform: Their augmentation.
        loading: How batches are made.
        seed: Of order and augmentation.
        cutout_size: As in Recipe.
    """

    def __init__(self, part: Part, transform: Callable, loading: Loading, seed: int = 0, cutout_size: int = 0):
        self.part, self.loading, self.seed, self.cutout_size = part, loading, seed, cutout_size
        self.batch_size = min(loading.batch_size, len(part))
        self._keys: List[List[Tuple[int, int]]] = []  # of the epoch, filled in before each: workers live on
        self._loader = loading.loader(
            PartImages(part, transform), batch_sampler=self._keys, persistent_workers=loading.workers > 0
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.part) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields images, float32 (b, C, H, W) in channels_last memory format, and labels, int64 (b,).

        Args:
            epoch: Number of the epoch.
            first: Batches to leave out at the beginning.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.part), generator=generator)
        seeds = torch.randint(2**31, (len(order),), generator=generator)
        places = torch.rand(len(order), 2, generator=generator)
        batches = [
            slice(step * self.batch_size + self.loading.rank, (step + 1) * self.batch_size, self.loading.processes)
            for step in range(first, len(self))
        ]
        self._keys[:] = [list(zip(order[batch].tolist(), seeds[batch].tolist())) for batch in batches]
        for chosen, (batch, problems) in zip(batches, self._loader):
            self.loading.unusable.report(problems)
            images, labels = self.loading.normalized(*filled(batch, len(order[chosen]), problems))
            if self.cutout_size:
                centers = (places[chosen] * torch.tensor(images.shape[2:])).long()
                images = cutout(images, centers.to(images.device), self.cutout_size)
            yield images, labels


def part_batches(part: Part, transform: Callable, loading: Loading) -> Iterator[Batch]:
    """This process's part of the images, each exactly once, not augmented; unusable ones are left out."""
    indices = range(loading.rank, len(part), loading.processes)
    size = max(1, loading.batch_size // loading.processes)
    keys = [[(index, 0) for index in indices[start : start + size]] for start in range(0, len(indices), size)]
    return _usable(loading.loader(PartImages(part, transform), batch_sampler=keys), loading)


def _usable(loader: DataLoader, loading: Loading) -> Iterator[Batch]:
    for batch, problems in loader:
        loading.unusable.report(problems)
        if batch is not None:
            yield loading.normalized(*batch)


class StreamImages(IterableDataset):
    """The images of a stream, each worker its share: transformed pixels and label, or what is wrong.

    Args:
        rows: Columns of encoded images and of labels.
        columns: Their names.
        classes: Class index of each label.
        transform: PIL to pixels.
        seed: Of the transform.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: Tuple[str, str],
        classes: Dict[Any, int],
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int = 0,
    ):
        self.rows, self.columns, self.classes, self.transform, self.seed = rows, columns, classes, transform, seed
        self.skipped = 0  # images that each worker passes over

    def __iter__(self) -> Iterator[Union[str, Tuple[torch.Tensor, int]]]:
        worker = get_worker_info().id if get_worker_info() else 0
        for number, row in enumerate(self.rows):
            if number >= self.skipped:
                (seed,) = np.random.SeedSequence([self.seed, worker, number]).generate_state(1)
                yield self._item(row, f'image {number} of worker {worker}', int(seed))

    def _item(self, row: Dict[str, Any], name: str, seed: int) -> Union[str, Tuple[torch.Tensor, int]]:
        image_column, label_column = self.columns
        label = self.classes.get(row[label_column])
        if label is None:
            return f'{name}: label {row[label_column]!r} is not one of the {len(self.classes)} classes'
        try:
            image = read_image(row[image_column], name)
        except UnreadableImage as error:
            return str(error)
        with drawn_from(seed):
            return self.transform(image), label


class StreamBatches:
    """Training batches of a stream without an end, `steps` to an epoch; the next epoch goes on where one ended.

    The order is the same for a seed and a number of workers and processes.

    Args:
        images: This process's share of an endless, shuffled stream.
        loading: How batches are made.
        steps: Batches in an epoch.
    """

    def __init__(self, images: StreamImages, loading: Loading, steps: int):
        self.images, self.loading, self.steps = images, loading, steps
        self.batch_size = loading.batch_size
        self._live: Optional[Iterator] = None
        self._next = 0  # the step that the live iterator has come to

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps

    def _start(self, step: int) -> Iterator:
        """The stream from a step on: workers pass over whole rounds of theirs, the rest of a round is drawn here."""
        share = self.batch_size // self.loading.processes
        rounds, rest = divmod(step, max(1, self.loading.workers))
        self.images.skipped = rounds * share
        return islice(self.loading.loader(self.images, batch_size=share), rest, None)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Takes and yields as PartBatches does."""
        if self._live is None or self._next != epoch * self.steps + first:
            self._next = epoch * self.steps + first
            self._live = self._start(self._next)
        for batch, problems in islice(self._live, self.steps - first):
            self._next += 1
            self.loading.unusable.report(problems)
            yield self.loading.normalized(*filled(batch, self.batch_size // self.loading.processes, problems))


def stream_batches(images: StreamImages, loading: Loading) -> Iterator[Batch]:
    """This process's part of a stream that ends, each image once, not augmented; unusable ones are left out."""
    return _usable(loading.loader(images, batch_size=max(1, loading.batch_size // loading.processes)), loading)
