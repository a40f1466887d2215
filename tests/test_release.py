"""The wheel, as somebody without a checkout and without a network has it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_wheel_alone(tmp_path):
    """Unpacked elsewhere, its bundled weights load and classify, with every way out of the machine closed."""
    pytest.importorskip('build')
    pytest.importorskip('hatchling')
    command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.stat().st_size < 60e6
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    Image.new('RGB', (50, 40), 'skyblue').save(tmp_path / 'image.png')
    closed = dict.fromkeys(('http_proxy', 'https_proxy', 'HF_ENDPOINT'), 'http://127.0.0.1:9')
    environment = {**os.environ, **closed, 'PYTHONPATH': str(tmp_path / 'site'), 'HF_HOME': str(tmp_path / 'home')}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    code = "import timm_ham, timm; print(timm.create_model('resnet20_ham', pretrained=True).pretrained_cfg['file'])"
    assert run('-c', code).startswith(str(tmp_path / 'site'))
    assert len(run('-m', 'timm_ham.cli', 'predict', 'image.png').splitlines()) == 5
    assert run('-m', 'timm_ham.cli', 'verify', 'resnet20_ham.cifar10').count('ok  ') == 5
