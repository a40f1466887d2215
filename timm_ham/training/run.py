"""A run's folder: what was asked for, where it ran, what came out.

run.json            recipe, dataset, environment of each start, and the results once it is finished
metrics.jsonl       a line for each epoch
curves.png          the same as a picture
checkpoint-<n>/     the state after n epochs, to go on from
model.safetensors   the final weights
tensorboard/        the metrics once more, if asked for
"""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from timm_ham import __version__
from timm_ham.errors import TimmHamError
from timm_ham.training.data import DataInfo
from timm_ham.training.recipes import Recipe

__all__ = ['Run', 'environment', 'new_run_folder']

CHECKPOINT = 'checkpoint-'
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


def _write_text(path: Path, text: str) -> None:
    """Write by renaming, so that a reader or a kill never meets half a file."""
    part = path.with_name(path.name + '.part')
    part.write_text(text, encoding='utf-8')
    os.replace(part, path)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2) + '\n')


@dataclass(frozen=True)
class Run:
    """The folder of one run. The files are the state: a Run can be made from its path at any time."""

    folder: Path

    @property
    def record_file(self) -> Path:
        """What was asked for, where it ran, what came out."""
        return self.folder / 'run.json'

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
        self.folder.mkdir(parents=True)
        _write_json(
            self.record_file, {'recipe_name': recipe_name, 'recipe': asdict(recipe), 'data': asdict(data), 'starts': []}
        )

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
        _write_json(self.record_file, {**self.record(), **values})

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return Recipe.from_json(self.record()['recipe'])

    def data(self) -> DataInfo:
        """The facts about the dataset."""
        values = self.record()['data']
        return DataInfo(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def metrics(self) -> List[Dict[str, float]]:
        """The lines of metrics.jsonl, in the order of the epochs."""
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text(encoding='utf-8').splitlines()]

    def write_metrics(self, lines: List[Dict[str, float]]) -> None:
        """Replace metrics.jsonl."""
        _write_text(self.metrics_file, ''.join(json.dumps(line) + '\n' for line in lines))

    def checkpoints(self) -> List[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob(f'{CHECKPOINT}*') if path.name[len(CHECKPOINT) :].isdigit()]
        return sorted(found, key=checkpoint_epoch)

    def checkpoint(self, epoch: int) -> Path:
        """Where the state after `epoch` epochs belongs."""
        return self.folder / f'{CHECKPOINT}{epoch}'

    def keep_last_checkpoint(self) -> None:
        """Remove all checkpoints but the last, and what a kill left half-written."""
        last = self.checkpoints()[-1:]
        for path in self.folder.glob(f'{CHECKPOINT}*'):
            if path not in last:
                shutil.rmtree(path)


def checkpoint_epoch(checkpoint: Path) -> int:
    """The number of finished epochs that a checkpoint was written after."""
    return int(checkpoint.name[len(CHECKPOINT) :])
