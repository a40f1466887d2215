"""Pre-activation residual block, for WideResNet."""

from typing import Optional, Type

import torch
from timm.layers import LayerType, create_attn
from torch import nn

__all__ = ['PreActBlock']


class PreActBlock(nn.Module):
    """Norm, activation, 3x3 convolution, twice: https://arxiv.org/abs/1603.05027, Fig. 4e, as WideResNet takes it.

    Called like timm's BasicBlock; timm's pre-activation blocks take no attention. It stands at the end of the residual
    branch. (B, inplanes, H, W) to (B, planes, ceil(H / stride), ceil(W / stride)).

    Args:
        inplanes: Channels of the input.
        planes: Channels of the output.
        stride: Stride of the first convolution.
        downsample: Shortcut where the shape changes.
        act_layer: Activation class.
        norm_layer: Norm class.
        attn_layer: Attention, as timm's blocks take it.
        drop_path: Stochastic depth module.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        act_layer: Type[nn.Module] = nn.ReLU,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        attn_layer: Optional[LayerType] = None,
        drop_path: Optional[nn.Module] = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.bn1 = norm_layer(inplanes, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn2 = norm_layer(planes, **dd)
        self.act2 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False, **dd)
        self.se = create_attn(attn_layer, planes, **dd)
        self.downsample = downsample
        self.drop_path = drop_path

    def zero_init_last(self) -> None:
        """Start the branch at zero."""
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        shortcut = x
        x = self.conv1(self.act1(self.bn1(x)))
        x = self.conv2(self.act2(self.bn2(x)))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x + shortcut
