"""What the passes of HAM's fast path over a feature map share with what lies between them."""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['Inner', 'as_matrix', 'attention_gradients', 'channel_shifts', 'computing_dtype', 'convolve_channels']


def computing_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else x's own."""
    return torch.promote_types(x.dtype, torch.float32)


def as_matrix(x: Tensor) -> Tensor:
    """(B, C, H, W), contiguous or channels_last, as (B, C, H W) without copying."""
    return x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


def channel_shifts(f: Tensor, kernel_size: int) -> List[Tensor]:
    """What the k taps of a convolution along the channels see, zeros outside: (B, C) to k of (B, C)."""
    padded = F.pad(f, (kernel_size // 2, kernel_size // 2))
    return [padded[:, tap : tap + f.shape[1]] for tap in range(kernel_size)]


def convolve_channels(f: Tensor, taps: Tensor, kernel_size: int) -> Tensor:
    """The convolution along the channels, of (B, C) and (k,), zeros outside.

    As a sum: autocast would run a conv1d in bfloat16, and channels would tie.
    """
    shifts = channel_shifts(f, kernel_size)
    result = shifts[0] * taps[0]
    for tap in range(1, kernel_size):
        result = result + shifts[tap] * taps[tap]
    return result


@dataclass(frozen=True)
class Inner:
    """What the gradient of x is made of, beside x and the gradient of the output.

    groups, attention: Which group a channel is in, (B, 2, C), and its weight, (B, C).
    maps, tops, dtops, davgs: Spatial maps, group maxima, their gradients, gradients of the group sums, (B, 2, H W).
    taps: Of the convolution along the channels, (k,).
    pool_weights: Of average and maximum in Eq. 5, (2,).
    top: Maximum over pixels, (B, C).
    ties: How many channels attain a group's maximum, without `masked_ties`, (B, 2, H W); None where they are counted
        on the way.
    """

    groups: Tensor
    attention: Tensor
    maps: Tensor
    tops: Tensor
    dtops: Tensor
    davgs: Tensor
    taps: Tensor
    pool_weights: Tensor
    top: Tensor
    ties: Optional[Tensor]

    @property
    def masked_ties(self) -> Tensor:
        """The zeros of a group's masked channels attain its maximum too where that is zero: how many, (B, 2, H W)."""
        return (self.tops == 0) * (self.groups.shape[2] - self.groups.sum(2, keepdim=True))


def attention_gradients(dattention: Tensor, attention: Tensor, taps: Tensor) -> Tuple[Tensor, Tensor]:
    """From the gradient of A to those of the channel logits and of f (Eq. 7), (B, C) each."""
    dlogits = dattention * attention * (1 - attention)
    return dlogits, convolve_channels(dlogits, taps.flip(0), len(taps))
