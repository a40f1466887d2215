"""fuse: the same output from fewer layers."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_ham
from timm_ham import TimmHamError, add_attention, fuse
from timm_ham.layers import ham_fused

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def trained(name, **kwargs):
    """Norms as training leaves them: statistics of real features, weights away from one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, 48, 48))
    return model.eval()


def norms(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize(
    'name, left',
    [
        *((f'resnet20_{attention}', 0) for attention in ('plain', 'se', 'cbam', 'rcca', 'ham')),
        ('resnet18_ham', 0),
        ('resnet50_ham', 0),
        ('wide_resnet16_8_ham', 7),  # six blocks and the whole begin with a norm
        ('seresnet50', 0),
        ('regnety_002', 0),
        ('efficientnet_b0', 0),
    ],
)
@torch.no_grad()
def test_output_is_the_same(name, left, fast, monkeypatch):
    monkeypatch.setattr(ham_fused, 'SMALLEST_FORWARD', 1)
    timm_ham.set_fused(fast)
    try:
        model = trained(name)
        wanted, count = model(IMAGES), norms(model)
        fused = fuse(model)
        torch.testing.assert_close(fused(IMAGES), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        assert norms(fused) == left < norms(model) == count and type(fused) is type(model)
        assert torch.equal(model(IMAGES), wanted)
    finally:
        timm_ham.set_fused(True)


@torch.no_grad()
def test_training_mode_and_features():
    model = trained('resnet20_ham')
    fused = fuse(model.train())
    assert model.training and not fused.training
    model.eval()
    torch.testing.assert_close(fused.forward_features(IMAGES), model.forward_features(IMAGES), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_norm_with_an_attention_behind_it_keeps_both():
    model = add_attention(trained('regnety_002'), 'ham', identity_start=False)
    wanted = model(IMAGES)
    torch.testing.assert_close(fuse(model)(IMAGES), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_what_can_not_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TimmHamError, match='Branching can not be traced'):
        fuse(Branching())
