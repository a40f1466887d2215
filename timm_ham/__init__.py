"""Residual networks with the Hybrid Attention Module, as a plugin for timm.

import timm, timm_ham
model = timm.create_model('resnet20_ham', pretrained=True)
"""

from timm_ham.errors import TimmHamError
from timm_ham.layers import ABLATIONS, ATTENTIONS, HybridAttention, RecurrentCrissCrossAttention, set_fused
from timm_ham.models import ARCHITECTURES, MODELS, ResidualNetwork, add_attention, fuse
from timm_ham.models.maps import HamMaps, inspect

__all__ = [
    'ABLATIONS',
    'ARCHITECTURES',
    'ATTENTIONS',
    'MODELS',
    'HamMaps',
    'HybridAttention',
    'RecurrentCrissCrossAttention',
    'ResidualNetwork',
    'TimmHamError',
    'add_attention',
    'fuse',
    'inspect',
    'set_fused',
]
__version__ = '0.1.0'
