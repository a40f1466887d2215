"""add_attention on timm's own networks: nothing changes at first, everything else is kept, all of it comes back."""

import pytest
import timm
import torch
from timm.layers import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.densenet import DenseBlock

import timm_ham
from timm_ham import HybridAttention, RecurrentCrissCrossAttention, TimmHamError, add_attention
from timm_ham.models.insertion import IdentityStart

# Network, where the attentions go, how many.
NETWORKS = {
    'resnet50': ('layer1.0.se', 16),
    'seresnet50': ('layer1.0.bn3.attention', 16),
    'regnety_002': ('s1.b1.conv3.bn.attention', 13),
    'efficientnet_b0': ('blocks.1.1.bn3.attention', 9),
    'mobilenetv3_large_100': ('blocks.0.0.bn2.attention', 10),
    'convnext_tiny': ('stages.0.attention', 4),
    'densenet121': ('features.denseblock1_attention', 5),
}
every_network = pytest.mark.parametrize('name', NETWORKS)


def network(name, **kwargs):
    """Like a trained one: no norm weight is at zero, where a branch would be cut off."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(getattr(module, 'weight', None), torch.nn.Parameter) and module.weight.dim() == 1:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@every_network
@torch.no_grad()
def test_output_is_bit_for_bit_what_it_was(name):
    model = network(name)
    wanted, weights = model(X), {key: value.clone() for key, value in model.state_dict().items()}
    assert add_attention(model, 'ham') is model and not model.training
    assert torch.equal(model(X), wanted)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    added = [path for path, module in model.named_modules() if isinstance(module, IdentityStart)]
    path, count = NETWORKS[name]
    assert path in added and len(added) == count
    assert set(after) - set(weights) == {key for key in after for path in added if key.startswith(f'{path}.')}


@every_network
def test_training_goes_on_from_there(name):
    model = add_attention(network(name), 'ham').train()
    model(X).square().sum().backward()
    gates = {key: parameter for key, parameter in model.named_parameters() if key.endswith('.gate')}
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(gate.grad.abs() > 0 for gate in gates.values())


@every_network
@torch.no_grad()
def test_what_timm_saves_loads_with_one_call(name, tmp_path):
    model = randomize(add_attention(network(name), 'ham', kernel_size=3))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(X), model(X))
    modules = [module for module in again.modules() if isinstance(module, HybridAttention)]
    assert modules and all(module.spatial_conv.kernel_size == (3, 3) for module in modules)
    # ... and with another head, as for any model of timm
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)(X).shape == (2, 3)


@pytest.mark.parametrize('name, replaced', [('seresnet50', SEModule), ('regnety_002', SEModule)])
@torch.no_grad()
def test_replace(name, replaced, tmp_path):
    model = network(name)
    paths = [path for path, module in model.named_modules() if isinstance(module, replaced)]
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(paths))}
    add_attention(model, 'ham', replace=True, identity_start=False)
    assert paths and all(type(model.get_submodule(path)) is HybridAttention for path in paths)
    assert not any(isinstance(module, replaced) for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    timm.models.save_for_hf(randomize(model), tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(X), model(X))


@pytest.mark.parametrize('name', ['efficientnet_b0', 'mobilenetv3_large_100'])
def test_replace_inside_of_the_branch(name):
    """Squeeze-and-excitation of these works on the expanded width."""
    model = network(name)
    widths = {path: m.conv_reduce.in_channels for path, m in model.named_modules() if isinstance(m, SqueezeExcite)}
    add_attention(model, 'ham', replace=True)
    assert widths == {path: m.attention.channels for path, m in model.named_modules() if isinstance(m, IdentityStart)}
    assert model(X).isfinite().all()


@torch.no_grad()
def test_replace_where_there_is_nothing_to_replace_adds():
    assert torch.equal(
        randomize(add_attention(network('resnet50'), 'ham', replace=True))(X),
        randomize(add_attention(network('resnet50'), 'ham'))(X),
    )


@torch.no_grad()
def test_without_identity_start_it_is_the_attn_layer_of_timm():
    model = add_attention(network('resnet50'), 'ham', identity_start=False)
    wanted = timm.create_model('resnet50', num_classes=5, block_args=dict(attn_layer=HybridAttention)).eval()
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(model(X), wanted(X))
    plain = network('resnet50')
    assert not torch.equal(model(X), plain(X))


@pytest.mark.parametrize('attention', [*(set(timm_ham.ATTENTIONS) - {'plain'}), *timm_ham.ABLATIONS])
@torch.no_grad()
def test_any_attention(attention, tmp_path):
    model = network('regnety_002')
    wanted = model(X)
    assert torch.equal(add_attention(model, attention)(X), wanted)
    timm.models.save_for_hf(randomize(model), tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(X), model(X))


def test_rcca_goes_behind_the_last_three_stages():
    model = add_attention(network('resnet50'), 'rcca', identity_start=False)
    paths = [path for path, m in model.named_modules() if isinstance(m, RecurrentCrissCrossAttention)]
    assert paths == [f'layer{stage}.attention' for stage in (2, 3, 4)]
    assert model(X).shape == (2, 5)


@every_network
@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:FutureWarning')
@torch.no_grad()
def test_script_and_fx(name):
    """Hooks are traced and scripted with the network."""
    model = randomize(add_attention(network(name), 'ham'))
    wanted = model(X)
    tolerance = dict(rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), wanted, **tolerance)
    torch.testing.assert_close(torch.jit.script(model)(X), wanted, **tolerance)


def test_our_own_networks_take_it_too():
    model = add_attention(network('wide_resnet16_8_plain'), 'ham', identity_start=False)
    ham = timm.create_model('wide_resnet16_8_ham', num_classes=5).eval()
    ham.load_state_dict(model.state_dict())
    x = X[..., :16, :16]
    assert torch.equal(model(x), ham(x))


def test_dtype_device_and_mode_are_the_networks():
    model = add_attention(timm.create_model('resnet18', device='meta', dtype=torch.bfloat16), 'ham')
    assert model.training and {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


def test_channels_come_first_in_every_place_found():
    assert any(isinstance(module, DenseBlock) for module in network('densenet121').modules())
    for name in ('vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'):
        with pytest.raises(TimmHamError, match=f'{name} .* offers no place for ham'):
            add_attention(timm.create_model(name, device='meta'), 'ham')


@pytest.mark.parametrize('attention', ['hamm', 'plain'])
def test_unknown_attention(attention):
    with pytest.raises(
        TimmHamError, match=f"unknown attention '{attention}': choose from se, eca, cbam, rcca, ham, cbam_"
    ):
        add_attention(timm.create_model('resnet18', device='meta'), attention)


def test_what_is_no_whole_network_of_timm():
    for model in (torch.nn.Conv2d(3, 8, 3), timm.create_model('resnet18', features_only=True, device='meta')):
        with pytest.raises(TimmHamError, match='is no whole network of timm'):
            add_attention(model)


def test_twice_is_refused():
    model = add_attention(timm.create_model('resnet18', device='meta'), 'se')
    with pytest.raises(TimmHamError, match='was added to this model before'):
        add_attention(model, 'ham')


def test_arguments_reach_the_attention():
    with pytest.raises(TypeError, match='kernal'):
        add_attention(timm.create_model('resnet18', device='meta'), 'ham', kernal=3)
    model = timm.create_model(
        'timm_with_attention', base='resnet18', attention='se', replace=False, identity_start=True
    )
    assert sum(isinstance(module, IdentityStart) for module in model.modules()) == 8
