"""Rows of the paper's tables: which, how they are trained, what is adopted, and what is said of them."""

import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from timm_ham import MODELS, TimmHamError, cli
from timm_ham.inspection.paper import PAPER_TABLES, paper_results
from timm_ham.publishing import reproduce
from timm_ham.publishing.reproduce import Reproduction, comparison_section, describe, is_current, write_card
from timm_ham.training.recipes import RECIPES

from .conftest import make_run

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT.parent / 'shared' / 'paper' / 'tables.csv'
RECIPE = replace(RECIPES['cifar_fast'], epochs=15, holdout=0.0)


def task(folder, table=4, architecture='resnet20', attentions=('plain', 'ham'), seeds=2, recipe=RECIPE):
    return Reproduction(table, architecture, attentions, seeds, recipe, 'cifar_fast', folder)


@pytest.fixture
def launched(monkeypatch):
    """The commands that would be run, and the records that they leave."""
    words = []

    def launch(command):
        words.append(command)
        folder = Path(command[-1])
        cut = '--resume' in command
        if cut:
            shutil.rmtree(folder)
        make_run(folder, folder.name.partition('.')[0], int(folder.name[-1]), 9.5 if cut else 10.5)
        return 0

    monkeypatch.setattr(reproduce, 'launch', launch)
    return words


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's tables are not on this machine")
def test_tables_have_the_papers_rows():
    wanted = Counter(int(row['table']) for row in csv.DictReader(PAPER.open(encoding='utf-8')))
    assert {table: len(a) * len(rows) for table, (a, rows) in PAPER_TABLES.items()} == wanted
    errors = {}
    for row in csv.DictReader(PAPER.open(encoding='utf-8')):
        errors.setdefault(int(row['table']), []).append(row['cifar10_error_pct'] or row['stl10_error_pct'])
    for table, (architectures, rows) in PAPER_TABLES.items():
        ours = []
        for architecture in architectures:
            for label in rows:
                attention, _, attn_kwargs = label.partition('.')
                result = paper_results()[f'{architecture}_{attention}', attn_kwargs]
                ours.append(f'{result.cifar10_error or result.stl10_error:.2f}')
        assert sorted(ours) == sorted(errors[table]), table


def test_every_row_is_a_model():
    for table, (architectures, rows) in PAPER_TABLES.items():
        for label in rows:
            recipe = task(Path(), table, architectures[0], ()).run_recipe(label, 3)
            assert recipe.seed == 3 and recipe.model in MODELS
            if recipe.model_args:
                timm.create_model(recipe.model, device='meta', **recipe.model_args)
    recipe = task(Path(), 3, 'resnet56', ()).run_recipe('ham.separation_rate=0.8', 0)
    assert recipe.model_args == {'attn_kwargs': {'separation_rate': 0.8}}


def test_what_is_missing_is_run_what_was_cut_goes_on_what_is_there_is_taken(tmp_path, launched):
    make_run(tmp_path / 'resnet20_plain.0', 'resnet20_plain', 0, 11.0, compile=True)  # the same, but faster
    make_run(tmp_path / 'resnet20_ham.0', 'resnet20_ham', 0, None, done=4)
    results = task(tmp_path).go(tmp_path / 'out.json')
    assert [words[-2:] for words in launched] == [
        ['--resume', f'{tmp_path}/resnet20_ham.0'],
        ['--run', f'{tmp_path}/resnet20_plain.1'],
        ['--run', f'{tmp_path}/resnet20_ham.1'],
    ]
    first = launched[1]
    assert first[:3] == ['train', '--recipe', 'cifar_fast']
    options = dict(zip(first[3::2], first[4::2]))
    changed = {'--holdout': '0.0', '--epochs': '15', '--seed': '1', '--model': 'resnet20_plain'}
    assert options == {**changed, '--run': f'{tmp_path}/resnet20_plain.1'}
    assert results == json.loads((tmp_path / 'out.json').read_text()) and is_current(tmp_path / 'out.json')
    plain, ham = results['rows']
    assert [run['error'] for run in plain['runs']] == [11.0, 10.5] and plain['paper_error'] == 8.54
    assert [run['error'] for run in ham['runs']] == [9.5, 10.5]
    text = describe(results)
    assert re.search(r'ham +2 of 2 +10\.00 \+- 0\.71 +-0\.75 \+- 1\.06 +7\.54 +-1\.00', text)
    assert 'Ours: 15 epochs of cifar_fast, nothing held out, seeds 0 to 1' in text
    assert "The paper's: 200 epochs, the best of ten runs; budgets differ" in text
    assert 'Lowest mean error first: ham, plain; in the paper: ham, plain.' in text and 'not the best' not in text
    launched.clear()
    older = json.loads((tmp_path / 'out.json').read_text())
    del older['budget']['cutout']  # from before there was one
    (tmp_path / 'out.json').write_text(json.dumps(older))
    assert task(tmp_path).go(tmp_path / 'out.json') == results and launched == []


def test_a_training_that_fails_stops_with_what_is_there(tmp_path, launched, monkeypatch):
    launch, failing = reproduce.launch, f'{tmp_path}/resnet20_ham.0'
    monkeypatch.setattr(reproduce, 'launch', lambda words: 130 if words[-1] == failing else launch(words))
    with pytest.raises(TimmHamError, match=r'resnet20_ham.0 was not finished \(status 130\): the same command goes on'):
        task(tmp_path).go(tmp_path / 'out.json')
    results = json.loads((tmp_path / 'out.json').read_text())
    assert [len(row['runs']) for row in results['rows']] == [1, 0]
    text = describe(results)
    assert 'not yet run' in text and '3 of the 4 runs are not there yet: nothing is concluded.' in text
    assert 'Lowest' not in text


def test_the_table_says_so_where_ham_does_not_win(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f'resnet20_plain.{seed}', 'resnet20_plain', seed, 9.0)
        make_run(tmp_path / f'resnet20_ham.{seed}', 'resnet20_ham', seed, 9.5)
    text = describe(task(tmp_path).results(), markdown=True)
    assert 'Lowest mean error first: plain, ham; in the paper: ham, plain. HAM is not the best here.' in text


def test_a_smaller_network_in_the_place_of_the_papers_is_named(tmp_path):
    results = task(tmp_path, table=2, attentions=('plain', 'ham.kernel_size=3')).results()
    assert [row['paper_error'] for row in results['rows']] == [7.24, 6.49]
    assert 'the best of ten runs, and of resnet56; budgets differ' in describe(results)
    assert task(tmp_path, table=2).run('ham.kernel_size=3', 1).folder.name == 'resnet20_ham.kernel_size=3.1'


@pytest.mark.parametrize(
    'changed, message',
    [
        (dict(epochs=25), 'resnet20_ham.0 has epochs 25 instead of 15: name another --folder'),
        (dict(model='resnet20_se'), "has model 'resnet20_se' instead of 'resnet20_ham'"),
        (dict(seed=4), 'has seed 4 instead of 0'),
    ],
)
def test_a_run_of_another_kind_is_not_adopted(tmp_path, launched, changed, message):
    make_run(tmp_path / 'resnet20_ham.0', **{'model': 'resnet20_ham', 'seed': 0, 'error': 9.0, **changed})
    with pytest.raises(TimmHamError, match=re.escape(message)):
        task(tmp_path).go(tmp_path / 'out.json')
    assert launched == [] and not (tmp_path / 'out.json').exists()


def test_other_data_are_not_adopted_and_have_no_figure_of_the_papers(tmp_path):
    other = task(tmp_path, recipe=replace(RECIPE, dataset='me/pets'))
    assert [row['paper_error'] for row in other.results()['rows']] == [None, None]
    assert 'The paper has no figures of pets.' in describe(other.results())
    make_run(tmp_path / 'resnet20_ham.0', 'resnet20_ham', 0, 9.0)
    with pytest.raises(TimmHamError, match='dataset cifar10 instead of pets'):
        other.results()


def test_a_file_of_something_else_is_not_replaced(tmp_path):
    file = tmp_path / 'out.json'
    task(tmp_path).go(file, train=False)
    before = file.read_bytes()
    for other in (task(tmp_path, recipe=replace(RECIPE, epochs=3)), task(tmp_path, table=2)):
        with pytest.raises(TimmHamError, match=r'out.json holds something else .* name another file by --output'):
            other.go(file, train=False)
    assert file.read_bytes() == before
    file.write_text('mine')
    with pytest.raises(TimmHamError, match=r'out.json holds something else'):
        task(tmp_path).go(file)
    assert file.read_text() == 'mine'


def test_two_rows_are_trained_by_the_command(tiny_folder, tmp_path, monkeypatch, capsys, fresh):
    def in_this_process(words):
        fresh()
        cli.main(words)
        return 0

    monkeypatch.setattr(reproduce, 'launch', in_this_process)
    monkeypatch.chdir(tmp_path)
    card = tmp_path / 'CARD.md'
    card.write_text(f'before\n{reproduce.BEGIN}\nold\n{reproduce.END}\nafter\n')
    words = f'--recipe cifar_fast --epochs 1 --batch-size 16 --precision fp32 --dataset {tiny_folder} --card {card}'
    cli.main(f'reproduce --table 4 --arch resnet20 --attn plain eca --seeds 1 {words}'.split())
    out = capsys.readouterr().out
    assert 'Table 4, resnet20 on tiny' in out and '1 of 1' in out and 'Lowest mean error first' in out
    file = tmp_path / 'runs/reproduce/table4-resnet20-tiny.json'
    command = 'python scripts/reproduce.py --table 4 --arch resnet20 --attn plain eca --seeds 1 --recipe cifar_fast'
    assert json.loads(file.read_text())['command'].startswith(f'{command} --dataset tiny')
    before, _, after = card.read_text().partition(comparison_section(file.parent))
    assert before.startswith('before\n') and after.endswith('\nafter\n') and 'old' not in before + after


@pytest.mark.parametrize(
    'words, message',
    [
        ('--table 7 --arch resnet20', 'no results in table 7: choose from 1 to 6'),
        ('--table 4 --arch resnet21', "unknown architecture 'resnet21': choose from resnet20, "),
        ('--table 4 --arch resnet20 --attn hamm', "table 4 has no row 'hamm': choose from all, plain, se, "),
        ('--table 4 --arch resnet20 --seeds 0', '0 seeds are none'),
        ('--table 4 --arch resnet20 --seed 3', 'model, model_args and seed follow from --arch, --attn and --seeds'),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(['reproduce', *words.split()])
    assert stop.value.code == 1 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_familys_card_is_made_of_the_committed_results():
    card = (ROOT / 'MODEL_CARD.md').read_text(encoding='utf-8')
    body = card.partition(reproduce.BEGIN)[2].partition(reproduce.END)[0].strip()
    assert body == comparison_section(ROOT / 'hub' / 'results')
    for file in (ROOT / 'hub' / 'results').glob('table*.json'):
        assert is_current(file), f'{file.stem}.png is of other results: run scripts/reproduce.py again'


def test_a_card_without_a_place_is_left_alone(tmp_path):
    card = tmp_path / 'CARD.md'
    card.write_text('mine')
    with pytest.raises(TimmHamError, match=r'CARD.md has no place for the comparison: add the lines <!--'):
        write_card(card, tmp_path)
    assert card.read_text() == 'mine'
    assert 'Not yet run' in comparison_section(tmp_path)


def test_a_picture_of_older_results_is_noticed(tmp_path):
    file = tmp_path / 'out.json'
    task(tmp_path).go(file, train=False)
    assert is_current(file)
    file.write_text(file.read_text() + '\n')
    assert not is_current(file)
    file.with_suffix('.png').unlink()
    assert not is_current(file)
