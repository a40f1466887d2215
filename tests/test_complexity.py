"""Costs, counted by hand on one network, and the comparison with the paper."""

import csv
import re
from pathlib import Path

import pytest

from timm_ham import ABLATIONS, ARCHITECTURES, ATTENTIONS, MODELS, TimmHamError
from timm_ham.inspection.complexity import ROUNDING, complexity, complexity_table, reason
from timm_ham.inspection.paper import paper_results

TABLES = Path(__file__).resolve().parents[2] / 'shared' / 'paper' / 'tables.csv'


def test_resnet20_by_hand():
    stage = [6 * 9 * 16 * 16 * 32**2]
    stage.append((9 * 16 * 32 + 5 * 9 * 32 * 32) * 16**2)
    stage.append((9 * 32 * 64 + 5 * 9 * 64 * 64) * 8**2)
    stem, classifier = 9 * 3 * 16 * 32**2, 64 * 10
    cost = complexity('resnet20_plain')
    assert cost.multiply_adds == stem + sum(stage) + classifier
    assert cost.parameters == 269_722
    assert cost.gflops == 2 * cost.multiply_adds / 1e9 and cost.memory_mib == pytest.approx(1.0289, abs=1e-4)
    # HAM: one 7x7 convolution from 2 maps to 1, for two groups, in each of the 9 blocks
    ham = 2 * 2 * 49 * 3 * (32**2 + 16**2 + 8**2)
    assert complexity('resnet20_ham').multiply_adds == cost.multiply_adds + ham


def test_attn_kwargs_change_the_cost():
    full, small = complexity('resnet20_ham'), complexity('resnet20_ham', attn_kwargs=dict(kernel_size=3))
    assert full.parameters - small.parameters == 9 * 2 * (49 - 9)


def test_reasons():
    assert reason('memory', 'resnet18_ham', 42.0, 42.01) is None
    assert reason('gflops', 'resnet20_plain', 0.0811, 0.08) == ROUNDING
    assert '4.14' in reason('memory', 'resnet50_rcca', 166.1, 171.62)
    assert 'stride' in reason('gflops', 'resnet50_se', 5.34, 5.08)
    assert '0.5 to 0.9' in reason('gflops', 'resnet101_ham', 10.8, 11.48)
    assert '1 to 3 %' in reason('gflops', 'resnet18_plain', 2.495, 2.53)


def test_table_of_everything():
    text = complexity_table(markdown=True)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:3] == '| `']
    names = [row[0].strip('`') for row in rows]
    assert [name for name in names if '(' not in name] == list(MODELS)
    assert len(MODELS) == len(ARCHITECTURES) * (len(ATTENTIONS) + len(ABLATIONS)) == 132
    assert {name for name in names if '(' in name} == {f'resnet56_ham (kernel_size={k})' for k in (3, 5)}
    notes = re.findall(r'^(\d+)\. ', text, re.MULTILINE)
    assert notes == [str(number) for number in range(1, len(notes) + 1)]
    for row in rows:
        for ours, theirs, off in (row[2:5], row[5:8]):
            if theirs:
                assert float(off.removesuffix(' %')) == pytest.approx(
                    100 * (float(ours) / float(theirs) - 1), abs=100 * 0.0005 / float(theirs) + 0.0051
                )
            if theirs and abs(float(off.removesuffix(' %'))) > 1.005:
                assert row[8], row
        assert set(row[8].split(', ')) <= {'', *notes}
    # The whole comparison stands in the family's card, word for word.
    assert text in (Path(__file__).resolve().parents[1] / 'MODEL_CARD.md').read_text()


def test_no_such_model():
    with pytest.raises(TimmHamError, match="no model is called 'resnet19"):
        complexity_table('resnet19_*')


@pytest.mark.skipif(not TABLES.is_file(), reason="the paper's tables are not on this machine")
def test_the_papers_figures_are_those_of_its_tables():
    """Every number of the six tables is in ours, and no other."""
    columns = ('params_millions', 'gflops', 'memory_mib', 'cifar10_error_pct', 'cifar100_error_pct', 'stl10_error_pct')
    wanted = {}
    for row in csv.DictReader(TABLES.open(encoding='utf-8')):
        words = re.sub(r'\s*\((R=2|baseline|7\u00d77|λ=0\.6)\)', '', row['architecture'])
        words = words.replace('ResNeXt29(8x64d)', 'resnext29_8x64d').replace('ResNeXt50(32x4d)', 'resnext50_32x4d')
        words = words.replace('WideResNet16-8', 'wide_resnet16_8').replace('WideResNet18-2', 'wide_resnet18_2')
        network, _, attention = words.partition(' + ')
        variant = ''.join(f'kernel_size={k}' for k in re.findall(r'\((\d)\u00d7', attention))
        variant += ''.join(f'separation_rate={rate}' for rate in re.findall(r'λ=(0\.\d)', attention))
        attention = re.sub(r'\s*\((\d\u00d7\d|λ=0\.\d)\)', '', attention)
        attention = '_'.join(re.findall(r'\w+', attention.replace('no adaptive', 'no_adaptive'))) or 'plain'
        figures = wanted.setdefault((f'{network}_{attention}'.lower(), variant), {})
        figures.update({column: float(row[column]) for column in columns if row[column]})
    assert set(wanted) == set(paper_results())
    for key, figures in wanted.items():
        ours = [value for value in vars(paper_results()[key]).values()]
        assert ours == [figures.get(column) for column in columns], key
