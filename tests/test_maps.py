"""timm_ham.inspect against what the modules put out, and against the convolution's own results."""

import pytest
import timm
import torch

import timm_ham
from timm_ham import HybridAttention, TimmHamError

IMAGES = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def randomized(model):
    """Norms and poolings as after training, so that nothing is at its neutral value."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, HybridAttention):
            torch.nn.init.normal_(module.pool_logits)
            torch.nn.init.normal_(module.spatial_norm.running_mean, std=0.1)
            torch.nn.init.uniform_(module.spatial_norm.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.spatial_norm.bias, -1, 2)
    return model.eval()


@pytest.fixture(scope='module')
def model():
    return randomized(timm.create_model('resnet20_ham'))


def watched(model, images):
    """Input and output of each HAM module, by its path."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, HybridAttention):
            # a copy: the block adds its shortcut in place
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y.detach().clone())}))
    model(images)
    for module in model.modules():
        module._forward_hooks.clear()
    return seen


@pytest.mark.parametrize('fused', [True, False])
def test_the_maps_give_back_each_modules_output(model, fused):
    """F'' = S_1 F1 + S_2 F2: with a wrong map, group or attention it would not."""
    timm_ham.set_fused(fused)
    try:
        images = IMAGES.repeat(8, 1, 1, 1)  # enough for the fast path
        seen, maps = watched(model, images), timm_ham.inspect(model, images)
    finally:
        timm_ham.set_fused(True)
    assert list(maps) == list(seen) == [f'stages.{stage}.{block}.se' for stage in range(3) for block in range(3)]
    for name, (x, output) in seen.items():
        found = maps[name]
        batch, channels, height, width = x.shape
        assert found.channel_attention.shape == found.important.shape == (batch, channels)
        assert found.spatial_important.shape == found.spatial_sub_important.shape == (batch, height, width)
        important = found.important.float()[:, :, None, None]
        assert important.sum() == batch * {16: 10, 32: 20, 64: 38}[channels]
        ranked = found.channel_attention.sort(descending=True).indices
        assert found.important.gather(1, ranked[:, : int(important[0].sum())]).all()
        spatial = important * found.spatial_important[:, None] + (1 - important) * found.spatial_sub_important[:, None]
        torch.testing.assert_close(spatial * found.channel_attention[:, :, None, None] * x, output)
        module = model.get_submodule(name)
        alpha, beta = torch.sigmoid(module.pool_logits).tolist()
        assert (found.alpha, found.beta) == (alpha, beta) and 0 < alpha < 1
        assert not found.channel_attention.requires_grad


def test_it_leaves_no_trace(model):
    model.train()
    model.stages[0].eval()  # as a person does who freezes the first stage
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    timm_ham.inspect(model, IMAGES)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model.eval()
    with pytest.raises(RuntimeError):
        timm_ham.inspect(model.train(), IMAGES[:, :2])  # the network refuses two colours
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_the_output_is_the_same_while_it_looks(model):
    outputs = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    timm_ham.inspect(model, IMAGES)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(outputs[0], model(IMAGES))


def test_attention_added_to_a_network_of_timm():
    model = timm_ham.add_attention(timm.create_model('test_resnet', num_classes=3))
    maps = timm_ham.inspect(model, torch.randn(2, 3, 64, 64))
    assert maps and all(isinstance(model.get_submodule(name), HybridAttention) for name in maps)


def test_no_ham():
    with pytest.raises(TimmHamError, match='ResidualNetwork has no HAM module to look into: choose a model such as'):
        timm_ham.inspect(timm.create_model('resnet20_cbam'), IMAGES)
