"""Finished runs beside each other: those that differ in the seed alone are one row, set against plain seed by seed."""

import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from tabulate import tabulate

from timm_ham.errors import TimmHamError
from timm_ham.models import ARCHITECTURES, MODELS
from timm_ham.training.recipes import Recipe, changes
from timm_ham.training.run import Run

__all__ = ['Group', 'compare', 'comparison_table', 'draw_groups', 'mean_and_deviation', 'paired_differences']

# What a row has a column of its own for, or a row is made of.
OWN_COLUMN = ('model', 'model_args', 'dataset', 'epochs', 'seed')


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    label: What was trained, in words.
    errors: Seed and test error after the last epoch, %, of each run.
    differences: For each seed that plain was trained with too, the error over plain's, %.
    recipe: Recipe of the first run, and recipe_name the name of what it was made from.
    dataset, images: Name of the dataset, and how many of its images were trained on.
    """

    label: str
    errors: Tuple[Tuple[int, float], ...]
    differences: Dict[int, float] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    recipe_name: str = ''
    dataset: str = ''
    images: int = 0


def mean_and_deviation(values: Sequence[float], sign: str = '') -> str:
    """Mean +- standard deviation of a sample, such as '9.51 +- 0.12'; one value alone, and none as ''."""
    if not values:
        return ''
    deviation = f' +- {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.2f}{deviation}'


def _by_seed(errors: Sequence[Tuple[int, float]]) -> Dict[int, float]:
    """The mean of each seed's runs, one run mostly."""
    values = defaultdict(list)
    for seed, error in errors:
        values[seed].append(error)
    return {seed: statistics.mean(of_seed) for seed, of_seed in values.items()}


def paired_differences(errors: Sequence[Tuple[int, float]], plain: Sequence[Tuple[int, float]]) -> Dict[int, float]:
    """Seed to error minus plain's error, for the seeds that both have."""
    ours, theirs = _by_seed(errors), _by_seed(plain)
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def _plain(model: str) -> Optional[str]:
    """The same architecture without attention; None for a model that is not one of ours."""
    names = [f'{architecture}_plain' for architecture in ARCHITECTURES if model.startswith(f'{architecture}_')]
    return names[0] if names and model in MODELS else None


def _key(record: Dict[str, Any]) -> Dict[str, Any]:
    """All that makes runs one group."""
    recipe = {name: value for name, value in asdict(Recipe.from_json(record['recipe'])).items() if name != 'seed'}
    # The same data may lie at another place.
    return {**recipe, 'dataset': record['data']['name'], 'images': record['data']['sizes']['train']}


def _group(records: List[Dict[str, Any]], plain: List[Dict[str, Any]]) -> Group:
    errors, plain_errors = (
        tuple((record['recipe']['seed'], 100 * (1 - record['results']['test']['accuracy'])) for record in of)
        for of in (records, plain)
    )
    first = records[0]
    recipe = Recipe.from_json(first['recipe'])
    return Group(
        label=recipe.model + (f' {json.dumps(recipe.model_args)}' if recipe.model_args else ''),
        errors=errors,
        differences=paired_differences(errors, plain_errors) if plain is not records else {},
        recipe=recipe,
        recipe_name=first['recipe_name'],
        dataset=first['data']['name'],
        images=first['data']['sizes']['train'],
    )


def compare(folders: Sequence[Path]) -> Tuple[List[Group], List[str]]:
    """Read runs and put together those that differ in the seed alone.

    Args:
        folders: Of runs.

    Returns:
        The groups, in the order of their first folders, and a line for each folder that is left out, with the reason.

    Raises:
        TimmHamError: If no folder holds a finished run.
    """
    groups: Dict[str, List[Dict[str, Any]]] = {}
    left_out = []
    for run in map(Run, folders):
        if not run.record_file.is_file():
            left_out.append(f'{run.folder}: no run')
            continue
        record = run.record()
        if 'results' not in record:
            left_out.append(f'{run.folder}: not finished, {len(run.metrics())} of {record["recipe"]["epochs"]} epochs')
            continue
        groups.setdefault(json.dumps(_key(record), sort_keys=True), []).append(record)
    if not groups:
        raise TimmHamError(
            f'no finished run among {len(folders)} folders ({"; ".join(left_out[:3]) or "none given"}): train one first'
        )
    result = []
    for records in groups.values():
        key = {**_key(records[0]), 'model': _plain(records[0]['recipe']['model']), 'model_args': {}}
        result.append(_group(records, groups.get(json.dumps(key, sort_keys=True), [])))
    return result, left_out


def _how(group: Group) -> str:
    changed = changes(group.recipe, group.recipe_name)
    return ', '.join(
        [group.recipe_name, *(f'{name}={value}' for name, value in changed.items() if name not in OWN_COLUMN)]
    )


def comparison_table(groups: Sequence[Group], markdown: bool = False) -> str:
    """A row a group: what it is, its budget, its test error, and the paired difference to plain.

    Args:
        groups: As `compare` gives them.
        markdown: As Markdown, else for a terminal.
    """
    rows = [
        (
            group.label,
            _how(group),
            group.dataset,
            f'{group.recipe.epochs}',
            f'{group.images:,}',
            f'{len(group.errors)}',
            mean_and_deviation([error for _, error in group.errors]),
            mean_and_deviation(list(group.differences.values()), sign='+'),
            f'{len(group.differences) or ""}',
        )
        for group in groups
    ]
    headers = (
        'model',
        'recipe',
        'dataset',
        'epochs',
        'training images',
        'runs',
        'test error, %',
        'minus plain, paired',
        'pairs',
    )
    lines = [
        tabulate(
            rows,
            headers,
            tablefmt='github' if markdown else 'simple',
            disable_numparse=True,
            colalign=('left', 'left', 'left', *['right'] * 6),
        ),
        '',
        'Test error after the last epoch: mean +- standard deviation over runs that differ in the seed alone.',
    ]
    budgets = {(group.dataset, group.recipe.epochs, group.images) for group in groups}
    if len(budgets) > 1:
        said = '; '.join(f'{epochs} epochs of {images:,} images of {name}' for name, epochs, images in sorted(budgets))
        lines.append(f'Budgets differ ({said}): compare only rows of the same one.')
    return '\n'.join(lines)


def draw_groups(
    groups: Sequence[Group],
    title: str,
    path: Path,
    paper: Optional[Mapping[str, float]] = None,
    metadata: Optional[Dict[str, str]] = None,
) -> None:
    """The runs of each group as dots with mean and standard deviation, and their paired differences to plain, as a PNG.

    Args:
        groups: One a row.
        title: Over the picture.
        path: File to write.
        paper: Labels, 'plain' among them, to the paper's test errors, %, to show beside ours.
        metadata: Text to store in the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.4 * len(groups)), dpi=110, layout='constrained')
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, group in enumerate(groups):
        for axes, values in ((left, [error for _, error in group.errors]), (right, list(group.differences.values()))):
            if values:
                axes.plot(values, [row] * len(values), 'o', color='#0072B2', alpha=0.4, markersize=5)
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                axes.errorbar(statistics.mean(values), row, xerr=deviation, fmt='s', color='#0072B2', capsize=4)
        if paper and group.label in paper:
            left.plot(paper[group.label], row, 'x', color='#D55E00', markersize=8)
            if 'plain' in paper and group.label != 'plain':
                right.plot(paper[group.label] - paper['plain'], row, 'x', color='#D55E00', markersize=8)
    left.plot([], [], 's', color='#0072B2', label='mean and standard deviation of our runs')
    if paper:
        left.plot([], [], 'x', color='#D55E00', label="the paper's best of ten, 200 epochs")
    names = [group.label for group in groups]
    if len(set(names)) < len(names):
        names = [f'{group.label}\n{_how(group)}, {group.recipe.epochs} epochs' for group in groups]
    left.set_yticks(range(len(groups)), names)
    left.set_ylim(len(groups) - 0.5, -0.5)
    left.set_xlabel('test error, %')
    right.set_xlabel('test error minus that of plain with the same seed, %')
    right.axvline(0, color='gray', linewidth=1)
    for axes in (left, right):
        axes.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8)
    figure.savefig(path, metadata=metadata)
