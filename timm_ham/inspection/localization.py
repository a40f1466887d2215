"""How well a network looks where it should: Grad-CAM on images whose object has a known place."""

from dataclasses import dataclass, fields
from typing import Dict, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from timm_ham.errors import TimmHamError
from timm_ham.inspection.gradcam import class_activation_maps
from timm_ham.training.batches import eval_batches
from timm_ham.training.data import Split

__all__ = [
    'CHANCE',
    'Estimate',
    'Localization',
    'PastedImages',
    'estimates',
    'localization_table',
    'localize',
    'paste_objects',
]

SCALE = 2  # side of the canvas over that of the object
CHANCE = 1 / SCALE**2  # what a map that knows nothing of the image scores


@dataclass(frozen=True)
class PastedImages:
    """Images of one class on a background of another.

    split: The images, uint8 (N, 2H, 2W, 3), and the class of each object.
    corners: Row and column of each object's upper left pixel, int64 (N, 2). The object is H x W.
    """

    split: Split
    corners: torch.Tensor

    def inside(self) -> torch.Tensor:
        """Where the object is: bool (N, 2H, 2W)."""
        rows, columns = (
            torch.arange(side)[None] - self.corners[:, axis, None]
            for axis, side in enumerate(self.split.images.shape[1:3])
        )
        height, width = (side // SCALE for side in self.split.images.shape[1:3])
        return ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]


def paste_objects(split: Split, count: int, seed: int = 0) -> PastedImages:
    """Paste images, whole and untouched, into a random quarter of images of other classes that are enlarged to twice.

    Quarters, because a map that knows nothing of the image then has 25 % of its energy inside, whatever it is, and
    points inside with 25 %. Were the place any, the object would nearly always cover the middle, and so would score a
    map that always points there.

    Args:
        split: Images to take objects and backgrounds from.
        count: Images to make, each with an object of its own.
        seed: Of all that is random.

    Raises:
        TimmHamError: If `count` is below 2 or above the number of images, or they are all of one class.
    """
    if not 2 <= count <= len(split):
        raise TimmHamError(f'{count} objects can not be had: choose a --count from 2 to {len(split)}')
    if len(split.labels.unique()) < 2:
        raise TimmHamError('all images are of one class: a background of another one is needed')
    generator = torch.Generator().manual_seed(seed)
    objects = torch.randperm(len(split), generator=generator)[:count]
    backgrounds = torch.randint(len(split), (count,), generator=generator)
    while (same := split.labels[backgrounds] == split.labels[objects]).any():
        backgrounds[same] = torch.randint(len(split), (int(same.sum()),), generator=generator)
    _, height, width, _ = split.images.shape
    large = F.interpolate(
        split.images[backgrounds].permute(0, 3, 1, 2).float(), scale_factor=SCALE, mode='bicubic', align_corners=False
    )
    canvas = large.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    corners = torch.randint(SCALE, (count, 2), generator=generator) * torch.tensor([height, width])
    pasted = PastedImages(Split(canvas, split.labels[objects]), corners)
    canvas[pasted.inside()] = split.images[objects].flatten(0, 2)
    return pasted


@dataclass(frozen=True)
class Localization:
    """What one network does with each of N images.

    energy: Share of the map's sum that lies inside the object's box, (N,). 0 for a map of zeros.
    pointing: Whether the map's largest value does, (N,): the pointing game of https://arxiv.org/abs/1608.00507, without
        a tolerance.
    correct: Whether the object's class is the predicted one, (N,).
    """

    energy: np.ndarray
    pointing: np.ndarray
    correct: np.ndarray


def localize(model: nn.Module, pasted: PastedImages, method: str = 'gradcam', batch_size: int = 50) -> Localization:
    """Measure a network's maps for the objects' classes.

    Args:
        model: In evaluation mode, with the mean and std of its images in its pretrained_cfg.
        pasted: Images.
        method: Key in METHODS.
        batch_size: Images in a batch.
    """
    cfg, inside = model.pretrained_cfg, pasted.inside().numpy()
    maps, correct = [], []
    batches = eval_batches(pasted.split, cfg['mean'], cfg['std'], batch_size)
    steps = -(-len(pasted.split) // batch_size)
    for images, labels in tqdm(batches, 'localizing', steps, unit=' batches', leave=False, disable=None):
        with torch.no_grad():
            correct.append((model(images).argmax(1) == labels).numpy())
        maps.append(class_activation_maps(model, images, labels.tolist(), method))
    heat = np.concatenate(maps).astype(np.float64)
    total = heat.sum((1, 2))
    energy = np.divide((heat * inside).sum((1, 2)), total, out=np.zeros_like(total), where=total > 0)
    peaks = heat.reshape(len(heat), -1).argmax(1)
    pointing = np.take_along_axis(inside.reshape(len(heat), -1), peaks[:, None], 1)[:, 0] & (total > 0)
    return Localization(energy, pointing, np.concatenate(correct))


class Estimate(NamedTuple):
    """Mean of a sample with its 95 % confidence interval, by the normal approximation."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> 'Estimate':
        """From the sample, of two values at least."""
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        return cls(*(round(value.item(), 4) for value in (values.mean(), values.mean() - half, values.mean() + half)))

    def percent(self, sign: str = '') -> str:
        """In %, with the interval in brackets; `sign` '+' where it is a difference."""
        mean, low, high = (100 * value for value in self)
        return f'{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})'


def estimates(results: Dict[str, Localization]) -> Dict[str, Dict[str, Estimate]]:
    """Each model's three quantities, and under '<model> over <first model>' the others' differences to the first.

    All models saw the same images, so the differences are of pairs.
    """
    first, *others = results
    samples = {
        name: {field.name: getattr(result, field.name).astype(np.float64) for field in fields(result)}
        for name, result in results.items()
    }
    for name in others:
        samples[f'{name} over {first}'] = {
            quantity: values - samples[first][quantity] for quantity, values in samples[name].items()
        }
    return {
        name: {quantity: Estimate.of(values) for quantity, values in quantities.items()}
        for name, quantities in samples.items()
    }


def localization_table(found: Dict[str, Dict[str, Estimate]], markdown: bool = False) -> str:
    """The estimates as a table, in %; as Markdown, or for a terminal."""
    rows = [
        (name, *(estimate.percent('+' if ' over ' in name else '') for estimate in quantities.values()))
        for name, quantities in found.items()
    ]
    rows.append(('chance', f'{100 * CHANCE:.1f}', f'{100 * CHANCE:.1f}', ''))
    headers = ('%, with 95 % confidence interval', 'energy in the box', 'pointing game', 'object recognized')
    return tabulate(rows, headers, tablefmt='github' if markdown else 'simple', disable_numparse=True)
