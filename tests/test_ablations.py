"""The halves and mixtures of CBAM and HAM, against compositions of what is tested elsewhere."""

import pytest
import torch
from timm.layers import EcaModule
from timm.layers.cbam import CbamModule, ChannelAttn, SpatialAttn

from timm_ham import ABLATIONS, HybridAttention
from timm_ham.layers.ham import HybridChannelAttention


def make(name, channels=32):
    torch.manual_seed(0)
    module = ABLATIONS[name](channels)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


X = torch.randn(3, 32, 5, 7, generator=torch.Generator().manual_seed(0))


def eq5(x, alpha, beta):
    avg, top = x.flatten(2).mean(2), x.flatten(2).max(2).values
    return 0.5 * (avg + top) + alpha * avg + beta * top


def test_cbam_channel_is_the_first_half_of_timms_cbam():
    module, cbam = make('cbam_channel'), CbamModule(32).eval()
    assert type(module) is ChannelAttn
    cbam.channel.load_state_dict(module.state_dict())
    torch.testing.assert_close(cbam.spatial(module(X)), cbam(X))


def test_cbam_channel_adaptive_is_one_pass_of_eq5_through_the_mlp():
    module = make('cbam_channel_adaptive')
    alpha, beta = module.pool_logits.sigmoid().tolist()
    w1, w2 = module.fc1.weight.flatten(1), module.fc2.weight.flatten(1)
    attention = torch.sigmoid((eq5(X, alpha, beta) @ w1.T).relu() @ w2.T)
    torch.testing.assert_close(module(X), attention[:, :, None, None] * X)


@pytest.mark.parametrize('name', ['ham_channel', 'ham_channel_no_adaptive'])
def test_ham_channel(name):
    module = make(name)
    # By EcaModule's convolution, on a map whose mean is Eq. 5.
    eca = EcaModule(32)
    eca.conv.weight.data = module.channel_conv.weight.data
    weights = module.pool_logits.sigmoid().tolist() if name == 'ham_channel' else (0.5, 0.5)
    f = eq5(X, *weights)[:, :, None, None]
    torch.testing.assert_close(module(X), eca(f) / f * X)


def test_no_adaptive_pools_by_avg_plus_max_and_trains_the_convolution_alone():
    module = make('ham_channel_no_adaptive')
    assert [name for name, _ in module.named_parameters()] == ['channel_conv.weight'] == list(module.state_dict())
    assert module.alpha == module.beta == 0.5


def test_ham_channel_is_the_first_half_of_ham():
    module, ham = make('ham_channel'), HybridAttention(32)
    ham.pool_logits, ham.channel_conv = module.pool_logits, module.channel_conv
    assert torch.equal(module.channel_logits(X), ham.channel_logits(X))


def test_ham_channel_cbam_spatial_is_one_after_the_other():
    module = make('ham_channel_cbam_spatial')
    channel, spatial = HybridChannelAttention(32), SpatialAttn(7)
    channel.load_state_dict(module.channel.state_dict())
    spatial.load_state_dict(module.spatial.state_dict())
    torch.testing.assert_close(module(X), spatial.eval()(channel(X)))


@pytest.mark.parametrize(
    'name, count',
    [
        ('cbam_channel', 2 * 32 * 2),
        ('cbam_channel_adaptive', 2 * 32 * 2 + 2),
        ('ham_channel', 3 + 2),
        ('ham_channel_no_adaptive', 3),
        ('ham_channel_cbam_spatial', 3 + 2 + 98 + 2),
    ],
)
def test_parameter_counts(name, count):
    assert sum(parameter.numel() for parameter in ABLATIONS[name](32).parameters()) == count
