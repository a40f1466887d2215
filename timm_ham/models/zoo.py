"""The registered models, `<architecture>_<attention>`: two tables and the loop that registers their product in timm."""

from typing import Any, Callable, Dict

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models.resnet import Bottleneck
from torch import nn

from timm_ham.layers import ABLATIONS, AFTER_STAGES, ATTENTIONS
from timm_ham.models.hub import with_checked_weights
from timm_ham.models.network import ResidualNetwork
from timm_ham.models.preact import PreActBlock
from timm_ham.models.weights import bundled_cfgs

__all__ = ['ARCHITECTURES', 'MODELS']


def _cifar_resnet(depth: int) -> Dict[str, Any]:
    """6n + 2 layers: https://arxiv.org/abs/1512.03385, Section 4.2."""
    return dict(depths=((depth - 2) // 6,) * 3, widths=(16, 32, 64), stem_width=16)


def _stl_resnet(*depths: int, **changed) -> Dict[str, Any]:
    """The widths and depths of https://arxiv.org/abs/1512.03385, Table 1, behind a 3x3 stem and a max pool."""
    return dict(dict(depths=depths, widths=(64, 128, 256, 512), stem_width=64, stem_pool=True), **changed)


# Arguments of ResidualNetwork. The first six are for 32x32 images, those with a stem_pool for 96x96.
ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    'resnet20': _cifar_resnet(20),
    'resnet32': _cifar_resnet(32),
    'resnet56': _cifar_resnet(56),
    'resnet110': _cifar_resnet(110),
    'wide_resnet16_8': dict(depths=(2, 2, 2), widths=(128, 256, 512), stem_width=16, block=PreActBlock),
    'resnext29_8x64d': dict(
        depths=(3, 3, 3),
        widths=(64, 128, 256),
        stem_width=64,
        block=Bottleneck,
        block_args=dict(cardinality=8, base_width=64),
    ),
    'resnet18': _stl_resnet(2, 2, 2, 2),
    'resnet34': _stl_resnet(3, 4, 6, 3),
    'resnet50': _stl_resnet(3, 4, 6, 3, block=Bottleneck),
    'resnet101': _stl_resnet(3, 4, 23, 3, block=Bottleneck),
    'wide_resnet18_2': _stl_resnet(2, 2, 2, 2, widths=(128, 256, 512, 1024), stem_width=128),
    'resnext50_32x4d': _stl_resnet(3, 4, 6, 3, block=Bottleneck, block_args=dict(cardinality=32, base_width=4)),
}

MODELS: Dict[str, Dict[str, Any]] = {
    f'{name}_{attention}': {**arguments, 'stage_attn_layer' if attention in AFTER_STAGES else 'attn_layer': layer}
    for name, arguments in ARCHITECTURES.items()
    for attention, layer in {**ATTENTIONS, **ABLATIONS}.items()
}


# Normalization and size of the images that the paper trains a network on.
CIFAR10 = dict(input_size=(3, 32, 32), pool_size=(8, 8), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
STL10 = dict(input_size=(3, 96, 96), pool_size=(6, 6), mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713))


def _untrained_cfg(name: str) -> PretrainedCfg:
    """What a model without weights expects: the paper's images, untouched but for normalization."""
    return PretrainedCfg(
        **(STL10 if MODELS[name].get('stem_pool') else CIFAR10),
        num_classes=10,
        crop_pct=1.0,
        interpolation='bicubic',
        first_conv='stem.conv',
        classifier='head.fc',
        license='apache-2.0',
        paper_name='HAM: Hybrid attention module in deep convolutional neural networks for image classification',
        paper_ids='doi:10.1016/j.patcog.2022.108785',
    )


def _all_cfgs() -> Dict[str, PretrainedCfg]:
    bundled = bundled_cfgs(MODELS)
    with_tags = {name.partition('.')[0] for name in bundled}
    return {**{name: _untrained_cfg(name) for name in MODELS if name not in with_tags}, **bundled}


# timm's register_model looks for this name in the module of an entry point.
default_cfgs = generate_default_cfgs(_all_cfgs())


def _build(name: str, pretrained: bool, **kwargs) -> nn.Module:
    if pretrained:
        kwargs = with_checked_weights(name, kwargs)
    table = MODELS[name]
    if 'block_args' in table:  # the caller's are added to them
        kwargs['block_args'] = {**table['block_args'], **kwargs.get('block_args', {})}
    return build_model_with_cfg(
        ResidualNetwork,
        name,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(1 + len(table['depths']))), flatten_sequential=True),
        **{**table, **kwargs},
    )


def _register(name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__  # where timm looks for default_cfgs
    entrypoint.__doc__ = f'{name}; keywords as of ResidualNetwork.'
    return register_model(entrypoint)


for _name in MODELS:
    globals()[_name] = _register(_name)
