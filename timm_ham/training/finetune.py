"""Training that starts from weights: the recipe they lead to, the model with a new head, what of it stays as it is."""

from dataclasses import replace
from typing import Any, Dict, Optional

import timm
from timm.models import PretrainedCfg
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.models.loading import describe_weights, load_model
from timm_ham.training.data import DataInfo
from timm_ham.training.recipes import Recipe

__all__ = ['freeze', 'from_weights', 'starting_cfg', 'starting_model', 'train_mode']


def from_weights(recipe: Recipe, weights: str) -> Recipe:
    """The recipe with these weights as its start, and their model.

    Args:
        recipe: How to train.
        weights: As for `load_model`.

    Raises:
        TimmHamError: If there are no such weights.
    """
    described = describe_weights(weights)
    return replace(
        recipe, weights=weights, model=described.model, model_args={**described.model_args, **recipe.model_args}
    )


def starting_cfg(recipe: Recipe, known: Optional[DataInfo] = None) -> Dict[str, Any]:
    """What the recipe's model expects of images: `input_size`, `mean`, `std`.

    Args:
        recipe: What is trained.
        known: The facts of a run that is gone on with, whose weights may be gone by now.
    """
    if known:
        return dict(input_size=(3, *known.image_size), mean=known.mean, std=known.std)
    if recipe.weights:
        return describe_weights(recipe.weights).cfg
    return (timm.get_pretrained_cfg(recipe.model) or PretrainedCfg()).to_dict()


def starting_model(recipe: Recipe, data: DataInfo) -> nn.Module:
    """The recipe's weights under a new classifier for the dataset's classes.

    Raises:
        TimmHamError: If the weights can't be had, or are of another model than the recipe's.
    """
    described = describe_weights(recipe.weights)
    if described.model != recipe.model:
        raise TimmHamError(
            f'{recipe.weights} holds weights of {described.model!r}, not of {recipe.model!r}: leave --model to '
            f'timm-ham finetune {recipe.weights}'
        )
    model = load_model(recipe.weights, **recipe.model_args)
    model.reset_classifier(len(data.label_names))
    return model


def freeze(model: nn.Module) -> None:
    """Leave gradients to the classifier alone."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)


def train_mode(model: nn.Module, frozen: bool) -> None:
    """Put a model into train mode; of a frozen one only the classifier, so that norms keep their statistics."""
    model.train(not frozen)
    if frozen:
        model.get_classifier().train()
