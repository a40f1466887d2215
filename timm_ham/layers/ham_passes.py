"""What the passes of HAM's fast path over a feature map share with what lies between them."""

from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['Inner', 'as_matrix', 'attention_gradients', 'channel_windows', 'computing_dtype']


def computing_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else x's own."""
    return torch.promote_types(x.dtype, torch.float32)


def as_matrix(x: Tensor) -> Tensor:
    """(B, C, H, W), contiguous or channels_last, as (B, C, H W) without copying."""
    return x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


def channel_windows(f: Tensor, kernel_size: int) -> Tensor:
    """What a convolution along the channels sees, zeros outside: (B, C) to (B, C, k)."""
    return F.pad(f, (kernel_size // 2, kernel_size // 2)).unfold(1, kernel_size, 1)


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
    return dlogits, (channel_windows(dlogits, len(taps)) * taps.flip(0)).sum(-1)
