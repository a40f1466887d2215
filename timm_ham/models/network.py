"""The one network class: the residual networks of the HAM paper, on timm's blocks.

timm's own ResNet has a stem of 64 channels and stride 2 and counts its feature reductions from there, so a network for
32x32 images needs a class of its own. Everything that a timm user calls on a model works here the same.
"""

from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    get_attn,
    get_norm_act_layer,
    get_norm_layer,
)
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn import functional as F

from timm_ham.models.preact import PreActBlock

__all__ = ['ResidualNetwork', 'ZeroPadShortcut']


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters, "option A" of https://arxiv.org/abs/1512.03385: stride, then zeros as new channels.

    (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        """What print shows in the brackets."""
        return f'new_channels={self.new_channels}, stride={self.stride}'


def residual_stage(
    block: Type[nn.Module],
    in_channels: int,
    planes: int,
    stride: int,
    drop_path_rates: Sequence[float],
    attention: Optional[nn.Module],
    **block_args,
) -> nn.Sequential:
    """One block for each rate, then the attention if any.

    The first block strides and widens, through a shortcut without parameters.
    """
    out_channels = planes * block.expansion
    blocks = []
    for index, rate in enumerate(drop_path_rates):
        widens = index == 0 and (stride > 1 or in_channels != out_channels)
        blocks.append(
            block(
                in_channels if index == 0 else out_channels,
                planes,
                stride if index == 0 else 1,
                downsample=ZeroPadShortcut(in_channels, out_channels, stride) if widens else None,
                drop_path=DropPath(rate) if rate > 0 else None,
                **block_args,
            )
        )
    return nn.Sequential(*blocks) if attention is None else nn.Sequential(*blocks, attention)


class ResidualNetwork(nn.Module):
    """3x3 stem of stride 1, stages of residual blocks with parameter-free shortcuts, pooling, linear classifier.

    The stages after the first halve the resolution, and so does the max pool after the stem where there is one. Images
    (B, in_chans, H, W) of any size give logits (B, num_classes).

    Args:
        depths: Blocks in each stage.
        widths: Width (timm's `planes`) of each stage.
        block: timm's BasicBlock, or a class that is called like it. With PreActBlock the stem is a convolution alone,
            and a norm and activation follow the last stage.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the input images.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        stem_width: Channels of the stem.
        stem_pool: 3x3 max pool of stride 2 after the stem.
        attn_layer: Attention in each block, as timm's blocks take it: a name, a class or None.
        stage_attn_layer: Attention after each of the last three stages, given in the same way.
        attn_kwargs: Arguments for the attention, such as dict(kernel_size=3).
        act_layer: Activation.
        norm_layer: Norm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly to this rate at the last block.
        zero_init_last: Start each residual branch at zero, by the weight of its last norm.
            NOTE off, unlike in timm: the channels that a shortcut fills with zeros would stay zero behind a ReLU,
            without a gradient.
        block_args: Further arguments for the blocks.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        block: Type[nn.Module] = BasicBlock,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        stem_width: int = 16,
        stem_pool: bool = False,
        attn_layer: Optional[LayerType] = None,
        stage_attn_layer: Optional[LayerType] = None,
        attn_kwargs: Optional[Dict[str, Any]] = None,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        block_args: Optional[Dict[str, Any]] = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        if attn_kwargs and not (attn_layer or stage_attn_layer):
            raise TypeError(f'attn_kwargs {attn_kwargs} given to a network without attention')
        attn_layer, stage_attn_layer = (
            partial(get_attn(layer), **(attn_kwargs or {})) if layer else None
            for layer in (attn_layer, stage_attn_layer)
        )
        block_args = dict(
            attn_layer=attn_layer,
            act_layer=get_act_layer(act_layer),
            norm_layer=get_norm_layer(norm_layer),
            **(block_args or {}),
            **dd,
        )

        pre_activation = issubclass(block, PreActBlock)
        norm_act = dict(norm_layer=norm_layer, act_layer=act_layer, **dd)
        self.stem = ConvNormAct(in_chans, stem_width, 3, apply_norm=not pre_activation, **norm_act)
        self.feature_info = [dict(num_chs=stem_width, reduction=1, module='stem')]
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem_pool else nn.Identity()
        stages = []
        channels, reduction = stem_width, 2 if stem_pool else 1
        for index, (planes, rates) in enumerate(
            zip(widths, calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        ):
            stride = 1 if index == 0 else 2
            out_channels = planes * block.expansion
            attention = stage_attn_layer(out_channels, **dd) if stage_attn_layer and index >= len(depths) - 3 else None
            stages.append(residual_stage(block, channels, planes, stride, rates, attention, **block_args))
            channels, reduction = out_channels, reduction * stride
            self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f'stages.{index}'))
        self.stages = nn.Sequential(*stages)
        self.norm = get_norm_act_layer(norm_layer, act_layer)(channels, **dd) if pre_activation else nn.Identity()

        self.num_features = channels
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Kaiming-normal convolutions; the last norm of each residual branch at zero if `zero_init_last`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        if zero_init_last:
            for module in self.modules():
                if hasattr(module, 'zero_init_last'):
                    module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, str]:
        """Patterns that group the parameters by stage (`coarse`) or by block, for layer-wise learning rates."""
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give the network a new classifier, untrained; the pooling is kept if None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features of the stem (index 0) and of each stage.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n if int, all if None, else the named ones.
            norm: Apply the norm that follows the last stage of a pre-activation network to its features.
            stop_early: Don't compute what comes after the last index.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list alone.

        Returns:
            The final features and a list of the intermediate ones, or only that list.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(1 + len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        x = self.pool(x)
        stages = self.stages[:max_index] if stop_early else self.stages
        for index, stage in enumerate(stages, start=1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == len(self.stages) else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(stages) == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what the features at `indices` don't need; returns the indices."""
        take_indices, max_index = feature_take_indices(1 + len(self.stages), indices)
        prune_end = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            # The head was sized for the last stage, so it goes too.
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the feature map of the last stage, before pooling."""
        x = self.pool(self.stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map to logits, or to pooled features if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
