"""The passes of HAM's fast path as expressions, for torch.compile: it makes few loops of them and of their neighbours.

The same functions as in ham_cpu.py.
"""

from typing import Tuple

import torch
from torch import Tensor

from timm_ham.layers.block_conv import Blocks
from timm_ham.layers.ham_passes import Inner, attention_gradients, computing_dtype

__all__ = ['apply', 'describe', 'input_gradient', 'pool', 'products']


def _spread(groups: Tensor, maps: Tensor, like: Tensor) -> Tensor:
    """groups^T @ maps: (B, 2, C) and (B, 2, H W) to (B, C, H, W)."""
    first, second = maps.unflatten(2, like.shape[2:]).unsqueeze(2).unbind(1)  # B 1 H W
    return groups[:, 0, :, None, None] * first + groups[:, 1, :, None, None] * second


def _sums(groups: Tensor, x: Tensor) -> Tensor:
    """groups @ x: (B, 2, C) and (B, C, H, W) to (B, 2, H W)."""
    return torch.stack([(x * groups[:, group, :, None, None]).sum(1) for group in range(2)], 1).flatten(2)


def pool(x: Tensor) -> Tuple[Tensor, Tensor]:
    """(B, C, H, W) to the average and the maximum over pixels, (B, C) each."""
    dtype = computing_dtype(x)
    return x.mean((2, 3), dtype=dtype), x.amax((2, 3)).to(dtype)


def describe(x: Tensor, weighted: Tensor, averaging: Tensor, blocks: Blocks) -> Tensor:
    """Descriptors of both groups, in blocks."""
    wide = x.to(weighted.dtype)
    tops = [(wide * weighted[:, group, :, None, None]).amax(1).flatten(1) for group in range(2)]
    described = torch.stack([_sums(averaging, wide), torch.stack(tops, 1)], 2)  # B 2 2 HW
    return blocks.block(described.flatten(0, 1).unflatten(2, x.shape[2:])).unflatten(0, (-1, 2))


def apply(x: Tensor, weighted: Tensor, maps: Tensor) -> Tensor:
    """(weighted^T @ maps) * x, in x's dtype."""
    return (x * _spread(weighted, maps, x)).to(x.dtype)


def products(x: Tensor, gradient: Tensor, groups: Tensor, attention: Tensor, tops: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradient of the spatial maps, and how many channels attain a group's maximum, (B, 2, H W) each."""
    refined = x.to(attention.dtype) * attention[:, :, None, None]
    attained = (refined == _spread(groups, tops, x)).to(refined.dtype)
    return _sums(groups, refined * gradient), _sums(groups, attained)


def input_gradient(x: Tensor, gradient: Tensor, inner: Inner) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the channel logits and of f (Eq. 5), the last two (B, C)."""
    wide, attention = x.to(inner.attention.dtype), inner.attention[:, :, None, None]
    attained = (wide * attention == _spread(inner.groups, inner.tops, x)).to(wide.dtype)
    # At least 1, should a compiler have rounded the product of the forward pass in another way.
    ties = (inner.ties + inner.masked_ties).clamp(min=1)
    upper = attained * _spread(inner.groups, inner.dtops / ties, x)
    upper = upper + gradient * _spread(inner.groups, inner.maps, x) + _spread(inner.groups, inner.davgs, x)
    dlogits, df = attention_gradients((wide * upper).sum((2, 3)), inner.attention, inner.taps)
    attained = (wide == inner.top[:, :, None, None]).to(wide.dtype)
    davg = df * (inner.pool_weights[0] / x.shape[2:].numel())
    dtop = df * inner.pool_weights[1] / attained.sum((2, 3))
    return (upper * attention + attained * dtop[:, :, None, None] + davg[:, :, None, None]).to(x.dtype), dlogits, df
