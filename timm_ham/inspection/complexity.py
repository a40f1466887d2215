"""What a model costs, counted on the meta device, and how that compares with the HAM paper's tables."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from timm_ham.errors import TimmHamError
from timm_ham.inspection.paper import paper_results
from timm_ham.models import MODELS

__all__ = ['Complexity', 'complexity', 'complexity_table', 'model_table']


@dataclass(frozen=True)
class Complexity:
    """Cost of one model.

    parameters: Trained parameters, with the classifier.
    multiply_adds: Of one image in the convolutions and matrix products, which is what torch's FlopCounterMode counts;
        elementwise work and pooling are left out.
    """

    parameters: int
    multiply_adds: int

    @property
    def gflops(self) -> float:
        """2 x multiply-adds, 1e9."""
        return 2 * self.multiply_adds / 1e9

    @property
    def memory_mib(self) -> float:
        """4 bytes a parameter, MiB."""
        return 4 * self.parameters / 2**20


def complexity(name: str, **kwargs: Any) -> Complexity:
    """Cost of a registered model at the image size of its own configuration.

    Args:
        name: Registered name, one of timm's own models too.
        **kwargs: As for timm.create_model.
    """
    model = timm.create_model(name, device='meta', **kwargs).eval()
    image = torch.empty(1, *model.default_cfg['input_size'], device='meta')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return Complexity(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


# Why a figure differs from the paper's by more than 1 %: column, model (the first pattern that matches), reason.
ROUNDING = "the paper's two decimals: rounded to them, ours is the same"
REASONS: Sequence[Tuple[str, str, str]] = (
    ('memory', '*_rcca', "the paper's RCCA has about 4.4 C^2 parameters, CCNet's with a 1x1 join has 4.14 C^2"),
    ('memory', 'resnext29_8x64d_ham', "the paper's Memory is that of its CBAM row; its 33.81 million parameters agree"),
    ('memory', 'resnext50_32x4d_*', 'the ResNeXt-50 that the paper describes has fewer parameters than it states'),
    (
        'memory',
        'resnet[23][02]_*',
        'no ResNet-20 or -32 of the kind described has as few; ResNet-56 and -110, built by the same rule, agree',
    ),
    (
        'gflops',
        '*_rcca',
        "the paper's RCCA has 4.4 C^2 parameters but takes 1.95 C^2 multiply-adds a position; ours has and takes 4.14",
    ),
    *(
        ('gflops', f'{network}_{attention}', 'the paper adds 0.5 to 0.9 GFLOPs for it, which no part of it takes')
        for network in ('resnet50', 'resnet101', 'resnext50_32x4d')
        for attention in ('eca', 'ham')
    ),
    *(
        ('gflops', pattern, "the paper's blocks stride in their first 1x1 convolution, timm's in the 3x3 after it")
        for pattern in ('resnet50_*', 'resnet101_*', 'resnext*')
    ),
    ('gflops', '*', 'the paper counts 1 to 3 % more than convolutions and matrix products, and does not say what'),
)


def reason(column: str, model: str, ours: float, theirs: float) -> Optional[str]:
    """Why our figure is more than 1 % off the paper's; None if it is not."""
    if abs(ours - theirs) <= 0.01 * theirs:
        return None
    if abs(ours - theirs) <= 0.005 + 1e-9:
        return ROUNDING
    return next(text for where, pattern, text in REASONS if where == column and fnmatch(model, pattern))


def _compared(name: str, attn_kwargs: str, notes: List[str]) -> Iterator[str]:
    """The cells of a row; new reasons are added to the notes."""
    kwargs = dict(pair.split('=') for pair in attn_kwargs.split(',') if pair)
    cost = (
        complexity(name, attn_kwargs={key: int(value) for key, value in kwargs.items()}) if kwargs else complexity(name)
    )
    paper = paper_results().get((name, attn_kwargs))
    yield f'{name} ({attn_kwargs})' if attn_kwargs else name
    yield f'{cost.parameters:,}'
    numbers = []
    for column, ours, theirs in (
        ('gflops', cost.gflops, paper and paper.gflops),
        ('memory', cost.memory_mib, paper and paper.memory_mib),
    ):
        yield f'{ours:.3f}'
        yield f'{theirs:.2f}' if theirs else ''
        yield f'{100 * (ours / theirs - 1):+.2f} %' if theirs else ''
        why = reason(column, name, ours, theirs) if theirs else None
        if why:
            if why not in notes:
                notes.append(why)
            numbers.append(notes.index(why) + 1)
    yield ', '.join(f'{number}' for number in numbers)


def _chosen(pattern: str) -> List[str]:
    names = [name for name in MODELS if fnmatch(name, pattern)]
    if not names:
        raise TimmHamError(f'no model is called {pattern!r}: give a pattern such as "resnet18_*", or see timm-ham list')
    return names


def complexity_table(pattern: str = '*', markdown: bool = False) -> str:
    """Parameters, GFLOPs and Memory of the models beside the paper's, a reason under it for each difference over 1 %.

    Args:
        pattern: Which of the models, with * and ?.
        markdown: As Markdown, else for a terminal.

    Raises:
        TimmHamError: If no model matches.
    """
    rows = [(name, '') for name in _chosen(pattern)]
    rows += [
        (name, attn_kwargs)
        for (name, attn_kwargs), paper in paper_results().items()
        if attn_kwargs and paper.gflops and (name, '') in rows
    ]
    rows.sort(key=lambda row: list(MODELS).index(row[0]))
    notes: List[str] = []
    cells = [tuple(_compared(*row, notes)) for row in rows]
    headers = ('model', 'parameters', 'GFLOPs', 'paper', 'off by', 'MiB', 'paper', 'off by', 'note')
    lines = [
        tabulate(
            [tuple(f'`{c}`' if i == 0 and markdown else c for i, c in enumerate(row)) for row in cells],
            headers,
            tablefmt='github' if markdown else 'simple',
            disable_numparse=True,
            colalign=('left', *['right'] * 7, 'left'),
        ),
        '',
        'GFLOPs are 2 x multiply-adds of one image, as the paper counts them; Memory is 4 bytes a parameter, in MiB.',
        '',
        *(f'{number}. {note}' for number, note in enumerate(notes, start=1)),
    ]
    return '\n'.join(lines).rstrip()


def model_table(pattern: str = '*') -> str:
    """Names, parameters, multiply-adds and weights at hand of the models, for a terminal.

    Raises:
        TimmHamError: If no model matches.
    """
    tags: Dict[str, List[str]] = {}
    for pretrained in timm.list_pretrained():
        name, _, tag = pretrained.partition('.')
        tags.setdefault(name, []).append(tag)
    rows = []
    for name in _chosen(pattern):
        cost = complexity(name)
        size = timm.get_pretrained_cfg(name).input_size[-1]
        rows.append(
            (
                name,
                f'{size}x{size}',
                f'{cost.parameters:,}',
                f'{cost.multiply_adds / 1e6:,.1f} M',
                ', '.join(tags.get(name, [])),
            )
        )
    headers = ('model', 'image', 'parameters', 'multiply-adds', 'weights')
    return tabulate(rows, headers, disable_numparse=True, colalign=('left', 'right', 'right', 'right', 'left'))
