"""The passes of HAM's fast path on a CPU.

The feature map is worked on in pieces that stay in the processor's cache, as matrices (b, C, H W) in either memory
format. Everything that selects a group of channels is a product with the (b, 2, C) matrix of the groups, and so is
every sum over channels: `groups @ x` makes descriptors, `groups^T @ maps` spreads maps over the channels again.
"""

import math
from dataclasses import dataclass, replace
from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from timm_ham.layers.block_conv import Blocks
from timm_ham.layers.ham_passes import Inner, as_matrix, attention_gradients, computing_dtype

__all__ = ['apply', 'describe', 'input_gradient', 'pool', 'products']

CHUNK = 1 << 17  # elements of a piece: with its scratch, what a core's second-level cache holds
VECTORS = 64  # elements that torch reduces in one go


@dataclass(frozen=True)
class Pieces:
    """How a feature map is cut: slices of the batch, and scratch of a slice's size.

    shape: (B, C, H, W).
    channels_last: Memory format; contiguous if not.
    dtype: To compute in.
    """

    shape: torch.Size
    channels_last: bool
    dtype: torch.dtype

    @property
    def step(self) -> int:
        """Samples in a piece."""
        return min(self.shape[0], max(1, CHUNK // self.shape[1:].numel()))

    @classmethod
    def of(cls, x: Tensor) -> 'Pieces':
        """Those of a feature map."""
        return cls(x.shape, not x.is_contiguous(), computing_dtype(x))

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.shape[0], self.step):
            yield slice(start, min(start + self.step, self.shape[0]))

    def scratch(self) -> Tensor:
        """(step, C, H W), uninitialized."""
        channels, pixels = self.shape[1], self.shape[2:].numel()
        if self.channels_last:
            return torch.empty(self.step, pixels, channels, dtype=self.dtype).transpose(1, 2)
        return torch.empty(self.step, channels, pixels, dtype=self.dtype)

    def spread(self, groups: Tensor, maps: Tensor, out: Tensor) -> Tensor:
        """groups^T @ maps: (b, k, C) and (b, k, H W) to (b, C, H W)."""
        if self.channels_last:
            torch.bmm(maps.transpose(1, 2), groups, out=out.transpose(1, 2))
        else:
            torch.bmm(groups.transpose(1, 2), maps, out=out)
        return out

    def choose(self, groups: Tensor, maps: Tensor, out: Tensor) -> Tensor:
        """As `spread`, of groups that are 0 and 1, without any rounding of the maps."""
        if self.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision in ('tf32', 'bf16'):
            # A person let products be rounded: torch.set_float32_matmul_precision('medium').
            torch.mul(groups[:, 0, :, None], maps[:, 0, None], out=out)
            return out.addcmul_(groups[:, 1, :, None], maps[:, 1, None])
        return self.spread(groups, maps, out)

    def spread_onto(self, out: Tensor, groups: Tensor, maps: Tensor) -> None:
        """Add groups^T @ maps to `out`."""
        if self.channels_last:
            out.transpose(1, 2).baddbmm_(maps.transpose(1, 2), groups)
        else:
            out.baddbmm_(groups.transpose(1, 2), maps)

    def channel_max(self, x: Tensor) -> Tensor:
        """(b, C, H W) to (b, H W)."""
        channels, pixels = x.shape[1:]
        together = VECTORS // math.gcd(VECTORS, pixels)  # channels that are whole vectors
        if self.channels_last or together == 1 or channels % together:
            return x.amax(1)
        # In two steps too, of which the first leaves no rest that torch would do number by number.
        rows = x.view(len(x), -1, together * pixels).amax(1)
        return rows.view(-1, together, pixels).amax(1)

    def pixel_max(self, x: Tensor) -> Tensor:
        """(b, C, H W) to (b, C)."""
        if not self.channels_last:
            return x.amax(2)
        # In two steps, of which the first has long rows: torch is slow at reducing over many short ones.
        samples, channels, height, width = len(x), *self.shape[1:]
        rows = x.transpose(1, 2).reshape(samples, height, width * channels).amax(1)
        return rows.view(samples, width, channels).amax(1)


def in_dtype(x: Tensor, piece: slice, dtype: torch.dtype, scratch: Optional[Tensor]) -> Tensor:
    """A piece of a matrix in another dtype, copied into scratch if it has to be."""
    return x[piece] if scratch is None else scratch[: piece.stop - piece.start].copy_(x[piece])


def pool(x: Tensor) -> Tuple[Tensor, Tensor]:
    """(B, C, H, W) to the average and the maximum over pixels, (B, C) each."""
    pieces, matrix = Pieces.of(x), as_matrix(x)
    avg, top = (torch.empty(x.shape[:2], dtype=pieces.dtype) for _ in range(2))
    scratch = None if x.dtype == pieces.dtype else pieces.scratch()
    for piece in pieces:
        part = in_dtype(matrix, piece, pieces.dtype, scratch)
        avg[piece] = part.sum(2)
        top[piece] = pieces.pixel_max(part)
    return avg.div_(matrix.shape[2]), top


def describe(x: Tensor, weighted: Tensor, averaging: Tensor, blocks: Blocks) -> Tensor:
    """Descriptors of both groups, averaging @ x and the maximum of weighted * x, each (B, 2, C) by (B, C, H W).

    Returns:
        (B, 2 groups, 2 p q, H / p, W / q), average and maximum in blocks.
    """
    pieces, matrix = Pieces.of(x), as_matrix(x)
    p, q = blocks.size
    described = torch.empty(len(x), 2, 2 * p * q, blocks.height // p, blocks.width // q, dtype=pieces.dtype)
    avg, top = blocks.pixels(described).unbind(2)
    convert = None if x.dtype == pieces.dtype else pieces.scratch()
    # Maxima over few channels are slow where those lie next to each other: turn the piece around.
    turn = pieces.channels_last and x.shape[1] < 32
    scratched = replace(pieces, channels_last=False) if turn else pieces
    scratch = scratched.scratch()
    turned = torch.empty_like(scratch) if turn else None
    for piece in pieces:
        part = in_dtype(matrix, piece, pieces.dtype, convert)
        avg[piece] = torch.bmm(averaging[piece], part).view(avg[piece].shape)
        if turned is not None:
            part = turned[: len(part)].copy_(part)
        product = scratch[: len(part)]
        for group in range(2):
            torch.mul(part, weighted[piece, group, :, None], out=product)
            top[piece, group] = scratched.channel_max(product).view(top[piece, group].shape)
    return described


def apply(x: Tensor, weighted: Tensor, maps: Tensor) -> Tensor:
    """(weighted^T @ maps) * x, of (B, 2, C) and (B, 2, H W), in x's shape and dtype."""
    pieces, matrix, out = Pieces.of(x), as_matrix(x), torch.empty_like(x)
    result, scratch = as_matrix(out), pieces.scratch()
    for piece in pieces:
        factor = pieces.spread(weighted[piece], maps[piece], scratch[: piece.stop - piece.start])
        if x.dtype == pieces.dtype:
            torch.mul(factor, matrix[piece], out=result[piece])
        else:
            result[piece] = factor.mul_(matrix[piece])
    return out


def products(x: Tensor, gradient: Tensor, groups: Tensor, attention: Tensor, tops: Tensor) -> Tuple[Tensor, None]:
    """Gradient of the spatial maps, groups @ (attention * x * gradient): (B, 2, H W).

    Returns:
        It, and None: the channels that attain `tops` are counted by `input_gradient`, which has them in cache anyway.
    """
    pieces, matrix, upper, weighted = Pieces.of(x), as_matrix(x), as_matrix(gradient), groups * attention[:, None]
    sums = torch.empty(len(x), 2, matrix.shape[2], dtype=pieces.dtype)
    scratch = pieces.scratch()
    for piece in pieces:
        part = scratch[: piece.stop - piece.start]
        if x.dtype == pieces.dtype:
            torch.mul(matrix[piece], upper[piece], out=part)
        else:
            part.copy_(matrix[piece]).mul_(upper[piece])
        torch.bmm(weighted[piece], part, out=sums[piece])
    return sums, None


def input_gradient(x: Tensor, gradient: Tensor, inner: Inner) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the channel logits and of f (Eq. 5), the last two (B, C)."""
    pieces, matrix, upper, out = Pieces.of(x), as_matrix(x), as_matrix(gradient), torch.empty_like(x)
    result, pixels = as_matrix(out), matrix.shape[2]
    dlogits, df = torch.empty_like(inner.attention), torch.empty_like(inner.attention)
    masked_ties = inner.masked_ties
    first, second = pieces.scratch(), pieces.scratch()
    x_scratch, g_scratch = (None if x.dtype == pieces.dtype else pieces.scratch() for _ in range(2))
    for piece in pieces:
        part = in_dtype(matrix, piece, pieces.dtype, x_scratch)
        above = in_dtype(upper, piece, pieces.dtype, g_scratch)
        a, b = first[: len(part)], second[: len(part)]
        groups, attention = inner.groups[piece], inner.attention[piece, :, None]
        # Gradient of F' = A x. 1 where a channel has its group's maximum, by the product that the maximum was made of:
        torch.mul(part, attention, out=a)
        a.eq_(pieces.choose(groups, inner.tops[piece], b))
        ties = torch.bmm(groups, a).add_(masked_ties[piece])
        a.mul_(pieces.spread(groups, inner.dtops[piece] / ties, b))
        a.addcmul_(above, pieces.spread(groups, inner.maps[piece], b))
        pieces.spread_onto(a, groups, inner.davgs[piece])
        # A's gradient, its sigmoid's, and the convolution's along the channels
        dattention = torch.mul(part, a, out=b).sum(2)
        dlogits[piece], df[piece] = attention_gradients(dattention, inner.attention[piece], inner.taps)
        # x's: by A, by the average, and by the maximum over pixels
        torch.eq(part, inner.top[piece, :, None], out=b)
        davg = df[piece] * (inner.pool_weights[0] / pixels)
        dtop = df[piece] * inner.pool_weights[1] / b.sum(2)
        b.mul_(dtop[:, :, None]).add_(davg[:, :, None])
        if x.dtype == pieces.dtype:
            torch.addcmul(b, a, attention, out=result[piece])
        else:
            result[piece] = b.addcmul_(a, attention)
    return out, dlogits, df
