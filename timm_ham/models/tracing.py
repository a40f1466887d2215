"""The graph of a network's layers."""

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx

__all__ = ['LayerTracer']


class LayerTracer(fx.Tracer):
    """Symbolic tracing as torch does it, but down to modules of the given classes and those that timm keeps whole."""

    def __init__(self, *whole: type):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.whole = (*whole, *get_notrace_modules())

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """As in fx.Tracer."""
        return isinstance(m, self.whole) or super().is_leaf_module(m, module_qualified_name)
