"""A run's folder: what was asked for, where it ran, what came out.

run.json                      recipe, dataset, environment of each start, and the results once it is finished
metrics.jsonl                 a line for each epoch
curves.png                    the same as a picture
checkpoint-<n>.safetensors    the state after n steps, to go on from
model.safetensors             the final weights
tensorboard/                  the metrics once more, if asked for
"""

import json
import os
import platform
import re
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch

from timm_ham import __version__
from timm_ham.errors import TimmHamError
from timm_ham.training.data import DataInfo
from timm_ham.training.recipes import Recipe

__all__ = ['Run', 'environment', 'new_run_folder', 'write_file', 'writing']

RECORD = 'run.json'
CHECKPOINT = re.compile(r'checkpoint-(\d+)\.safetensors')
PACKAGES = ('torch', 'timm', 'accelerate', 'datasets', 'huggingface_hub', 'safetensors')


def new_run_folder(recipe: Recipe, recipe_name: str, root: Path = Path('runs')) -> Path:
    """A folder that does not exist yet, named after model and recipe; a number is added if the name is taken."""
    base = root / f'{recipe.model}.{recipe_name}'
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f'{base.name}-{number}')
    return folder


def environment(processes: int, device: torch.device) -> Dict[str, Any]:
    """Versions, commit and hardware, for the record of a run. Names no person, machine or path."""
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f'{_cpu_name()}, threads: {torch.get_num_threads()}'
    return {
        'started': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'python': platform.python_version(),
        'versions': {'timm_ham': __version__, **{name: metadata.version(name) for name in PACKAGES}},
        'commit': _git_commit(),
        'device': device.type,
        'hardware': hardware,
        'processes': processes,
    }


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> Optional[str]:
    """Commit of the checkout that this package is in, with '-dirty' if it has changes; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    try:
        described = subprocess.run(
            ['git', '-C', str(root), 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty'],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def write_file(path: Path, data: bytes) -> None:
    """Write to the disk under another name, then rename: no reader, kill or power cut ever leaves half a file."""
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        with part.open('wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + '\n').encode()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses to write to a run's folder into a TimmHamError, of one line."""
    try:
        yield
    except OSError as error:
        begun = (folder / RECORD).is_file()
        advice = f'nothing before it is lost, go on by timm-ham train --resume {folder}' if begun else 'or choose --run'
        what = error.filename or folder
        raise TimmHamError(f'{what} can not be written ({error.strerror}): see to that; {advice}') from error


@dataclass(frozen=True)
class Run:
    """The folder of one run. The files are the state: a Run can be made from its path at any time."""

    folder: Path

    @property
    def record_file(self) -> Path:
        """What was asked for, where it ran, what came out."""
        return self.folder / RECORD

    @property
    def metrics_file(self) -> Path:
        """A JSON line for each epoch."""
        return self.folder / 'metrics.jsonl'

    @property
    def curves_file(self) -> Path:
        """The picture of the metrics."""
        return self.folder / 'curves.png'

    @property
    def weights_file(self) -> Path:
        """The final weights."""
        return self.folder / 'model.safetensors'

    def check_new(self) -> None:
        """Raise a TimmHamError if the folder exists."""
        if self.folder.exists():
            raise TimmHamError(
                f'{self.folder} exists: go on with it by --resume {self.folder}, or name another folder by --run'
            )

    def create(self, recipe: Recipe, recipe_name: str, data: DataInfo) -> None:
        """Make the folder and note what will be trained; `recipe_name` is the recipe that `recipe` was made from."""
        self.check_new()
        record = {'recipe_name': recipe_name, 'recipe': asdict(recipe), 'data': asdict(data), 'starts': []}
        with writing(self.folder):
            self.folder.mkdir(parents=True)
            write_file(self.record_file, _json(record))

    def record(self) -> Dict[str, Any]:
        """All that run.json holds.

        Raises:
            TimmHamError: If the folder is not a run's.
        """
        try:
            return json.loads(self.record_file.read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise TimmHamError(f'{self.folder} is not the folder of a run: it has no {self.record_file.name}') from None

    def note(self, **values: Any) -> None:
        """Add to run.json."""
        with writing(self.folder):
            write_file(self.record_file, _json({**self.record(), **values}))

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return Recipe.from_json(self.record()['recipe'])

    def data(self) -> DataInfo:
        """The facts about the dataset."""
        return DataInfo.from_json(self.record()['data'])

    def metrics(self) -> List[Dict[str, float]]:
        """The lines of metrics.jsonl, in the order of the epochs."""
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text(encoding='utf-8').splitlines()]

    def write_metrics(self, lines: List[Dict[str, float]]) -> None:
        """Replace metrics.jsonl."""
        write_file(self.metrics_file, ''.join(json.dumps(line) + '\n' for line in lines).encode())

    def checkpoints(self) -> List[Path]:
        """The checkpoints, oldest first."""
        steps = {path: CHECKPOINT.fullmatch(path.name) for path in self.folder.glob('checkpoint-*')}
        return sorted((path for path, found in steps.items() if found), key=lambda path: int(steps[path][1]))

    def checkpoint(self, steps: int) -> Path:
        """Where the state after that many steps belongs."""
        return self.folder / f'checkpoint-{steps}.safetensors'

    def keep_checkpoints(self, count: int) -> None:
        """Remove all checkpoints but the last ones, and what a kill left half-written."""
        for path in [*self.checkpoints()[:-count], *self.folder.glob('*.part')]:
            path.unlink()
