"""Hybrid Attention Module (HAM): the definition, and the reference that its fast path is held to.

G. Li, Q. Fang, L. Zha, X. Gao, N. Zheng, "HAM: Hybrid attention module in deep convolutional neural networks for image
classification", Pattern Recognition 129 (2022) 108785, https://doi.org/10.1016/j.patcog.2022.108785

Equation numbers are the paper's. `# NOTE` marks each choice that the paper leaves open.
"""

import math
from typing import Tuple

import torch
from timm.layers import _assert
from torch import nn

from timm_ham.layers.ham_fused import fused_applies, hybrid_attention
from timm_ham.layers.ham_passes import computing_dtype, convolve_channels

__all__ = ['HybridAttention', 'HybridChannelAttention', 'adaptive_pool']

torch.fx.wrap('computing_dtype')  # a leaf when traced by FX: the result depends on the dtype that comes at run time


def channel_kernel_size(channels: int) -> int:
    """Kernel size of the convolution along the channels: Eq. 6, the odd number nearest to log2(C)/2 + 1/2.

    NOTE a tie goes up and the result is at least 3, as in ECA (https://arxiv.org/abs/1910.03151).
    """
    size = int((math.log2(channels) + 1) / 2)
    return max(3, size if size % 2 else size + 1)


def num_important_channels(channels: int, separation_rate: float) -> int:
    """Size of the important group: Eq. 8, the even number nearest to rate * C.

    NOTE a tie goes up, and the result stays within [2, C - 2] so that neither group is empty.
    """
    # The small constant lets a product such as 0.7 * 10, which is 6.999... in binary, be the tie that it is on paper.
    nearest_even = 2 * math.floor(separation_rate * channels / 2 + 0.5 + 1e-9)
    return min(max(2, nearest_even), channels - 2)


def adaptive_pool(x: torch.Tensor, pool_logits: torch.Tensor) -> torch.Tensor:
    """Eq. 5: f = 1/2 (avg + max) + alpha avg + beta max, of the global average and maximum over H x W.

    Args:
        x: (B, C, H, W).
        pool_logits: (2,), alpha and beta before their sigmoid.

    Returns:
        (B, C), float32 at least.
    """
    dtype = computing_dtype(x)
    avg = x.mean((2, 3), dtype=dtype)  # B C
    max = x.amax((2, 3)).to(dtype)  # B C
    weights = pool_logits.sigmoid().to(dtype)
    return 0.5 * (avg + max) + weights[0] * avg + weights[1] * max


class HybridChannelAttention(nn.Module):
    """HAM's channel half alone: A = sigmoid(conv1d_k(f)), F' = A * x, with f as in `adaptive_pool` (Eq. 5-7, Eq. 1).

    (B, C, H, W) to the same shape, dtype and memory format. Adds k + 2 parameters, k = |log2(C)/2 + 1/2|_odd.

    Args:
        channels: C, the channels of the feature map.
        adaptive: Train alpha and beta; without, f = avg + max, which is what both at 0.5 make of it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int, adaptive: bool = True, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        # Logits of (alpha, beta). transformers renames parameters with 'beta' or 'gamma' in their names, so they have
        # neither.
        if adaptive:
            self.pool_logits = nn.Parameter(torch.zeros(2, **dd))
        else:
            self.register_buffer('pool_logits', torch.zeros(2, **dd), persistent=False)
        k = channel_kernel_size(channels)
        self.channel_conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, **dd)

    @property
    def alpha(self) -> torch.Tensor:
        """Weight of the average-pooled features, a scalar in (0, 1)."""
        return self.pool_logits[0].sigmoid()

    @property
    def beta(self) -> torch.Tensor:
        """Weight of the max-pooled features, a scalar in (0, 1)."""
        return self.pool_logits[1].sigmoid()

    def channel_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Channel attention before its sigmoid, the argument of sigma in Eq. 7: (B, C), float32 at least."""
        # No shape below depends on it, so a wrong width would give a wrong attention in silence.
        _assert(x.shape[1] == self.channels, 'attention on an input with another number of channels than its own')
        f = adaptive_pool(x, self.pool_logits)
        return convolve_channels(f, self.channel_conv.weight.to(f.dtype).view(-1), self.channel_conv.kernel_size[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return self.channel_logits(x).sigmoid().to(x.dtype)[:, :, None, None] * x

    def extra_repr(self) -> str:
        """What print shows in the brackets."""
        return f'{self.channels}'


class HybridAttention(HybridChannelAttention):
    r"""Channel attention, then one spatial attention for the important and one for the sub-important channels.

    It takes and returns a feature map of shape (B, C, H, W), of the same dtype and memory format, and stands after the
    last norm of a residual branch, before the shortcut is added. That is where timm puts an `attn_layer`:

        timm.create_model('resnet50', block_args=dict(attn_layer=timm_ham.HybridAttention))

    Channel attention (Eq. 5-7), with global average and max pool over H x W:

        f = 1/2 (avg + max) + alpha avg + beta max,    A = sigmoid(conv1d_k(f)),    F' = A * x

    Channel separation (Eq. 8, Algorithm 1): the C_im channels with the largest attention of each sample are important,
    F1 = important * F', F2 = (1 - important) * F'. With ties at the C_im-th value more than C_im are important.

    Spatial attention (Eq. 9-10, Eq. 3-4), with one shared convolution and norm:

        S_i = sigmoid(relu(bn(conv_7x7([sum_channels(F_i) / n_i; max_channels(F_i)])))),    F'' = S_1 F1 + S_2 F2

    Adds k + 2 * kernel_size^2 + 4 parameters, k = |log2(C)/2 + 1/2|_odd: about 105, whatever the width.

    NOTE alpha and beta are kept inside (0, 1), as the paper has them, by a sigmoid; they start at 0.5.
    NOTE channels are ranked before the sigmoid, in float32 at least: the order is the same, saturation and bfloat16
    would add ties. The masks carry no gradient.
    NOTE n_1 = C_im and n_2 = C - C_im also under ties; the maximum is over all C channels, masked zeros included.
    NOTE both groups pass the norm as one batch of 2B, so its running statistics describe what it sees in training.

    Args:
        channels: C, the channels of the feature map, at least 4.
        separation_rate: Share of the channels that are important, lambda in the paper, 0 < rate < 1.
        kernel_size: Size of the spatial convolution, odd.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        channels: int,
        separation_rate: float = 0.6,
        kernel_size: int = 7,
        device=None,
        dtype=None,
    ):
        if channels < 4:
            raise ValueError(f'channels must be at least 4, to have two groups of at least 2, but is {channels}')
        if not 0 < separation_rate < 1:
            raise ValueError(f'separation_rate must be between 0 and 1, but is {separation_rate}')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and positive, but is {kernel_size}')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, **dd)
        self.important_channels = num_important_channels(channels, separation_rate)
        self.spatial_conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.spatial_norm = nn.BatchNorm2d(1, **dd)

    def separate(self, logits: torch.Tensor) -> torch.Tensor:
        """Algorithm 1: (B, C) logits to a (B, C) mask, True where a channel is important."""
        nth = logits.topk(self.important_channels, dim=1).values[:, -1:]
        return logits >= nth

    def groups(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eq. 1 and 2: (B, C, H, W) to the channels' logits, (B, C), and to the groups F1 and F2, of x's shape each."""
        logits = self.channel_logits(x)
        refined = logits.sigmoid().to(x.dtype)[:, :, None, None] * x  # F', Eq. 1
        important = self.separate(logits).to(x.dtype)[:, :, None, None]
        return logits, important * refined, (1 - important) * refined  # Eq. 2

    def spatial_attention(self, f1: torch.Tensor, f2: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Eq. 9 and 10: the groups, (B, C, H, W) each, to their attention maps S_1 and S_2, (B, 1, H, W) each."""
        n1, n2 = self.important_channels, self.channels - self.important_channels
        avg = torch.cat([f1.sum(1, keepdim=True) / n1, f2.sum(1, keepdim=True) / n2])  # 2B 1 H W
        max = torch.cat([f1.amax(1, keepdim=True), f2.amax(1, keepdim=True)])  # 2B 1 H W
        maps = self.spatial_norm(self.spatial_conv(torch.cat([avg, max], dim=1)))
        maps = maps.relu().sigmoid()  # 2B 1 H W
        batch = f1.shape[0]  # chunk(2) would fix the batch size of an exported graph
        return maps[:batch], maps[batch:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape, dtype and memory format."""
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript leaves out what stands under just this condition
            if fused_applies(self, x):
                return hybrid_attention(self, x)
        _, f1, f2 = self.groups(x)
        s1, s2 = self.spatial_attention(f1, f2)
        return s1 * f1 + s2 * f2  # Eq. 3-4

    def extra_repr(self) -> str:
        """What print shows in the brackets."""
        return f'{self.channels}, important_channels={self.important_channels}'
