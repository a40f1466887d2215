"""The download from a Hub server that nobody here wrote: olah, serving a git repository."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from timm_ham.models.loading import load_model
from timm_ham.publishing.golden import golden_logits

from . import hub_client
from .conftest import BUNDLED
from .hub_client import Client


@pytest.fixture
def olah(tmp_path):
    """The address of a server with the bundled weights as org/resnet20_ham.cifar10, tagged v1."""
    pytest.importorskip('olah')
    repository = shutil.copytree(BUNDLED, tmp_path / 'mirror' / 'models' / 'org' / BUNDLED.name)
    git = ['git', '-C', str(repository), '-c', 'user.name=ann', '-c', 'user.email=ann@example.org']
    for words in (['init', '-q', '-b', 'main'], ['add', '.'], ['commit', '-q', '-m', 'weights'], ['tag', 'v1']):
        subprocess.run([*git, *words], check=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    (tmp_path / 'olah.toml').write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nmirrors-path = ["{tmp_path / "mirror"}"]\n'
        f'repos-path = "{tmp_path / "repos"}"\nhf-scheme = "http"\nhf-netloc = "127.0.0.1:9"\n'
        f'mirror-scheme = "http"\nmirror-netloc = "127.0.0.1:{port}"\nmirror-lfs-netloc = "127.0.0.1:{port}"\n'
        '[accessibility]\noffline = true\n'
    )
    log = tmp_path / 'log'
    with log.open('w') as output:
        command = [sys.executable, '-m', 'olah.server', '--config', 'olah.toml']
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        try:
            url = f'http://127.0.0.1:{port}'
            while not answers(url):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError:
        pass
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_download(olah, tmp_path):
    wanted = golden_logits(load_model(str(BUNDLED)).eval()).tolist()
    name = f'hf-hub:org/{BUNDLED.name}'
    with Client(olah, tmp_path / 'home') as client:
        for revision in ('', '@main', '@v1'):
            assert client(hub_client.golden, name + revision)[0] == wanted
        status, said = client.cli('verify', name)
        assert status == 0 and said.count('ok  ') == 5, said
        (weights,) = (tmp_path / 'home/hub').glob('models--*/snapshots/*/model.safetensors')
        weights.resolve().write_bytes(weights.read_bytes()[:-1])
        assert 'SHA-256 differs' in client.cli('evaluate', name)[1]
    with Client('http://127.0.0.1:9', tmp_path / 'home', offline=True) as client:
        assert 'SHA-256 differs' in client.cli('evaluate', name)[1]
