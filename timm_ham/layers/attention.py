"""The attentions by name: what timm's blocks take as `attn_layer`."""

from functools import partial

from timm.layers import SEModule
from timm.layers.cbam import ChannelAttn

from timm_ham.layers.ablations import CbamChannelAdaptive, HamChannelCbamSpatial
from timm_ham.layers.ham import HybridAttention, HybridChannelAttention
from timm_ham.layers.rcca import RecurrentCrissCrossAttention

__all__ = ['ABLATIONS', 'AFTER_STAGES', 'ATTENTIONS']

# Values as timm.layers.get_attn understands them: None, one of timm's own names, a class or a functools.partial, called
# as layer(channels, device=..., dtype=...).
ATTENTIONS = {
    'plain': None,
    # Reduction 16 as in the papers, not rounded up to a multiple of 8 as timm does for narrow layers.
    'se': partial(SEModule, rd_divisor=1),
    'eca': 'eca',
    'cbam': 'cbam',
    'rcca': RecurrentCrissCrossAttention,
    'ham': HybridAttention,
}
# Those that stand after each of the last three stages; the others stand in every residual block.
AFTER_STAGES = ('rcca',)

# Parts of HAM and CBAM, for the comparisons of Tables 1 and 2 of the HAM paper.
ABLATIONS = {
    'cbam_channel': ChannelAttn,
    'cbam_channel_adaptive': CbamChannelAdaptive,
    'ham_channel_no_adaptive': partial(HybridChannelAttention, adaptive=False),
    'ham_channel': HybridChannelAttention,
    'ham_channel_cbam_spatial': HamChannelCbamSpatial,
}
