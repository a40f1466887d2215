"""Residual networks with the Hybrid Attention Module, as a plugin for timm.

import timm, timm_ham
model = timm.create_model('resnet20_ham', pretrained=True)
"""

from timm_ham.errors import TimmHamError
from timm_ham.layers import ATTENTIONS, HybridAttention
from timm_ham.models import ARCHITECTURES, MODELS, ResidualNetwork

__all__ = ['ARCHITECTURES', 'ATTENTIONS', 'MODELS', 'HybridAttention', 'ResidualNetwork', 'TimmHamError']
__version__ = '0.1.0'
