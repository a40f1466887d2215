"""The fast path of HybridAttention against its reference, and when it steps aside."""

import copy

import pytest
import torch
from torch import nn

import timm_ham
from timm_ham import HybridAttention
from timm_ham.layers import ham_cpu, ham_fused
from timm_ham.layers.ham_fused import fused_applies, hybrid_attention

# Dense blocks, blocks of 4x4, single pixels; H != W, one pixel, a map smaller than the kernel, C that is no power of 2.
SHAPES = [
    (3, 16, 8, 8),
    (2, 10, 5, 7),
    (4, 64, 12, 12),
    (2, 16, 16, 16),
    (2, 32, 20, 24),
    (2, 12, 17, 19),
    (1, 4, 1, 1),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces to a batch, the last one smaller, and no size too small, at the sizes of these tests."""
    monkeypatch.setattr(ham_fused, 'SMALLEST_FORWARD', 1)
    monkeypatch.setattr(ham_fused, 'SMALLEST_TRAINING', 1)
    monkeypatch.setattr(ham_cpu, 'CHUNK', 2 * 16 * 64)


@pytest.fixture
def reference():
    """HybridAttention computes the reference."""
    timm_ham.set_fused(False)
    yield
    timm_ham.set_fused(True)


def make(channels, dtype=torch.float64, training=True, **kwargs):
    torch.manual_seed(0)
    module = HybridAttention(channels, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(module.spatial_norm.running_mean)
    return module.to(dtype).train(training)


def noise(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(function, module, x, upper):
    """Output, gradients of x and of the parameters, running statistics."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    out = function(module, x)
    gradients = torch.autograd.grad(out, [x, *module.parameters()], upper.to(out.dtype))
    return [out.detach(), *gradients, *module.spatial_norm.buffers()]


def assert_equal(module, x, upper, **tolerance):
    wanted = run(HybridAttention.forward, module, x, upper)
    for ours, theirs in zip(run(hybrid_attention, module, x, upper), wanted):
        torch.testing.assert_close(ours, theirs, check_stride=x.is_contiguous(), **tolerance)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_reference(reference, shape, memory_format, training):
    x, upper = (noise(shape, seed=seed).contiguous(memory_format=memory_format) for seed in (1, 2))
    assert_equal(make(shape[1], training=training), x, upper)
    # Few values, half of them zero: ties between pixels, between channels, and with the zeros of masked channels
    assert_equal(make(shape[1], training=training), (2 * x).round().relu() / 2, upper)


@pytest.mark.parametrize('kwargs', [dict(kernel_size=k) for k in (1, 3, 5, 9, 11)] + [dict(separation_rate=0.3)])
@pytest.mark.parametrize('shape', [(2, 16, 8, 8), (2, 16, 16, 12), (2, 16, 17, 18)])
def test_variants_equal_the_reference(reference, shape, kwargs):
    assert_equal(make(16, **kwargs), noise(shape), noise(shape, seed=2))


@pytest.mark.parametrize('value', [0.0, 1.0, -1.0])
def test_all_channels_tie(reference, value):
    """All are important then, and a maximum may be negative."""
    module = make(8)
    module.channel_conv.weight.data.zero_()
    assert_equal(module, torch.full((2, 8, 4, 4), value, dtype=torch.float64), noise((2, 8, 4, 4)))
    assert_equal(module, value + noise((2, 8, 4, 4)), noise((2, 8, 4, 4), seed=2))


@pytest.mark.parametrize('momentum', [0.3, None])
def test_running_statistics_over_several_steps(reference, momentum):
    one, other = make(16), make(16)
    for module, function in ((one, HybridAttention.forward), (other, hybrid_attention)):
        module.spatial_norm.momentum = momentum
        for seed in range(3):
            function(module, noise((2, 16, 5, 5), seed=seed))
    for ours, theirs in zip(other.spatial_norm.buffers(), one.spatial_norm.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_without_running_statistics(reference):
    module = make(16, training=False)
    module.spatial_norm = nn.BatchNorm2d(1, track_running_stats=False).double().eval()
    assert_equal(module, noise((2, 16, 5, 5)), noise((2, 16, 5, 5), seed=2))


@pytest.mark.parametrize(
    'view',
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, 2:18],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(2, 1, 0, 3),
    ],
)
def test_non_contiguous_input_and_gradient(reference, view):
    x, upper = view(noise((4, 20, 8, 8))), view(noise((4, 20, 8, 8), seed=2))
    assert_equal(make(x.shape[1]), x, upper)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape', SHAPES[:6])
def test_float32_within_rounding(reference, shape, memory_format):
    x = noise(shape, torch.float32).contiguous(memory_format=memory_format)
    assert_equal(make(shape[1], torch.float32), x, noise(shape, torch.float32, seed=2), rtol=2e-4, atol=2e-5)


def distance(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_half_precision_is_as_close_to_the_truth_as_the_reference(reference, dtype, memory_format, autocast):
    shape = (4, 32, 12, 12)
    module = make(32, torch.float32 if autocast else dtype)
    x, upper = (noise(shape, dtype, seed=seed).contiguous(memory_format=memory_format) for seed in (1, 2))
    truth = run(HybridAttention.forward, copy.deepcopy(module).double(), x.double(), upper.double())
    with torch.autocast('cpu', dtype, enabled=autocast):
        ours, theirs = (run(function, module, x, upper) for function in (hybrid_attention, HybridAttention.forward))
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
    assert ours[0].dtype == ours[1].dtype == dtype and ours[0].stride() == x.stride()
    for mine, other, wanted in list(zip(ours, theirs, truth))[:2]:  # output and gradient of x
        assert distance(mine, wanted) < 1.2 * distance(other, wanted) + 1e-3
    for mine, wanted in list(zip(ours, truth))[2:7]:  # parameters, of which each is a sum that cancels
        assert distance(mine, wanted) < 0.1


@pytest.mark.parametrize('memory_format', FORMATS)
def test_gradients_of_maxima_survive_rounded_products(reference, memory_format):
    """set_float32_matmul_precision('medium') lets a processor with bfloat16 units round what it multiplies."""
    module, shape = make(16, torch.float32), (2, 16, 8, 8)
    x, upper = (noise(shape, torch.float32, seed).contiguous(memory_format=memory_format) for seed in (1, 2))
    wanted = run(HybridAttention.forward, module, x, upper)
    torch.set_float32_matmul_precision('medium')
    try:
        ours = run(hybrid_attention, module, x, upper)
    finally:
        torch.set_float32_matmul_precision('highest')
    assert distance(ours[0], wanted[0].double()) < 0.01 and distance(ours[1], wanted[1].double()) < 0.02


def test_second_derivative_is_refused_by_name():
    module, x = make(8), noise((2, 8, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative .* timm_ham\.set_fused\(False\)'):
        gradient.sum().backward()


def test_second_derivative_of_the_reference(reference):
    module, x = make(8), noise((2, 8, 4, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()
    assert x.grad.isfinite().all()


def test_set_fused_chooses(monkeypatch):
    module, x, seen = make(8, training=False), noise((2, 8, 4, 4)), []
    monkeypatch.setattr('timm_ham.layers.ham.hybrid_attention', lambda module, x: seen.append(x) or x)
    module(x)
    assert len(seen) == 1
    timm_ham.set_fused(False)
    try:
        module(x)
    finally:
        timm_ham.set_fused(True)
    assert len(seen) == 1


def test_steps_aside():
    module, x = make(8), noise((2, 8, 4, 4))
    assert fused_applies(module, x)
    assert (
        not fused_applies(module, x.to('meta'))
        and not fused_applies(module, x[:, :6])
        and not fused_applies(module, x[0])
    )
    assert not fused_applies(module, x[:0]) and not fused_applies(module, x.long())
    assert not fused_applies(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)), x)
    replaced = copy.deepcopy(module)
    replaced.spatial_conv = nn.Sequential(replaced.spatial_conv)
    assert not fused_applies(replaced, x)
    graph = torch.fx.symbolic_trace(module).graph
    exported = torch.export.export(module.eval(), (x,)).graph
    traced = torch.jit.trace(module, x).inlined_graph
    assert not any('timm_ham::' in str(form) or 'ops.timm_ham' in str(form) for form in (graph, exported, traced))


def test_small_inputs_are_the_references(monkeypatch):
    monkeypatch.undo()
    module, small, middle, large = make(16), *(torch.empty(batch, 16, 32, 32) for batch in (3, 4, 16))
    assert [fused_applies(module, x) for x in (small, middle, large)] == [False, True, True]
    with torch.no_grad():
        assert [fused_applies(module, x) for x in (small, middle, large)] == [False, False, True]


def test_operators_are_well_formed():
    """Schema, aliasing, shapes without data, autograd registration: torch's own check."""
    module, x = make(8), noise((2, 8, 4, 4))
    norm = module.spatial_norm
    parameters = [parameter.detach() for parameter in module.parameters()]
    for tensor in (x, *parameters):
        tensor.requires_grad_()
    for statistics in ((None, None), (norm.running_mean, norm.running_var)):
        torch.library.opcheck(torch.ops.timm_ham.hybrid_attention, (x, *parameters, *statistics, 4, 1e-5))


@pytest.mark.parametrize(
    ('backend', 'size'),
    # The convolution as a matrix, over blocks, over pixels
    [('aot_eager', 16), *(pytest.param('inductor', size, marks=pytest.mark.slow) for size in (8, 16, 17))],
)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('training', [True, False])
def test_compiles_whole(backend, size, memory_format, training):
    torch.compiler.reset()
    module = make(16, torch.float32, training).to(memory_format=memory_format)
    x, upper = (
        noise((2, 16, size, size), torch.float32, seed).contiguous(memory_format=memory_format) for seed in (1, 2)
    )
    x = (2 * x).round() / 2  # ties
    compiled = torch.compile(lambda module, x: module(x), backend=backend, fullgraph=True)
    for ours, theirs in zip(run(compiled, module, x, upper), run(hybrid_attention, module, x, upper)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_compiles_whole_under_autocast(backend, memory_format):
    torch.compiler.reset()
    module, shape = make(16, torch.float32), (2, 16, 16, 16)
    x, upper = (noise(shape, torch.bfloat16, seed).contiguous(memory_format=memory_format) for seed in (1, 2))
    truth = run(HybridAttention.forward, copy.deepcopy(module).double(), x.double(), upper.double())
    with torch.autocast('cpu', torch.bfloat16):
        compiled = torch.compile(lambda module, x: module(x), backend=backend, fullgraph=True)
        ours, theirs = (run(function, module, x, upper) for function in (compiled, hybrid_attention))
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
    for mine, other, wanted in list(zip(ours, theirs, truth))[:-1]:  # without the count of batches
        assert distance(mine, wanted) < 1.2 * distance(other, wanted) + 1e-2


def test_saves_the_input_and_six_maps():
    module, x, saved = make(16, torch.float32), noise((4, 16, 16, 16), torch.float32).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.data_ptr(), tensor.numel()) and tensor, lambda tensor: tensor
    ):
        module(x)
    few = 5 * 4 * 16 + 200  # five numbers a channel, the parameters
    assert x.numel() < sum(saved.values()) <= x.numel() * (1 + 6 / 16) + few
