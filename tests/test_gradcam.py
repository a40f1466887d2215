"""Grad-CAM against the closed form that it has on these networks, and the commands that draw."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional as F

from tests.conftest import make_dataset, random_images, save_parquet
from timm_ham import TimmHamError, cli
from timm_ham.inspection import localization
from timm_ham.inspection.gradcam import METHODS, class_activation_maps, explain, short_names
from timm_ham.inspection.images import open_image
from timm_ham.inspection.localization import Estimate, Localization, estimates, localize, paste_objects
from timm_ham.inspection.predict import predict
from timm_ham.models.loading import load_classifier
from timm_ham.training.data import Split

pytest.importorskip('pytorch_grad_cam')
EXAMPLES = Path(__file__).resolve().parents[1] / 'hub' / 'space' / 'examples'
WEIGHTS = 'resnet20_ham.cifar10'


@pytest.fixture(scope='module')
def classifier():
    return load_classifier(WEIGHTS)


@pytest.fixture(scope='module')
def images(classifier):
    return torch.stack([classifier.transform(open_image(EXAMPLES / name)) for name in ('cat.jpg', 'ship.png')])


def rescaled(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-7)


def test_closed_form(classifier, images):
    """Behind the last stage stand an average and a linear layer, so the gradients are that layer's weights."""
    with torch.no_grad():
        features = classifier.model.forward_features(images)
    weights = classifier.model.get_classifier().weight.detach()[[3, 8]]
    maps = rescaled(torch.einsum('bchw,bc->bhw', features, weights).relu())
    wanted = rescaled(F.interpolate(maps[:, None], (32, 32), mode='bilinear')[:, 0])
    found = class_activation_maps(classifier.model, images, [3, 8])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_gives_maps(classifier, images, method):
    maps = class_activation_maps(classifier.model, images, [3, 8], method)
    assert maps.shape == (2, 32, 32) and np.isfinite(maps).all()
    assert maps.min() >= 0 and maps.max() == pytest.approx(1, abs=1e-5)


def test_the_model_is_left_as_it_was(classifier, images):
    model = copy.deepcopy(classifier.model).train()
    class_activation_maps(model, images, [3, 8], 'ablationcam')
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_networks_of_timm():
    images = torch.randn(1, 3, 96, 96)
    for name in ('test_resnet', 'test_mambaout'):  # the second has its channels last
        assert class_activation_maps(timm.create_model(name).eval(), images, [1]).shape == (1, 96, 96)
    with pytest.raises(TimmHamError, match='VisionTransformer has no stages with feature maps'):
        class_activation_maps(timm.create_model('test_vit', img_size=96), images, [1])
    with pytest.raises(TimmHamError, match=r'Sequential has no stages .* choose a convolutional network of timm'):
        class_activation_maps(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1)), images, [1])


def test_without_the_package(classifier, images, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(TimmHamError, match=r"needs the grad-cam package .*: pip install 'timm_ham\[inspect\]'"):
        class_activation_maps(classifier.model, images, [3, 8])


def test_explain(classifier):
    cat = open_image(EXAMPLES / 'cat.jpg')
    found = explain(classifier, cat)
    assert found.predicted == 'cat' and found.label_names[found.target] == 'cat'
    assert found.probabilities.max().item() == pytest.approx(dict(predict(classifier, cat))['cat'])
    # What the network saw is the picture at its own size.
    small = np.asarray(cat.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert abs(found.seen - small).max() <= 1
    assert explain(classifier, cat, 'dog').target == explain(classifier, cat, '5').target == 5
    with pytest.raises(TimmHamError, match="no class '10': choose a number below 10, or from airplane, automobile"):
        explain(classifier, cat, '10')


def test_short_names():
    assert short_names(['a/m.x', 'hf-hub:b/n.x', 'o.x']) == {'a/m.x': 'm.x', 'hf-hub:b/n.x': 'n.x', 'o.x': 'o.x'}
    assert short_names(['a/m.x', 'm.x']) == {'a/m.x': 'a/m.x', 'm.x': 'm.x'}


@pytest.mark.parametrize(
    'content, message',
    [
        (b'hello', 'x.png is no image that Pillow reads'),
        ((EXAMPLES / 'ship.png').read_bytes()[:600], r'x.png can not be read \(.*it is damaged'),
        (None, 'there is no file .*x.png'),
    ],
)
def test_files_that_are_no_images(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'x.png').write_bytes(content)
    with pytest.raises(TimmHamError, match=message):
        open_image(tmp_path / 'x.png')


@pytest.mark.parametrize('side', [8001, 14000])
@pytest.mark.filterwarnings('ignore:Image size')
def test_huge_images(side, tmp_path):
    Image.new('1', (side, side)).save(tmp_path / 'x.png')
    with pytest.raises(TimmHamError, match='more than 64 megapixels: shrink it first'):
        open_image(tmp_path / 'x.png')


# The number
# ----------


def split_of(count, classes):
    """Images of one brightness for each class."""
    labels = torch.arange(count) % classes
    return Split((20 + 40 * labels).byte()[:, None, None, None].expand(count, 8, 8, 3).contiguous(), labels)


def test_objects_lie_where_they_are_said_to():
    pasted = paste_objects(split_of(40, 4), 30, seed=1)
    assert pasted.split.images.shape == (30, 16, 16, 3) and len(pasted.corners.unique(dim=0)) == 4
    for image, label, (row, column) in zip(pasted.split.images, pasted.split.labels, pasted.corners.tolist()):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[row : row + 8, column : column + 8] = True
        assert (image[inside] == 20 + 40 * label).all()
        (background,) = image[~inside].unique().tolist()
        assert background != 20 + 40 * label and (background - 20) % 40 == 0
    assert pasted.inside().sum((1, 2)).tolist() == [64] * 30
    again = paste_objects(split_of(40, 4), 30, seed=1)
    assert torch.equal(again.split.images, pasted.split.images)
    with pytest.raises(TimmHamError, match='41 objects can not be had: choose a --count from 2 to 40'):
        paste_objects(split_of(40, 4), 41)
    with pytest.raises(TimmHamError, match='all images are of one class'):
        paste_objects(split_of(4, 1), 2)


def test_energy_and_pointing(monkeypatch):
    pasted = paste_objects(split_of(40, 4), 20)
    inside = pasted.inside().float().numpy()
    model = timm.create_model('resnet20_plain').eval()

    def measured(maps):
        given = iter(np.split(maps, 4))
        monkeypatch.setattr(localization, 'class_activation_maps', lambda *arguments: next(given))
        found = localize(model, pasted, batch_size=5)
        return found.energy.tolist(), found.pointing.tolist()

    assert measured(inside) == ([1.0] * 20, [True] * 20)
    assert measured(1 - inside) == ([0.0] * 20, [False] * 20)
    assert measured(np.ones_like(inside))[0] == [0.25] * 20
    assert measured(np.zeros_like(inside)) == ([0.0] * 20, [False] * 20)
    energy, pointing = measured(1 + 2 * inside)
    assert energy == [0.5] * 20 and all(pointing)


def test_estimates():
    random = np.random.default_rng(0)
    first, second = (Localization(random.random(500), random.random(500) < 0.7, random.random(500) < p) for p in (0, 1))
    found = estimates({'a': first, 'b': second})
    assert list(found) == ['a', 'b', 'b over a']
    wanted = stats.t.interval(0.95, 499, first.energy.mean(), stats.sem(first.energy))
    assert found['a']['energy'] == pytest.approx((first.energy.mean(), *wanted), abs=2e-4)
    pairs = stats.ttest_rel(second.energy, first.energy).confidence_interval(0.95)
    assert found['b over a']['energy'][1:] == pytest.approx(pairs, abs=2e-4)
    assert found['b over a']['correct'] == (1, 1, 1) and found['a']['correct'] == (0, 0, 0)
    assert Estimate(0.1234, -0.01, 0.2).percent('+') == '+12.3 (-1.0 to +20.0)'


# The commands
# ------------


def colours(path):
    with Image.open(path) as image:
        return len(image.convert('RGB').getcolors(1 << 24))


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = load_classifier(WEIGHTS).label_names
    rows = make_dataset(random_images(30, (32, 32)), [index % 10 for index in range(30)], names)
    save_parquet(tmp_path / 'noise', train=rows, test=rows)
    cat, ship = EXAMPLES / 'cat.jpg', EXAMPLES / 'ship.png'
    cli.main(f'gradcam {cat} {ship} --models {WEIGHTS} --dataset noise --rows 4 --target cat'.split())
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[2][:3] == ['cat', WEIGHTS, 'cat'] and table[3][:3] == ['ship', WEIGHTS, 'ship']
    assert table[4][:2] == ['deer', WEIGHTS]
    cli.main(f'attention {cat}'.split())
    assert colours('gradcam.png') > 1000 and colours('attention.png') > 1000
    cli.main(f'localization {WEIGHTS} --dataset noise --count 20'.split())
    result = json.loads(Path('localization.json').read_text())
    assert result['chance'] == 0.25 and result['settings']['count'] == 20
    energy = result['estimates'][WEIGHTS]['energy']
    assert (
        f'{100 * energy["mean"]:.1f} (' in capsys.readouterr().out and energy['low'] < energy['mean'] < energy['high']
    )
    for command in (f'gradcam {cat} --models {WEIGHTS}', f'attention {cat}', f'localization {WEIGHTS}'):
        with pytest.raises(SystemExit):
            cli.main(command.split())
        assert 'exists: replace it by --overwrite, or name another by --output' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words, message',
    [
        ('gradcam --models resnet20_ham', 'no image: name image files, or a dataset by --dataset'),
        (f'gradcam {EXAMPLES}/cat.jpg --models', 'no model: name one at least'),
        (f'attention {EXAMPLES}/cat.jpg --output a/b.png', 'there is no folder a: make it, or name another file'),
        ('gradcam nope.png --models resnet20_ham', 'there is no file nope.png'),
        (f'gradcam {EXAMPLES}/cat.jpg --models resnet20_cbam', "no weights for 'resnet20_cbam': choose from"),
        (
            'gradcam --models resnet20_ham --dataset digits --rows 360',
            "no row 360 in split 'test': choose from 0 to 359",
        ),
        ('localization resnet20_ham --dataset digits --count 361', 'choose a --count from 2 to 360'),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
