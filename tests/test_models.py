"""Every registered model keeps timm's habits."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from timm_ham import ARCHITECTURES, ATTENTIONS, MODELS, HybridAttention
from timm_ham.models.network import ZeroPadShortcut

# Parameters without attention, 10 classes, as counted for the networks of https://arxiv.org/abs/1512.03385 elsewhere
# (github.com/akamaster/pytorch_resnet_cifar10), and residual blocks.
PLAIN = {'resnet20': (269_722, 9), 'resnet32': (464_154, 15), 'resnet56': (853_018, 27), 'resnet110': (1_727_962, 54)}
every_model = pytest.mark.parametrize('name', MODELS)
# The habits that cost time are looked at in the smallest and the deepest network.
some_models = pytest.mark.parametrize('name', ['resnet20_plain', 'resnet20_ham', 'resnet56_ham'])


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(batch=2, size=16, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_the_table_is_the_registry():
    names = {f'{architecture}_{attention}' for architecture in ARCHITECTURES for attention in ATTENTIONS}
    assert set(MODELS) == names == set(timm.list_models(module='zoo'))
    assert timm.list_models('resnet*_ham') == ['resnet20_ham', 'resnet32_ham', 'resnet56_ham', 'resnet110_ham']
    assert all(timm.is_model(name) and timm.model_entrypoint(name).__name__ == name for name in names)


@pytest.mark.parametrize('architecture', PLAIN)
def test_parameter_counts(architecture):
    count, blocks = PLAIN[architecture]
    counts = {
        attention: sum(p.numel() for p in build(f'{architecture}_{attention}', device='meta').parameters())
        for attention in ATTENTIONS
    }
    # Widths 16, 32 and 64 all have k = 3.
    assert counts == {'plain': count, 'ham': count + blocks * (3 + 102)}


@every_model
def test_forward_and_backward(name):
    model = build(name, num_classes=42, in_chans=1)
    logits = model(images(channels=1))
    assert logits.shape == (2, 42)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    attention = [module for module in model.modules() if isinstance(module, HybridAttention)]
    assert len(attention) == (PLAIN[name.rpartition('_')[0]][1] if name.endswith('ham') else 0)


@every_model
def test_default_cfg_is_true_to_the_model(name):
    model = build(name)
    cfg = model.default_cfg
    assert cfg['architecture'] == name and cfg['num_classes'] == model.num_classes == 10
    assert model.get_submodule(cfg['first_conv']) is model.stem.conv
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, *cfg['input_size']))
    assert tuple(features.shape[-2:]) == tuple(cfg['pool_size'])
    assert features.shape[1] == model.num_features == model.head_hidden_size
    config = resolve_model_data_config(model)
    assert config['input_size'] == (3, 32, 32) and config['crop_pct'] == 1.0
    assert config['mean'] == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-4)


@every_model
def test_features_only(name):
    model = build(name, features_only=True).eval()
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    assert model.feature_info.channels() == [16, 16, 32, 64]
    x = images(size=24)
    for features, reduction, channels in zip(model(x), model.feature_info.reduction(), model.feature_info.channels()):
        assert features.shape == (2, channels, 24 // reduction, 24 // reduction)
    last_two = build(name, features_only=True, out_indices=(2, 3)).eval()
    assert all(torch.equal(a, b) for a, b in zip(last_two(x), model(x)[2:]))


@every_model
def test_reset_classifier(name):
    model = build(name).eval()
    x = images()
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, '')
    assert torch.equal(model(x), features)
    model.reset_classifier(5, 'catavgmax')
    assert model(x).shape == (2, 5) and model.head_hidden_size == 128


@some_models
def test_num_classes_zero_gives_pooled_features(name):
    model = build(name, num_classes=0).eval()
    x = images()
    pooled = model(x)
    assert pooled.shape == (2, 64)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))


@some_models
def test_forward_intermediates(name):
    model = build(name).eval()
    x = images()
    final, features = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, features[-1])
    assert [tuple(f.shape[1:]) for f in features] == [(16, 16, 16), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], features[0]) and torch.equal(early[1], features[2])
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.stages) == 2 and model.num_features == 32
    assert torch.equal(model(x), features[2])


@some_models
def test_gradient_checkpointing_gives_the_same_gradients(name):
    plain, checkpointed = build(name), build(name)
    checkpointed.set_grad_checkpointing()
    losses = [model(images()).square().sum() for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (parameter_name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=parameter_name)


@some_models
@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:FutureWarning')
def test_script_and_fx(name):
    model = build(name, scriptable=True).eval()
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    traced.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


@some_models
def test_export_with_any_batch_size(name):
    model = build(name).eval()
    exported = torch.export.export(model, (images(4),), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}).module()
    for batch in (1, 4, 7):
        torch.testing.assert_close(exported(images(batch)), model(images(batch)))


@every_model
def test_channels_last_is_kept(name):
    model = build(name, features_only=True).eval()
    x = images()
    wanted = model(x)
    features = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(features, wanted):
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, check_stride=False, rtol=0, atol=1e-4 * b.abs().max().item())


@every_model
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (96, 64)])
def test_any_image_size(name, size):
    model = build(name, device='meta')
    assert model(torch.empty(1, 3, *size, device='meta')).shape == (1, 10)


@pytest.mark.parametrize('keyword', [dict(num_class=10), dict(attn_kwarg={}), dict(drop=0.1)])
def test_misspelt_keyword(keyword):
    with pytest.raises(TypeError, match='unexpected keyword'):
        build('resnet20_ham', **keyword)


def test_attn_kwargs():
    model = build('resnet20_ham', attn_kwargs=dict(kernel_size=3, separation_rate=0.5))
    attention = model.stages[2][0].se
    assert attention.spatial_conv.kernel_size == (3, 3) and attention.important_channels == 32
    with pytest.raises(TypeError, match='without attention'):
        build('resnet20_plain', attn_kwargs=dict(kernel_size=3))
    with pytest.raises(TypeError, match='unexpected keyword'):
        build('resnet20_ham', attn_kwargs=dict(kernal_size=3))


def test_drop_options_reach_the_network():
    model = build('resnet20_plain', drop_rate=0.3, drop_path_rate=0.2)
    assert model.head.drop.p == 0.3
    rates = [block.drop_path.drop_prob if block.drop_path else 0 for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.2 * i / 8 for i in range(9)])


def test_layer_groups_cover_all_parameters():
    model = build('resnet20_ham', device='meta')
    from timm.models import group_parameters

    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
        assert len(groups) == (5 if coarse else 11)  # stem, stages or blocks, head


def test_shortcut_strides_and_fills_with_zeros():
    x = images(size=5)
    out = ZeroPadShortcut(3, 8, 2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, :3], x[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]]) and not out[:, 3:].any()


def test_names_survive_loaders_that_rename_gamma_and_beta():
    for name in MODELS:
        keys = timm.create_model(name, device='meta').state_dict()
        assert not any('gamma' in key or 'beta' in key for key in keys)
