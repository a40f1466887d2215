"""Attention layers, on torch and timm alone."""

from timm_ham.layers.attention import ATTENTIONS
from timm_ham.layers.ham import HybridAttention

__all__ = ['ATTENTIONS', 'HybridAttention']
