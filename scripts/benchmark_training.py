"""python scripts/benchmark_training.py --recipe.dataset cifar10: the training loop beside its bare step."""

import tyro

from timm_ham.training.throughput import Settings, benchmark_training

print(benchmark_training(tyro.cli(Settings)))
