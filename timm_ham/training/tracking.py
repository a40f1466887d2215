"""A run's metrics to TensorBoard or trackio as well, by accelerate's trackers; metrics.jsonl needs neither."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from typing import Literal, Optional

from accelerate import Accelerator

from timm_ham.errors import TimmHamError
from timm_ham.training.recipes import Recipe
from timm_ham.training.run import Run

__all__ = ['Tracker', 'check_tracker', 'start_tracking']

Tracker = Literal['tensorboard', 'trackio']
# What accelerate calls the project is a folder to TensorBoard: <run>/tensorboard/.
PROJECTS = {'tensorboard': 'tensorboard', 'trackio': 'timm_ham'}


def check_tracker(tracker: Optional[Tracker]) -> None:
    """Raise a TimmHamError that names the extra if the package is missing: accelerate would go on without it."""
    if tracker and find_spec(tracker) is None:
        raise TimmHamError(f"tracker {tracker} is not installed: get it by pip install 'timm_ham[{tracker}]'")


def start_tracking(accelerator: Accelerator, tracker: Optional[Tracker], run: Run, recipe: Recipe) -> None:
    """Open the tracker, if any, with the recipe as its configuration; a resumed run goes on in its old place."""
    if tracker:
        config = {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in asdict(recipe).items()
        }
        names = {'trackio': {'name': run.folder.resolve().name, 'resume': 'allow'}}
        accelerator.init_trackers(PROJECTS[tracker], config, names)
