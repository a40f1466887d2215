"""RecurrentCrissCrossAttention against loops over positions."""

import math

import pytest
import timm
import torch
from torch import nn

from timm_ham import RecurrentCrissCrossAttention
from timm_ham.layers.rcca import CrissCrossAttention


def randomized(module, seed=0):
    """All parameters and running statistics away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            spread = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + spread if tensor.dim() == 1 else 0.6 * (spread - 0.5))
    return module.double().eval()


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loop_criss_cross(module, x):
    """Softmax over the H + W - 1 positions that share a row or a column, one position at a time."""
    q, k, v = (conv(x).tolist() for conv in (module.query, module.key, module.value))
    batch, channels, height, width = x.shape
    out = x.clone()
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                cross = {(u, j) for u in range(height)} | {(i, w) for w in range(width)}
                assert len(cross) == height + width - 1
                energies = {(u, w): sum(qc[i][j] * kc[u][w] for qc, kc in zip(q[b], k[b])) for u, w in cross}
                total = sum(math.exp(energy) for energy in energies.values())
                for c in range(channels):
                    gathered = sum(math.exp(energy) / total * v[b][c][u][w] for (u, w), energy in energies.items())
                    out[b, c, i, j] += module.scale.item() * gathered
    return out


@pytest.mark.parametrize('shape', [(2, 4, 3, 5), (1, 8, 1, 4), (1, 16, 4, 1), (2, 8, 1, 1), (1, 24, 5, 5)])
def test_criss_cross_equals_loops(shape):
    module, x = randomized(CrissCrossAttention(shape[1])), noise(*shape)
    with torch.no_grad():
        torch.testing.assert_close(module(x), loop_criss_cross(module, x))


@pytest.mark.parametrize('channels', [16, 64])
def test_module_equals_loops(channels):
    module, x = randomized(RecurrentCrissCrossAttention(channels)), noise(1, channels, 3, 4)

    def conv_norm_act(layer, x):
        conv, norm = layer.conv, layer.bn
        x = nn.functional.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
        shape = (1, -1, 1, 1)
        x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        x = x * norm.weight.view(shape) + norm.bias.view(shape)
        return torch.where(x > 0, x, 0.01 * x)

    with torch.no_grad():
        context = conv_norm_act(module.reduce, x)
        for _ in range(2):
            context = loop_criss_cross(module.criss_cross, context)
        wanted = conv_norm_act(module.join, torch.cat([x, conv_norm_act(module.smooth, context)], 1))
        torch.testing.assert_close(module(x), wanted)


def test_two_rounds_are_one_round_twice_with_the_same_weights():
    once, twice = CrissCrossAttention(8), RecurrentCrissCrossAttention(32)
    randomized(twice)
    once.load_state_dict(twice.criss_cross.state_dict())
    once.double()
    seen = []
    twice.smooth.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        x = noise(2, 32, 5, 4)
        twice(x)
        assert torch.equal(seen[0], once(once(twice.reduce(x))))


@pytest.mark.parametrize('recurrence, reached', [(1, 4 + 3 - 1), (2, 4 * 3)])
def test_two_rounds_reach_every_position(recurrence, reached):
    module = randomized(RecurrentCrissCrossAttention(32, recurrence=recurrence)).criss_cross
    x = noise(1, 8, 4, 3).requires_grad_()
    out = x
    for _ in range(recurrence):
        out = module(out)
    out[0, :, 1, 2].sum().backward()
    assert (x.grad.abs().sum(1) > 0).sum() == reached


def test_starts_without_attention():
    """As in CCNet, whose gamma starts at zero."""
    module, x = CrissCrossAttention(8), torch.randn(1, 8, 4, 4)
    assert torch.equal(module(x), x)


def test_gradcheck():
    module = randomized(CrissCrossAttention(8))
    assert torch.autograd.gradcheck(module, noise(1, 8, 2, 3).requires_grad_())


@pytest.mark.parametrize('channels', [64, 512])
def test_parameters_are_about_4_14_c_squared(channels):
    count = sum(parameter.numel() for parameter in RecurrentCrissCrossAttention(channels, device='meta').parameters())
    linear = 2 * (channels // 32) + channels // 4 + 2 * (2 * channels // 4) + 2 * channels + 1  # biases, norms, scale
    assert count - linear == channels**2 * (9 / 4 + 2 / 128 + 1 / 16 + 9 / 16 + 5 / 4)
    assert count / channels**2 == pytest.approx(4.14, abs=0.08)


@pytest.mark.parametrize('arguments, message', [((3,), 'channels must be'), ((16, 0), 'recurrence must be')])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecurrentCrissCrossAttention(*arguments)


def test_stands_after_each_of_the_last_three_stages():
    for name, stages in (('resnet20_rcca', [0, 1, 2]), ('resnet18_rcca', [1, 2, 3])):
        model = timm.create_model(name, device='meta', attn_kwargs=dict(recurrence=3))
        paths = [path for path, module in model.named_modules() if isinstance(module, RecurrentCrissCrossAttention)]
        assert paths == [f'stages.{stage}.{len(model.stages[stage]) - 1}' for stage in stages]
        assert all(model.get_submodule(path).recurrence == 3 for path in paths)
        assert all(block.se is None for stage in model.stages for block in list(stage)[:2])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    module, x = randomized(CrissCrossAttention(16)), 0.1 * noise(2, 16, 6, 5)
    with torch.no_grad():
        wanted = module(x)
        half = module.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), wanted, rtol=0.05, atol=0.05)
