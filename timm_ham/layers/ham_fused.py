"""The fast path of HybridAttention on a CPU: the function of ham.py in as few passes over memory as torch allows.

HAM's cost is memory traffic. The reference reads and writes the feature map some forty times, forward and backward.
Here the map is worked on in pieces that stay in the processor's cache, as matrices (b, C, H W) in either memory format:

* Everything that selects a group of channels is a product with the (b, 2, C) matrix of the groups, and so is every sum
  over channels: `groups @ x` makes descriptors, `groups^T @ maps` spreads maps over the channels again.
* The backward pass recomputes what it can from x. Saved are x, four descriptor maps and two normalized maps a sample.
* The spatial convolution is done over blocks of pixels, block_conv.py.

Float16 and bfloat16 maps are computed on in float32, but for bfloat16's spatial convolution. Ranking, ties and their
gradients are those of the reference: a maximum's gradient is shared by all that attain it.
"""

from dataclasses import dataclass
from typing import Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ham.layers.block_conv import Blocks

__all__ = ['fused_applies', 'hybrid_attention', 'set_fused']

CHUNK = 1 << 17  # elements of a piece: with its scratch, what a core's second-level cache holds


# The feature map in pieces
# -------------------------


def as_matrix(x: Tensor, channels_last: bool) -> Tensor:
    """(B, C, H, W) in the given memory format as (B, C, H W), without copying."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2) if channels_last else x.flatten(2)


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


# Forward
# -------


def channel_windows(f: Tensor, kernel_size: int) -> Tensor:
    """What a convolution along the channels sees, zeros outside: (B, C) to (B, C, k)."""
    return F.pad(f, (kernel_size // 2, kernel_size // 2)).unfold(1, kernel_size, 1)


def _pool(x: Tensor, pieces: Pieces) -> Tuple[Tensor, Tensor]:
    """(B, C, H W) to the average and the maximum over pixels, (B, C) each."""
    avg, top = (torch.empty(x.shape[:2], dtype=pieces.dtype) for _ in range(2))
    scratch = None if x.dtype == pieces.dtype else pieces.scratch()
    for piece in pieces:
        part = in_dtype(x, piece, pieces.dtype, scratch)
        avg[piece] = part.sum(2)
        top[piece] = pieces.pixel_max(part)
    return avg.div_(x.shape[2]), top


def _groups(logits: Tensor, important: int) -> Tensor:
    """Algorithm 1: (B, C) logits to (B, 2, C), 1 where a channel is in the group, important and sub-important."""
    nth = logits.kthvalue(logits.shape[1] - important + 1, dim=1, keepdim=True).values
    mask = (logits >= nth).to(logits.dtype)
    return torch.stack([mask, 1 - mask], dim=1)


def _describe(x: Tensor, pieces: Pieces, weighted: Tensor, averaging: Tensor, blocks: Blocks) -> Tensor:
    """Sum / n and maximum over the channels of each group, in blocks: (B, 2 groups, 2 p q, H / p, W / q)."""
    p, q = blocks.size
    described = torch.empty(len(x), 2, 2 * p * q, blocks.height // p, blocks.width // q, dtype=pieces.dtype)
    avg, top = blocks.pixels(described).unbind(2)
    convert = None if x.dtype == pieces.dtype else pieces.scratch()
    # Maxima over few channels are slow where those lie next to each other: turn the piece around.
    turn = pieces.channels_last and x.shape[1] < 32
    scratch = (Pieces(pieces.shape, False, pieces.dtype) if turn else pieces).scratch()
    turned = torch.empty_like(scratch) if turn else None
    for piece in pieces:
        part = in_dtype(x, piece, pieces.dtype, convert)
        avg[piece] = torch.bmm(averaging[piece], part).view(avg[piece].shape)
        if turned is not None:
            part = turned[: len(part)].copy_(part)
        product = scratch[: len(part)]
        for group in range(2):
            torch.mul(part, weighted[piece, group, :, None], out=product)
            top[piece, group] = product.amax(1).view(top[piece, group].shape)
    return described


def _apply(x: Tensor, pieces: Pieces, weighted: Tensor, maps: Tensor, out: Tensor) -> None:
    """out = (weighted^T @ maps) * x."""
    scratch = pieces.scratch()
    for piece in pieces:
        factor = pieces.spread(weighted[piece], maps[piece], scratch[: piece.stop - piece.start])
        if out.dtype == pieces.dtype:
            torch.mul(factor, x[piece], out=out[piece])
        else:
            out[piece] = factor.mul_(x[piece])


def _convolution_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else dtype


def _formatted(x: Tensor) -> Tensor:
    """x itself in one of the two memory formats that the passes know, else a contiguous copy."""
    known = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if known else x.contiguous()


def _pieces(x: Tensor) -> Pieces:
    return Pieces(x.shape, not x.is_contiguous(), torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op('timm_ham::hybrid_attention', mutates_args=())
def _forward(
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
        Output, mean and variance, and for the backward pass: average and maximum over pixels (B, C), logits (B, C),
        descriptors in blocks, normalized maps in blocks, 1 / standard deviation.
    """
    with torch.autocast('cpu', enabled=False):
        pieces = _pieces(x)
        dtype, (batch, channels, height, width) = pieces.dtype, x.shape
        matrix = as_matrix(x, pieces.channels_last)
        avg, top = _pool(matrix, pieces)
        alpha_beta = pool_logits.to(dtype).sigmoid()
        f = (0.5 + alpha_beta[0]) * avg + (0.5 + alpha_beta[1]) * top
        taps = channel_weight.flatten().to(dtype)
        logits = (channel_windows(f, len(taps)) * taps).sum(-1)
        weighted = _groups(logits, important) * logits.sigmoid()[:, None]
        sizes = weighted.new_tensor([important, channels - important])[:, None]

        blocks = Blocks(height, width, spatial_weight.shape[-1])
        described = _describe(matrix, pieces, weighted, weighted / sizes, blocks)
        reduced = _convolution_dtype(x, dtype)
        kernel = blocks.weight(spatial_weight.to(reduced))
        z = blocks.convolve(described.flatten(0, 1).to(reduced), kernel).to(dtype)
        mean = z.mean().view(1) if mean is None else mean.to(dtype, copy=True)
        z -= mean
        var = (torch.dot(z.flatten(), z.flatten()) / z.numel()).view(1) if var is None else var.to(dtype, copy=True)
        scale = (var + eps).rsqrt()
        z *= scale
        maps = torch.addcmul(norm_bias.to(dtype), z, norm_weight.to(dtype)).relu_().sigmoid_()
        out = torch.empty_like(x)
        maps = blocks.unblock(maps).view(batch, 2, -1)
        _apply(matrix, pieces, weighted, maps, as_matrix(out, pieces.channels_last))
    return [out, mean, var, avg, top, logits, described, z, scale]


@_forward.register_fake
def _(x, pool_logits, channel_weight, spatial_weight, norm_weight, norm_bias, mean, var, important, eps):
    dtype, (batch, channels, height, width) = torch.promote_types(x.dtype, torch.float32), x.shape
    blocks = Blocks(height, width, spatial_weight.shape[-1])
    p, q = blocks.size
    one, few = (x.new_empty(shape, dtype=dtype) for shape in ((1,), (batch, channels)))
    described = x.new_empty((batch, 2, 2 * p * q, height // p, width // q), dtype=dtype)
    z = x.new_empty((2 * batch, p * q, height // p, width // q), dtype=dtype)
    return [torch.empty_like(x), one, one.clone(), few, few.clone(), few.clone(), described, z, one.clone()]


# Backward
# --------


def _products(x: Tensor, gradient: Tensor, pieces: Pieces, weighted: Tensor) -> Tensor:
    """Gradient of the spatial maps, weighted @ (x * gradient): (B, 2, H W)."""
    sums = torch.empty(len(x), 2, x.shape[2], dtype=pieces.dtype)
    product = pieces.scratch()
    for piece in pieces:
        part = product[: piece.stop - piece.start]
        if x.dtype == pieces.dtype:
            torch.mul(x[piece], gradient[piece], out=part)
        else:
            part.copy_(x[piece]).mul_(gradient[piece])
        torch.bmm(weighted[piece], part, out=sums[piece])
    return sums


def _maps_backward(
    dmaps: Tensor,
    described: Tensor,
    z: Tensor,
    scale: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    blocks: Blocks,
    batch_statistics: bool,
    reduced: torch.dtype,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the maps back to the descriptors: gradients of descriptors, in blocks, of weight and of the norm's two.

    dmaps: Gradient of the maps' sigmoid, in blocks; it is overwritten.
    """
    weight = norm_weight.to(z.dtype)
    y = torch.addcmul(norm_bias.to(z.dtype), z, weight).relu_()
    maps = y.sigmoid()
    # sigmoid'(y) = maps (1 - maps), and relu'(y) is 1 where y > 0
    dy = torch.ops.aten.threshold_backward(torch.ops.aten.sigmoid_backward(dmaps, maps), y, 0)
    dbias = dy.sum().view(1)
    dweight = torch.dot(dy.flatten(), z.flatten()).view(1)
    if batch_statistics:
        dy.sub_(dbias / z.numel()).addcmul_(z, dweight / z.numel(), value=-1)
    dz = dy.mul_(scale * weight)
    kernel = blocks.weight(spatial_weight.to(reduced))
    ddescribed, dkernel = blocks.convolve_backward(dz.to(reduced), described.flatten(0, 1).to(reduced), kernel)
    return ddescribed.to(z.dtype), blocks.weight_gradient(dkernel.to(z.dtype)), dweight, dbias


@dataclass(frozen=True)
class _Inner:
    """What the gradient of x is made of, a sample in each row.

    groups, attention: Which group a channel is in, (B, 2, C), and its weight, (B, C).
    maps, tops, dtops, davgs: Spatial maps, group maxima, their gradients, gradients of the group sums, (B, 2, H W).
    taps: Of the convolution along the channels, (k,).
    pool_weights: Of average and maximum in Eq. 5, (2,).
    top: Maximum over pixels, (B, C).
    """

    groups: Tensor
    attention: Tensor
    maps: Tensor
    tops: Tensor
    dtops: Tensor
    davgs: Tensor
    taps: Tensor
    pool_weights: Tensor
    top: Tensor


def _input_gradient(x: Tensor, gradient: Tensor, pieces: Pieces, inner: _Inner, out: Tensor) -> Tuple[Tensor, Tensor]:
    """Write the gradient of x; returns those of the channel logits and of f (Eq. 5), (B, C) each."""
    dlogits, df = torch.empty_like(inner.attention), torch.empty_like(inner.attention)
    # The zeros of a group's masked channels attain its maximum too where that is zero.
    masked_ties = torch.eq(inner.tops, 0, out=torch.empty_like(inner.tops))
    masked_ties *= x.shape[1] - inner.groups.sum(2, keepdim=True)
    first, second = pieces.scratch(), pieces.scratch()
    x_scratch, g_scratch = (None if x.dtype == pieces.dtype else pieces.scratch() for _ in range(2))
    for piece in pieces:
        part = in_dtype(x, piece, pieces.dtype, x_scratch)
        upper = in_dtype(gradient, piece, pieces.dtype, g_scratch)
        a, b = first[: len(part)], second[: len(part)]
        groups, attention = inner.groups[piece], inner.attention[piece, :, None]
        # Gradient of F' = A x. 1 where a channel has its group's maximum, by the product that the maximum was made of:
        torch.mul(part, attention, out=a)
        a.eq_(pieces.choose(groups, inner.tops[piece], b))
        ties = torch.bmm(groups, a).add_(masked_ties[piece])
        a.mul_(pieces.spread(groups, inner.dtops[piece] / ties, b))
        a.addcmul_(upper, pieces.spread(groups, inner.maps[piece], b))
        pieces.spread_onto(a, groups, inner.davgs[piece])
        # A's gradient, its sigmoid's, and the convolution's along the channels
        dattention = torch.mul(part, a, out=b).sum(2)
        weight = inner.attention[piece]
        dlogits[piece] = dattention * weight * (1 - weight)
        df[piece] = (channel_windows(dlogits[piece], len(inner.taps)) * inner.taps.flip(0)).sum(-1)
        # x's: by A, by the average, and by the maximum over pixels
        torch.eq(part, inner.top[piece, :, None], out=b)
        davg = df[piece] * (inner.pool_weights[0] / x.shape[2])
        dtop = df[piece] * inner.pool_weights[1] / b.sum(2)
        b.mul_(dtop[:, :, None]).add_(davg[:, :, None])
        if out.dtype == pieces.dtype:
            torch.addcmul(b, a, attention, out=out[piece])
        else:
            out[piece] = b.addcmul_(a, attention)
    return dlogits, df


@torch.library.custom_op('timm_ham::hybrid_attention_backward', mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    pool_logits: Tensor,
    channel_weight: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    avg: Tensor,
    top: Tensor,
    logits: Tensor,
    described: Tensor,
    z: Tensor,
    scale: Tensor,
    important: int,
    batch_statistics: bool,
) -> List[Tensor]:
    """Gradients of x and of the five parameters."""
    with torch.autocast('cpu', enabled=False):
        pieces = _pieces(x)
        dtype, (batch, channels, height, width) = pieces.dtype, x.shape
        blocks = Blocks(height, width, spatial_weight.shape[-1])
        matrix = as_matrix(x, pieces.channels_last)
        memory_format = torch.channels_last if pieces.channels_last else torch.contiguous_format
        upper = as_matrix(gradient.contiguous(memory_format=memory_format), pieces.channels_last)
        groups, attention = _groups(logits, important), logits.sigmoid()
        weighted = groups * attention[:, None]
        sizes = weighted.new_tensor([important, channels - important])[:, None]

        dmaps = _products(matrix, upper, pieces, weighted)
        ddescribed, dspatial, dweight, dbias = _maps_backward(
            blocks.block(dmaps.view(2 * batch, 1, height, width)),
            described,
            z,
            scale,
            spatial_weight,
            norm_weight,
            norm_bias,
            blocks,
            batch_statistics,
            _convolution_dtype(x, dtype),
        )
        davgs, dtops = blocks.unblock(ddescribed).view(batch, 2, 2, -1).unbind(2)
        tops = blocks.unblock(described.flatten(0, 1)).view(batch, 2, 2, -1)[:, :, 1]
        maps = torch.addcmul(norm_bias.to(dtype), z, norm_weight.to(dtype)).relu_().sigmoid_()
        alpha_beta = pool_logits.to(dtype).sigmoid()
        inner = _Inner(
            groups,
            attention,
            blocks.unblock(maps).view(batch, 2, -1),
            tops,
            dtops,
            davgs / sizes,
            channel_weight.flatten().to(dtype),
            0.5 + alpha_beta,
            top,
        )
        dx = torch.empty_like(x)
        dlogits, df = _input_gradient(matrix, upper, pieces, inner, as_matrix(dx, pieces.channels_last))
        dpool = torch.stack([(df * avg).sum(), (df * top).sum()]) * alpha_beta * (1 - alpha_beta)
        f = inner.pool_weights[0] * avg + inner.pool_weights[1] * top
        dchannel = torch.einsum('bc,bck->k', dlogits, channel_windows(f, channel_weight.numel()))
    return [
        dx,
        dpool.to(pool_logits.dtype),
        dchannel.view_as(channel_weight).to(channel_weight.dtype),
        dspatial.to(spatial_weight.dtype),
        dweight.to(norm_weight.dtype),
        dbias.to(norm_bias.dtype),
    ]


@_backward.register_fake
def _(gradient, x, pool_logits, channel_weight, spatial_weight, norm_weight, norm_bias, *saved_and_options):
    parameters = (pool_logits, channel_weight, spatial_weight, norm_weight, norm_bias)
    return [torch.empty_like(x), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


def _save(ctx, inputs, output) -> None:
    x, *parameters = inputs[:6]
    ctx.important, ctx.batch_statistics = inputs[8], inputs[6] is None
    ctx.save_for_backward(x, *parameters, *output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradients):
    if gradients[0] is None:  # nothing depends on the output
        return (None,) * 10
    return (*_backward(gradients[0], *ctx.saved_tensors, ctx.important, ctx.batch_statistics), *[None] * 4)


def _refuse(ctx, gradients):
    raise NotImplementedError(
        'HybridAttention has no second derivative on its fast path: call timm_ham.set_fused(False) first'
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


# The module's door
# -----------------

_enabled = True


def set_fused(enabled: bool) -> None:
    """Turn the fast path of HybridAttention on (as it is at the start) or off, for the whole process."""
    global _enabled
    _enabled = enabled


def _is_folded(module: nn.Module) -> bool:
    """Whether the spatial norm was folded into the convolution, which then has a bias."""
    return isinstance(module.spatial_norm, nn.Identity) and module.spatial_conv.bias is not None


def fused_applies(module: nn.Module, x: Tensor) -> bool:
    """Whether `hybrid_attention` takes this module and input; else they are the reference's.

    Traced and exported graphs get the reference, which is made of operators that every runtime knows.
    """
    return (
        _enabled
        and not torch.jit.is_tracing()
        and isinstance(x, Tensor)
        and x.device.type == 'cpu'
        and x.dim() == 4
        and x.shape[1] == module.channels
        and x.is_floating_point()
        and x.numel() > 0
        and type(module.spatial_conv) is nn.Conv2d
        and (_is_folded(module) or (type(module.spatial_norm) is nn.BatchNorm2d and module.spatial_norm.affine))
        and not torch.compiler.is_exporting()
    )


def hybrid_attention(module: nn.Module, x: Tensor) -> Tensor:
    """What HybridAttention computes of x, (B, C, H, W), on a CPU. Updates the running statistics in training."""
    norm = module.spatial_norm
    if _is_folded(module):
        bias = module.spatial_conv.bias
        scale, statistics, eps = torch.ones_like(bias), (torch.zeros_like(bias), torch.ones_like(bias)), 0.0
    else:
        batch_statistics = norm.training or norm.running_mean is None
        scale, bias, eps = norm.weight, norm.bias, norm.eps
        statistics = (None, None) if batch_statistics else (norm.running_mean, norm.running_var)
    out, mean, var, *_ = _forward(
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
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            count = 2 * x.shape[0] * x.shape[2] * x.shape[3]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    return out
