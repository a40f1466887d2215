"""A model with its weights, by registered name, folder or Hub id, and what it takes to put an image through it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.models.hub import download
from timm_ham.models.weights import CONFIG_FILE, MAX_CONFIG_BYTES, check_architecture, hub_folders, read_config

__all__ = ['Classifier', 'Description', 'describe_weights', 'load_classifier', 'load_model']

HUB_PREFIX = 'hf-hub:'
FOLDER_PREFIX = 'local-dir:'


@dataclass(frozen=True)
class Classifier:
    """A model in eval mode, and what goes before and behind it.

    model: Images, float32 (B, 3, H, W), to logits (B, classes).
    transform: A PIL image in RGB to float32 (3, H, W), as the weights expect it.
    label_names: Of the classes, in the order of the logits; their numbers where the weights name none.
    """

    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    label_names: Tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What is known of weights before they are loaded.

    model: Registered name of the architecture.
    model_args: Further arguments that it is made with, but for the number of classes.
    cfg: timm's pretrained cfg: `input_size`, `mean`, `std` and the like.
    """

    model: str
    model_args: Dict[str, Any]
    cfg: Dict[str, Any]


def _find(name: str, cache_dir: Union[str, Path, None] = None) -> Tuple[str, Optional[Path]]:
    """The name as timm takes it, and the checked config.json of a folder or repository."""
    folder = Path(name.removeprefix(FOLDER_PREFIX))
    if (folder / CONFIG_FILE).is_file():
        _check_config(folder / CONFIG_FILE, folder.resolve().name)
        return f'{FOLDER_PREFIX}{folder}', folder / CONFIG_FILE
    if name.startswith(HUB_PREFIX):
        hub_id = name.removeprefix(HUB_PREFIX)
        config = download(hub_id, CONFIG_FILE, cache_dir, MAX_CONFIG_BYTES)
        _check_config(config, hub_id.partition('@')[0].rpartition('/')[2])
        return name, config
    if not timm.is_model_pretrained(name):
        choices = [
            *(folder.name for folder in hub_folders()),
            f'a folder with {CONFIG_FILE}',
            f'{HUB_PREFIX}<owner>/<name>',
            'any pretrained model of timm',
        ]
        raise TimmHamError(f'no weights for {name!r}: choose from {", ".join(choices)}')
    return name, None


def describe_weights(name: str, cache_dir: Union[str, Path, None] = None) -> Description:
    """Model, arguments and cfg of weights, named as for `load_model`; raises as that does."""
    name, file = _find(name, cache_dir)
    if file is None:
        return Description(name.partition('.')[0], {}, timm.get_pretrained_cfg(name).to_dict())
    config = read_config(file)
    arguments = {key: value for key, value in config.get('model_args', {}).items() if key != 'num_classes'}
    return Description(config['architecture'], arguments, config['pretrained_cfg'])


def load_model(name: str, cache_dir: Union[str, Path, None] = None, **model_args) -> nn.Module:
    """A model with its weights.

    Args:
        name: A registered name (`resnet20_ham.cifar10`), a folder with config.json, or
            `hf-hub:<owner>/<name>[@revision]`.
        cache_dir: For what is downloaded; huggingface_hub's own if None.
        **model_args: For timm.create_model.

    Raises:
        TimmHamError: If there is no such model, or it has no weights, or they are not whole.
    """
    name, _ = _find(name, cache_dir)
    try:
        return timm.create_model(name, pretrained=True, cache_dir=cache_dir, **model_args)
    except (OSError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split('\n')
        raise TimmHamError(f'{name} can not be loaded: {" ".join(reason[:2])}') from error


def _check_config(config: Path, name: str) -> None:
    """timm believes whatever config it is given: hold it against limits, the registry and the weights' name first."""
    architecture = read_config(config)['architecture']
    if not timm.is_model(architecture):
        raise TimmHamError(f'{config} is of {architecture!r}, which neither timm nor timm_ham has')
    check_architecture(architecture, name)


def load_classifier(name: str) -> Classifier:
    """`load_model` in eval mode, with its eval transform and class names; raises as that does."""
    model = load_model(name).eval()
    transform = create_transform(**resolve_model_data_config(model))
    return Classifier(model, transform, _label_names(model))


def _label_names(model: nn.Module) -> Tuple[str, ...]:
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return tuple(names)
    subset = infer_imagenet_subset(model)  # by the number of classes: timm's own weights name none
    if subset:
        imagenet = ImageNetInfo(subset)
        return tuple(imagenet.index_to_description(index) for index in range(model.num_classes))
    return tuple(str(index) for index in range(model.num_classes))
