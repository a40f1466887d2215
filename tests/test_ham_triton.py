"""The passes of HAM on a GPU against the reference: compiled where there is one, else under Triton's interpreter."""

import pytest
import torch

from tests.test_ham_fused import FORMATS, assert_equal, distance, make, noise, reference, run
from timm_ham import HybridAttention
from timm_ham.layers import ham_fused
from timm_ham.layers.block_conv import Blocks
from timm_ham.layers.ham_fused import hybrid_attention

ham_triton = pytest.importorskip('timm_ham.layers.ham_triton', exc_type=ImportError)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Several tiles of channels and of pixels, fewer than a tile, one pixel, H != W, C that is no power of 2.
SHAPES = [(2, 16, 8, 8), (1, 10, 5, 7), (1, 300, 3, 3), (1, 6, 17, 19), (1, 12, 20, 14), (1, 4, 1, 1)]
__all__ = ['reference']  # a fixture


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """The passes under test, with what a GPU has around them."""
    monkeypatch.setattr(ham_fused, '_passes', lambda x: ham_triton)
    monkeypatch.setattr(
        Blocks, 'of', classmethod(lambda cls, x, weight: cls(*x.shape[2:], weight.shape[-1], single=True))
    )


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_reference(reference, shape, memory_format, training):
    x, upper = (noise(shape, seed=seed).to(DEVICE).contiguous(memory_format=memory_format) for seed in (1, 2))
    module = make(shape[1], training=training).to(DEVICE)
    assert_equal(module, x, upper)
    # Few values, half of them zero: ties between pixels, between channels, and with the zeros of masked channels
    assert_equal(module, (2 * x).round().relu() / 2, upper)


@pytest.mark.parametrize('value', [0.0, 1.0, -1.0])
def test_all_channels_tie(reference, value):
    module = make(8).to(DEVICE)
    module.channel_conv.weight.data.zero_()
    x = torch.full((2, 8, 4, 4), value, dtype=torch.float64, device=DEVICE)
    assert_equal(module, x, noise((2, 8, 4, 4)).to(DEVICE))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_half_precision_is_as_close_to_the_truth_as_the_reference(reference, dtype, memory_format):
    shape = (2, 16, 6, 6)
    module = make(16, torch.float32).to(DEVICE)
    x, upper = (noise(shape, dtype, seed=seed).to(DEVICE, memory_format=memory_format) for seed in (1, 2))
    truth = run(HybridAttention.forward, module.double(), x.double(), upper.double())
    module.float()
    with torch.autocast(DEVICE, dtype):
        ours, theirs = (run(function, module, x, upper) for function in (hybrid_attention, HybridAttention.forward))
    assert ours[0].dtype == ours[1].dtype == dtype and ours[0].stride() == x.stride()
    for mine, other, wanted in list(zip(ours, theirs, truth))[:2]:  # output and gradient of x
        assert distance(mine, wanted) < 1.2 * distance(other, wanted) + 1e-3
