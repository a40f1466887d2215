"""The passes of HAM's fast path on a GPU: Triton kernels, for contiguous and channels_last maps alike.

The same functions as in ham_cpu.py. Forward they read x three times and write once, which is the least there is;
backward they read x and the gradient three times each and write once. A program works on tiles of (channels, pixels).
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from timm_ham.layers.block_conv import Blocks
from timm_ham.layers.ham_passes import Inner, attention_gradients, computing_dtype

__all__ = ['apply', 'describe', 'input_gradient', 'pool', 'products']

TILE = 2048  # elements
ROW = 256  # of those at most along the dimension that is contiguous in memory


# Kernels
# -------
# x, gradient, out: (B, C, H W) with strides (C H W, stride_c, stride_p); everything else is contiguous.


@triton.jit
def _offsets(sample, c, p, channels, pixels, stride_c, stride_p):
    return sample * channels * pixels + c[:, None] * stride_c + p[None, :] * stride_p


@triton.jit
def _of_channels(values, sample, c, channels):
    """A tile's column of (B, C) numbers."""
    return tl.load(values + sample * channels + c, mask=c < channels, other=0)[:, None]


@triton.jit
def _of_pixels(maps, sample, group: tl.constexpr, p, pixels):
    """A tile's row of one group's (B, 2, H W) maps."""
    return tl.load(maps + (sample * 2 + group) * pixels + p, mask=p < pixels, other=0)[None, :]


@triton.jit
def _choose(important, maps, sample, p, pixels):
    """Each channel's map, of the group that it is in."""
    return tl.where(important, _of_pixels(maps, sample, 0, p, pixels), _of_pixels(maps, sample, 1, p, pixels))


@triton.jit
def _pool(x, avg, top, channels, pixels, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    dtype = avg.dtype.element_ty
    sample, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    highest = tl.full((BLOCK_C, BLOCK_P), float('-inf'), dtype)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
        part = tl.load(x + at, mask=inside, other=0).to(dtype)
        total += part
        highest = tl.maximum(highest, tl.where(inside, part, float('-inf')))
    at = sample * channels + c
    tl.store(avg + at, tl.sum(total, 1) / pixels, mask=c < channels)
    tl.store(top + at, tl.max(highest, 1), mask=c < channels)


@triton.jit
def _describe(
    x, weighted, averaging, out, channels, pixels, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """out: (B, 2 groups, average and maximum, H W)."""
    dtype = out.dtype.element_ty
    sample, p = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    avg1, avg2 = tl.zeros((BLOCK_C, BLOCK_P), dtype), tl.zeros((BLOCK_C, BLOCK_P), dtype)
    top1 = tl.full((BLOCK_C, BLOCK_P), float('-inf'), dtype)
    top2 = tl.full((BLOCK_C, BLOCK_P), float('-inf'), dtype)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
        part = tl.load(x + at, mask=inside, other=0).to(dtype)
        avg1 += part * _of_channels(averaging, 2 * sample, c, channels)
        avg2 += part * _of_channels(averaging, 2 * sample + 1, c, channels)
        product1 = part * _of_channels(weighted, 2 * sample, c, channels)
        product2 = part * _of_channels(weighted, 2 * sample + 1, c, channels)
        top1 = tl.maximum(top1, tl.where(inside, product1, float('-inf')))
        top2 = tl.maximum(top2, tl.where(inside, product2, float('-inf')))
    at = out + sample * 4 * pixels + p
    tl.store(at, tl.sum(avg1, 0), mask=p < pixels)
    tl.store(at + pixels, tl.max(top1, 0), mask=p < pixels)
    tl.store(at + 2 * pixels, tl.sum(avg2, 0), mask=p < pixels)
    tl.store(at + 3 * pixels, tl.max(top2, 0), mask=p < pixels)


@triton.jit
def _apply(x, weighted, maps, out, channels, pixels, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    sample, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(pixels, BLOCK_P)
    c = tl.program_id(1) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
    part = tl.load(x + at, mask=inside, other=0).to(maps.dtype.element_ty)
    factor = _of_channels(weighted, 2 * sample, c, channels) * _of_pixels(maps, sample, 0, p, pixels)
    factor += _of_channels(weighted, 2 * sample + 1, c, channels) * _of_pixels(maps, sample, 1, p, pixels)
    tl.store(out + at, (part * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    x,
    gradient,
    groups,
    attention,
    tops,
    sums,
    ties,
    channels,
    pixels,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype = sums.dtype.element_ty
    sample, p = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    sum1, sum2 = tl.zeros((BLOCK_C, BLOCK_P), dtype), tl.zeros((BLOCK_C, BLOCK_P), dtype)
    ties1, ties2 = tl.zeros((BLOCK_C, BLOCK_P), dtype), tl.zeros((BLOCK_C, BLOCK_P), dtype)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
        refined = tl.load(x + at, mask=inside, other=0).to(dtype) * _of_channels(attention, sample, c, channels)
        product = refined * tl.load(gradient + at, mask=inside, other=0).to(dtype)
        important = _of_channels(groups, 2 * sample, c, channels) > 0
        attained = (inside & (refined == _choose(important, tops, sample, p, pixels))).to(dtype)
        sum1 += tl.where(important, product, 0)
        sum2 += tl.where(important, 0, product)
        ties1 += tl.where(important, attained, 0)
        ties2 += tl.where(important, 0, attained)
    at = sample * 2 * pixels + p
    tl.store(sums + at, tl.sum(sum1, 0), mask=p < pixels)
    tl.store(sums + at + pixels, tl.sum(sum2, 0), mask=p < pixels)
    tl.store(ties + at, tl.sum(ties1, 0), mask=p < pixels)
    tl.store(ties + at + pixels, tl.sum(ties2, 0), mask=p < pixels)


@triton.jit
def _refined_gradient(part, above, attention, important, tops, dtops, maps, davgs, sample, p, pixels):
    """Gradient of F' = A x, a tile of it: by the maximum over channels, by the output and by the average."""
    attained = part * attention == _choose(important, tops, sample, p, pixels)
    result = tl.where(attained, _choose(important, dtops, sample, p, pixels), 0)
    result += above * _choose(important, maps, sample, p, pixels)
    return result + _choose(important, davgs, sample, p, pixels)


@triton.jit
def _attention_gradient(
    x,
    gradient,
    groups,
    attention,
    top,
    tops,
    dtops,
    maps,
    davgs,
    dattention,
    ties,
    channels,
    pixels,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dattention: Gradient of A, (B, C). ties: How many pixels attain a channel's maximum, (B, C)."""
    dtype = dattention.dtype.element_ty
    sample, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    important = _of_channels(groups, 2 * sample, c, channels) > 0
    weight, highest = _of_channels(attention, sample, c, channels), _of_channels(top, sample, c, channels)
    total, count = tl.zeros((BLOCK_C, BLOCK_P), dtype), tl.zeros((BLOCK_C, BLOCK_P), dtype)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
        part = tl.load(x + at, mask=inside, other=0).to(dtype)
        above = tl.load(gradient + at, mask=inside, other=0).to(dtype)
        total += part * _refined_gradient(
            part, above, weight, important, tops, dtops, maps, davgs, sample, p, pixels
        )  # 0 outside, where part is
        count += (inside & (part == highest)).to(dtype)
    at = sample * channels + c
    tl.store(dattention + at, tl.sum(total, 1), mask=c < channels)
    tl.store(ties + at, tl.sum(count, 1), mask=c < channels)


@triton.jit
def _input_gradient(
    x,
    gradient,
    groups,
    attention,
    top,
    tops,
    dtops,
    maps,
    davgs,
    davg,
    dtop,
    out,
    channels,
    pixels,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """davg, dtop: Gradients of average and maximum over pixels for each pixel that they come from, (B, C)."""
    dtype = attention.dtype.element_ty
    sample, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(pixels, BLOCK_P)
    c = tl.program_id(1) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = _offsets(sample, c, p, channels, pixels, stride_c, stride_p)
    part = tl.load(x + at, mask=inside, other=0).to(dtype)
    above = tl.load(gradient + at, mask=inside, other=0).to(dtype)
    important = _of_channels(groups, 2 * sample, c, channels) > 0
    weight = _of_channels(attention, sample, c, channels)
    result = weight * _refined_gradient(part, above, weight, important, tops, dtops, maps, davgs, sample, p, pixels)
    attained = part == _of_channels(top, sample, c, channels)
    result += tl.where(attained, _of_channels(dtop, sample, c, channels), 0)
    result += _of_channels(davg, sample, c, channels)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


# Launches
# --------


def _launch(kernel, over: str, x: Tensor, *others: Tensor) -> None:
    """Run a kernel over x, a program for each sample and block of `over`: 'channels', 'pixels' or 'tiles', of both."""
    channels, pixels = x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        block_p = min(triton.next_power_of_2(pixels), ROW)
        block_c = min(triton.next_power_of_2(channels), TILE // block_p)
        strides = (pixels, 1)
    else:
        block_c = min(triton.next_power_of_2(channels), ROW)
        block_p = min(triton.next_power_of_2(pixels), TILE // block_c)
        strides = (1, channels)
    count = {'channels': triton.cdiv(channels, block_c), 'pixels': triton.cdiv(pixels, block_p)}
    count['tiles'] = count['channels'] * count['pixels']
    with torch.cuda.device_of(x):
        kernel[len(x), count[over]](x, *others, channels, pixels, *strides, BLOCK_C=block_c, BLOCK_P=block_p)


def pool(x: Tensor) -> Tuple[Tensor, Tensor]:
    """(B, C, H, W) to the average and the maximum over pixels, (B, C) each."""
    avg, top = (x.new_empty(x.shape[:2], dtype=computing_dtype(x)) for _ in range(2))
    _launch(_pool, 'channels', x, avg, top)
    return avg, top


def describe(x: Tensor, weighted: Tensor, averaging: Tensor, blocks: Blocks) -> Tensor:
    """Descriptors of both groups, in blocks."""
    described = weighted.new_empty(len(x), 2, 2, *x.shape[2:])
    _launch(_describe, 'pixels', x, weighted, averaging, described)
    return blocks.block(described.flatten(0, 1)).unflatten(0, (-1, 2))


def apply(x: Tensor, weighted: Tensor, maps: Tensor) -> Tensor:
    """(weighted^T @ maps) * x, in x's shape and dtype."""
    out = torch.empty_like(x)
    _launch(_apply, 'tiles', x, weighted, maps.contiguous(), out)
    return out


def products(x: Tensor, gradient: Tensor, groups: Tensor, attention: Tensor, tops: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradient of the spatial maps, and how many channels attain a group's maximum."""
    sums, ties = (attention.new_empty(tops.shape) for _ in range(2))
    _launch(_products, 'pixels', x, gradient, groups, attention, tops.contiguous(), sums, ties)
    return sums, ties


def input_gradient(x: Tensor, gradient: Tensor, inner: Inner) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the channel logits and of f (Eq. 5)."""
    maps = inner.tops, inner.dtops / (inner.ties + inner.masked_ties), inner.maps, inner.davgs
    shared = gradient, inner.groups, inner.attention, inner.top, *(each.contiguous() for each in maps)
    dattention, ties = (torch.empty_like(inner.attention) for _ in range(2))
    _launch(_attention_gradient, 'channels', x, *shared, dattention, ties)
    dlogits, df = attention_gradients(dattention, inner.attention, inner.taps)
    davg, dtop = df * (inner.pool_weights[0] / x.shape[2:].numel()), df * inner.pool_weights[1] / ties
    dx = torch.empty_like(x)
    _launch(_input_gradient, 'tiles', x, *shared, davg, dtop, dx)
    return dx, dlogits, df
