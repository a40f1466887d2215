"""Loading by any name, and classifying an image."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_ham import cli
from timm_ham.inspection.images import open_image
from timm_ham.inspection.predict import predict
from timm_ham.models import loading
from timm_ham.models.loading import load_classifier

from .conftest import BUNDLED


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')  # of grey, and of another size
    return tmp_path / 'photo.png'


def test_predict_is_timms_way(photo):
    model = timm.create_model('resnet20_ham', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        wanted = model(transform(Image.open(photo).convert('RGB'))[None]).softmax(1)[0]
    for name in ('resnet20_ham', BUNDLED.name, str(BUNDLED), f'local-dir:{BUNDLED}'):
        found = predict(load_classifier(name), open_image(photo), top=100)
        assert [label for label, _ in found] == [
            model.pretrained_cfg['label_names'][index] for index in wanted.argsort(descending=True)
        ]
        assert [share for _, share in found] == sorted(wanted.tolist(), reverse=True)


def test_command(photo, capsys):
    cli.main(['predict', str(photo), '--model', str(BUNDLED), '--top', '2'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[1] == 'frog' and lines[0].split()[0].endswith('%')
    for words, message in (
        ([str(BUNDLED / 'run.json')], 'run.json is no image that Pillow reads'),
        (['nowhere.png'], 'there is no file nowhere.png'),
        ([str(photo), '--model', 'resnet20_plain'], "no weights for 'resnet20_plain': choose from"),
        (['a\x1b[2J.png'], 'there is no file a?[2J.png'),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(['predict', *words])
        assert stop.value.code == 1 and message in capsys.readouterr().err


def test_label_names_of_timms_own_weights(monkeypatch):
    """They name no classes: ImageNet's are known by their number, others are numbered."""
    for classes, third in ((1000, 'great white shark'), (7, '2')):
        model = timm.create_model('resnet18', num_classes=classes, device='meta')
        monkeypatch.setattr(loading, 'load_model', lambda name, model=model: model)
        names = load_classifier('resnet18').label_names
        assert len(names) == classes and names[2].startswith(third)


def test_control_characters_stay_off_the_terminal(photo, monkeypatch, capsys):
    classifier = load_classifier('resnet20_ham')
    names = tuple(f'\x1b]0;{name}\x07\n' for name in classifier.label_names)
    monkeypatch.setattr(
        loading, 'load_classifier', lambda name: loading.Classifier(classifier.model, classifier.transform, names)
    )
    cli.main(['predict', str(photo), '--top', '1'])
    assert capsys.readouterr().out.endswith('  ?]0;frog??\n')
