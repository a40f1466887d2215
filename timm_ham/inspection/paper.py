"""The figures of the HAM paper's Tables 1 to 6, from paper.csv beside this file, by the names of the models here."""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Dict, Optional, Tuple

__all__ = ['PaperResult', 'paper_results']


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
