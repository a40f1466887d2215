"""The registered models, `<architecture>_<attention>`: two tables and the loop that registers their product in timm."""

from pathlib import Path
from typing import Any, Callable, Dict

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from timm_ham.layers import ATTENTIONS
from timm_ham.models.network import ResidualNetwork
from timm_ham.models.weights import bundled_cfgs, check_weights

__all__ = ['ARCHITECTURES', 'MODELS']


def _cifar_resnet(depth: int) -> Dict[str, Any]:
    """6n + 2 layers: https://arxiv.org/abs/1512.03385, Section 4.2."""
    return dict(depths=((depth - 2) // 6,) * 3, widths=(16, 32, 64), stem_width=16)


# Arguments of ResidualNetwork.
ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    'resnet20': _cifar_resnet(20),
    'resnet32': _cifar_resnet(32),
    'resnet56': _cifar_resnet(56),
    'resnet110': _cifar_resnet(110),
}

MODELS: Dict[str, Dict[str, Any]] = {
    f'{name}_{attention}': dict(arguments, attn_layer=layer)
    for name, arguments in ARCHITECTURES.items()
    for attention, layer in ATTENTIONS.items()
}


def _untrained_cfg() -> PretrainedCfg:
    """What a model without weights expects: CIFAR-10 images, untouched but for normalization."""
    return PretrainedCfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation='bicubic',
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        first_conv='stem.conv',
        classifier='head.fc',
        license='apache-2.0',
        paper_name='HAM: Hybrid attention module in deep convolutional neural networks for image classification',
        paper_ids='doi:10.1016/j.patcog.2022.108785',
    )


def _all_cfgs() -> Dict[str, PretrainedCfg]:
    bundled = bundled_cfgs(MODELS)
    with_tags = {name.partition('.')[0] for name in bundled}
    return {**{name: _untrained_cfg() for name in MODELS if name not in with_tags}, **bundled}


# timm's register_model looks for this name in the module of an entry point.
default_cfgs = generate_default_cfgs(_all_cfgs())


def _build(name: str, pretrained: bool, **kwargs) -> nn.Module:
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        if cfg.file:
            check_weights(Path(cfg.file))
    return build_model_with_cfg(
        ResidualNetwork,
        name,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(1 + len(MODELS[name]['depths']))), flatten_sequential=True),
        **{**MODELS[name], **kwargs},
    )


def _register(name: str) -> Callable[..., nn.Module]:
    architecture, _, attention = name.rpartition('_')

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__  # where timm looks for default_cfgs
    entrypoint.__doc__ = f'{architecture} with attention {attention!r}; keywords as of ResidualNetwork.'
    return register_model(entrypoint)


for _name in MODELS:
    globals()[_name] = _register(_name)
