"""Model and batches to metrics."""

from dataclasses import dataclass
from typing import Iterable, Optional, Tuple

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from timm_ham.errors import TimmHamError
from timm_ham.models.loading import load_model
from timm_ham.training.feed import eval_feed
from timm_ham.training.processes import start_processes
from timm_ham.training.sources import OpenDataset, open_dataset

__all__ = ['Metrics', 'check_classes', 'evaluate', 'load_for', 'measure']


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy in nats, share of images whose largest logit is their class, number of images."""

    loss: float
    accuracy: float
    images: int


def check_classes(name: str, model: nn.Module, data: OpenDataset) -> None:
    """Raise a TimmHamError if the weights `name` have other classes than the dataset, by number or by name."""
    if model.num_classes != len(data.label_names):
        raise TimmHamError(
            f'{name} has {model.num_classes} classes, but {data.name} has {len(data.label_names)}: '
            'choose the dataset that it was trained on'
        )
    names = tuple(model.pretrained_cfg.get('label_names') or data.label_names)
    differing = [pair for pair in zip(names, data.label_names) if pair[0] != pair[1]]
    # Datasets that number their classes say nothing about which they are.
    if differing and not all(label.isdecimal() for label in data.label_names):
        raise TimmHamError(
            f'{name} and {data.name} mean different classes by the same number, such as '
            f'{differing[0][0]!r} and {differing[0][1]!r}: choose the dataset that it was trained on'
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]], accelerator: Accelerator
) -> Metrics:
    """Measure a model in eval mode; it is left in the mode that it was in.

    Args:
        model: Images (B, C, H, W) to logits (B, classes).
        batches: Images and int64 labels (B,), this process's part of them.
        accelerator: Adds up what all processes counted.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, device=accelerator.device)  # loss, correct, images
    for images, labels in batches:
        logits = model(images).float()
        totals[0] += F.cross_entropy(logits, labels, reduction='sum')
        totals[1] += (logits.argmax(1) == labels).sum()
        totals[2] += len(labels)
    model.train(was_training)
    loss, correct, images = accelerator.reduce(totals, reduction='sum').tolist()
    return Metrics(loss=loss / images, accuracy=correct / images, images=int(images))


def load_for(name: str, dataset: str, *columns_and_version: Optional[str]) -> Tuple[nn.Module, OpenDataset]:
    """Pretrained weights, and a dataset of the same classes to measure them on: `load_model` and `open_dataset`."""
    model = load_model(name)
    data = open_dataset(dataset, *columns_and_version)
    check_classes(name, model, data)
    return model, data


def measure(
    name: str,
    dataset: str,
    split: str = 'test',
    batch_size: int = 100,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
    dataset_config: Optional[str] = None,
    dataset_revision: Optional[str] = None,
    test_share: float = 0.0,
    workers: int = 2,
) -> Metrics:
    """`evaluate` for pretrained weights on a dataset, in float32, on the device that accelerate chooses.

    Args:
        name: As for `load_model`.
        dataset: As for `open_dataset`, and so are the columns, config and revision.
        split: 'test' or 'train'.
        batch_size: Images in a batch of one process.
        image_column: Found by its type if None.
        label_column: Likewise.
        dataset_config: Of a dataset that has several.
        dataset_revision: Of a dataset on the Hub.
        test_share: As in Recipe.
        workers: Processes that open images.

    Raises:
        TimmHamError: If weights or dataset can't be had, or their classes differ.
    """
    model, data = load_for(name, dataset, image_column, label_column, dataset_config, dataset_revision)
    start_processes()
    accelerator = Accelerator()
    part = data.part(split, test_share)
    batches = eval_feed(part, resolve_model_data_config(model), batch_size, workers, accelerator)
    return evaluate(model.to(accelerator.device), batches, accelerator)
