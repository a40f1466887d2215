"""Model and batches to metrics."""

from dataclasses import dataclass
from typing import Iterable, Optional, Tuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from timm_ham.errors import TimmHamError
from timm_ham.models.loading import load_model
from timm_ham.training.batches import eval_batches
from timm_ham.training.data import OpenDataset, Split, open_dataset
from timm_ham.training.processes import start_processes

__all__ = ['Metrics', 'check_classes', 'evaluate', 'evaluate_split', 'load_for', 'measure']


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy in nats, share of images whose largest logit is their class, number of images."""

    loss: float
    accuracy: float
    images: int


def check_classes(name: str, model: nn.Module, data: OpenDataset) -> None:
    """Raise a TimmHamError if the weights `name` have another number of classes than the dataset."""
    if model.num_classes != len(data.label_names):
        raise TimmHamError(
            f'{name} has {model.num_classes} classes, but {data.name} has {len(data.label_names)}: '
            'choose the dataset that it was trained on'
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


def evaluate_split(
    model: nn.Module,
    split: Split,
    mean: Tuple[float, ...],
    std: Tuple[float, ...],
    accelerator: Accelerator,
    batch_size: int = 500,
) -> Metrics:
    """`evaluate` on the plain images of a split, shared among the processes, each image once.

    Args:
        model: Images (B, C, H, W) to logits (B, classes).
        split: Images and labels on the device of the model.
        mean: Of each channel, pixel values scaled to [0, 1].
        std: Likewise.
        accelerator: Knows the processes.
        batch_size: Images in a batch of one process.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    return evaluate(model, eval_batches(split, mean, std, batch_size, rank, processes), accelerator)


def load_for(
    name: str, dataset: str, image_column: Optional[str] = None, label_column: Optional[str] = None
) -> Tuple[nn.Module, OpenDataset]:
    """Pretrained weights, and a dataset of as many classes to measure them on; arguments and errors as of `measure`."""
    model = load_model(name)
    data = open_dataset(dataset, image_column, label_column)
    check_classes(name, model, data)
    return model, data


def measure(
    name: str,
    dataset: str,
    split: str = 'test',
    batch_size: int = 500,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
) -> Metrics:
    """`evaluate_split` of pretrained weights on a dataset, in float32, on the device that accelerate chooses.

    Args:
        name: As for `load_model`.
        dataset: As for `open_dataset`, and so are the columns.
        split: 'test' or 'train'.
        batch_size: Images in a batch of one process.
        image_column: Found by its type if None.
        label_column: Likewise.

    Raises:
        TimmHamError: If weights or dataset can't be had, or their numbers of classes differ.
    """
    model, data = load_for(name, dataset, image_column, label_column)
    start_processes()
    accelerator = Accelerator()
    images = data.decode(split).to(accelerator.device)
    cfg = model.pretrained_cfg
    return evaluate_split(model.to(accelerator.device), images, cfg['mean'], cfg['std'], accelerator, batch_size)
