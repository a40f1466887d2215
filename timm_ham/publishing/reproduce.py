"""Rows of the paper's tables, trained here: what is missing is run, what was cut is gone on with, all of it compared.

Runs are laid out as `<folder>/<architecture>_<attention>.<seed>/`. The result is a JSON file, from which the table, its
picture and the family's card are made.
"""

import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from tabulate import tabulate

from timm_ham.errors import TimmHamError
from timm_ham.inspection.paper import PAPER_TABLES, paper_results
from timm_ham.models import ARCHITECTURES
from timm_ham.publishing.card import command_line
from timm_ham.training.compare import Group, draw_groups, mean_and_deviation, paired_differences
from timm_ham.training.recipes import Recipe
from timm_ham.training.run import Run

__all__ = ['Reproduction', 'comparison_section', 'describe', 'draw', 'is_current', 'write_card']

PAPER_EPOCHS = 200
BEGIN, END = '<!-- comparison: made by scripts/reproduce.py -->', '<!-- end of comparison -->'
SOURCE_KEY = 'Source'  # in the picture: SHA-256 of the results that it shows
# Fields that differ between runs, or change how fast the same thing is trained, or where the same data lie.
FREE = ('model', 'model_args', 'seed', 'compile', 'dataset')


def _split(label: str) -> Tuple[str, str]:
    """`<attention>.<attn_kwargs>` into both."""
    attention, _, attn_kwargs = label.partition('.')
    return attention, attn_kwargs


@dataclass(frozen=True)
class Reproduction:
    """What is to be trained.

    table: Number of the paper's table, 1 to 6.
    architecture: One of ARCHITECTURES; another one than the paper's is trained in its place.
    attentions: Rows of the table, as in PAPER_TABLES; all if empty.
    seeds: How many, from 0 on.
    recipe: How; model, its arguments and seed are put in. `recipe_name` is the name of what it was made from.
    folder: Holds the runs.

    Raises:
        TimmHamError: If there is no such table, architecture or row.
    """

    table: int
    architecture: str
    attentions: Tuple[str, ...]
    seeds: int
    recipe: Recipe
    recipe_name: str
    folder: Path

    def __post_init__(self):
        if self.table not in PAPER_TABLES:
            raise TimmHamError(f'the paper has no results in table {self.table}: choose from 1 to {len(PAPER_TABLES)}')
        if self.architecture not in ARCHITECTURES:
            raise TimmHamError(f'unknown architecture {self.architecture!r}: choose from {", ".join(ARCHITECTURES)}')
        rows = PAPER_TABLES[self.table][1]
        for label in self.attentions:
            if label not in rows:
                raise TimmHamError(f'table {self.table} has no row {label!r}: choose from all, {", ".join(rows)}')
        if self.seeds < 1:
            raise TimmHamError(f'{self.seeds} seeds are none: give at least 1')

    @property
    def dataset(self) -> str:
        """As a run's record calls it: the last part of an id or a path."""
        return Path(self.recipe.dataset).name

    @property
    def rows(self) -> Tuple[str, ...]:
        """The attentions, in the paper's order."""
        return tuple(label for label in PAPER_TABLES[self.table][1] if label in self.attentions or not self.attentions)

    def run(self, label: str, seed: int) -> Run:
        """The run of a row and seed, finished or not or not there."""
        return Run(self.folder / f'{self.architecture}_{label}.{seed}')

    def run_recipe(self, label: str, seed: int) -> Recipe:
        """What it is trained by."""
        attention, attn_kwargs = _split(label)
        pairs = (pair.split('=') for pair in attn_kwargs.split(',') if pair)
        arguments = {key: json.loads(value) for key, value in pairs}
        return replace(
            self.recipe,
            model=f'{self.architecture}_{attention}',
            model_args={**self.recipe.model_args, **({'attn_kwargs': arguments} if arguments else {})},
            seed=seed,
        )

    def check(self, run: Run, wanted: Recipe) -> None:
        """Raise a TimmHamError if a run was made in another way than is asked for here."""
        record = run.record()
        found = asdict(Recipe.from_json(record['recipe']))
        different = [
            f'{name} {found[name]!r} instead of {value!r}'
            for name, value in asdict(wanted).items()
            if found[name] != value and name not in ('compile', 'dataset')
        ]
        if record['data']['name'] != self.dataset:
            different.append(f'dataset {record["data"]["name"]} instead of {self.dataset}')
        if different:
            raise TimmHamError(f'{run.folder} has {", ".join(different)}: name another --folder, or the same options')

    def train(self, label: str, seed: int) -> None:
        """Train a run that is missing or go on with one that was cut, as a person would, in a process of its own."""
        run, recipe = self.run(label, seed), self.run_recipe(label, seed)
        if run.record_file.is_file():
            self.check(run, recipe)
            if 'results' in run.record():
                return
            words = ['train', '--resume', str(run.folder)]
        else:
            words = [*shlex.split(command_line(recipe, self.recipe_name))[1:], '--run', str(run.folder)]
        print(f'timm-ham {shlex.join(words)}', file=sys.stderr)
        status = launch(words)
        if status:
            raise TimmHamError(f'{run.folder} was not finished (status {status}): the same command goes on from there')

    def results(self) -> Dict[str, Any]:
        """What is there so far, for a JSON file.

        Raises:
            TimmHamError: If a run was made in another way than is asked for.
        """
        budget = {name: value for name, value in asdict(self.recipe).items() if name not in FREE}
        budget['milestones'] = list(self.recipe.milestones)  # as JSON gives it back
        rows = []
        for label in self.rows:
            runs = []
            for seed in range(self.seeds):
                run = self.run(label, seed)
                if run.record_file.is_file():
                    self.check(run, self.run_recipe(label, seed))
                    runs += _outcome(run.record())
            rows.append({'attention': label, 'paper_error': self._paper_error(label), 'runs': runs})
        options = command_line(replace(self.recipe, dataset=self.dataset), self.recipe_name).split()[2:]
        chosen = ['--attn', *self.attentions] if self.attentions else []
        command = [f'python scripts/reproduce.py --table {self.table} --arch {self.architecture}', *chosen]
        return {
            'table': self.table,
            'architecture': self.architecture,
            'paper_architecture': self._paper_architecture(),
            'dataset': self.dataset,
            'seeds': self.seeds,
            'recipe_name': self.recipe_name,
            'command': ' '.join([*command, f'--seeds {self.seeds}', *options]),
            'budget': budget,
            'rows': rows,
        }

    def _paper_architecture(self) -> str:
        architectures = PAPER_TABLES[self.table][0]
        return self.architecture if self.architecture in architectures else architectures[0]

    def _paper_error(self, label: str) -> Optional[float]:
        attention, attn_kwargs = _split(label)
        paper = paper_results()[f'{self._paper_architecture()}_{attention}', attn_kwargs]
        return getattr(paper, f'{self.dataset}_error', None)

    def go(self, output: Path, train: bool = True) -> Dict[str, Any]:
        """Train what is not there, seed by seed so that pairs are whole early, and write the results after each run.

        Args:
            output: JSON file for the results; the picture goes beside it.
            train: False to take only the runs that are there.

        Raises:
            TimmHamError: If a training fails, a run was made in another way, or the file is of another reproduction.
        """
        results = self.results()
        _check_output(output, results)
        _write(results, output)
        if train:
            for seed, label in product(range(self.seeds), self.rows):
                self.train(label, seed)
                results = self.results()
                _write(results, output)
        return results


def launch(words: List[str]) -> int:
    """Run a command of timm-ham in a process of its own; returns its exit status."""
    process = subprocess.Popen([sys.executable, '-m', 'timm_ham.cli', *words])
    try:
        return process.wait()
    except KeyboardInterrupt:  # which the training got too: let it say how to go on
        return process.wait()


def _outcome(record: Dict[str, Any]) -> List[Dict[str, Any]]:
    if 'results' not in record:
        return []
    results, start = record['results'], record['starts'][-1]
    return [
        {
            'seed': record['recipe']['seed'],
            'error': round(100 * (1 - results['test']['accuracy']), 4),
            'loss': results['test']['loss'],
            'train_seconds': results['train_seconds'],
            'compile': record['recipe']['compile'],
            'precision': results['precision'],
            'hardware': start['hardware'],
            'commit': start['commit'],
        }
    ]


def _check_output(output: Path, results: Dict[str, Any]) -> None:
    if output.exists():
        try:
            found = json.loads(output.read_text(encoding='utf-8'))
            same = all(found[key] == results[key] for key in ('table', 'architecture', 'dataset'))
            # As recipes: one written before a field was added has its default.
            same = same and Recipe.from_json(found['budget']) == Recipe.from_json(results['budget'])
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise TimmHamError(f'{output} holds something else than these results: name another file by --output')


def _write(results: Dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    draw(output)


def _groups(results: Dict[str, Any]) -> List[Group]:
    """The rows as groups of runs."""
    errors = {row['attention']: tuple((run['seed'], run['error']) for run in row['runs']) for row in results['rows']}
    plain = errors.get('plain', ())
    return [
        Group(label, of_row, {} if label == 'plain' else paired_differences(of_row, plain))
        for label, of_row in errors.items()
    ]


def _title(results: Dict[str, Any]) -> str:
    return f'Table {results["table"]}, {results["architecture"]} on {results["dataset"]}'


def draw(output: Path) -> None:
    """The picture of a results file, beside it, which names the file's content by its SHA-256."""
    results = json.loads(output.read_text(encoding='utf-8'))
    paper = {row['attention']: row['paper_error'] for row in results['rows'] if row['paper_error'] is not None}
    title = f'{_title(results)}: {results["budget"]["epochs"]} epochs of {results["recipe_name"]}'
    draw_groups(_groups(results), title, output.with_suffix('.png'), paper, {SOURCE_KEY: _digest(output)})


def _digest(output: Path) -> str:
    return hashlib.sha256(output.read_bytes()).hexdigest()


def is_current(output: Path) -> bool:
    """Whether the picture beside a results file is of what the file holds."""
    from PIL import Image

    picture = output.with_suffix('.png')
    if not picture.is_file():
        return False
    with Image.open(picture) as image:
        return image.info.get(SOURCE_KEY) == _digest(output)


def _table(results: Dict[str, Any], markdown: bool) -> str:
    paper = {row['attention']: row['paper_error'] for row in results['rows']}
    rows = []
    for group in _groups(results):
        theirs, base = paper[group.label], paper.get('plain')
        rows.append(
            (
                f'`{group.label}`' if markdown else group.label,
                f'{len(group.errors)} of {results["seeds"]}',
                mean_and_deviation([error for _, error in group.errors]) or 'not yet run',
                mean_and_deviation(list(group.differences.values()), sign='+'),
                '' if theirs is None else f'{theirs:.2f}',
                '' if theirs is None or base is None or group.label == 'plain' else f'{theirs - base:+.2f}',
            )
        )
    return tabulate(
        rows,
        ('attention', 'runs', 'test error, %', 'minus plain, paired', "paper's best of ten, %", 'minus plain, paper'),
        tablefmt='github' if markdown else 'simple',
        disable_numparse=True,
        colalign=('left', *['right'] * 5),
    )


def _verdict(results: Dict[str, Any]) -> str:
    """The order of the rows, ours and the paper's; nothing is concluded from a part."""
    groups, seeds = _groups(results), results['seeds']
    missing = sum(seeds - len(group.errors) for group in groups)
    if missing:
        return f'{missing} of the {seeds * len(groups)} runs are not there yet: nothing is concluded.'
    means = {group.label: statistics.mean(error for _, error in group.errors) for group in groups}
    paper = {row['attention']: row['paper_error'] for row in results['rows'] if row['paper_error'] is not None}
    said = f'Lowest mean error first: {", ".join(sorted(means, key=means.get))}'
    said += f'; in the paper: {", ".join(sorted(paper, key=paper.get))}.' if paper else '.'
    if 'ham' in means and min(means, key=means.get) != 'ham':
        said += ' HAM is not the best here.'
    return said


def _budget(results: Dict[str, Any]) -> str:
    budget, seeds = results['budget'], results['seeds']
    held_out = f'{budget["holdout"]:.0%} of the training images held out' if budget['holdout'] else 'nothing held out'
    ours = (
        f'Ours: {budget["epochs"]} epochs of {results["recipe_name"]}, {held_out}, '
        f'{f"seeds 0 to {seeds - 1}" if seeds > 1 else "seed 0"}, test error after the last epoch, '
        'mean +- standard deviation.'
    )
    if all(row['paper_error'] is None for row in results['rows']):
        return f'{ours} The paper has no figures of {results["dataset"]}.'
    same = results['architecture'] == results['paper_architecture']
    theirs = f"The paper's: {PAPER_EPOCHS} epochs, the best of ten runs"
    theirs += '' if same else f', and of {results["paper_architecture"]}'
    if not same or budget['epochs'] != PAPER_EPOCHS:
        theirs += '; budgets differ, so only the order and the differences to plain can be set beside each other'
    return f'{ours} {theirs}.'


def describe(results: Dict[str, Any], markdown: bool = False) -> str:
    """A results file in words: title, table, budget, and what follows."""
    return '\n\n'.join([_title(results), _table(results, markdown), _budget(results), _verdict(results)])


def comparison_section(folder: Path) -> str:
    """The comparison for the family's card, in Markdown, from all results files table*.json in a folder."""
    parts = []
    for file in sorted(folder.glob('table*.json')):
        results = json.loads(file.read_text(encoding='utf-8'))
        title, *rest = describe(results, markdown=True).split('\n\n')
        picture = f'![{title}: our runs, and the paper]({folder.parent.name}/{folder.name}/{file.stem}.png)'
        parts += [f'### {title}', *rest, f'```\n{results["command"]}\n```', picture]
    return '\n\n'.join(parts or ['Not yet run: `scripts/reproduce.py` makes it.'])


def write_card(card: Path, folder: Path) -> None:
    """Put the comparison into a card, between its two marks.

    Raises:
        TimmHamError: If the marks are not there.
    """
    before, begin, rest = card.read_text(encoding='utf-8').partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise TimmHamError(f'{card} has no place for the comparison: add the lines {BEGIN} and {END}')
    card.write_text(f'{before}{begin}\n\n{comparison_section(folder)}\n\n{end}{after}', encoding='utf-8')
