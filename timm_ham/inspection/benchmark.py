"""What each attention costs in time and memory, as ratios from one process that measures all of them in turn.

Machines are noisy, and a time says little about another machine: every figure is the median of a ratio between two
measurements that stand next to each other, and its quartiles.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Literal, Sequence, Tuple

import timm
import torch
from tabulate import tabulate
from timm.layers import get_attn
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from timm_ham.layers import AFTER_STAGES, ATTENTIONS, HybridAttention
from timm_ham.models import ARCHITECTURES, MODELS

__all__ = ['Measurement', 'Settings', 'benchmark', 'draw', 'module_shapes', 'table']

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


@dataclass(frozen=True)
class Settings:
    """What is measured. Each field is an option of `timm-ham bench`."""

    architectures: Tuple[str, ...] = ('resnet20', 'resnet18')
    """Networks to measure whole, and whose feature maps the modules are measured on; `all` for the twelve."""
    attentions: Tuple[str, ...] = ('se', 'eca', 'cbam', 'rcca', 'ham')
    """Attentions to compare."""
    memory_formats: Tuple[Literal['contiguous', 'channels_last'], ...] = ('contiguous', 'channels_last')
    """Memory formats of images and feature maps."""
    precisions: Tuple[Literal['fp32', 'bf16'], ...] = ('fp32', 'bf16')
    """bf16: autocast to bfloat16."""
    modules: bool = True
    """Measure the modules alone."""
    networks: bool = True
    """Measure whole networks."""
    compile: bool = False
    """Measure compiled networks too. Compiling takes minutes for each."""
    batch_size: int = 128
    """Images in a batch, on 32x32; half of that on 96x96. Inference is measured on single images too."""
    rounds: int = 11
    """Measurements of each."""
    threads: int = 0
    """Threads of the processor; 0 for what torch takes by itself."""


@dataclass(frozen=True)
class Measurement:
    """One comparison.

    what: 'module', 'network' or 'compiled network'.
    where: Architecture, or C x H x W of the feature map.
    action: 'forward', 'forward+backward', 'train step', 'inference'.
    baseline: Whose ratio is 1: no attention for networks, CBAM for modules.
    ratios: Attention to (lower quartile, median, upper quartile) of its time over the baseline's.
    peak: Attention to the memory at the most allocated at a time, beside parameters and input, over the baseline's.
    saved: Attention to bytes kept for the backward pass over the baseline's; train steps alone.
    """

    what: str
    where: str
    action: str
    batch_size: int
    memory_format: str
    precision: str
    baseline: str
    ratios: Dict[str, Tuple[float, float, float]]
    peak: Dict[str, float]
    saved: Dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        medians = ', '.join(f'{name} {median:.2f}' for name, (_, median, _) in self.ratios.items())
        how = f'batch {self.batch_size}, {self.memory_format}, {self.precision}'
        return f'{self.what} {self.where}, {self.action}, {how}, over {self.baseline}: {medians}'


def module_shapes(architecture: str) -> List[Tuple[int, int, int]]:
    """The shapes (C, H, W) of the feature maps that HAM sees in an architecture, each once, on the meta device."""
    model = timm.create_model(f'{architecture}_ham', device='meta').eval()
    shapes: Dict[Tuple[int, int, int], None] = {}
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.register_forward_hook(lambda module, inputs, output: shapes.setdefault(tuple(output.shape[1:])))
    model(torch.empty(1, *model.default_cfg['input_size'], device='meta'))
    return list(shapes)


def interleaved(
    functions: Dict[str, Callable[[], Any]], baseline: str, rounds: int
) -> Dict[str, Tuple[float, float, float]]:
    """Quartiles of each function's time over the baseline's in the same round, after one round to warm up."""
    ratios: Dict[str, List[float]] = {name: [] for name in functions if name != baseline}
    for number in range(rounds + 1):
        seconds = {}
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name] = time.perf_counter() - start
        for name, values in ratios.items():
            if number:
                values.append(seconds[name] / seconds[baseline])
    return {name: tuple(statistics.quantiles(values, n=4, method='inclusive')) for name, values in ratios.items()}


def saved_bytes(function: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: Dict[int, torch.Tensor] = {}  # alive, so that no two share an address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes that a call has allocated at the most at a time, as torch's profiler sees it."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's own log
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'trace.json')
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    changes = sorted((event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]')
    return max(accumulate(change for _, change in changes))


def over(baseline: str, values: Dict[str, float]) -> Dict[str, float]:
    """Each of the others over the baseline's."""
    return {name: value / values[baseline] for name, value in values.items() if name != baseline}


def autocast(precision: str) -> torch.autocast:
    """The context of a precision, on a CPU."""
    return torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16')


def _module_functions(
    module: nn.Module, shape: Sequence[int], memory_format: str, precision: str
) -> Dict[str, Callable[[], Any]]:
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    x, upper = (torch.randn(shape).to(dtype, memory_format=FORMATS[memory_format]) for _ in range(2))
    x.requires_grad_()
    inputs = [x, *module.parameters()]

    def forward():
        with torch.no_grad(), autocast(precision):
            module(x)

    def both():
        with autocast(precision):
            out = module(x)
        torch.autograd.grad(out, inputs, upper.to(out.dtype))

    return {'forward': forward, 'forward+backward': both}


def _batch_size(settings: Settings, architecture: str) -> int:
    return settings.batch_size // (2 if MODELS[f'{architecture}_ham'].get('stem_pool') else 1)


def _modules(settings: Settings) -> Iterator[Measurement]:
    shapes: Dict[Tuple[int, ...], None] = {}
    for architecture in settings.architectures:
        batch = _batch_size(settings, architecture)
        shapes.update({(batch, *shape): None for shape in module_shapes(architecture)})
    names = [name for name in settings.attentions if name not in ('plain', *AFTER_STAGES)]
    for shape, precision, memory_format in product(shapes, settings.precisions, settings.memory_formats):
        functions = {
            name: _module_functions(get_attn(ATTENTIONS[name])(shape[1]), shape, memory_format, precision)
            for name in dict.fromkeys(['cbam', *names])
        }
        where = 'x'.join(map(str, shape[1:]))
        for action in ('forward', 'forward+backward'):
            of_action = {name: both[action] for name, both in functions.items()}
            ratios = interleaved(of_action, 'cbam', settings.rounds)
            peak = over('cbam', {name: peak_bytes(function) for name, function in of_action.items()})
            yield Measurement('module', where, action, shape[0], memory_format, precision, 'cbam', ratios, peak)


class _Network:
    """One network with its optimizer, to be called for a train step or for inference."""

    def __init__(self, name: str, batch: int, memory_format: str, precision: str, compiled: bool):
        self.model = timm.create_model(name).to(memory_format=FORMATS[memory_format])
        size = self.model.default_cfg['input_size']
        self.images = torch.randn(batch, *size).contiguous(memory_format=FORMATS[memory_format])
        self.labels = torch.randint(self.model.num_classes, (batch,))
        self.precision = precision
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.call = torch.compile(self.model, fullgraph=True) if compiled else self.model

    def loss(self) -> torch.Tensor:
        with autocast(self.precision):
            logits = self.call(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def train_step(self) -> None:
        self.model.train()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        self.model.eval()
        with torch.no_grad(), autocast(self.precision):
            self.call(self.images)

    def saved(self) -> int:
        self.model.train()
        return saved_bytes(self.loss, self.model.parameters())


def _networks(settings: Settings) -> Iterator[Measurement]:
    attentions = ['plain', *(name for name in settings.attentions if name != 'plain')]
    for compiled, architecture, precision, memory_format, single in product(
        (False, True)[: 1 + settings.compile],
        settings.architectures,
        settings.precisions,
        settings.memory_formats,
        (False, True),
    ):
        batch = 1 if single else _batch_size(settings, architecture)
        torch.compiler.reset()
        networks = {
            name: _Network(f'{architecture}_{name}', batch, memory_format, precision, compiled) for name in attentions
        }
        for action in ('inference',) if single else ('train step', 'inference'):
            functions = {
                name: network.train_step if action == 'train step' else network.inference
                for name, network in networks.items()
            }
            saved = {}
            if action == 'train step' and not compiled:
                saved = over('plain', {name: network.saved() for name, network in networks.items()})
            ratios = interleaved(functions, 'plain', settings.rounds)
            peak = over('plain', {name: peak_bytes(function) for name, function in functions.items()})
            what = 'compiled network' if compiled else 'network'
            yield Measurement(what, architecture, action, batch, memory_format, precision, 'plain', ratios, peak, saved)


def benchmark(settings: Settings) -> List[Measurement]:
    """Measure; shows what it is at."""
    if settings.architectures == ('all',):
        settings = replace(settings, architectures=tuple(ARCHITECTURES))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    measurements = []
    with tqdm(unit=' measurements', disable=None) as bar:
        for part in ([_modules] if settings.modules else []) + ([_networks] if settings.networks else []):
            for measurement in part(settings):
                measurements.append(measurement)
                bar.update()
                bar.write(str(measurement), file=sys.stderr)
    return measurements


def table(measurements: Sequence[Measurement], markdown: bool = False) -> str:
    """Median ratios with quartiles, a row a comparison."""
    names = list(dict.fromkeys(name for m in measurements for name in m.ratios))
    rows = []
    for m in measurements:
        cells = [
            f'{m.ratios[name][1]:.2f} ({m.ratios[name][0]:.2f}-{m.ratios[name][2]:.2f})' if name in m.ratios else ''
            for name in names
        ]
        memory = [', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items()) for ratios in (m.peak, m.saved)]
        where = (m.what, m.where, m.action, m.batch_size, m.memory_format, m.precision, m.baseline)
        rows.append((*where, *cells, *memory))
    headers = 'what', 'where', 'action', 'batch', 'format', 'precision', 'over', *names, 'peak memory', 'saved'
    return tabulate(rows, headers, tablefmt='github' if markdown else 'simple', disable_numparse=True)


def draw(measurements: Sequence[Measurement], path) -> None:
    """Median ratios as dots with their quartiles, a panel for modules and one for networks."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((m.what, m.baseline) for m in measurements))
    rows = [[m for m in measurements if m.what == what] for what, _ in kinds]
    height = sum(map(len, rows)) * 0.22 + 1.2 * len(rows)
    figure = Figure(figsize=(10, height), layout='constrained')
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[len(row) + 2 for row in rows])[:, 0]
    names = list(dict.fromkeys(name for m in measurements for name in m.ratios))
    markers = dict(zip(names, 'os^vDPX*'))
    for panel, row, (what, baseline) in zip(panels, rows, kinds):
        for name in names:
            points = [(m.ratios[name], y) for y, m in enumerate(row) if name in m.ratios]
            if points:
                low, middle, high = zip(*(ratios for ratios, _ in points))
                spread = [[b - a for a, b in zip(low, middle)], [b - a for a, b in zip(middle, high)]]
                places = [y for _, y in points]
                panel.errorbar(middle, places, xerr=spread, fmt=markers[name], ms=5, label=name, alpha=0.8)
        labels = [f'{m.where} {m.action}, batch {m.batch_size}, {m.memory_format}, {m.precision}' for m in row]
        panel.set_yticks(range(len(row)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.set_xscale('log')
        panel.axvline(1, color='gray', lw=1)
        panel.xaxis.set_major_formatter('{x:g}')
        panel.xaxis.set_minor_formatter('{x:.2g}')
        panel.tick_params(axis='x', which='minor', labelsize=7)
        panel.set_title(f'{what}: time over that of {baseline}, median and quartiles', fontsize=10)
        panel.grid(axis='y', alpha=0.3)
        panel.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)
