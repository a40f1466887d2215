"""Batch norms folded into the convolutions before them, for inference."""

import copy

from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_ham.errors import TimmHamError
from timm_ham.models.tracing import LayerTracer

__all__ = ['fuse']


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a network, for inference, whose batch norms are part of the convolutions before them.

    HAM's spatial norms are too. The copy is of the same class and gives the same output but for rounding; it is in
    evaluation mode and not for training. A norm that does not directly follow a convolution stays.

    Args:
        model: Any network of timm that torch.fx can trace.

    Raises:
        TimmHamError: If it can not be traced.
    """
    fused = copy.deepcopy(model).eval()
    try:
        graph = LayerTracer(_BatchNorm).trace(fused)
    except Exception as error:
        raise TimmHamError(
            f'{type(model).__name__} can not be traced by torch.fx, so its norms stay: {error}'
        ) from error
    modules = dict(fused.named_modules())
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == 'call_module' else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm._forward_hooks:
            continue
        source = node.all_input_nodes[0]
        conv = modules.get(source.target) if source.op == 'call_module' else None
        if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
            fused.set_submodule(source.target, fuse_conv_bn_eval(conv, norm))
            after = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
            fused.set_submodule(node.target, after.eval())
    return fused
