"""Bundled weights hold what they say; each thing that can be wrong with a folder is found, and named."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_ham import TimmHamError, cli
from timm_ham.models.loading import load_model
from timm_ham.models.weights import hub_folders
from timm_ham.publishing.card import folder_card
from timm_ham.publishing.golden import golden_error, golden_images, golden_logits
from timm_ham.publishing.verify import find_folder, verify

from .conftest import BUNDLED

FOLDERS = [pytest.param(folder, id=folder.name) for folder in hub_folders()]


def change(file, edit):
    """Change a JSON file by a function that works on its value in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize('folder', FOLDERS)
def test_bundled(folder):
    checks = list(verify(folder))
    assert [check.title for check in checks if check.passed] == ['files', 'hash', 'config', 'golden logits', 'card']
    # Nothing in the card was written by hand.
    assert (folder / 'README.md').read_text() == str(folder_card(folder))


@pytest.mark.slow
@pytest.mark.parametrize('folder', FOLDERS)
def test_bundled_accuracy(folder, cifar10):
    data = json.loads((folder / 'run.json').read_text())['data']['name']
    if data not in ('cifar10', 'digits'):
        pytest.skip(f'{data} is not on this machine')
    assert all(check.passed for check in verify(folder, str(cifar10) if data == 'cifar10' else data))


def test_accuracy_is_held_against_the_record(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['--dataset', str(tiny_folder), '--epochs', '1', '--batch-size', '16', '--precision', 'fp32']
    cli.main(['train', *words, '--run', 'run'])
    folder = next((tmp_path / 'run').glob('*/config.json')).parent
    capsys.readouterr()
    cli.main(['verify', str(folder), '--dataset', str(tiny_folder)])
    assert capsys.readouterr().out.count('ok  ') == 6

    def claim(record):
        record['results']['test']['accuracy'] = 0.987

    change(folder / 'run.json', claim)
    with pytest.raises(SystemExit) as stop:
        cli.main(['verify', str(folder), '--dataset', str(tiny_folder)])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and 'FAILED  card' in out and 'FAILED  accuracy' in out
    assert 'but the card says 98.70%' in out and err.strip().endswith('2 of the checks failed')


def flip_a_bit(folder):
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[-5] ^= 1
    (folder / 'model.safetensors').write_bytes(content)


def other_weights(folder):
    """Other numbers under a hash of their own: only the golden logits can tell."""
    import hashlib

    state = load_file(folder / 'model.safetensors')
    state['head.fc.bias'] += 0.01
    save_file(state, folder / 'model.safetensors')
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    for name in ('config.json', 'quality.json'):
        change(folder / name, lambda values: values.update(weights_sha256=digest))


def claim_more(folder):
    card = ModelCard.load(folder / 'README.md')
    card.data.eval_results[0].metric_value = 97.0
    card.save(folder / 'README.md')


def relicense(folder):
    card = ModelCard.load(folder / 'README.md')
    card.data.license = 'mit'
    card.save(folder / 'README.md')


@pytest.mark.parametrize(
    'damage, title, message',
    [
        (lambda folder: (folder / 'golden.json').unlink(), 'files', 'lacks golden.json'),
        (lambda folder: (folder / 'weights.PKL').touch(), 'files', 'holds weights.PKL: remove it'),
        (flip_a_bit, 'hash', 'SHA-256 differs'),
        (lambda folder: change(folder / 'config.json', lambda c: c.pop('weights_sha256')), 'hash', 'names no'),
        (
            lambda folder: change(folder / 'config.json', lambda c: c['label_names'].reverse()),
            'config',
            "has label_names ['truck'",
        ),
        (
            lambda folder: change(folder / 'config.json', lambda c: c['pretrained_cfg'].update(mean=[0.5] * 3)),
            'config',
            'has mean [0.5, 0.5, 0.5], but the record in run.json [0.4915',
        ),
        (
            lambda folder: change(folder / 'config.json', lambda c: c.update(architecture='resnet20_se')),
            'config',
            "has architecture 'resnet20_se'",
        ),
        (
            lambda folder: change(folder / 'run.json', lambda r: r['recipe'].update(model_args={'drop_rate': 0.1})),
            'config',
            'has model_args',
        ),
        (other_weights, 'golden logits', 'differ by 0.01, more than 0.001'),
        (lambda folder: (folder / 'golden.json').write_text('[]'), 'golden logits', 'holds no logits'),
        (claim_more, 'card', "'value': 97.0"),
        (relicense, 'card', "has license 'mit'"),
        (
            lambda folder: change(folder / 'quality.json', lambda q: q.update(weights_sha256='')),
            'card',
            'other weights',
        ),
        (lambda folder: (folder / 'run.json').write_text('[' * 100_000), 'config', 'RecursionError'),
    ],
)
def test_what_is_wrong_is_named(folder, damage, title, message):
    damage(folder)
    failed = [check for check in verify(folder) if not check.passed]
    assert [check.title for check in failed] == [title] and message in failed[0].found


def test_golden_input_is_the_formula():
    images = golden_images(3, 5)
    assert images.shape == (4, 3, 5, 3) and images.dtype == torch.uint8
    assert images.flatten().tolist() == [(k * 2654435761 % 2**32) >> 24 for k in range(4 * 3 * 5 * 3)]


def test_golden_logits_are_the_models(folder):
    model = load_model(str(folder)).eval()
    cfg = model.pretrained_cfg
    pixels = golden_images(32, 32).permute(0, 3, 1, 2).double() / 255
    images = (pixels - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    torch.testing.assert_close(golden_logits(model), model(images.float()), atol=1e-4, rtol=0)
    assert golden_error(model, folder) < 1e-3
    torch.nn.init.constant_(model.head.fc.bias, float('nan'))
    with pytest.raises(TimmHamError, match='golden logits differ by nan'):
        golden_error(model, folder)
    model.reset_classifier(3)
    with pytest.raises(TimmHamError, match=r'have shape \(4, 10\), the model gives \(4, 3\)'):
        golden_error(model, folder)


def test_find_folder(folder):
    assert find_folder(BUNDLED.name) == BUNDLED and find_folder(str(folder)) == find_folder(f'local-dir:{folder}')
    with pytest.raises(TimmHamError, match=rf"no weights 'nope': choose from {BUNDLED.name}, a folder"):
        find_folder('nope')
