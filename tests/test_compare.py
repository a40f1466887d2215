"""Finished runs put together and set beside each other, from made-up records."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from timm_ham import TimmHamError, cli
from timm_ham.training.compare import compare, comparison_table, mean_and_deviation

from .conftest import make_run

ERRORS = {'plain': (11.0, 10.4, 10.9), 'ham': (10.1, 10.0, 10.6)}


@pytest.fixture
def runs(tmp_path):
    for attention, errors in ERRORS.items():
        for seed, error in enumerate(errors):
            make_run(tmp_path / f'{attention}.{seed}', f'resnet20_{attention}', seed, error)
    return tmp_path


def folders(runs):
    return sorted(runs.iterdir(), reverse=True)


def test_seeds_are_one_group_and_pairs_are_of_one_seed(runs):
    (plain, ham), left_out = compare(folders(runs))
    assert left_out == [] and (plain.label, ham.label) == ('resnet20_plain', 'resnet20_ham')
    assert dict(ham.errors) == pytest.approx(dict(enumerate(ERRORS['ham'])))
    assert ham.differences == pytest.approx(dict(enumerate(np.subtract(ERRORS['ham'], ERRORS['plain']))))
    assert plain.differences == {}
    cells = [cell.strip() for cell in comparison_table([ham], markdown=True).splitlines()[2].strip('|').split('|')]
    difference = np.subtract(ERRORS['ham'], ERRORS['plain'])
    assert cells == [
        'resnet20_ham',
        'cifar_fast, holdout=0.0',
        'cifar10',
        '15',
        '50,000',
        '3',
        f'{np.mean(ERRORS["ham"]):.2f} +- {np.std(ERRORS["ham"], ddof=1):.2f}',
        f'{difference.mean():+.2f} +- {difference.std(ddof=1):.2f}',
        '3',
    ]


def test_only_common_seeds_are_paired_and_a_seed_run_twice_counts_once(runs):
    make_run(runs / 'ham.again', 'resnet20_ham', 2, 10.8)
    make_run(runs / 'ham.7', 'resnet20_ham', 7, 9.0)
    _, ham = compare(folders(runs))[0]
    assert len(ham.errors) == 5 and sorted(ham.differences) == [0, 1, 2]
    assert ham.differences[2] == pytest.approx((10.6 + 10.8) / 2 - 10.9)


def test_other_budgets_and_arguments_are_other_groups_and_the_table_says_so(runs):
    assert 'Budgets differ' not in comparison_table(compare(folders(runs))[0])
    make_run(runs / 'long', 'resnet20_ham', 0, 8.0, epochs=25)
    make_run(runs / 'small', 'resnet20_ham', 0, 10.2, model_args={'attn_kwargs': {'kernel_size': 3}})
    groups, _ = compare(folders(runs))
    by_label = {(group.label, group.recipe.epochs): group for group in groups}
    assert len(groups) == 4 and by_label['resnet20_ham', 25].differences == {}  # no plain of that budget
    assert by_label['resnet20_ham {"attn_kwargs": {"kernel_size": 3}}', 15].differences == pytest.approx({0: -0.8})
    text = comparison_table(groups)
    assert 'Budgets differ (15 epochs of 50,000 images of cifar10; 25 epochs of 50,000 images of cifar10)' in text


def test_a_record_from_before_a_field_was_added_joins_its_group(runs):
    from timm_ham.training.run import Run

    run = Run(runs / 'ham.0')
    recipe = run.record()['recipe']
    del recipe['cutout'], recipe['model_args']
    run.note(recipe={**recipe, 'dataset': '/at/another/place/cifar10'})
    assert [len(group.errors) for group in compare(folders(runs))[0]] == [3, 3]


def test_what_is_not_finished_is_named(runs, tmp_path):
    make_run(runs / 'cut', 'resnet20_ham', 3, None, done=7)
    (runs / 'empty').mkdir()
    _, left_out = compare(folders(runs))
    assert left_out == [f'{runs}/empty: no run', f'{runs}/cut: not finished, 7 of 15 epochs']
    with pytest.raises(TimmHamError, match=r'no finished run among 1 folders .*7 of 15 epochs'):
        compare([runs / 'cut'])


def test_mean_and_deviation():
    assert mean_and_deviation([]) == '' and mean_and_deviation([2.5]) == '2.50'
    assert mean_and_deviation([1.0, 2.0], sign='+') == '+1.50 +- 0.71'


def test_any_model_of_timm_has_no_plain(tmp_path):
    make_run(tmp_path / 'a', 'test_resnet', 0, 20.0)
    ((group,), _) = compare([tmp_path / 'a'])
    assert group.differences == {} and asdict(group.recipe)['model'] == 'test_resnet'


def test_command(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    make_run(runs / 'long', 'resnet20_ham', 0, 8.0, epochs=25)
    names = [str(folder) for folder in folders(runs)]
    cli.main(['compare', *names])
    assert 'resnet20_ham' in capsys.readouterr().out
    with Image.open(runs / 'comparison.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 20)) > 10
    with pytest.raises(SystemExit):
        cli.main(['compare', *names])
    assert 'comparison.png exists: replace it by --overwrite' in capsys.readouterr().err
