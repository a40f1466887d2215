"""Decoded splits to normalized batches, cropped and flipped at random, all on the device that the split is on."""

from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

import torch
from torch.nn import functional as F

from timm_ham.training.data import Split

__all__ = ['TrainBatches', 'cutout', 'eval_batches', 'normalize', 'random_crop_flip']


def normalize(images: torch.Tensor, mean: Tuple[float, ...], std: Tuple[float, ...]) -> torch.Tensor:
    """(x / 255 - mean) / std: uint8 (B, H, W, C) to float32 (B, C, H, W) in channels_last memory format."""
    mean, std = (torch.tensor(values, device=images.device) for values in (mean, std))
    return (images.float() - 255 * mean).mul_(1 / (255 * std)).permute(0, 3, 1, 2)


def random_crop_flip(
    images: torch.Tensor, offsets: torch.Tensor, flips: Optional[torch.Tensor], padding: int
) -> torch.Tensor:
    """Crop each zero-padded image at its own offset, mirror some.

    Args:
        images: (B, H, W, C), any dtype.
        offsets: int64 (B, 2), top and left corner of the crop, 0 to 2 * padding.
        flips: bool (B,), which ones to mirror left to right; None for none.
        padding: Pixels of zeros around the image.

    Returns:
        Images of the same shape and dtype.
    """
    batch, height, width, _ = images.shape
    device = images.device
    rows = offsets[:, :1] + torch.arange(height, device=device)  # B H
    columns = offsets[:, 1:] + torch.arange(width, device=device)  # B W
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(batch, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutout(images: torch.Tensor, centers: torch.Tensor, size: int) -> torch.Tensor:
    """Zero a square in each image, part of which may lie outside: https://arxiv.org/abs/1708.04552.

    Args:
        images: Normalized, (B, C, H, W); zero is the mean colour.
        centers: int64 (B, 2), row and column of each square's center.
        size: Side of the square, pixels.

    Returns:
        Images of the same shape and dtype.
    """
    rows, columns = (
        torch.arange(length, device=images.device) - centers[:, axis, None] + size // 2
        for axis, length in enumerate(images.shape[2:])
    )  # B H and B W, 0 to size - 1 inside of the square
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return images.masked_fill(inside[:, None], 0)


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of each epoch, the same for a seed on any device and with any number of processes.

    Every epoch goes through the images in a new order. The images that do not fill the last batch are left out of that
    epoch (other ones each time), so that all steps have the same size.

    split: Images on the device to work on.
    batch_size: Over all processes; `epoch` yields this process's share.
    padding, flip, cutout: Augmentation, as in Recipe.
    """

    split: Split
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    batch_size: int
    padding: int = 0
    flip: bool = False
    cutout: int = 0
    seed: int = 0
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.split) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Yields images, float32 (b, C, H, W) in channels_last memory format, and labels, int64 (b,).

        Args:
            epoch: Number of the epoch.
            first: Batches to leave out at the beginning, which an earlier process has had; the rest stays the same.
        """
        # Drawn on the CPU for all processes alike, from a stream of this epoch alone: resuming needs no saved state.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.split), generator=generator)
        for step, batch in enumerate(order.split(self.batch_size)[: len(self)]):
            offsets = torch.randint(2 * self.padding + 1, (self.batch_size, 2), generator=generator)
            flips = torch.rand(self.batch_size, generator=generator) < 0.5
            places = torch.rand(self.batch_size, 2, generator=generator) if self.cutout else offsets
            if step < first:
                continue
            batch, offsets, flips, places = (
                draw[self.rank :: self.processes].to(self.split.images.device)
                for draw in (batch, offsets, flips, places)
            )
            images = self.split.images[batch]
            if self.padding or self.flip:
                images = random_crop_flip(images, offsets, flips if self.flip else None, self.padding)
            images = normalize(images, self.mean, self.std)
            if self.cutout:
                sides = torch.tensor(images.shape[2:], device=images.device)
                images = cutout(images, (places * sides).long(), self.cutout)
            yield images, self.split.labels[batch]


def eval_batches(
    split: Split,
    mean: Tuple[float, ...],
    std: Tuple[float, ...],
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """This process's part of the plain images, each exactly once, in batches as TrainBatches yields them."""
    images, labels = split.images[rank::processes], split.labels[rank::processes]
    for start in range(0, len(labels), batch_size):
        yield normalize(images[start : start + batch_size], mean, std), labels[start : start + batch_size]
