"""What weights are worth beyond their accuracy: calibration, classes, speed, corrupted images; JSON and a picture."""

import json
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from timm_ham.errors import TimmHamError
from timm_ham.models.weights import CONFIG_FILE, HASH_KEY, read_config
from timm_ham.training.batches import eval_batches
from timm_ham.training.corruptions import CORRUPTION_SEED, CORRUPTIONS, corrupt
from timm_ham.training.data import Split, decode
from timm_ham.training.evaluate import load_for
from timm_ham.training.pipeline import eval_transform
from timm_ham.training.run import environment

__all__ = [
    'QUALITY_FILE',
    'QUALITY_PICTURE',
    'calibration',
    'describe',
    'measure_quality',
    'read_quality',
    'write_quality',
]

QUALITY_FILE = 'quality.json'
QUALITY_PICTURE = 'quality.png'
BINS = 15
SPEED_BATCHES = (1, 256)
SPEED_SECONDS = 3.0  # of measuring for each batch size
MANY_CLASSES = 20  # more have no room for a number in each cell of the confusion picture


def calibration(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> Dict[str, Any]:
    """Expected calibration error of https://arxiv.org/abs/1706.04599, Eq. 5, and the bins behind it.

    ECE = sum over bins of (images in the bin / images) * |accuracy - mean confidence|. An image's confidence is its
    largest probability; bins are of equal width, open below and closed above.

    Args:
        probabilities: (N, classes).
        labels: int64 (N,).
        bins: How many.

    Returns:
        The error, and for each bin the images in it, their accuracy and mean confidence (0 for an empty one).
    """
    confidence, predicted = probabilities.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    images, correct, total = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values)
        for values in (torch.ones_like(confidence), (predicted == labels).double(), confidence)
    )
    filled = images.clamp(min=1)
    return {
        'error': ((correct - total).abs().sum() / len(labels)).item(),
        'images': images.long().tolist(),
        'accuracy': (correct / filled).tolist(),
        'confidence': (total / filled).tolist(),
    }


def classification(logits: torch.Tensor, labels: torch.Tensor) -> Dict[str, Any]:
    """Metrics of the plain images: shares and nats; rows of the confusion are true classes, columns predicted ones.

    Args:
        logits: (N, classes).
        labels: int64 (N,).
    """
    logits = logits.double()
    top1, top5 = (round(value.item() / 100, 6) for value in accuracy(logits, labels, (1, 5)))
    confusion = confusion_matrix(labels, logits.argmax(1), labels=range(logits.shape[1]))
    # A class without images has no accuracy.
    per_class = [row[index] / row.sum() if row.sum() else None for index, row in enumerate(confusion)]
    return {
        'top1': top1,
        'top5': top5,
        'negative_log_likelihood': F.cross_entropy(logits, labels).item(),
        'calibration': calibration(logits.softmax(1), labels),
        'per_class_accuracy': per_class,
        'confusion': confusion.tolist(),
    }


@torch.inference_mode()
def _logits(model: nn.Module, split: Split, device: torch.device, batch_size: int) -> torch.Tensor:
    cfg = model.pretrained_cfg
    batches = eval_batches(split, cfg['mean'], cfg['std'], batch_size)
    return torch.cat([model(images.to(device)).cpu() for images, _ in batches])


@torch.inference_mode()
def images_per_second(model: nn.Module, image_size: Tuple[int, ...], device: torch.device, batch_size: int) -> float:
    """Median over some seconds of calls, after two to warm up; images are made on the device beforehand."""
    images = torch.randn(batch_size, *image_size, device=device)
    seconds: List[float] = []
    calls = 0
    while calls < 5 or sum(seconds) < SPEED_SECONDS:
        start = time.perf_counter()
        model(images)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        calls += 1
        if calls > 2:
            seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds)


def measure_quality(
    folder: Path,
    dataset: str,
    batch_size: int = 500,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
) -> Dict[str, Any]:
    """All of it, on the test split of a dataset, in float32, in one process on the device that accelerate chooses.

    Args:
        folder: Weights with their config.json.
        dataset: As for `open_dataset`, and so are the columns.
        batch_size: Images in a batch.
        image_column: Found by its type if None.
        label_column: Likewise.

    Returns:
        What QUALITY_FILE holds.

    Raises:
        TimmHamError: If weights or dataset can't be had, their numbers of classes differ, or there are more processes.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise TimmHamError('--full measures in one process: leave accelerate launch out')
    model, data = load_for(str(folder), dataset, image_column, label_column)
    device = accelerator.device
    model.eval().to(device)
    split = decode(data.part('test'), resize=eval_transform(tuple(model.pretrained_cfg['input_size'][1:])))
    result = {
        HASH_KEY: read_config(folder / CONFIG_FILE).get(HASH_KEY),
        'dataset': data.name,
        'images': len(split),
        'label_names': list(data.label_names),
        'environment': environment(1, device),
        **classification(_logits(model, split, device, batch_size), split.labels),
        'images_per_second': {
            str(batch): images_per_second(model, (3, *split.images.shape[1:3]), device, batch)
            for batch in SPEED_BATCHES
        },
        'corruption_seed': CORRUPTION_SEED,
        'corruptions': {
            name: {'unit': unit, 'strengths': s, 'accuracy': []} for name, (unit, _, s) in CORRUPTIONS.items()
        },
    }
    steps = [(name, strength) for name, (_, _, strengths) in CORRUPTIONS.items() for strength in strengths]
    for kind, strength in tqdm(steps, 'corruptions', disable=None):
        worse = Split(corrupt(split.images, kind, strength), split.labels)
        correct = _logits(model, worse, device, batch_size).argmax(1) == split.labels
        result['corruptions'][kind]['accuracy'].append(correct.double().mean().item())
    return result


def describe(quality: Dict[str, Any]) -> str:
    """The result for the terminal."""
    speed = ', '.join(f'{value:,.0f} at batch {batch}' for batch, value in quality['images_per_second'].items())
    lines = [
        f'top-1 {quality["top1"]:.2%}   top-5 {quality["top5"]:.2%}   of {quality["images"]} test images',
        f'negative log likelihood {quality["negative_log_likelihood"]:.4f} nats   '
        f'expected calibration error {quality["calibration"]["error"]:.2%} ({BINS} bins)',
        f'images/s {speed}, {quality["environment"]["hardware"]}',
    ]
    for kind, values in quality['corruptions'].items():
        lines.append(f'{kind:16}' + ''.join(f'{accuracy:9.2%}' for accuracy in values['accuracy']))
    return '\n'.join(lines)


def _draw(quality: Dict[str, Any], title: str, path: Path) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(quality['label_names'])
    figure = Figure(figsize=(15, 5), dpi=100, layout='constrained')
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    confusion = np.array(quality['confusion'])
    share = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    few = classes <= MANY_CLASSES
    ConfusionMatrixDisplay(share, display_labels=quality['label_names']).plot(
        ax=left,
        include_values=few,
        cmap='Blues',
        values_format='.1f',
        xticks_rotation=90,
        text_kw={'fontsize': 7},
        im_kw={'norm': PowerNorm(0.5, 0, 100)},  # the few mistakes are to be seen
    )
    if not few:
        left.set(xticks=[], yticks=[])
    left.set(title='confusion: % of each true class', xlabel='predicted', ylabel='true')
    bins = quality['calibration']
    filled = [index for index, images in enumerate(bins['images']) if images]
    middle.plot([0, 100], [0, 100], color='gray', linewidth=1, label='perfectly calibrated')
    middle.plot(*([100 * bins[key][i] for i in filled] for key in ('confidence', 'accuracy')), 'o-', color='#0072B2')
    middle.set(title=f'calibration: error {100 * bins["error"]:.2f} %', xlabel='confidence (%)', ylabel='accuracy (%)')
    for (kind, values), marker in zip(quality['corruptions'].items(), 'os^v'):
        right.plot(range(6), [100 * quality['top1'], *(100 * a for a in values['accuracy'])], f'{marker}-', label=kind)
    right.set(title='corrupted images', xlabel='strength, 0: as they are', ylabel='accuracy (%)', ylim=(0, 100))
    for axes in (middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def write_quality(quality: Dict[str, Any], folder: Path, title: str) -> None:
    """Write what `measure_quality` returned as QUALITY_FILE and, under a title, as QUALITY_PICTURE into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUALITY_FILE).write_text(json.dumps(quality, indent=1) + '\n', encoding='utf-8')
    _draw(quality, title, folder / QUALITY_PICTURE)


def read_quality(folder: Path) -> Optional[Dict[str, Any]]:
    """What QUALITY_FILE in a folder of weights holds; None if there is none.

    Raises:
        TimmHamError: If it was measured on other weights than those in the folder.
    """
    if not (folder / QUALITY_FILE).is_file():
        return None
    quality = json.loads((folder / QUALITY_FILE).read_text(encoding='utf-8'))
    if quality[HASH_KEY] != read_config(folder / CONFIG_FILE).get(HASH_KEY):
        raise TimmHamError(f'{folder / QUALITY_FILE} is of other weights: measure again by timm-ham evaluate --full')
    return quality
