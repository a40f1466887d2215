"""What HAM attends to: the attentions inside its modules, for given images."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Dict

import torch
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.layers import HybridAttention

__all__ = ['HamMaps', 'ham_modules', 'inspect']


@dataclass(frozen=True)
class HamMaps:
    """What one HybridAttention computes for B feature maps (C, H, W). Equation numbers are those of layers/ham.py.

    alpha: Weight of the average-pooled features, in (0, 1), Eq. 5.
    beta: Weight of the max-pooled features, in (0, 1), Eq. 5.
    channel_attention: A, (B, C) in (0, 1), float32 at least, Eq. 7.
    important: bool (B, C), which channels are important; the others are sub-important. Eq. 8.
    spatial_important: S_1, (B, H, W) in [0.5, 1), over the important channels, Eq. 9.
    spatial_sub_important: S_2, (B, H, W) in [0.5, 1), over the sub-important channels, Eq. 10.
    """

    alpha: float
    beta: float
    channel_attention: torch.Tensor
    important: torch.Tensor
    spatial_important: torch.Tensor
    spatial_sub_important: torch.Tensor


def ham_modules(model: nn.Module) -> Dict[str, HybridAttention]:
    """The HAM modules of a network by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HybridAttention)}


def _maps(module: HybridAttention, x: torch.Tensor) -> HamMaps:
    logits, f1, f2 = module.groups(x)
    s1, s2 = module.spatial_attention(f1, f2)
    return HamMaps(
        alpha=module.alpha.item(),
        beta=module.beta.item(),
        channel_attention=logits.sigmoid(),
        important=module.separate(logits),
        spatial_important=s1[:, 0],
        spatial_sub_important=s2[:, 0],
    )


@torch.no_grad()
def inspect(model: nn.Module, images: torch.Tensor) -> Dict[str, HamMaps]:
    """The attentions inside every HAM module of a network, in evaluation mode.

        maps = timm_ham.inspect(model, images)
        maps['stages.2.2.se'].channel_attention  # (B, 64)

    They are computed beside the forward pass, from each module's input, so that whichever path the module itself takes,
    the network's output is untouched. So are its mode, its running statistics and its hooks.

    Args:
        model: A network with HybridAttention modules.
        images: As the network takes them, (B, 3, H, W), on its device.

    Returns:
        The path of each module to its maps, in the order in which they run.

    Raises:
        TimmHamError: If there is no HybridAttention in the network.
    """
    modules = ham_modules(model)
    if not modules:
        raise TimmHamError(
            f'{type(model).__name__} has no HAM module to look into: choose a model such as resnet20_ham, or '
            'timm_ham.add_attention one'
        )
    found: Dict[str, HamMaps] = {}

    def look(name: str, module: HybridAttention, inputs: Any) -> None:
        found[name] = _maps(module, inputs[0])

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found
