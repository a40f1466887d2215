"""An attention put into an existing timm network, and the registered model by which such a network is loaded again."""

import copy
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, List, Literal, Optional, Set, Tuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import (
    CecaModule,
    DropPath,
    EcaModule,
    EffectiveSEModule,
    GatherExcite,
    GlobalContext,
    GroupNorm,
    LayerNorm2d,
    LayerScale2d,
    RmsNorm2d,
    SEModule,
    get_attn,
)
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._input import update_model_args
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.senet import SEModule as LegacySEModule
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_ham.errors import TimmHamError
from timm_ham.layers import ABLATIONS, AFTER_STAGES, ATTENTIONS, HybridAttention
from timm_ham.models.hub import with_checked_weights
from timm_ham.models.preact import PreActBlock
from timm_ham.models.tracing import LayerTracer

__all__ = ['IdentityStart', 'add_attention']

# What `replace` takes out: modules that weigh a feature map and give back its shape.
REPLACEABLE = (
    SEModule,
    LegacySEModule,
    SqueezeExcite,
    EffectiveSEModule,
    EcaModule,
    CecaModule,
    CbamModule,
    LightCbamModule,
    GlobalContext,
    GatherExcite,
    HybridAttention,
)
# Blocks that end their residual branch with an attention, or None, called `se`.
SLOTTED = (BasicBlock, Bottleneck, Bottle2neck, PreActBlock)
NORMS = (_BatchNorm, nn.GroupNorm, GroupNorm, LayerNorm2d, RmsNorm2d)
# What may stand between the last norm of a residual branch and the addition.
BETWEEN = (DropPath, LayerScale2d, nn.Identity, nn.Dropout, *REPLACEABLE)


class IdentityStart(nn.Module):
    """x + gate * (attention(x) - x) with a trained scalar gate that starts at zero, so at first it is x itself.

    (B, C, H, W) to the same shape.
    """

    def __init__(self, attention: nn.Module, device=None, dtype=None):
        super().__init__()
        self.attention = attention
        self.gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return x + self.gate.to(x.dtype) * (self.attention(x) - x)


def apply_attention(self, input: Tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a module whose output goes through its own `attention`; the signature is what TorchScript reads.

    A hook, because a wrapper around the module would rename the pretrained weights in it.
    """
    return self.attention(output)


@dataclass(frozen=True)
class Place:
    """Where an attention goes.

    name: Path of a module. Its output has the shape that the attention will see.
    how: In place of that module; into its empty attribute `se`; or behind it.
    """

    name: str
    how: Literal['replace', 'se', 'behind']

    def put(self, model: nn.Module, attention: nn.Module) -> None:
        """Install the attention."""
        module = model.get_submodule(self.name)
        if self.how == 'replace':
            model.set_submodule(self.name, attention)
        elif self.how == 'se':
            module.se = attention
        elif isinstance(module, nn.Sequential):
            module.add_module('attention', attention)
        elif isinstance(module, nn.ModuleDict):  # it runs whatever is put into it, in its own way: DenseNet's blocks
            _insert_behind(model, self.name, attention)
        else:
            module.attention = attention
            module.register_forward_hook(apply_attention)


def _insert_behind(model: nn.Module, name: str, attention: nn.Module) -> None:
    """Make the attention the next child of the Sequential that the named module is in."""
    parent_name, _, child = name.rpartition('.')
    parent = model.get_submodule(parent_name)
    for following, module in list(parent.named_children()):
        if following == child:
            parent.add_module(f'{child}_attention', attention)
        elif f'{child}_attention' in dict(parent.named_children()):
            delattr(parent, following)
            parent.add_module(following, module)


def _ancestors(node: fx.Node) -> Set[fx.Node]:
    seen, pending = {node}, [node]
    while pending:
        new = [source for source in pending.pop().all_input_nodes if source not in seen]
        seen.update(new)
        pending.extend(new)
    return seen


def _residual_norms(model: nn.Module) -> List[str]:
    """Paths of the last norm of each residual branch; none where the network can't be traced."""
    try:
        graph = LayerTracer(*NORMS, *BETWEEN).trace(model)
    except Exception:  # whatever the network's own code raises on a symbol in place of a tensor
        return []
    modules = dict(model.named_modules())

    def convolutions(nodes: Set[fx.Node]) -> int:
        return sum(node.op == 'call_module' and isinstance(modules[node.target], nn.Conv2d) for node in nodes)

    def last_norm(node: fx.Node) -> Optional[str]:
        while node.op == 'call_module' and isinstance(modules[node.target], BETWEEN):
            node = node.all_input_nodes[0]
        return node.target if node.op == 'call_module' and isinstance(modules[node.target], NORMS) else None

    norms = []
    for node in graph.nodes:
        if node.target in (operator.add, operator.iadd, torch.add) and len(node.all_input_nodes) == 2:
            left, right = node.all_input_nodes
            seen = {end: _ancestors(end) for end in (left, right)}
            costs = {end: convolutions(seen[end] - seen[other]) for end, other in ((left, right), (right, left))}
            branch, shortcut = sorted(costs, key=costs.get, reverse=True)
            # A shortcut has one convolution at most; two long paths are two branches of a wider network.
            if costs[shortcut] < min(2, costs[branch]) and last_norm(branch):
                norms.append(last_norm(branch))
    return norms


def _places(model: nn.Module, attention: str, replace: bool) -> List[Place]:
    modules = dict(model.named_modules())
    stages = [Place(info['module'], 'behind') for info in model.feature_info if info['module'] in modules]
    if attention in AFTER_STAGES:
        return stages[-3:]
    replaceable = [Place(name, 'replace') for name, module in modules.items() if isinstance(module, REPLACEABLE)]
    if replace and replaceable:
        return replaceable
    return (
        [Place(name, 'se') for name, module in modules.items() if isinstance(module, SLOTTED) and module.se is None]
        or [Place(name, 'behind') for name in _residual_norms(model)]
        or stages
    )


@torch.no_grad()
def _channels(model: nn.Module, places: List[Place]) -> Dict[Place, int]:
    """Channels at the places where a feature map (B, C, H, W) comes by; other places are left out."""
    widths = {info['module']: info['num_chs'] for info in model.feature_info}
    found: Dict[Place, int] = {}

    def look(place: Place, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4:
            channels = output.shape[1]
            if channels == widths.get(place.name, channels):  # it is not where channels come last
                found[place] = channels

    shadow = copy.deepcopy(model).to('meta').eval()  # shapes without computing, and without touching the model
    for place in places:
        shadow.get_submodule(place.name).register_forward_hook(partial(look, place))
    shadow(torch.empty(1, *resolve_model_data_config(model)['input_size'], device='meta'))
    return found


def add_attention(
    model: nn.Module, attention: str = 'ham', replace: bool = False, identity_start: bool = True, **attn_kwargs: Any
) -> nn.Module:
    """Put an attention into a convolutional network of timm, in place, and keep all of its other weights.

    It goes where timm's blocks hold one (`se`), else behind the last norm of each residual branch, else, where blocks
    offer no such place (ConvNeXt, DenseNet), behind each stage of the network's `feature_info`. 'rcca' always goes
    behind the last three stages.

        model = timm_ham.add_attention(timm.create_model('resnet50', pretrained=True), 'ham')

    `timm.models.save_for_hf(model, folder, safe_serialization=True)` then writes a folder that
    `timm.create_model('local-dir:folder', pretrained=True)` loads, once timm_ham is imported.

    Args:
        model: A network made by timm.create_model.
        attention: Key in ATTENTIONS or ABLATIONS, but not 'plain'.
        replace: Where the network has attention or squeeze-and-excitation modules, put it in their place, which loses
            what they have learnt; without, they stay and it comes on top of them.
        identity_start: Start as an exact identity, by a gate at zero: the network's output is bit for bit what it was
            (unless something was replaced), and training goes on from there.
        **attn_kwargs: Arguments for the attention, such as kernel_size=3.

    Returns:
        The same model.

    Raises:
        TimmHamError: If there is no such attention, or no place for it, or one was added before, or the model is not a
            whole one of timm's.
    """
    choices = {**ATTENTIONS, **ABLATIONS}
    layer = choices.pop(attention, None)
    if layer is None:
        choices.pop('plain', None)
        raise TimmHamError(f'unknown attention {attention!r}: choose from {", ".join(choices)}')
    if not isinstance(getattr(model, 'feature_info', None), list) or not hasattr(model, 'pretrained_cfg'):
        raise TimmHamError(f'{type(model).__name__} is no whole network of timm: make it by timm.create_model(name)')
    name = model.pretrained_cfg['architecture']
    if name == timm_with_attention.__name__:
        raise TimmHamError('an attention was added to this model before: start from the network as timm makes it')
    channels = _channels(model, _places(model, attention, replace))
    if not channels:
        raise TimmHamError(
            f'{name} ({type(model).__name__}) offers no place for {attention}: neither residual branches that end in a '
            'norm nor stages with feature maps (B, C, H, W); choose a convolutional network'
        )
    weight = next(model.parameters())
    options = {'device': weight.device, 'dtype': weight.dtype}
    for place, width in channels.items():
        module = get_attn(layer)(width, **attn_kwargs, **options)
        place.put(model, IdentityStart(module, **options) if identity_start else module)
    _record(
        model,
        base=name,
        attention=attention,
        replace=replace,
        identity_start=identity_start,
        attn_kwargs=attn_kwargs,
    )
    return model.train(model.training)


def _record(model: nn.Module, **arguments: Any) -> None:
    """Let timm's own saving write down how the network is to be made again."""
    update_model_args(model, **arguments)
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        'architecture': timm_with_attention.__name__,
    }


default_cfgs = generate_default_cfgs({'timm_with_attention': PretrainedCfg()})


def _network_with_attention(
    base: str,
    attention: str = 'ham',
    replace: bool = False,
    identity_start: bool = True,
    attn_kwargs: Optional[Dict[str, Any]] = None,
    **kwargs: Any,
) -> nn.Module:
    # The arguments may come from anyone's config.json: they describe a network, they do not load another's weights.
    if not timm.is_model(base) or 'checkpoint_path' in kwargs:
        raise TimmHamError(f'{base!r} with {sorted(kwargs)} is no network to add an attention to')
    return add_attention(timm.create_model(base, **kwargs), attention, replace, identity_start, **(attn_kwargs or {}))


@register_model
def timm_with_attention(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model `base` of timm after `add_attention`, whose arguments the others are."""
    if pretrained:
        kwargs = with_checked_weights('timm_with_attention', kwargs)
    return build_model_with_cfg(_network_with_attention, 'timm_with_attention', pretrained, **kwargs)
