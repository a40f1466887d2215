"""Recurrent criss-cross attention (RCCA), of CCNet.

Z. Huang, X. Wang, Y. Wei, L. Huang, H. Shi, W. Liu, T.S. Huang, "CCNet: Criss-cross attention for semantic
segmentation", https://arxiv.org/abs/1811.11721
"""

import torch
from timm.layers import ConvNormAct
from torch import nn

__all__ = ['CrissCrossAttention', 'RecurrentCrissCrossAttention']


@torch.fx.wrap  # a leaf when traced by FX: the result's shape depends on the input's
def diagonal(x: torch.Tensor) -> torch.Tensor:
    """The (B, C, H, W) input's H x H mask that is True where row and row are the same."""
    return torch.eye(x.shape[2], dtype=torch.bool, device=x.device)


class CrissCrossAttention(nn.Module):
    """Each position attends to those in its own row and column: x + scale * sum of softmax(q k) v (Sec. 3.2).

    (B, C, H, W) to the same shape. The position itself, where row and column cross, counts once: H + W - 1 in all.

    Args:
        channels: C. Queries and keys have C / 8 channels, one at least.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1, **dd)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1, **dd)
        self.value = nn.Conv2d(channels, channels, 1, **dd)
        self.scale = nn.Parameter(torch.zeros(1, **dd))  # as in CCNet, where it is called gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        column = torch.einsum('bcij,bcuj->biju', q, k)  # B H W H, to row u of the same column
        row = torch.einsum('bcij,bciv->bijv', q, k)  # B H W W, to column v of the same row
        column = column.masked_fill(diagonal(x)[:, None], float('-inf'))  # it is in the row already
        height = x.shape[2]
        attention = torch.cat([column, row], dim=3).softmax(3)  # B H W H+W
        gathered = torch.einsum('biju,bcuj->bcij', attention[..., :height], v)
        gathered = gathered + torch.einsum('bijv,bciv->bcij', attention[..., height:], v)
        return x + self.scale * gathered


class RecurrentCrissCrossAttention(nn.Module):
    """CCNet's head as a module: reduce to C / 4, criss-cross attention R times (the same weights), join with the input.

    After two rounds each position has seen every other one. (B, C, H, W) to the same shape; stands after a stage.

    NOTE CCNet joins by a 3x3 convolution that leads to its classifier; here it is 1x1, which is what the HAM paper's
    parameter counts leave room for: about 4.14 C^2 in all.

    Args:
        channels: C, the channels of the feature map, at least 4.
        recurrence: R, how often the criss-cross attention is applied.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, channels: int, recurrence: int = 2, device=None, dtype=None):
        super().__init__()
        if channels < 4:
            raise ValueError(f'channels must be at least 4, to be reduced to a quarter, but is {channels}')
        if recurrence < 1:
            raise ValueError(f'recurrence must be at least 1, but is {recurrence}')
        options = {'act_layer': nn.LeakyReLU, 'device': device, 'dtype': dtype}
        self.recurrence = recurrence
        self.reduce = ConvNormAct(channels, channels // 4, 3, **options)
        self.criss_cross = CrissCrossAttention(channels // 4, device=device, dtype=dtype)
        self.smooth = ConvNormAct(channels // 4, channels // 4, 3, **options)
        self.join = ConvNormAct(channels + channels // 4, channels, 1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        context = self.reduce(x)
        for _ in range(self.recurrence):
            context = self.criss_cross(context)
        return self.join(torch.cat([x, self.smooth(context)], dim=1))

    def extra_repr(self) -> str:
        """What print shows in the brackets."""
        return f'recurrence={self.recurrence}'
