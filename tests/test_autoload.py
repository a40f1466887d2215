"""The start-up file, in virtual environments of its own that see this environment's packages."""

import os
import subprocess
import sys
import sysconfig
import timeit
import venv
from pathlib import Path

import pytest

from timm_ham import autoload

ROOT = Path(__file__).resolve().parents[1]


class Environment:
    """A virtual environment without pip: fast to make."""

    def __init__(self, folder, *paths):
        venv.create(folder, symlinks=True)
        self.python = folder / 'bin' / 'python'
        self.site_packages = Path(self('import sysconfig; print(sysconfig.get_path("purelib"))'))
        # As an editable installation does it.
        (self.site_packages / 'seen.pth').write_text(''.join(f'{path}\n' for path in paths))
        self.files = self.listing()

    def __call__(self, code, check=True):
        """What the code prints, to either stream."""
        environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        command = [str(self.python), '-c', code]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.python.parent, check=check
        )
        return (done.stdout + done.stderr).strip()

    def listing(self):
        return sorted(path for path in self.site_packages.rglob('*'))


def test_timm_knows_our_names(tmp_path):
    environment = Environment(tmp_path / 'env', sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), ROOT)
    command = 'from timm_ham import cli; cli.main(["autoload", "on"])'
    assert environment(command).endswith(str(environment.site_packages / autoload.START_UP_FILE))
    assert environment('import timm; print(timm.is_model("resnet18_ham"))') == 'True'


@pytest.fixture
def environment(tmp_path):
    """An environment with a timm and a timm_ham that only say which was imported, and our real autoload."""
    for name, files in (('timm', ['data']), ('timm_ham', ['autoload', 'errors'])):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(f'import sys; print({name!r})')
        for file in files:
            source = ROOT / name / f'{file}.py'
            (tmp_path / name / f'{file}.py').write_text(source.read_text() if source.is_file() else '')
    (tmp_path / 'timm_ham' / '__init__.py').write_text('import timm; print("timm_ham")')
    return Environment(tmp_path / 'env', tmp_path)


def test_on_off_status(environment):
    file = environment.site_packages / autoload.START_UP_FILE
    both, one = 'timm\ntimm_ham', 'timm'

    def call(function):
        return environment(f'from timm_ham import autoload; print(autoload.{function}())').splitlines()[-1]

    assert call('installed') == 'None' and environment('import timm') == one
    assert call('switch_on') == call('installed') == str(file)
    assert environment('import timm') == environment('import timm, timm_ham') == both
    assert environment('import timm_ham') == environment('from timm.data import __name__') == both
    # Looking for timm without importing it, as transformers does, must not use the chance up.
    assert environment('import importlib.util; importlib.util.find_spec("timm"); import timm') == both
    assert environment('import json') == ''  # without timm, nothing
    assert call('switch_on') == str(file) and str(file) in call('switch_off')
    assert environment.listing() == environment.files
    assert call('switch_off') == '[]' and environment('import timm') == one


@pytest.mark.parametrize(
    'broken, said',
    [
        ({}, ''),  # uninstalled
        ({'timm_ham.py': 'raise RuntimeError("half an update")'}, "RuntimeError('half an update')"),
        ({'timm_ham.py': 'import nothing_of_that_name'}, 'nothing_of_that_name'),
    ],
)
def test_timm_works_whatever_became_of_timm_ham(broken, said, tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('version = 7')
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
    environment = Environment(tmp_path / 'env', tmp_path)
    (environment.site_packages / autoload.START_UP_FILE).write_text(autoload.start_up_line())
    out = environment('import timm; print(timm.version)')
    assert out.startswith('7') and said in out and (said or out == '7') and 'Traceback' not in out
    (tmp_path / 'timm' / '__init__.py').unlink()
    (tmp_path / 'timm').rmdir()
    assert 'ModuleNotFoundError' in environment('import timm', check=False)


def test_start_up_costs_under_a_millisecond():
    line, before = autoload.start_up_line(), list(sys.meta_path)
    try:
        fastest = min(timeit.repeat(lambda: exec(line), number=1, repeat=50))
    finally:
        sys.meta_path[:] = before
    assert fastest < 1e-3


def test_no_permission(monkeypatch, tmp_path):
    monkeypatch.setattr(autoload, '_folders', lambda: [tmp_path / 'missing'])
    with pytest.raises(autoload.TimmHamError, match='no permission to write timm_ham_autoload'):
        autoload.switch_on()
    assert autoload.switch_off() == []
