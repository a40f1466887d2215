"""The figures of the HAM paper's Tables 1 to 6, from paper.csv beside this file, by the names of the models here."""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Dict, Optional, Tuple

__all__ = ['PAPER_TABLES', 'PaperResult', 'paper_results']

_SIX = ('plain', 'se', 'eca', 'cbam', 'rcca', 'ham')
_CHANNEL = ('cbam_channel', 'cbam_channel_adaptive', 'ham_channel_no_adaptive', 'ham_channel')
_SPATIAL = ('ham_channel_cbam_spatial', 'ham.kernel_size=3', 'ham.kernel_size=5', 'ham')
_RATES = ('ham.separation_rate=0.8', 'ham.separation_rate=0.7', 'ham', 'ham.separation_rate=0.5')

# Number of a table: its architectures and the attentions in each, `<attention>` or `<attention>.<attn_kwargs>`.
PAPER_TABLES: Dict[int, Tuple[Tuple[str, ...], Tuple[str, ...]]] = {
    1: (('resnet56',), (*_SIX[:3], *_CHANNEL)),
    2: (('resnet56',), (*_SIX[:5], *_SPATIAL)),
    3: (('resnet56',), ('plain', *_RATES)),
    4: (('resnet20', 'resnet32', 'resnet56', 'resnet110', 'wide_resnet16_8', 'resnext29_8x64d'), _SIX),
    5: (('resnet18', 'wide_resnet18_2', 'resnext50_32x4d'), _SIX),
    6: (('resnet18', 'resnet34', 'resnet50', 'resnet101'), _SIX),
}


@dataclass(frozen=True)
class PaperResult:
    """A row of the paper's tables; None where it has no figure.

    parameters_millions: Parameters, millions.
    gflops: 2 x multiply-adds of one image, 1e9.
    memory_mib: 4 bytes a parameter, MiB.
    cifar10_error, cifar100_error, stl10_error: Test error, %, the best of ten runs.
    """

    parameters_millions: Optional[float]
    gflops: Optional[float]
    memory_mib: Optional[float]
    cifar10_error: Optional[float]
    cifar100_error: Optional[float]
    stl10_error: Optional[float]


@cache
def paper_results() -> Dict[Tuple[str, str], PaperResult]:
    """Model name and attn_kwargs (as 'kernel_size=3', '' for none) to the paper's figures."""
    with (Path(__file__).parent / 'paper.csv').open(encoding='utf-8', newline='') as file:
        return {
            (row['model'], row['attn_kwargs']): PaperResult(
                *(float(row[field.name]) if row[field.name] else None for field in fields(PaperResult))
            )
            for row in csv.DictReader(file)
        }
