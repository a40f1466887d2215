"""What several test files need: real and made-up data, a clean accelerate for each test."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from .hub_client import Client
from .hub_server import running_hub

if not torch.cuda.is_available():
    # Triton reads it where it is imported first: without a GPU its interpreter runs the kernels.
    os.environ['TRITON_INTERPRET'] = '1'

CIFAR10 = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'cifar10'
BUNDLED = Path(__file__).resolve().parents[1] / 'hub' / 'resnet20_ham.cifar10'


@pytest.fixture
def cifar10():
    """A folder with CIFAR-10 as parquet; the test is skipped where there is none."""
    if not CIFAR10.is_dir():
        pytest.skip('CIFAR-10 is not on this machine')
    return CIFAR10


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps its state for the life of a process, but each test, and each call of this, is a new start."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)

    yield reset
    reset()


def make_dataset(images, labels, names=('cat', 'dog'), image_column='image', label_column='label'):
    features = datasets.Features({image_column: datasets.Image(), label_column: datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({image_column: images, label_column: labels}, features=features)


def random_images(count, size=(8, 8), mode='RGB', seed=0):
    """PIL images of noise."""
    channels = {'RGB': 3, 'RGBA': 4}.get(mode)
    shape = (count, *size, channels) if channels else (count, *size)
    return [Image.fromarray(pixels) for pixels in np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)]


def save_parquet(folder, **splits):
    """Write datasets as `<split>.parquet`, which `load_dataset(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / f'{split}-00000-of-00001.parquet')
    return folder


def make_tiny(folder):
    """Two classes of 8x8 images that brightness tells apart, 192 for training and 16 for the test, as parquet."""

    def split(count, seed):
        labels = [i % 2 for i in range(count)]
        pixels = np.random.default_rng(seed).integers(0, 128, (count, 8, 8, 3), dtype=np.uint8)
        return make_dataset([Image.fromarray(p + np.uint8(128 * y)) for p, y in zip(pixels, labels)], labels)

    return save_parquet(folder, train=split(192, 0), test=split(16, 1))


@pytest.fixture
def tiny_folder(tmp_path):
    """The folder of `make_tiny`."""
    return make_tiny(tmp_path / 'tiny')


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder of bundled weights."""
    return shutil.copytree(BUNDLED, tmp_path / BUNDLED.name)


def make_run(folder, model, seed, error, done=0, **changed):
    """The record of a run that nobody made: CIFAR-10, 15 epochs; `error` is its test error, %, None if not finished."""
    from timm_ham.training.data import DataInfo  # only now: see TRITON_INTERPRET above
    from timm_ham.training.recipes import RECIPES
    from timm_ham.training.run import Run, environment

    run = Run(folder)
    recipe = replace(RECIPES['cifar_fast'], model=model, seed=seed, **{'epochs': 15, 'holdout': 0.0, **changed})
    sizes = {'train': 50000, 'test': 10000}
    statistics = (0.5,) * 3, (0.25,) * 3
    names = tuple('abcdefghij')
    run.create(
        recipe, 'cifar_fast', DataInfo('cifar10', 'a folder', 'img', 'label', names, (32, 32), *statistics, sizes)
    )
    run.note(starts=[environment(1, torch.device('cpu'))])
    run.write_metrics([{'epoch': epoch + 1} for epoch in range(done)])
    if error is not None:
        test = {'loss': 0.3, 'accuracy': 1 - error / 100, 'images': 10000}
        run.note(results={'test': test, 'train_seconds': 60.0, 'precision': 'bf16'})
    return run


@pytest.fixture(scope='session')
def online(tmp_path_factory):
    """A Hub, a client of it, and the client's cache."""
    home = tmp_path_factory.mktemp('home')
    with running_hub() as hub, Client(hub.url, home) as client:
        yield hub, client, home


@pytest.fixture
def hub(online):
    for state in (online[0].repos, online[0].requests, online[0].failing, online[0].swapped):
        state.clear()
    shutil.rmtree(online[2] / 'hub', ignore_errors=True)
    return online[0]


@pytest.fixture
def client(online):
    return online[1]
