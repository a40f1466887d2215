"""Attention layers, on torch and timm alone."""

from timm_ham.layers.attention import ABLATIONS, AFTER_STAGES, ATTENTIONS
from timm_ham.layers.ham import HybridAttention
from timm_ham.layers.ham_fused import set_fused
from timm_ham.layers.rcca import RecurrentCrissCrossAttention

__all__ = ['ABLATIONS', 'AFTER_STAGES', 'ATTENTIONS', 'HybridAttention', 'RecurrentCrissCrossAttention', 'set_fused']
