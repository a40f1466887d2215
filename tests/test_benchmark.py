"""The benchmark measures what it says; its figures are not tested, machines are noisy."""

import json
import time

import pytest
import torch
from PIL import Image
from torch import nn

from timm_ham import cli
from timm_ham.inspection.benchmark import interleaved, module_shapes, peak_bytes, saved_bytes


def test_shapes_are_those_of_the_network():
    assert module_shapes('resnet20') == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert module_shapes('resnet50') == [(256, 48, 48), (512, 24, 24), (1024, 12, 12), (2048, 6, 6)]


def test_ratios_are_to_the_baseline_of_the_same_round():
    calls = []

    def task(name, milliseconds):
        return lambda: calls.append(name) or time.sleep(milliseconds / 1000)

    ratios = interleaved({'base': task('base', 5), 'slow': task('slow', 20), 'same': task('same', 5)}, 'base', rounds=5)
    assert calls == ['base', 'slow', 'same'] * 6
    assert set(ratios) == {'slow', 'same'}
    low, median, high = ratios['slow']
    assert low <= median <= high and 2 < median < 6 and ratios['same'][1] < 2


def test_saved_bytes():
    linear, x = nn.Linear(8, 4), torch.randn(16, 8)
    assert saved_bytes(lambda: linear(x), linear.parameters()) == 16 * 8 * 4  # the input alone
    assert saved_bytes(lambda: linear(x).exp(), linear.parameters()) == 16 * 8 * 4 + 16 * 4 * 4  # and exp's output
    twice = saved_bytes(lambda: linear(x) + linear(x), linear.parameters())
    assert twice == 16 * 8 * 4  # once, though it is saved twice


def test_peak_bytes():
    def function():
        first, second = torch.zeros(1000), torch.zeros(2000)
        del first
        return second, torch.zeros(500)

    assert peak_bytes(function) == 3000 * 4


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = 'bench --architectures resnet20 --attentions se rcca ham --precisions fp32 --memory-formats contiguous'
    words += ' --batch-size 2 --rounds 2'
    cli.main(words.split())
    out = capsys.readouterr().out
    result = json.loads((tmp_path / 'benchmark.json').read_text())
    found = {(m['what'], m['where'], m['action'], m['batch_size']) for m in result['measurements']}
    modules = {
        ('module', where, action, 2)
        for where in ('16x32x32', '32x16x16', '64x8x8')
        for action in ('forward', 'forward+backward')
    }
    networks = {
        ('network', 'resnet20', action, batch)
        for action, batch in (('train step', 2), ('inference', 2), ('inference', 1))
    }
    assert found == modules | networks and len(result['measurements']) == 9
    for measurement in result['measurements']:
        in_blocks = {'se', 'ham'}
        assert set(measurement['ratios']) == (in_blocks if measurement['what'] == 'module' else {*in_blocks, 'rcca'})
        assert measurement['where'] in out
        assert set(measurement['peak']) == set(measurement['ratios'])
        if measurement['action'] == 'train step':
            assert 1 < measurement['saved']['se'] < measurement['saved']['ham'] < 2
    assert {'hardware', 'versions'} <= set(result['environment']) and result['threads'] == torch.get_num_threads()
    with Image.open(tmp_path / 'benchmark.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 20)) > 10


@pytest.mark.parametrize(
    'words, message',
    [
        (['--architectures', 'resnet21'], "unknown architecture or attention 'resnet21': choose from resnet20, "),
        (['--attentions', 'hamm'], "unknown architecture or attention 'hamm'"),
        ([], 'benchmark.json exists: replace it by --overwrite'),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'benchmark.json').write_text('mine')
    with pytest.raises(SystemExit) as stop:
        cli.main(['bench', *words])
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert (tmp_path / 'benchmark.json').read_text() == 'mine'
