"""The fast path of HybridAttention: the function of ham.py in few passes over memory, as one operator.

HAM's cost is memory traffic. The reference reads and writes the feature map some forty times, forward and backward.
Here the passes that touch it are few, and written for what runs them: ham_cpu.py, ham_triton.py for a GPU, and
ham_compiled.py for torch.compile, which sees no operator but the passes themselves. What lies between them works on
(B, C) numbers and on maps of one channel, and is here. The backward pass recomputes what it can from x: saved are x,
four descriptor maps and two normalized maps a sample.

Float16 and bfloat16 maps are computed on in float32, but for bfloat16's spatial convolution. Ranking, ties and their
gradients are those of the reference: a maximum's gradient is shared by all that attain it.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from timm_ham.layers import ham_compiled, ham_cpu
from timm_ham.layers.block_conv import Blocks
from timm_ham.layers.ham_passes import Inner, channel_shifts, computing_dtype, convolve_channels

__all__ = ['fused_applies', 'hybrid_attention', 'set_fused']


def _passes(x: Tensor) -> ModuleType:
    """What computes on the feature map, for x's device."""
    if x.device.type == 'cpu':
        return ham_cpu
    from timm_ham.layers import ham_triton  # needs a package that only builds of torch for GPUs bring

    return ham_triton


# Forward
# -------


def _groups(logits: Tensor, important: int) -> Tensor:
    """Algorithm 1: (B, C) logits to (B, 2, C), 1 where a channel is in the group, important and sub-important."""
    nth = logits.kthvalue(logits.shape[1] - important + 1, dim=1, keepdim=True).values
    mask = (logits >= nth).to(logits.dtype)
    return torch.stack([mask, 1 - mask], dim=1)


def _per_member(of_groups: Tensor, important: int, channels: int) -> Tensor:
    """(B, 2, ...) over the channels of each group."""
    return torch.stack([of_groups[:, 0] / important, of_groups[:, 1] / (channels - important)], dim=1)


def _activated(z: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """The spatial maps before their sigmoid: relu(z * weight + bias)."""
    return torch.addcmul(norm_bias.to(z.dtype), z, norm_weight.to(z.dtype)).relu_()


def _convolution_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else dtype


def _formatted(x: Tensor) -> Tensor:
    """x itself in one of the two memory formats that the passes know, else a contiguous copy."""
    known = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if known else x.contiguous()


def _attend(
    passes: ModuleType,
    x: Tensor,
    pool_logits: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Optional[Tensor],
    var: Optional[Tensor],
    important: int,
    eps: float,
) -> List[Tensor]:
    """The module's function; the norm uses the batch's statistics if it is not given any.

    Returns:
        Output, mean and variance, and for the backward pass: average and maximum over pixels (B, C), groups (B, 2, C),
        channel attention (B, C), descriptors in blocks, normalized maps in blocks, 1 / standard deviation.
    """
    dtype, (batch, channels) = computing_dtype(x), x.shape[:2]
    avg, top = passes.pool(x)
    alpha_beta = pool_logits.to(dtype).sigmoid()
    f = (0.5 + alpha_beta[0]) * avg + (0.5 + alpha_beta[1]) * top
    taps = channel_weight.flatten().to(dtype)
    logits = convolve_channels(f, taps, len(taps))
    groups, attention = _groups(logits, important), logits.sigmoid()
    weighted = groups * attention[:, None]

    blocks = Blocks.of(x, spatial_weight)
    described = passes.describe(x, weighted, _per_member(weighted, important, channels), blocks)
    reduced = _convolution_dtype(x, dtype)
    kernel = blocks.weight(spatial_weight.to(reduced))
    z = blocks.convolve(described.flatten(0, 1).to(reduced), kernel).to(dtype)
    mean = z.mean().view(1) if mean is None else mean.to(dtype, copy=True)
    z -= mean
    var = (torch.dot(z.flatten(), z.flatten()) / z.numel()).view(1) if var is None else var.to(dtype, copy=True)
    scale = (var + eps).rsqrt()
    z *= scale
    maps = _activated(z, norm_weight, norm_bias).sigmoid_()
    out = passes.apply(x, weighted, blocks.unblock(maps).view(batch, 2, -1))
    return [out, mean, var, avg, top, groups, attention, described, z, scale]


@torch.library.custom_op(
    'timm_ham::hybrid_attention',
    mutates_args=(),
    schema='(Tensor x, Tensor pool_logits, Tensor channel_weight, Tensor spatial_weight, Tensor norm_weight, '
    'Tensor norm_bias, Tensor? mean, Tensor? var, int important, float eps) -> Tensor[]',
)
def _forward(x, *others):
    with torch.autocast(x.device.type, enabled=False):
        return _attend(_passes(x), x, *others)


@_forward.register_fake
def _(x, pool_logits, channel_weight, spatial_weight, norm_weight, norm_bias, mean, var, important, eps):
    dtype, (batch, channels, height, width) = computing_dtype(x), x.shape
    p, q = Blocks.of(x, spatial_weight).size
    shapes = (
        [(1,)] * 2  # mean, variance
        + [(batch, channels)] * 2  # average, maximum
        + [(batch, 2, channels), (batch, channels)]  # groups, attention
        + [(batch, 2, 2 * p * q, height // p, width // q), (2 * batch, p * q, height // p, width // q), (1,)]
    )
    return [torch.empty_like(x), *(x.new_empty(shape, dtype=dtype) for shape in shapes)]


# Backward
# --------


def _maps_backward(
    dmaps: Tensor,
    described: Tensor,
    z: Tensor,
    scale: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    activated: Tensor,
    maps: Tensor,
    blocks: Blocks,
    batch_statistics: bool,
    reduced: torch.dtype,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the maps back to the descriptors: gradients of descriptors, in blocks, of weight and of the norm's two.

    dmaps, activated, maps: Gradient of the maps, the maps before their sigmoid and after it, in blocks.
    """
    # sigmoid'(y) = maps (1 - maps), and relu'(y) is 1 where y > 0
    dy = torch.ops.aten.threshold_backward(torch.ops.aten.sigmoid_backward(dmaps, maps), activated, 0)
    dbias = dy.sum().view(1)
    dweight = torch.dot(dy.flatten(), z.flatten()).view(1)
    if batch_statistics:
        dy.sub_(dbias / z.numel()).addcmul_(z, dweight / z.numel(), value=-1)
    dz = dy.mul_(scale * norm_weight.to(z.dtype))
    kernel = blocks.weight(spatial_weight.to(reduced))
    ddescribed, dkernel = blocks.convolve_backward(dz.to(reduced), described.flatten(0, 1).to(reduced), kernel)
    return ddescribed.to(z.dtype), blocks.weight_gradient(dkernel.to(z.dtype)), dweight, dbias


def _attend_backward(
    passes: ModuleType,
    gradient: Tensor,
    x: Tensor,
    pool_logits: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    avg: Tensor,
    top: Tensor,
    groups: Tensor,
    attention: Tensor,
    described: Tensor,
    z: Tensor,
    scale: Tensor,
    important: int,
    batch_statistics: bool,
) -> List[Tensor]:
    """Gradients of x and of the five parameters."""
    dtype, (batch, channels, height, width) = computing_dtype(x), x.shape
    blocks = Blocks.of(x, spatial_weight)
    gradient = gradient.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    tops = blocks.unblock(described.flatten(0, 1)).view(batch, 2, 2, -1)[:, :, 1]
    dmaps, ties = passes.products(x, gradient, groups, attention, tops)
    activated = _activated(z, norm_weight, norm_bias)
    maps = activated.sigmoid()
    ddescribed, dspatial, dweight, dbias = _maps_backward(
        blocks.block(dmaps.view(2 * batch, 1, height, width)),
        described,
        z,
        scale,
        spatial_weight,
        norm_weight,
        activated,
        maps,
        blocks,
        batch_statistics,
        _convolution_dtype(x, dtype),
    )
    davgs, dtops = blocks.unblock(ddescribed).view(batch, 2, 2, -1).unbind(2)
    alpha_beta = pool_logits.to(dtype).sigmoid()
    inner = Inner(
        groups,
        attention,
        blocks.unblock(maps).view(batch, 2, -1),
        tops,
        dtops,
        _per_member(davgs, important, channels),
        channel_weight.flatten().to(dtype),
        0.5 + alpha_beta,
        top,
        ties,
    )
    dx, dlogits, df = passes.input_gradient(x, gradient, inner)
    dpool = torch.stack([(df * avg).sum(), (df * top).sum()]) * alpha_beta * (1 - alpha_beta)
    f = inner.pool_weights[0] * avg + inner.pool_weights[1] * top
    dchannel = torch.stack([(dlogits * shift).sum() for shift in channel_shifts(f, channel_weight.numel())])
    return [
        dx,
        dpool.to(pool_logits.dtype),
        dchannel.view_as(channel_weight).to(channel_weight.dtype),
        dspatial.to(spatial_weight.dtype),
        dweight.to(norm_weight.dtype),
        dbias.to(norm_bias.dtype),
    ]


@torch.library.custom_op('timm_ham::hybrid_attention_backward', mutates_args=())
def _backward(gradient: Tensor, x: Tensor, saved: List[Tensor], important: int, batch_statistics: bool) -> List[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _attend_backward(_passes(x), gradient, x, *saved, important, batch_statistics)


@_backward.register_fake
def _(gradient, x, saved, important, batch_statistics):
    return [torch.empty_like(x), *(parameter.new_empty(parameter.shape) for parameter in saved[:5])]


def _save(ctx, inputs, output) -> None:
    x, *parameters = inputs[:6]
    ctx.options = inputs[8], inputs[6] is None
    ctx.save_for_backward(x, *parameters, *output[3:])


def _save_for_operator(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradients):
    if gradients[0] is None:  # nothing depends on the output
        return (None,) * 10
    x, *saved = ctx.saved_tensors
    return (*_backward(gradients[0], x, saved, *ctx.options), *[None] * 4)


def _refuse(ctx, gradients):
    raise NotImplementedError(
        'HybridAttention has no second derivative on its fast path: call timm_ham.set_fused(False) first'
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_operator)
_backward.register_autograd(_refuse)


class _Traced(torch.autograd.Function):
    """The same for torch.compile, which sees through it and joins its loops to those of its neighbours."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _attend(ham_compiled, *inputs)
        _save(ctx, inputs, output)
        return tuple(output[:3])

    @staticmethod
    def backward(ctx, gradient, *_):
        return (*_attend_backward(ham_compiled, gradient, *ctx.saved_tensors, *ctx.options), *[None] * 4)


# The module's door
# -----------------

_enabled = True
_HAS_TRITON = find_spec('triton') is not None
# Elements of a feature map from which on the fast path is one: below, the reference makes do with fewer calls. Measured
# on one core of a Xeon with AVX-512, at the shapes of ResNet-20 and ResNet-18.
SMALLEST_FORWARD = 1 << 18
SMALLEST_TRAINING = 1 << 16


def set_fused(enabled: bool) -> None:
    """Turn the fast path of HybridAttention on (as it is at the start) or off, for the whole process."""
    global _enabled
    _enabled = enabled


def _is_folded(module: nn.Module) -> bool:
    """Whether the spatial norm was folded into the convolution, which then has a bias."""
    return isinstance(module.spatial_norm, nn.Identity) and module.spatial_conv.bias is not None


def _smallest(module: nn.Module, x: Tensor) -> int:
    training = torch.is_grad_enabled() and (x.requires_grad or module.pool_logits.requires_grad)
    return SMALLEST_TRAINING if training else SMALLEST_FORWARD


def fused_applies(module: nn.Module, x: Tensor) -> bool:
    """Whether `hybrid_attention` takes this module and input; else they are the reference's.

    Traced and exported graphs get the reference, which is made of operators that every runtime knows.
    """
    return (
        _enabled
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and isinstance(x, Tensor)
        and (x.device.type == 'cpu' or (x.is_cuda and _HAS_TRITON))
        and x.dim() == 4
        and x.shape[1] == module.channels
        and x.is_floating_point()
        and x.numel() >= _smallest(module, x)
        and type(module.spatial_conv) is nn.Conv2d
        and (_is_folded(module) or (type(module.spatial_norm) is nn.BatchNorm2d and module.spatial_norm.affine))
    )


def hybrid_attention(module: nn.Module, x: Tensor) -> Tensor:
    """What HybridAttention computes of x, (B, C, H, W). Updates the running statistics in training."""
    norm = module.spatial_norm
    if _is_folded(module):
        bias = module.spatial_conv.bias
        scale, statistics, eps = torch.ones_like(bias), (torch.zeros_like(bias), torch.ones_like(bias)), 0.0
    else:
        batch_statistics = norm.training or norm.running_mean is None
        scale, bias, eps = norm.weight, norm.bias, norm.eps
        statistics = (None, None) if batch_statistics else (norm.running_mean, norm.running_var)
    inputs = (
        _formatted(x),
        module.pool_logits,
        module.channel_conv.weight,
        module.spatial_conv.weight,
        scale,
        bias,
        *statistics,
        module.important_channels,
        eps,
    )
    if torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            out, mean, var = _Traced.apply(*inputs)
    else:
        out, mean, var, *_ = _forward(*inputs)
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            count = 2 * x.shape[0] * x.shape[2] * x.shape[3]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    return out
