"""The networks; importing this registers them in timm."""

from timm_ham.models.fusion import fuse
from timm_ham.models.insertion import add_attention
from timm_ham.models.network import ResidualNetwork
from timm_ham.models.zoo import ARCHITECTURES, MODELS

__all__ = ['ARCHITECTURES', 'MODELS', 'ResidualNetwork', 'add_attention', 'fuse']
