"""Several processes, on one machine or many: how they start, and what makes them one network."""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['start_processes', 'synchronize_batch_norms', 'take_buffers_of_first']


def start_processes() -> PartialState:
    """accelerate's view of the processes. Launched where there is no accelerator, they talk through gloo on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def take_buffers_of_first(model: nn.Module) -> None:
    """Give all processes the buffers of the first: each has running statistics of its own share of the images."""
    if PartialState().num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


class SumOverProcesses(torch.autograd.Function):
    """all_reduce with a backward pass: each process's loss depends on the sum, so the gradients add up likewise."""

    @staticmethod
    def forward(context, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all processes."""
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        """The sum of the gradients over all processes."""
        return SumOverProcesses.apply(gradient)


class CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm on the CPU, which torch's own refuses; with the activation that timm may put behind a norm."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) to the same shape and dtype."""
        x = self._over_processes(x) if self.training and torch.distributed.is_initialized() else super().forward(x)
        return self.act(self.drop(x)) if hasattr(self, 'act') else x

    def _over_processes(self, x: torch.Tensor) -> torch.Tensor:
        summed = SumOverProcesses.apply
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        count = summed(torch.tensor(float(x.numel() / x.shape[1])))
        mean = summed(wide.sum(dims)) / count
        centered = wide - mean.view(shape)
        var = summed(centered.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        normed = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(x.dtype)


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms over the batches of all processes; names and values in it stay as they are."""
    if device.type != 'cpu':
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = CpuSyncBatchNorm  # the same parameters, buffers and activation
    return model
