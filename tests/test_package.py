"""What importing the package costs, what it says of itself, and what it brings."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import timm
import torch

from timm_ham.models.weights import hub_folders
from timm_ham.publishing.card import weights_table

ROOT = Path(__file__).resolve().parents[1]


def test_import_is_light():
    """torch and timm alone: a person who only loads a model needs neither accelerate nor datasets in memory."""
    code = 'import timm, sys; before = set(sys.modules); import timm_ham; print(*set(sys.modules) - before)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'timm_ham' in out
    assert {module.partition('.')[0] for module in out} <= {'timm_ham', 'hashlib', '_hashlib', '_blake2'}


def test_model_card_lists_the_weights():
    """The table of the records, word for word. (test_complexity holds the models to the registry.)"""
    assert list(hub_folders())
    assert weights_table(markdown=True) in (ROOT / 'MODEL_CARD.md').read_text()


def test_bundled_weights(cifar10):
    """Every bundled CIFAR-10 weight scores what its record says, through timm's own transform and the PNGs' bytes."""
    for name in timm.list_pretrained('*_ham.cifar10'):
        model = timm.create_model(name, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        test = datasets.load_dataset(str(cifar10), split='test[:1000]')
        images = torch.stack([transform(image) for image in test['img']])
        with torch.inference_mode():
            accuracy = (model(images).argmax(1) == torch.tensor(test['label'][:])).float().mean().item()
        record = json.loads((ROOT / 'hub' / name / 'run.json').read_text())
        # A thousand of the ten thousand images: three standard deviations.
        expected = record['results']['test']['accuracy']
        assert abs(accuracy - expected) < 3 * (expected * (1 - expected) / 1000) ** 0.5
        assert tuple(model.pretrained_cfg['label_names']) == tuple(test.features['label'].names)
