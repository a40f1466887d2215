"""A convolution from 2 maps to 1, done over blocks of pixels.

With so few channels a convolution leaves a processor's vector units idle. Over blocks of 4x4 pixels a 7x7
convolution from 2 channels to 1 is a 3x3 convolution from 32 to 16, over a small map it is a product with a matrix: the
same numbers in a tenth of the time.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['Blocks']


@dataclass(frozen=True)
class Blocks:
    """Maps (N, d, H, W) as blocks of p x q pixels, (N, d p q, H / p, W / q), where a k x k convolution is another one.

    height, width: H, W.
    kernel: k.
    single: Take single pixels, whatever the size, as a GPU likes them.
    """

    height: int
    width: int
    kernel: int
    single: bool = False

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> 'Blocks':
        """Those of feature maps and a convolution's weight."""
        return cls(*x.shape[2:], weight.shape[-1], x.device.type != 'cpu')

    @property
    def fits(self) -> bool:
        """Whether blocks of 4 x 4 do."""
        return self.height % 4 == 0 and self.width % 4 == 0 and self.kernel <= 9

    @property
    def whole(self) -> bool:
        """Whether the map is one block, and the convolution a product of matrices."""
        return not self.single and self.height * self.width <= (144 if self.fits else 256)

    @property
    def size(self) -> Tuple[int, int]:
        """p, q: the whole of a small map, 4 x 4 where that fits, else 1 x 1."""
        if self.whole:
            return self.height, self.width
        return (4, 4) if self.fits and not self.single else (1, 1)

    @property
    def plain(self) -> bool:
        """Whether blocks are pixels, and the convolution stays what it is."""
        return self.size == (1, 1) and not self.whole

    @property
    def reach(self) -> Tuple[int, int]:
        """Neighbouring blocks that the kernel sees, up and to the left."""
        return (0, 0) if self.whole else tuple(math.ceil((self.kernel // 2) / p) for p in self.size)

    def pixels(self, blocked: Tensor) -> Tensor:
        """Blocks (..., d p q, H / p, W / q) seen as (..., d, H / p, p, W / q, q), which is (..., d, H, W) in order."""
        p, q = self.size
        h, w = self.height // p, self.width // q
        d = blocked.shape[-3] // (p * q)
        lead = blocked.shape[:-3]
        n = len(lead)
        return blocked.view(*lead, d, p, q, h, w).permute(*range(n + 1), n + 3, n + 1, n + 4, n + 2)

    def block(self, maps: Tensor) -> Tensor:
        """(N, d, H W) to (N, d p q, H / p, W / q)."""
        if self.plain:
            return maps
        p, q = self.size
        h, w = self.height // p, self.width // q
        blocked = maps.new_empty(len(maps), maps.shape[1] * p * q, h, w)
        pixels = self.pixels(blocked)
        pixels.copy_(maps.view(pixels.shape))
        return blocked

    def unblock(self, blocked: Tensor) -> Tensor:
        """(N, d p q, H / p, W / q) to (N, d, H W)."""
        return self.pixels(blocked).flatten(2)

    def convolve(self, maps: Tensor, weight: Tensor) -> Tensor:
        """(N, 2 p q, H / p, W / q) and a weight over blocks to (N, p q, H / p, W / q)."""
        if self.whole:
            return F.linear(maps.flatten(1), weight[:, :, 0, 0])[:, :, None, None]
        return F.conv2d(maps, weight, padding=self.reach)

    def convolve_backward(self, gradient: Tensor, maps: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of the maps and of the weight over blocks."""
        if self.whole:
            flat = gradient.flatten(1)
            dweight = (flat.T @ maps.flatten(1))[:, :, None, None]
            return (flat @ weight[:, :, 0, 0])[:, :, None, None], dweight
        dmaps, dweight, _ = torch.ops.aten.convolution_backward(
            gradient, maps, weight, None, (1, 1), self.reach, (1, 1), False, (0, 0), 1, (True, True, False)
        )
        return dmaps, dweight

    def weight(self, weight: Tensor) -> Tensor:
        """(1, 2, k, k) to the weight of the convolution over blocks."""
        if self.plain:
            return weight
        return torch.cat([weight.flatten(), weight.new_zeros(1)])[_weight_index(self.height, self.width, self.kernel)]

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the weight over blocks to that of the (1, 2, k, k) weight."""
        if self.plain:
            return gradient
        sums = gradient.new_zeros(2 * self.kernel**2 + 1)
        sums.index_add_(0, _weight_index(self.height, self.width, self.kernel).flatten(), gradient.flatten())
        return sums[:-1].view(1, 2, self.kernel, self.kernel)


@torch.compiler.assume_constant_result  # torch.compile does not look into it, so neither at the cache
def _weight_index(height: int, width: int, kernel: int) -> Tensor:
    return _weight_index_of(Blocks(height, width, kernel))


@lru_cache(maxsize=64)
def _weight_index_of(blocks: Blocks) -> Tensor:
    """Which weight a pixel of a block has for a pixel of a neighbouring block: (p q, 2 p q, rows, columns).

    Indices into the flattened weight; the last one, 2 k k, stands for zero.
    """
    (p, q), (up, left), k = blocks.size, blocks.reach, blocks.kernel
    out_row, out_column, maps, row, column, block_row, block_column = torch.meshgrid(
        *(torch.arange(n) for n in (p, q, 2, p, q, 2 * up + 1, 2 * left + 1)), indexing='ij'
    )
    u = (block_row - up) * p + row - out_row + k // 2
    v = (block_column - left) * q + column - out_column + k // 2
    inside = (u >= 0) & (u < k) & (v >= 0) & (v < k)
    index = torch.where(inside, (maps * k + u) * k + v, 2 * k * k)
    return index.reshape(p * q, 2 * p * q, 2 * up + 1, 2 * left + 1)
