"""Golden logits: what exported weights answer to a made-up input, so that a copy is checked without any data.

The input is made from integers alone: it is the same on every machine. The logits are not, to the last bit: other
processors and versions of torch add in another order.
"""

import json
from pathlib import Path

import torch
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.training.batches import normalize

__all__ = ['GOLDEN_FILE', 'golden_error', 'golden_images', 'golden_logits', 'write_golden']

GOLDEN_FILE = 'golden.json'
IMAGES = 4
TOLERANCE = 1e-3  # of a logit; float32 on other processors differs by about 1e-5


def golden_images(height: int, width: int) -> torch.Tensor:
    """Colour noise, uint8 (IMAGES, H, W, 3): of each index k the top byte of k * 2654435761 mod 2^32, Knuth's hash."""
    indices = torch.arange(IMAGES * height * width * 3)
    return (indices * 2654435761 % 2**32 // 2**24).to(torch.uint8).view(IMAGES, height, width, 3)


@torch.inference_mode()
def golden_logits(model: nn.Module) -> torch.Tensor:
    """Logits of the golden images at the size and normalization of the model's weights, float32 (IMAGES, classes).

    Args:
        model: In eval mode, on the CPU.
    """
    cfg = model.pretrained_cfg
    return model(normalize(golden_images(*cfg['input_size'][1:]), cfg['mean'], cfg['std']).contiguous())


def write_golden(model: nn.Module, folder: Path) -> None:
    """Write the golden logits of a model, in eval mode, into the folder of its weights."""
    golden = {
        'input': 'uint8 (N, H, W, 3), index k -> (k * 2654435761 mod 2^32) div 2^24, normalized as config.json says',
        'tolerance': TOLERANCE,
        'logits': golden_logits(model).tolist(),
    }
    (folder / GOLDEN_FILE).write_text(json.dumps(golden, indent=1) + '\n', encoding='utf-8')


def golden_error(model: nn.Module, folder: Path) -> float:
    """Largest difference between a model's golden logits and those stored in a folder.

    Raises:
        TimmHamError: If the folder holds none for as many classes, or the difference is above TOLERANCE.
    """
    try:
        stored = torch.tensor(json.loads((folder / GOLDEN_FILE).read_text(encoding='utf-8'))['logits'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TimmHamError(f'{folder / GOLDEN_FILE} holds no logits: export the weights again') from error
    logits = golden_logits(model)
    if stored.shape != logits.shape:
        raise TimmHamError(f'the golden logits have shape {tuple(stored.shape)}, the model gives {tuple(logits.shape)}')
    error = (stored - logits).abs().max().item()
    if not error <= TOLERANCE:  # NaN too
        raise TimmHamError(f'the golden logits differ by {error:.2g}, more than {TOLERANCE:g}')
    return error
