"""The halves of CBAM and HAM, alone and mixed: what Tables 1 and 2 of the HAM paper compare.

CBAM: https://arxiv.org/abs/1807.06521, in timm's implementation, reduction 16.
"""

import torch
from timm.layers.cbam import ChannelAttn, SpatialAttn
from torch import nn

from timm_ham.layers.ham import HybridChannelAttention, adaptive_pool

__all__ = ['CbamChannelAdaptive', 'HamChannelCbamSpatial']


class CbamChannelAdaptive(ChannelAttn):
    """CBAM's channel half with HAM's pooling: one pass of f (Eq. 5) through its MLP in place of two, added up.

    (B, C, H, W) to the same shape. Arguments as of timm's ChannelAttn.
    """

    def __init__(self, channels: int, device=None, dtype=None, **kwargs):
        super().__init__(channels, device=device, dtype=dtype, **kwargs)
        self.pool_logits = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        f = adaptive_pool(x, self.pool_logits).to(x.dtype)[:, :, None, None]
        return x * self.gate(self.fc2(self.act(self.fc1(f))))


class HamChannelCbamSpatial(nn.Module):
    """HAM's channel half, then CBAM's spatial half: HAM(channel)&CBAM(spatial) in Table 2.

    (B, C, H, W) to the same shape.

    Args:
        channels: C, the channels of the feature map.
        kernel_size: Size of the spatial convolution, odd.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int, kernel_size: int = 7, device=None, dtype=None):
        super().__init__()
        self.channel = HybridChannelAttention(channels, device=device, dtype=dtype)
        self.spatial = SpatialAttn(kernel_size, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return self.spatial(self.channel(x))
