"""Augmentation of whole batches: random erasing, Mixup and CutMix."""

from typing import Tuple

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from timm_ham.errors import TimmHamError
from timm_ham.training.recipes import Recipe

__all__ = ['Mixer']


class Mixer:
    """timm's random erasing, then its Mixup or CutMix, as a recipe says.

    It draws from the global generators, Python's, numpy's and torch's, which the training seeds for each step.

    Args:
        recipe: What to do.
        classes: Classes of the dataset.
        batch_size: Over all processes.
        accelerator: Knows device and processes.
    """

    def __init__(self, recipe: Recipe, classes: int, batch_size: int, accelerator: Accelerator):
        self.erase = RandomErasing(recipe.random_erasing, device=accelerator.device) if recipe.random_erasing else None
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            if batch_size % (2 * accelerator.num_processes):
                raise TimmHamError(f'mixup and cutmix need pairs of images: {batch_size} is odd, change batch_size')
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Augment the batch of a training step.

        Args:
            images: Normalized, (B, C, H, W), on the device; changed in place.
            labels: int64 (B,).

        Returns:
            Images, and labels, which are float32 (B, classes) where images are mixed.
        """
        if self.erase:
            self.erase(images)
        return self.mix(images, labels) if self.mix else (images, labels)
