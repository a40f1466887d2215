"""The attentions by name: what timm's blocks take as `attn_layer`."""

from functools import partial

from timm.layers import SEModule

from timm_ham.layers.ham import HybridAttention

__all__ = ['ATTENTIONS']

# Values as timm.layers.get_attn understands them: None, one of timm's own names, a class or a functools.partial, called
# as layer(channels, device=..., dtype=...).
ATTENTIONS = {
    'plain': None,
    # Reduction 16 as in the papers, not rounded up to a multiple of 8 as timm does for narrow layers.
    'se': partial(SEModule, rd_divisor=1),
    'eca': 'eca',
    'cbam': 'cbam',
    'ham': HybridAttention,
}
