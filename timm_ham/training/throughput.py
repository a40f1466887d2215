"""What the training loop costs beside its network: both in one process, in turn, as a ratio.

python scripts/benchmark_training.py --dataset cifar10
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator, Tuple

import torch
from accelerate.state import AcceleratorState
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from timm_ham.training.recipes import RECIPES, Recipe
from timm_ham.training.run import Run
from timm_ham.training.stopping import StopRequest
from timm_ham.training.trainer import Trainer, build_model, build_optimizer

__all__ = ['Settings', 'Throughput', 'benchmark_training', 'measure_throughput']


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: Tuple[str, ...] = ('resnet20_plain', 'resnet20_ham')
    """Networks to measure."""
    recipe: Recipe = field(default_factory=lambda: RECIPES['cifar_fast'])
    """How they are trained."""
    rounds: int = 21
    """Measurements of each, in turn."""
    steps: int = 10
    """Steps in a measurement."""
    threads: int = 1
    """Threads of the processor; 0 for what torch takes by itself."""


@dataclass(frozen=True)
class Throughput:
    """Medians over the rounds.

    loop: Images per second of the training loop.
    step: Of the bare step: forward, backward and update on one random batch that stays in memory.
    share: loop / step within a round: lower quartile, median, upper quartile.
    start: Seconds from a Trainer's beginning to the end of its first step, data and all.
    """

    model: str
    loop: float
    step: float
    share: Tuple[float, float, float]
    start: float


def training_loop(trainer: Trainer) -> Iterator[None]:
    """The loop of `timm-ham train`, epoch after epoch, a step at a time."""
    bar, stop = tqdm(disable=True), StopRequest()
    while True:
        yield from trainer.train_steps(bar, stop)
        trainer.next_epoch()


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The same network's forward pass, backward pass and update on a batch that stays where it is; no accelerate."""
    recipe, device = trainer.recipe, trainer.accelerator.device
    model: nn.Module = build_model(recipe, trainer.data).to(device, memory_format=trainer.memory_format)
    optimizer = build_optimizer(recipe, model)
    forward = torch.compile(model) if recipe.compile else model
    size = trainer.batches.batch_size
    images = torch.randn(size, 3, *trainer.data.image_size, device=device).to(memory_format=trainer.memory_format)
    labels = torch.randint(len(trainer.data.label_names), (size,), device=device)
    precision = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(trainer.accelerator.mixed_precision)

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(function: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure_throughput(recipe: Recipe, settings: Settings) -> Throughput:
    """Measure one network."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else one process could not change the precision
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Run(Path(folder)))
        loop, bare = training_loop(trainer), bare_step(trainer)
        next(loop)
        begun = time.perf_counter() - start
        functions = {'loop': lambda: next(loop), 'step': bare}
        for function in functions.values():
            _seconds(function, settings.steps)
        rounds = []
        for number in tqdm(range(settings.rounds), recipe.model, leave=False, disable=None):
            order = list(functions)[:: 1 if number % 2 else -1]
            rounds.append({name: _seconds(functions[name], settings.steps) for name in order})
    images = settings.steps * trainer.batches.batch_size
    loop_speed, step_speed = (images / statistics.median(each[name] for each in rounds) for name in functions)
    shares = statistics.quantiles([each['step'] / each['loop'] for each in rounds], n=4, method='inclusive')
    return Throughput(recipe.model, loop_speed, step_speed, tuple(shares), begun)


def benchmark_training(settings: Settings) -> str:
    """Measure all; returns a table."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    results = [measure_throughput(replace(settings.recipe, model=model), settings) for model in settings.models]
    rows = [
        (r.model, f'{r.loop:.0f}', f'{r.step:.0f}', f'{r.share[1]:.3f} ({r.share[0]:.3f}-{r.share[2]:.3f})', r.start)
        for r in results
    ]
    headers = 'model', 'loop, images/s', 'bare step, images/s', 'loop / bare step', 'seconds to the first step'
    return tabulate(rows, headers, disable_numparse=[1, 2, 3], floatfmt='.1f')
