"""The learning curves of a run as a picture."""

from pathlib import Path
from typing import Dict, List

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ['draw_curves']

# Blue and orange of the Okabe-Ito palette, told apart by colour-blind readers; the line style differs too.
TRAIN = dict(color='#0072B2', linestyle='-', marker='o', markersize=3, label='training (augmented)')
HOLDOUT = dict(color='#D55E00', linestyle='--', marker='s', markersize=3, label='held out')


def draw_curves(metrics: List[Dict[str, float]], title: str, path: Path) -> None:
    """Loss and accuracy over the epochs, from the lines of metrics.jsonl, as a PNG."""
    epochs = [line['epoch'] for line in metrics]
    figure = Figure(figsize=(9, 3.6), dpi=120, layout='constrained')
    figure.suptitle(title)
    for axes, name, unit, factor in zip(figure.subplots(1, 2), ('loss', 'accuracy'), ('nats', '%'), (1, 100)):
        for part, style in (('train', TRAIN), ('holdout', HOLDOUT)):
            key = f'{part}_{name}'
            if metrics and key in metrics[0]:
                axes.plot(epochs, [factor * line[key] for line in metrics], **style)
        axes.set_xlabel('epoch')
        axes.set_ylabel(f'{name} ({unit})')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
