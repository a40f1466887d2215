"""Every registered model keeps timm's habits."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import EcaModule

from timm_ham import ABLATIONS, ARCHITECTURES, ATTENTIONS, MODELS
from timm_ham.models.network import ZeroPadShortcut

# Parameters without attention, 10 classes, as counted elsewhere for the networks of https://arxiv.org/abs/1512.03385
# (github.com/akamaster/pytorch_resnet_cifar10), and for ResNet-18 by the paper to the last digit (41.96 MiB).
PLAIN = {
    'resnet20': 269_722,
    'resnet32': 464_154,
    'resnet56': 853_018,
    'resnet110': 1_727_962,
    'resnet18': 11_000_138,
}
# The paper's Memory column, Tables 4-6: 4 bytes a parameter, in MiB. Rows that no structure it describes can reach are
# left out: ResNet-20 and -32, ResNeXt-50, and what ECA and HAM add to the networks with bottlenecks.
MEMORY = {
    'resnet56': dict(plain=3.24, se=3.28, eca=3.24, cbam=3.29, ham=3.26),
    'resnet110': dict(plain=6.56, se=6.64, eca=6.56, cbam=6.65, ham=6.58),
    'wide_resnet16_8': dict(plain=41.16, se=41.47, eca=41.16, cbam=41.49, ham=41.18),
    'resnext29_8x64d': dict(plain=128.97, se=130.92, eca=128.97, cbam=130.93),
    'resnet18': dict(plain=41.96, se=42.30, eca=42.00, cbam=42.31, ham=42.01),
    'resnet34': dict(plain=80.53, se=81.14, eca=80.60, cbam=81.16, ham=80.61),
    'wide_resnet18_2': dict(plain=167.77, se=169.07, eca=167.85, cbam=169.11, ham=167.86),
    'resnet50': dict(plain=79.08, se=88.69, cbam=88.69),
    'resnet101': dict(plain=151.52, se=169.64, cbam=169.66),
}
# One network of each kind, one with each attention.
SOME = {
    *(f'resnet20_{attention}' for attention in (*ATTENTIONS, *ABLATIONS)),
    *(
        f'{architecture}_ham'
        for architecture in ('resnet56', 'wide_resnet16_8', 'resnext29_8x64d', 'resnet18', 'resnet50')
    ),
    'resnet18_rcca',
}


def over_the_registry(chosen):
    """Parametrize by all registered names, of which those that are not chosen are slow."""
    names = [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
    return pytest.mark.parametrize('name', names)


PAPERS = {f'{architecture}_{attention}' for architecture in ARCHITECTURES for attention in ATTENTIONS}
every_model = over_the_registry(PAPERS | SOME)
some_models = over_the_registry(SOME)  # habits that cost time and do not depend on the depth
few_models = over_the_registry({'resnet20_ham', 'resnet18_rcca'})  # a habit that costs seconds


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def images(batch=2, size=16, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_the_table_is_the_registry():
    attentions = [*ATTENTIONS, *ABLATIONS]
    assert list(ATTENTIONS) == ['plain', 'se', 'eca', 'cbam', 'rcca', 'ham'] and len(ARCHITECTURES) == 12
    names = {f'{architecture}_{attention}' for architecture in ARCHITECTURES for attention in attentions}
    assert set(MODELS) == names == set(timm.list_models(module='zoo'))
    assert len(timm.list_models('*_ham')) == 12
    assert all(timm.is_model(name) and timm.model_entrypoint(name).__name__ == name for name in names)


def count(name):
    return sum(parameter.numel() for parameter in build(name, device='meta').parameters())


@pytest.mark.parametrize('architecture', PLAIN)
def test_parameter_counts(architecture):
    assert count(f'{architecture}_plain') == PLAIN[architecture]


@pytest.mark.parametrize('architecture', MEMORY)
def test_parameters_are_the_papers(architecture):
    for attention, mebibytes in MEMORY[architecture].items():
        tolerance = 0.005 if architecture in ('resnet56', 'resnet110', 'resnext29_8x64d') else 0.002
        ours = 4 * count(f'{architecture}_{attention}') / 2**20
        rounding = 0.005  # the column has two decimals
        assert abs(ours - mebibytes) <= tolerance * mebibytes + rounding, attention


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_ham_adds_k_and_102_parameters_to_each_block_and_nothing_else(architecture):
    plain, ham = (build(f'{architecture}_{attention}', device='meta') for attention in ('plain', 'ham'))
    blocks = [block for stage in ham.stages for block in stage]
    assert len(blocks) == sum(ARCHITECTURES[architecture]['depths'])
    added = sum(EcaModule(block.se.channels, device='meta').conv.kernel_size[0] + 102 for block in blocks)
    assert sum(p.numel() for p in ham.parameters()) - sum(p.numel() for p in plain.parameters()) == added
    assert set(dict(plain.named_parameters())) == {n for n, _ in ham.named_parameters() if '.se.' not in n}


@some_models
def test_forward_and_backward(name):
    model = build(name, num_classes=42, in_chans=1)
    logits = model(images(channels=1))
    assert logits.shape == (2, 42)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


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
    assert config['input_size'] == cfg['input_size'] and config['crop_pct'] == 1.0
    size, mean = (
        (96, (0.4467, 0.4398, 0.4066)) if model.feature_info[-1]['reduction'] == 16 else (32, (0.4914, 0.4822, 0.4465))
    )
    assert config['input_size'] == (3, size, size) and config['mean'] == pytest.approx(mean, abs=2e-4)


@some_models
def test_features_only(name):
    model = build(name, features_only=True).eval()
    reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert reductions == ([1, 2, 4, 8, 16] if MODELS[name].get('stem_pool') else [1, 1, 2, 4])
    x = images(1, 48)
    with torch.no_grad():
        features = model(x)
    assert [tuple(f.shape) for f in features] == [(1, c, 48 // r, 48 // r) for c, r in zip(channels, reductions)]
    last_two = build(name, features_only=True, out_indices=(2, 3)).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(last_two(x), features[2:]))


@some_models
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
    width = model.num_features
    model.reset_classifier(5, 'catavgmax')
    assert model(x).shape == (2, 5) and model.head_hidden_size == 2 * width


@some_models
def test_num_classes_zero_gives_pooled_features(name):
    model = build(name, num_classes=0).eval()
    x = images()
    pooled = model(x)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))


@some_models
def test_forward_intermediates(name):
    model = build(name).eval()
    x = images()
    final, features = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, features[-1])
    wanted = [(info['num_chs'], 16 // info['reduction'], 16 // info['reduction']) for info in model.feature_info]
    assert [tuple(f.shape[1:]) for f in features] == wanted
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], features[0]) and torch.equal(early[1], features[2])
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.stages) == 2 and model.num_features == wanted[2][0]
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


@few_models
def test_export_with_any_batch_size(name):
    model = build(name).eval()
    exported = torch.export.export(model, (images(4),), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}).module()
    for batch in (1, 4, 7):
        torch.testing.assert_close(exported(images(batch)), model(images(batch)))


@some_models
def test_channels_last_is_kept(name):
    # In float64: an untrained network of a hundred layers makes a large error out of a rounding.
    model = build(name, features_only=True).double().eval()
    x = images().double()
    wanted = model(x)
    features = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(features, wanted):
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, check_stride=False, rtol=0, atol=1e-6 * b.abs().max().item())


@every_model
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (96, 64), (256, 256)])
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


def test_block_args_are_added_to_those_of_the_table():
    model = build('resnext29_8x64d_plain', block_args=dict(reduce_first=2), device='meta')
    assert model.stages[0][0].conv2.groups == 8 and model.stages[0][0].conv1.out_channels == 512 // 2


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
