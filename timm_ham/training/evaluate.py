"""Model and batches to metrics."""

from dataclasses import dataclass
from typing import Iterable, Optional, Tuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from timm_ham.errors import TimmHamError
from timm_ham.training.batches import eval_batches
from timm_ham.training.data import Split, open_dataset

__all__ = ['Metrics', 'evaluate', 'evaluate_split', 'measure']


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy in nats, share of images whose largest logit is their class, number of images."""

    loss: float
    accuracy: float
    images: int


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


def measure(
    model: nn.Module,
    dataset: str,
    split: str = 'test',
    batch_size: int = 500,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
) -> Metrics:
    """`evaluate_split` of pretrained weights on a dataset by name, in float32, on the device that accelerate chooses.

    Args:
        model: With a `pretrained_cfg`, as timm makes it; it is moved to the device.
        dataset: As for `open_dataset`, and so are the columns.
        split: 'test' or 'train'.
        batch_size: Images in a batch of one process.
        image_column: Found by its type if None.
        label_column: Likewise.

    Raises:
        TimmHamError: If the dataset can't be had or has another number of classes.
    """
    data = open_dataset(dataset, image_column, label_column)
    if model.num_classes != len(data.label_names):
        raise TimmHamError(
            f'the model has {model.num_classes} classes, but {dataset} has {len(data.label_names)}: '
            'choose the dataset that it was trained on'
        )
    accelerator = Accelerator()
    images = data.decode(split).to(accelerator.device)
    cfg = model.pretrained_cfg
    return evaluate_split(model.to(accelerator.device), images, cfg['mean'], cfg['std'], accelerator, batch_size)
