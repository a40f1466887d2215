"""What is measured beyond accuracy, against other libraries and plain loops, and its way into the card."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from huggingface_hub import ModelCard
from PIL import Image

from timm_ham import TimmHamError, cli
from timm_ham.publishing.card import folder_card
from timm_ham.publishing.export import export
from timm_ham.publishing.verify import verify
from timm_ham.training import quality, trainer
from timm_ham.training.corruptions import CORRUPTIONS, corrupt
from timm_ham.training.recipes import RECIPES
from timm_ham.training.run import Run

from .conftest import make_dataset, random_images, save_parquet


@pytest.fixture
def answers():
    """Logits that know something, of seven classes, one of them without images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (400,), generator=generator)
    return torch.randn(400, 7, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 7), labels


def test_metrics_are_scikit_learns(answers):
    logits, labels = answers
    found = quality.classification(logits, labels)
    scores, classes = logits.double().softmax(1).numpy(), range(7)
    assert found['top1'] == pytest.approx(sklearn.metrics.accuracy_score(labels, scores.argmax(1)))
    assert found['top5'] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=classes))
    assert 0 < found['top1'] < found['top5'] < 1
    assert found['negative_log_likelihood'] == pytest.approx(sklearn.metrics.log_loss(labels, scores, labels=classes))
    confusion = np.zeros((7, 7), dtype=int)
    for label, row in zip(labels, scores):
        confusion[label, row.argmax()] += 1
    assert found['confusion'] == confusion.tolist()
    recall = sklearn.metrics.recall_score(labels, scores.argmax(1), labels=range(6), average=None)
    assert found['per_class_accuracy'][:6] == pytest.approx(recall) and found['per_class_accuracy'][6] is None


def test_calibration_is_the_papers_sum(answers):
    logits, labels = answers
    probabilities = logits.softmax(1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])  # the last bin is closed above
    found = quality.calibration(probabilities, labels)
    error, sizes = 0.0, []
    for m in range(15):
        inside = [
            (row.argmax() == label, row.max().item())
            for row, label in zip(probabilities, labels)
            if m / 15 < row.max().item() <= (m + 1) / 15
        ]
        sizes.append(len(inside))
        if inside:
            accuracy = sum(int(right) for right, _ in inside) / len(inside)
            confidence = sum(value for _, value in inside) / len(inside)
            error += len(inside) / len(labels) * abs(accuracy - confidence)
            assert found['accuracy'][m] == pytest.approx(accuracy)
            assert found['confidence'][m] == pytest.approx(confidence)
    assert found['images'] == sizes and sum(sizes) == 400
    assert found['error'] == pytest.approx(error) and error > 0.01


def pictures():
    """Smooth ones: each channel rises along one side."""
    ramp = torch.linspace(20, 120, 32)
    stack = (ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 80.0))
    return torch.stack(stack, -1).expand(4, 32, 32, 3).to(torch.uint8).contiguous()


@pytest.mark.parametrize('name', list(CORRUPTIONS))
def test_corruptions_are_the_same_every_time_and_grow(name):
    images = pictures()
    images[:, 8:16, 8:16] = 255  # an edge, which blur takes
    before = images.clone()
    distances = []
    for strength in CORRUPTIONS[name][2]:
        state = torch.get_rng_state()
        worse = corrupt(images, name, strength)
        assert torch.equal(torch.get_rng_state(), state), 'the generator of others is left alone'
        torch.rand(7)
        assert torch.equal(corrupt(images, name, strength), worse)
        assert worse.dtype == torch.uint8 and worse.shape == images.shape
        distances.append((worse.float() - images.float()).square().mean().item())
    assert len(distances) == 5 and distances == sorted(distances) and distances[0] > 0
    assert torch.equal(images, before)


def test_noise_has_its_sigma():
    gray = torch.full((20, 32, 32, 3), 128, dtype=torch.uint8)
    noise = corrupt(gray, 'Gaussian noise', 0.08).float() - 128
    assert noise.std().item() == pytest.approx(0.08 * 255, rel=0.02) and abs(noise.mean().item()) < 0.5


def test_blur_is_a_gaussian():
    dot = torch.zeros(1, 33, 33, 3, dtype=torch.uint8)
    dot[0, 16, 16] = 255
    row = corrupt(dot, 'Gaussian blur', 1.0)[0, 16, :, 0].double()
    for distance in range(4):  # the ratio of neighbours in a Gaussian of sigma 1, up to the rounding to uint8
        expected = 255 / (2 * math.pi) * math.exp(-(distance**2) / 2)
        assert row[16 + distance].item() == pytest.approx(expected, abs=0.6)


def test_brightness_is_a_factor():
    images = pictures()
    wanted = (images.double() * 1.6).clamp(max=255).floor()
    assert (corrupt(images, 'brightness', 1.6).double() - wanted).abs().max() <= 1


def test_jpeg_is_pillows():
    images = pictures()
    buffer = io.BytesIO()
    Image.fromarray(images[0].numpy()).save(buffer, 'JPEG', quality=50)
    wanted = np.asarray(Image.open(buffer)).astype(int)
    assert (corrupt(images, 'JPEG', 50)[0].numpy() == wanted).all() and (wanted != images[0].numpy()).any()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """An exported folder, and the dataset that it was trained on."""
    from accelerate.state import AcceleratorState

    data = make_dataset(random_images(32), [0, 1] * 16, names=('cat|dog', 'a\nb'))
    folder = save_parquet(tmp_path_factory.mktemp('data') / 'pets', train=data, test=data)
    run = Run(tmp_path_factory.mktemp('runs') / 'run')
    recipe = replace(
        RECIPES['digits_quick'], dataset=str(folder), epochs=1, batch_size=16, holdout=0.0, model='resnet20_plain'
    )
    trainer.train(recipe, 'digits_quick', run)
    AcceleratorState._reset_state(reset_partial_state=True)
    return export(run, run.folder), folder


def test_command_and_card(made, tmp_path, monkeypatch, capsys, fresh):
    monkeypatch.setattr(quality, 'SPEED_SECONDS', 0)
    weights, data = made
    words = ['evaluate', str(weights), '--dataset', str(data), '--full', '--batch-size', '7']
    cli.main(words)
    out = capsys.readouterr().out
    found = quality.read_quality(weights)
    tested = Run(weights).record()['results']['test']
    assert found['top1'] == tested['accuracy'] and found['top5'] == 1
    assert found['negative_log_likelihood'] == pytest.approx(tested['loss'], rel=1e-5)
    assert f'top-1 {tested["accuracy"]:.2%}' in out and f'timm-ham export {weights} --overwrite' in out
    assert list(found['images_per_second']) == ['1', '256'] and min(found['images_per_second'].values()) > 0
    assert [len(values['accuracy']) for values in found['corruptions'].values()] == [5] * 4
    with Image.open(weights / 'quality.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 20)) > 10
    with pytest.raises(SystemExit):
        cli.main(words)
    assert 'quality.json exists: replace it by --overwrite' in capsys.readouterr().err

    folder = export(Run(weights), tmp_path)  # as it takes them along
    card = ModelCard.load(folder / 'README.md').text
    ece = f'{100 * found["calibration"]["error"]:.2f} %'
    for text in (ece, '(15 bins)', '](quality.png)', '| JPEG | ', 'cat\\|dog', ' a b ', 'batch 256'):
        assert text in card, text
    assert 'of robustness' not in card and (folder / 'quality.png').is_file()
    assert all(check.passed for check in verify(folder))

    found['weights_sha256'] = '0' * 64
    (folder / 'quality.json').write_text(json.dumps(found))
    with pytest.raises(TimmHamError, match=r'quality.json is of other weights: measure again'):
        folder_card(folder)
    (folder / 'quality.json').write_text(
        json.dumps({'weights_sha256': quality.read_quality(weights)['weights_sha256']})
    )
    assert [check.title for check in verify(folder) if not check.passed] == ['card']


@pytest.mark.parametrize(
    'words, message',
    [
        (['--split', 'train'], '--full is measured on the test split'),
        (['--dataset', 'digits'], 'has 2 classes, but digits has 10'),
    ],
)
def test_mistakes(made, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['evaluate', str(made[0]), '--full', '--output', str(tmp_path / 'out'), *words])
    assert stop.value.code == 1 and message in capsys.readouterr().err and not (tmp_path / 'out').exists()
