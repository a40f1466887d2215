"""Datasets as uint8 tensors: each image is decoded once, all that follows happens in batches on the model's device."""

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any, Callable, Dict, Literal, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from timm_ham.errors import TimmHamError
from timm_ham.training.sources import OpenDataset, Part, UnreadableImage, read_image

__all__ = ['DataInfo', 'Split', 'Unusable', 'data_info', 'decode', 'decode_parts']


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

    name: Short name: of DATASETS, else the last part of the Hub id or of the path.
    source: Where it came from, in words.
    image_size: Height and width of what the model is given.
    mean, std: Of each channel, pixel values scaled to [0, 1]: what the images are normalized by.
    sizes: Images in each split, as far as they are known; of a stream, those of an epoch for training.
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


def data_info(
    opened: OpenDataset,
    image_size: Tuple[int, int],
    mean: Tuple[float, ...],
    std: Tuple[float, ...],
    sizes: Dict[str, int],
) -> DataInfo:
    """The facts about an open dataset, and how its images are given to the model."""
    return DataInfo(
        name=opened.name,
        source=opened.source,
        image_column=opened.image_column,
        label_column=opened.label_column,
        label_names=opened.label_names,
        image_size=tuple(image_size),
        mean=tuple(mean),
        std=tuple(std),
        sizes=sizes,
    )


class Unusable:
    """Counts images that can't be used.

    Args:
        policy: What to do about them: 'stop', or 'skip' with a warning.
    """

    def __init__(self, policy: Literal['stop', 'skip']):
        self.policy = policy
        self.known = set()

    def report(self, problems: list) -> None:
        """Raise a TimmHamError, or warn of those that were not known yet; each problem names its image."""
        new = sorted(set(problems) - self.known)
        if not new:
            return
        self.known.update(new)
        shown = '; '.join(new[:5]) + ('; ...' if len(new) > 5 else '')
        message = f'{len(new)} image{"s" if len(new) > 1 else ""} can not be read ({shown})'
        if self.policy == 'stop':
            raise TimmHamError(f'{message}: replace or remove them, or go on without them by --bad-images skip')
        warnings.warn(f'{message}, {len(self.known)} in all so far: left out', stacklevel=3)


def decode(
    part: Part,
    bad_images: Literal['stop', 'skip'] = 'stop',
    resize: Optional[Callable[[Image.Image], torch.Tensor]] = None,
) -> Split:
    """Decode all images of a part to RGB, once.

    Args:
        part: The images.
        bad_images: What to do about images that can't be read.
        resize: An image to pixels of one size, uint8 (3, H, W); the images have to be of one size if None.

    Raises:
        TimmHamError: If images can't be read and are not skipped, or are of several sizes. The message names them.
    """
    images, kept, problems = None, [], []
    rows = chain.from_iterable(batch[part.images.column_names[0]] for batch in part.images.select(part.rows).iter(1000))
    # None: no bar where nobody watches.
    bar = tqdm(rows, f'decoding {part.split}', len(part), unit=' images', unit_scale=True, leave=False, disable=None)
    for index, encoded in enumerate(bar):
        try:
            image = read_image(encoded, part.name(index))
        except UnreadableImage as error:
            problems.append(str(error))
            continue
        pixels = np.asarray(image) if resize is None else resize(image).permute(1, 2, 0).numpy()
        if images is None:
            images = np.empty((len(part), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[1:3]
            raise TimmHamError(
                f'{part.name(index)} is {width}x{height}, but the first image is {first_width}x{first_height}: '
                'bring them to one size by --image-size, or go on with --in-memory no'
            )
        images[len(kept)] = pixels
        kept.append(index)
    Unusable(bad_images).report(problems)
    if images is None:
        raise TimmHamError(f'no image of split {part.split!r} can be read: {problems[0]}')
    return Split(torch.from_numpy(images[: len(kept)]), part.labels[kept])


def channel_statistics(images: torch.Tensor) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
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


def decode_parts(
    opened: OpenDataset,
    parts: Dict[str, Part],
    bad_images: Literal['stop', 'skip'] = 'stop',
    resize: Optional[Callable[[Image.Image], torch.Tensor]] = None,
) -> Tuple[DataInfo, Dict[str, Split]]:
    """`decode` for all parts; the facts have mean and standard deviation over the training images."""
    splits = {name: decode(part, bad_images, resize) for name, part in parts.items()}
    images = splits['train'].images
    sizes = {name: len(split) for name, split in splits.items()}
    return data_info(opened, images.shape[1:3], *channel_statistics(images), sizes), splits
