"""The model card, filled from a run's record."""

import json
import shlex
from pathlib import Path
from typing import Any, Dict, List

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ham.training.data import DATASETS
from timm_ham.training.recipes import Recipe, changes

__all__ = ['command_line', 'model_card']

TEMPLATE = Path(__file__).with_name('card.md')


def command_line(recipe: Recipe, recipe_name: str) -> str:
    """The command that trains a recipe: its name, and an option for each field that was changed."""
    words = ['timm-ham train --recipe', recipe_name]
    for field, value in changes(recipe, recipe_name).items():
        option = field.replace('_', '-')
        if isinstance(value, bool):
            words.append(f'--{option}' if value else f'--no-{option}')
        elif isinstance(value, dict):
            words.append(f'--{option} {shlex.quote(json.dumps(value))}')
        elif isinstance(value, (tuple, list)):
            words.append(' '.join([f'--{option}', *map(str, value)]))
        else:
            words.append(f'--{option} {value}')
    return ' '.join(words)


def model_card(name: str, record: Dict[str, Any], metrics: List[Dict[str, float]]) -> ModelCard:
    """The card of the weights `name` (`<model>.<tag>`).

    Args:
        name: Name of the weights.
        record: What run.json of the finished run holds.
        metrics: The lines of its metrics.jsonl.
    """
    data, results = record['data'], record['results']
    hub_id = DATASETS.get(data['name'])
    hub_id = hub_id if isinstance(hub_id, str) else None
    accuracy = round(100 * results['test']['accuracy'], 2)
    card_data = ModelCardData(
        library_name='timm',
        license='apache-2.0',
        tags=['image-classification', 'timm', 'timm_ham', 'attention'],
        datasets=hub_id,
        metrics=['accuracy'],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=hub_id or data['name'],
                dataset_name=data['name'],
                dataset_split='test',
                metric_type='accuracy',
                metric_value=accuracy,
            )
        ],
    )
    recipe = Recipe.from_json(record['recipe'])
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        recipe=recipe,
        command=command_line(recipe, record['recipe_name']),
        record=record,
        data=data,
        results=results,
        starts=record['starts'],
        accuracy=accuracy,
        held_out=metrics[-1].get('holdout_accuracy'),
    )
