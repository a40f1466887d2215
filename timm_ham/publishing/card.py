"""The model card and the table of all weights, filled from the records of runs."""

import html
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate

from timm_ham.errors import TimmHamError
from timm_ham.inspection.complexity import complexity
from timm_ham.models.weights import CONFIG_FILE, NAMESPACE, hub_folders, read_config
from timm_ham.training.quality import QUALITY_PICTURE, read_quality
from timm_ham.training.recipes import Recipe, changes
from timm_ham.training.run import Run
from timm_ham.training.sources import DATASETS, FROM_HUB

__all__ = ['CARD_FILE', 'GRADCAM_FILE', 'command_line', 'folder_card', 'model_card', 'weights_table']

TEMPLATE = Path(__file__).with_name('card.md')
CARD_FILE = 'README.md'
GRADCAM_FILE = 'gradcam.png'  # shown if the run has one


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
            words.append(f'--{option} {shlex.quote(str(value))}')
    return ' '.join(words)


def _plain(value: Any) -> Any:
    """Every string in it as mere text: names of classes and datasets bring no line, HTML or Markdown along."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return re.sub(r'([\\`*|\[\]])', r'\\\1', html.escape(' '.join(value.split()), quote=False))
    return value


def _dataset_id(data: Dict[str, Any]) -> Optional[str]:
    """The dataset's id on the Hub, if it came from there or is known to be there."""
    known = DATASETS.get(data['name'])
    if isinstance(known, str):
        return known
    source = data['source']
    return source.removesuffix(FROM_HUB) if source.endswith(FROM_HUB) else None


def _metadata(name: str, data: Dict[str, Any], test: Dict[str, Any]) -> ModelCardData:
    dataset = ' '.join(data['name'].split())
    dataset_id = _dataset_id(data)
    measured = {'accuracy': round(100 * test['accuracy'], 2), 'loss': round(test['loss'], 4)}
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license='apache-2.0',
        tags=['image-classification', 'timm', 'timm_ham', 'attention'],
        datasets=[dataset_id] if dataset_id else None,
        metrics=['accuracy'],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset_id or dataset,
                dataset_name=dataset,
                dataset_split='test',
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in measured.items()
        ],
    )


def model_card(
    name: str,
    record: Dict[str, Any],
    metrics: List[Dict[str, float]],
    repo_id: Optional[str] = None,
    gradcam: bool = False,
    quality: Optional[Dict[str, Any]] = None,
) -> ModelCard:
    """The card of the weights `name` (`<model>.<tag>`).

    Args:
        name: Name of the weights.
        record: What run.json of the finished run holds.
        metrics: The lines of its metrics.jsonl.
        repo_id: Repository on the Hub; that of the name in NAMESPACE if None.
        gradcam: Whether a picture GRADCAM_FILE lies beside the card.
        quality: What QUALITY_FILE beside the card holds, if it is there.
    """
    data, results = record['data'], record['results']
    recipe = Recipe.from_json(record['recipe'])
    cost = complexity(
        recipe.model,
        num_classes=len(data['label_names']),
        pretrained_cfg_overlay=dict(input_size=(3, *data['image_size'])),
        **recipe.model_args,
    )
    plain = _plain(record)
    return ModelCard.from_template(
        _metadata(name, data, results['test']),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id or f'{NAMESPACE}/{name}',
        recipe=_plain(asdict(recipe)),
        command=' '.join(command_line(recipe, record['recipe_name']).replace('`', "'").split()),
        data=plain['data'],
        results=plain['results'],
        starts=plain['starts'],
        accuracy=f'{100 * results["test"]["accuracy"]:.2f}',
        multiply_adds=f'{cost.multiply_adds / 1e6:,.1f} M',
        held_out=metrics[-1].get('holdout_accuracy'),
        gradcam=GRADCAM_FILE if gradcam else None,
        quality=_plain(quality),
        quality_picture=QUALITY_PICTURE,
    )


def folder_card(folder: Path, repo_id: Optional[str] = None) -> ModelCard:
    """The card of an exported folder, as `model_card` makes it of the record there."""
    run, config = Run(folder), read_config(folder / CONFIG_FILE)
    name = f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}'  # a copy of it may be called otherwise
    return model_card(
        name, run.record(), run.metrics(), repo_id, (folder / GRADCAM_FILE).is_file(), read_quality(folder)
    )


def weights_table(markdown: bool = False) -> str:
    """The weights under hub/ with what their records say, one run a row.

    Args:
        markdown: As Markdown, else for a terminal.

    Raises:
        TimmHamError: If there are none.
    """
    rows = []
    for folder in hub_folders():
        record = Run(folder).record()
        data, recipe, results = record['data'], record['recipe'], record['results']
        rows.append(
            (
                f'`{folder.name}`' if markdown else folder.name,
                _plain(data['name']),
                f'{data["sizes"]["train"]:,}',
                f'{results["test"]["images"]:,}',
                f'{100 * results["test"]["accuracy"]:.2f} %',
                f'{results["parameters"]:,}',
                record['recipe_name'],
                f'{recipe["epochs"]}',
                f'{recipe["seed"]}',
                f'{results["train_seconds"] / 60:,.0f} min',
            )
        )
    if not rows:
        raise TimmHamError('there are no weights under hub/: put a run there by timm-ham export')
    headers = (
        'weights',
        'dataset',
        'training images',
        'test images',
        'test accuracy',
        'parameters',
        'recipe',
        'epochs',
        'seed',
        'time',
    )
    return tabulate(
        rows,
        headers,
        tablefmt='github' if markdown else 'simple',
        disable_numparse=True,
        colalign=('left', 'left', 'right', 'right', 'right', 'right', 'left', 'right', 'right', 'right'),
    )
