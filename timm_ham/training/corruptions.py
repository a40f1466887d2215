"""Images made worse in four ways at five strengths each, the same way every time.

After https://arxiv.org/abs/1903.12261 but not its CIFAR-10-C: the kinds and the order of the strengths are alike, the
maths are torchvision's and Pillow's.
"""

import io
from typing import Callable, Dict, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

__all__ = ['CORRUPTIONS', 'CORRUPTION_SEED', 'corrupt']

CORRUPTION_SEED = 0  # of the noise


def _noise(images: torch.Tensor, sigma: float) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CORRUPTION_SEED)
        noisy = tv.gaussian_noise(tv.to_dtype(images, torch.float32, scale=True), sigma=sigma)
    return tv.to_dtype(noisy, torch.uint8, scale=True)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return tv.gaussian_blur(images, kernel_size=2 * round(4 * sigma) + 1, sigma=sigma)


def _jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    worse = []
    for image in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, 'JPEG', quality=quality)
        worse.append(np.array(Image.open(buffer)))
    return torch.from_numpy(np.stack(worse)).permute(0, 3, 1, 2)


# Name: what the strengths are, the function of uint8 images (N, 3, H, W), and its five strengths from mild to harsh.
CORRUPTIONS: Dict[str, Tuple[str, Callable[[torch.Tensor, float], torch.Tensor], Tuple[float, ...]]] = {
    'Gaussian noise': ('sigma, of pixels in [0, 1]', _noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    'Gaussian blur': ('sigma, pixels', _blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    'brightness': ('factor', tv.adjust_brightness, (1.2, 1.4, 1.6, 1.8, 2.0)),
    'JPEG': ('quality', _jpeg, (80, 65, 58, 50, 40)),
}


def corrupt(images: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    """One of CORRUPTIONS.

    Args:
        images: uint8 (N, H, W, 3), on the CPU.
        name: Key of CORRUPTIONS.
        strength: In its own unit.

    Returns:
        Images of the same shape and dtype.
    """
    return CORRUPTIONS[name][1](images.permute(0, 3, 1, 2), strength).permute(0, 2, 3, 1).contiguous()
