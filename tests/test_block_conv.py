"""The convolution over blocks is the convolution."""

import pytest
import torch
from torch.nn import functional as F

from timm_ham.layers.block_conv import Blocks


@pytest.mark.parametrize('kernel', [1, 3, 7, 9, 11])
@pytest.mark.parametrize(
    'height, width, size',
    [
        (8, 8, (8, 8)),
        (12, 12, (12, 12)),
        (14, 14, (14, 14)),  # small enough for one block, though of no use to blocks of 4
        (16, 16, (4, 4)),
        (4, 40, (4, 4)),
        (20, 24, (4, 4)),
        (18, 20, (1, 1)),
        (1, 1, (1, 1)),
    ],
)
def test_equals_conv2d(height, width, size, kernel):
    blocks = Blocks(height, width, kernel)
    if kernel <= 9:
        assert blocks.size == size
    generator = torch.Generator().manual_seed(0)
    maps, weight, upper = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((3, 2, height, width), (1, 2, kernel, kernel), (3, 1, height, width))
    )
    maps.requires_grad_(), weight.requires_grad_()
    wanted = F.conv2d(maps, weight, padding=kernel // 2)
    dmaps, dweight = torch.autograd.grad(wanted, (maps, weight), upper)
    with torch.no_grad():
        blocked, kernels = blocks.block(maps), blocks.weight(weight)
        torch.testing.assert_close(blocks.unblock(blocked).view_as(maps), maps)
        out = blocks.unblock(blocks.convolve(blocked, kernels)).view_as(wanted)
        torch.testing.assert_close(out, wanted)
        ours = blocks.convolve_backward(blocks.block(upper), blocked, kernels)
        torch.testing.assert_close(blocks.unblock(ours[0]).view_as(maps), dmaps)
        torch.testing.assert_close(blocks.weight_gradient(ours[1]), dweight)
