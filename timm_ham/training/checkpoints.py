"""The state of a run as one safetensors file, which is whole and undamaged or is not read at all."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Tuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_ham.training.run import write_file

__all__ = ['DamagedError', 'optimizer_tensors', 'read_state', 'restore_optimizer', 'write_state']


class DamagedError(ValueError):
    """A checkpoint that is not what was written. The message says why in a few words."""


def _digest(tensors: Dict[str, torch.Tensor], facts: str) -> str:
    """SHA-256 over the facts and each tensor's name, dtype, shape and bytes: safetensors has no checksum of its own."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_state(file: Path, tensors: Dict[str, torch.Tensor], facts: Dict[str, Any]) -> None:
    """Write tensors, on any device, and JSON values; the file gets its name once it is on the disk."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    write_file(file, safetensors.torch.save(tensors, {'facts': text, 'sha256': _digest(tensors, text)}))


def read_state(file: Path) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """What `write_state` wrote, on the CPU.

    Raises:
        DamagedError: If a part of it is missing or has changed.
    """
    try:
        with safe_open(file, 'pt') as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DamagedError(str(error)) from error
    if metadata.get('sha256') != _digest(tensors, metadata.get('facts', '')):
        raise DamagedError('its checksum is another')
    return tensors, json.loads(metadata['facts'])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Dict[str, torch.Tensor]:
    """The optimizer's state by '<parameter>.<name>'; learning rates and the like are the recipe's."""
    return {
        f'{parameter_name}.{name}': value
        for parameter_name, parameter in model.named_parameters()
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in the memory format of the parameters."""
    parameters = dict(model.named_parameters())
    ordered = (parameter for group in optimizer.param_groups for parameter in group['params'])
    numbers = {parameter: number for number, parameter in enumerate(ordered)}
    states: Dict[int, Dict[str, torch.Tensor]] = {}
    for full_name, value in tensors.items():
        parameter_name, _, name = full_name.rpartition('.')
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        states.setdefault(numbers[parameter], {})[name] = value
    optimizer.load_state_dict({'state': states, 'param_groups': optimizer.state_dict()['param_groups']})


def prefixed(prefix: str, tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The same tensors under longer names."""
    return {f'{prefix}.{name}': tensor for name, tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Those under `prefixed` names, under their own."""
    start = f'{prefix}.'
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def finite(model: nn.Module) -> bool:
    """Whether no parameter is infinite or not a number."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
