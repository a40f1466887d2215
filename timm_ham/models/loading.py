"""A model with its weights, by registered name, folder or Hub id, and what it takes to put an image through it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Tuple

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.models.weights import CONFIG_FILE, hub_folders

__all__ = ['Classifier', 'load_classifier', 'load_model']

HUB_PREFIX = 'hf-hub:'
FOLDER_PREFIX = 'local-dir:'


@dataclass(frozen=True)
class Classifier:
    """A model in eval mode, and what goes before and behind it.

    model: Images, float32 (B, 3, H, W), to logits (B, classes).
    transform: A PIL image in RGB to float32 (3, H, W), as the weights expect it.
    label_names: Of the classes, in the order of the logits; their numbers where the weights name none.
    """

    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    label_names: Tuple[str, ...]


def load_model(name: str) -> nn.Module:
    """A model with its weights.

    Args:
        name: A registered name (`resnet20_ham.cifar10`), a folder with config.json, or
            `hf-hub:<owner>/<name>[@revision]`.

    Raises:
        TimmHamError: If there is no such model, or it has no weights, or they are not whole.
    """
    folder = name.removeprefix(FOLDER_PREFIX)
    if (Path(folder) / CONFIG_FILE).is_file():
        return timm.create_model(f'{FOLDER_PREFIX}{folder}', pretrained=True)
    if not name.startswith(HUB_PREFIX) and not timm.is_model_pretrained(name):
        choices = [
            *(folder.name for folder in hub_folders()),
            f'a folder with {CONFIG_FILE}',
            f'{HUB_PREFIX}<owner>/<name>',
            'any pretrained model of timm',
        ]
        raise TimmHamError(f'no weights for {name!r}: choose from {", ".join(choices)}')
    return timm.create_model(name, pretrained=True)


def load_classifier(name: str) -> Classifier:
    """`load_model` in eval mode, with its eval transform and class names; raises as that does."""
    model = load_model(name).eval()
    transform = create_transform(**resolve_model_data_config(model))
    return Classifier(model, transform, _label_names(model))


def _label_names(model: nn.Module) -> Tuple[str, ...]:
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return tuple(names)
    subset = infer_imagenet_subset(model)  # by the number of classes: timm's own weights name none
    if subset:
        imagenet = ImageNetInfo(subset)
        return tuple(imagenet.index_to_description(index) for index in range(model.num_classes))
    return tuple(str(index) for index in range(model.num_classes))
