"""HybridAttention against the paper's equations, written out as loops over numbers in float64."""

import math

import pytest
import timm
import torch
from timm.layers import EcaModule
from torch import nn

from timm_ham import HybridAttention, set_fused
from timm_ham.layers import ham_fused
from timm_ham.layers.ham import channel_kernel_size, num_important_channels

# B, C, H, W: the smallest C, an odd C_im * 10, the paper's widths; H != W, maps smaller than the 7x7 kernel, batch 1.
SHAPES = [(2, 4, 5, 3), (1, 10, 4, 9), (3, 16, 6, 5), (2, 64, 3, 4), (1, 128, 2, 3)]


@pytest.fixture(params=[False, True], ids=['reference', 'fused'])
def both_paths(request, monkeypatch):
    """A test of the definition is one of the fast path too."""
    monkeypatch.setattr(ham_fused, 'SMALLEST_FORWARD', 1)
    monkeypatch.setattr(ham_fused, 'SMALLEST_TRAINING', 1)
    set_fused(request.param)
    yield
    set_fused(True)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def loop_ham(x, alpha, beta, channel_weight, spatial_weight, norm, important_count, training):
    """F'' by Eq. 1-10, one number at a time. `norm` is (weight, bias, mean, variance, eps)."""
    batch, channels, height, width = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    refined, masks = [], []
    for image in x.tolist():
        pooled = []
        for c in range(channels):
            values = [image[c][i][j] for i, j in places]
            avg, top = sum(values) / len(values), max(values)
            pooled.append(0.5 * (avg + top) + alpha * avg + beta * top)
        half = len(channel_weight) // 2
        logits = [
            sum(w * pooled[c + t - half] for t, w in enumerate(channel_weight) if 0 <= c + t - half < channels)
            for c in range(channels)
        ]
        nth = sorted(logits, reverse=True)[important_count - 1]
        masks.append([logit >= nth for logit in logits])
        refined.append([{p: sigmoid(logits[c]) * image[c][p[0]][p[1]] for p in places} for c in range(channels)])

    half = len(spatial_weight[0]) // 2
    maps = []  # one for each sample and group
    for b in range(batch):
        for group in (True, False):
            count = important_count if group else channels - important_count
            descriptors = [{}, {}]
            for p in places:
                values = [refined[b][c][p] if masks[b][c] == group else 0.0 for c in range(channels)]
                descriptors[0][p], descriptors[1][p] = sum(values) / count, max(values)
            maps.append(
                {
                    (i, j): sum(
                        spatial_weight[d][u][v] * descriptors[d].get((i + u - half, j + v - half), 0.0)
                        for d in range(2)
                        for u in range(2 * half + 1)
                        for v in range(2 * half + 1)
                    )
                    for i, j in places
                }
            )
    weight, bias, mean, variance, eps = norm
    if training:
        values = [value for one in maps for value in one.values()]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
    out = torch.empty_like(x)
    for b in range(batch):
        for i, j in places:
            attention = [
                sigmoid(max(0.0, (maps[2 * b + g][i, j] - mean) / math.sqrt(variance + eps) * weight + bias))
                for g in range(2)
            ]
            for c in range(channels):
                out[b, c, i, j] = attention[0 if masks[b][c] else 1] * refined[b][c][i, j]
    return out


def make(channels, seed=0, dtype=torch.float64, **kwargs):
    """A module in which every parameter and statistic is random."""
    torch.manual_seed(seed)
    module = HybridAttention(channels, **kwargs)
    with torch.no_grad():
        for tensor in [*module.parameters(), module.spatial_norm.running_mean]:
            tensor.copy_(torch.randn_like(tensor))
        module.spatial_norm.running_var.uniform_(0.5, 2)
    return module.to(dtype)


def expected(module, x):
    norm = module.spatial_norm
    return loop_ham(
        x,
        1 / (1 + math.exp(-module.pool_logits[0].item())),
        1 / (1 + math.exp(-module.pool_logits[1].item())),
        module.channel_conv.weight.flatten().tolist(),
        module.spatial_conv.weight[0].tolist(),
        (norm.weight.item(), norm.bias.item(), norm.running_mean.item(), norm.running_var.item(), norm.eps),
        module.important_channels,
        module.training,
    )


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_equals_loops(both_paths, shape, training, memory_format):
    module = make(shape[1]).train(training)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    wanted = expected(module, x)
    out = module(x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9, check_stride=False)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(module.float()(x.float()).double(), wanted, rtol=1e-3, atol=1e-4, check_stride=False)


@pytest.mark.parametrize(
    'kwargs', [dict(kernel_size=3), dict(kernel_size=5, separation_rate=0.5), dict(separation_rate=0.8)]
)
def test_variants_equal_loops(both_paths, kwargs):
    module = make(10, **kwargs).eval()
    x = torch.randn(2, 10, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('channels', [4, 10, 16])
@pytest.mark.parametrize('value', [0.0, 1.0, -2.0])
def test_ties_equal_loops(both_paths, channels, value):
    """A constant input ties all channels but those at the ends: more than C_im can be important."""
    module = make(channels).eval()
    x = torch.full((2, channels, 4, 5), value, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-9, atol=1e-9)


def test_separation_of_ties():
    module = HybridAttention(6, separation_rate=0.34)  # C_im = 2
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0.0] * 6])
    wanted = [[False, True, True, True, False, True], [True, True, False, False, False, False], [True] * 6]
    assert module.separate(logits).tolist() == wanted


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_gradcheck(both_paths, training):
    module = make(4, kernel_size=3).train(training)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (x,))

    values = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(function, (x, *values))


def test_gradient_reaches_every_parameter(both_paths):
    module = make(16, dtype=torch.float32).train()
    module(torch.randn(2, 16, 8, 8)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_running_statistics_are_of_both_groups(both_paths):
    """Eval mode with the statistics of a batch gives what train mode gave for that batch."""
    module = make(16)
    module.spatial_norm.momentum = 1.0
    x = torch.randn(4, 16, 7, 6, dtype=torch.float64)
    trained = module.train()(x)
    count = 2 * 4 * 7 * 6
    module.spatial_norm.running_var *= (count - 1) / count  # torch keeps the unbiased variance
    torch.testing.assert_close(module.eval()(x), trained)


@pytest.mark.parametrize(
    'channels, rate, wanted',
    [
        (4, 0.6, 2),  # 2.4
        (10, 0.6, 6),  # 6.0
        (16, 0.6, 10),  # 9.6
        (64, 0.6, 38),  # 38.4
        (128, 0.6, 76),  # 76.8
        (10, 0.5, 6),  # 5.0, a tie goes up
        (10, 0.7, 8),  # 7.0 on paper, 6.999... in binary
        (10, 0.3, 4),  # 3.0
        (4, 0.95, 2),  # 3.8, kept so that two are left
        (8, 0.05, 2),  # 0.4, kept so that there are two
    ],
)
def test_important_channels(channels, rate, wanted):
    assert num_important_channels(channels, rate) == wanted
    assert HybridAttention(channels, rate).important_channels == wanted


def test_channel_kernel_is_that_of_timms_eca():
    for channels in range(4, 3000, 7):
        assert channel_kernel_size(channels) == EcaModule(channels, device='meta').conv.kernel_size[0]


@pytest.mark.parametrize('channels, k', [(4, 3), (16, 3), (64, 3), (128, 5), (512, 5), (2048, 7)])
def test_parameter_count(channels, k):
    module = HybridAttention(channels, device='meta')
    assert sum(parameter.numel() for parameter in module.parameters()) == k + 102


def test_alpha_and_beta_start_at_one_half_and_are_read_only():
    module = HybridAttention(16)
    assert module.alpha.item() == module.beta.item() == 0.5
    with pytest.raises(AttributeError):
        module.alpha = torch.tensor(0.3)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(channels=3), 'channels must be at least 4'),
        (dict(channels=16, separation_rate=0), 'separation_rate must be between 0 and 1'),
        (dict(channels=16, separation_rate=1.0), 'separation_rate must be between 0 and 1'),
        (dict(channels=16, kernel_size=4), 'kernel_size must be odd'),
        (dict(channels=16, kernel_size=-1), 'kernel_size must be odd'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HybridAttention(**arguments)


def test_ranking_under_autocast_is_in_float32(both_paths):
    """Logits whose differences are below the resolution of bfloat16 are still told apart."""
    module = HybridAttention(16).eval()
    with torch.no_grad():
        module.channel_conv.weight.copy_(torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 3))
    # Means differ by 1/512 of a value near 1, the maxima are alike: bfloat16 resolves 1/128 there.
    x = torch.ones(1, 16, 32, 32)
    for channel in range(16):
        x[0, channel].view(-1)[: 2 * channel + 2] = 0
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = module.channel_logits(x.bfloat16())
        assert logits.dtype == torch.float32
        assert module.separate(logits).squeeze().tolist() == [True] * 10 + [False] * 6
        out = module(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_module_is_close_to_float32(both_paths, dtype):
    module = make(16, dtype=torch.float32).eval()
    x = torch.randn(2, 16, 8, 9).to(dtype)
    with torch.no_grad():
        wanted = module(x.float())
        for parameter in module.parameters():  # the same values in both
            parameter.copy_(parameter.to(dtype))
        wanted = module(x.float())
        out = module.to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)


def graph_forms(module, x):
    """The same module through each of torch's tracers."""
    yield 'script', torch.jit.script(module)
    yield 'fx', torch.fx.symbolic_trace(module)
    yield 'export', torch.export.export(module, (x,)).module()


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:FutureWarning')
def test_script_fx_and_export_equal_eager():
    module = make(16, dtype=torch.float32).eval()
    x = torch.randn(2, 16, 8, 9)
    for name, form in graph_forms(module, x):
        torch.testing.assert_close(form(x), module(x), msg=name)


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:FutureWarning')
def test_script_and_fx_do_not_freeze_the_dtype():
    """Traced once, run in other precisions."""
    module = make(16, dtype=torch.float32).eval()
    x = torch.randn(2, 16, 8, 9)
    for form in (torch.jit.script(module), torch.fx.symbolic_trace(module)):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            wanted = module(x.bfloat16())
            # TorchScript has an autocast of its own, which multiplies in float32.
            torch.testing.assert_close(form(x.bfloat16()), wanted, check_dtype=False, rtol=0.05, atol=0.05)
        module.double(), form.double()
        torch.testing.assert_close(form(x.double()), module(x.double()))
        module.float(), form.float()


def test_compile_equals_eager():
    module = make(16, dtype=torch.float32).train()
    x = torch.randn(2, 16, 8, 9, requires_grad=True)
    wanted = module(x)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    out = compiled(x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], wanted_gradient)


@pytest.mark.slow
def test_inductor_equals_eager():
    """Generated C++, for the module and for a network, forward and backward."""
    torch.manual_seed(0)
    for module, shape in (
        (make(16, dtype=torch.float32), (2, 16, 8, 9)),
        (timm.create_model('resnet20_ham'), (4, 3, 16, 16)),
    ):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for form in (module, torch.compile(module, fullgraph=True)):
            out = form(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
        for eager, compiled in zip(*results):
            torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-3 * eager.abs().max().item())


def test_onnx_equals_eager(tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    module = make(16, dtype=torch.float32).eval()
    shapes = {'x': {0: torch.export.Dim('batch')}}
    x = torch.randn(2, 16, 8, 9)
    torch.onnx.export(module, (x,), tmp_path / 'ham.onnx', dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'ham.onnx')
    for batch in (1, 2, 5):
        x = torch.randn(batch, 16, 8, 9)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet50', 'seresnet50', 'resnext50_32x4d'])
def test_is_an_attn_layer_of_timm(name):
    model = timm.create_model(name, block_args=dict(attn_layer=HybridAttention), num_classes=3)
    modules = [module for module in model.modules() if isinstance(module, HybridAttention)]
    assert len(modules) == 16
    logits = model(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 3)
    assert all(parameter.grad is not None for module in modules for parameter in module.parameters())


def test_input_of_another_width_is_refused():
    with pytest.raises(AssertionError, match='another number of channels than its own'):
        HybridAttention(16)(torch.randn(2, 32, 4, 4))


def test_survives_a_transformers_style_rename():
    """transformers once renamed whatever had gamma or beta in its name."""
    assert not any(part in name for name in HybridAttention(8).state_dict() for part in ('gamma', 'beta'))


def test_meta_device_and_dtype():
    module = HybridAttention(8, device='meta', dtype=torch.bfloat16)
    assert all(p.device.type == 'meta' and p.dtype == torch.bfloat16 for p in module.parameters())
    assert isinstance(module.spatial_norm, nn.BatchNorm2d)
