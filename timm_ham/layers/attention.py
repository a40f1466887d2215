"""The attentions by name: what timm's blocks take as `attn_layer`."""

from timm_ham.layers.ham import HybridAttention

__all__ = ['ATTENTIONS']

# Values as timm.layers.get_attn understands them: None, one of timm's own names, a class or a functools.partial, called
# as layer(channels, device=..., dtype=...).
ATTENTIONS = {
    'plain': None,
    'ham': HybridAttention,
}
