"""Grad-CAM and HAM's maps as pictures. The colours are told apart by colour-blind readers, and in grey."""

import textwrap
from typing import Dict, List, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image

from timm_ham.inspection.gradcam import Explanation
from timm_ham.models.maps import HamMaps

__all__ = ['draw_attention', 'draw_gradcam']

HEAT = 'viridis'  # dark to bright, so that it can be read without its hues
# Blue and orange of the Okabe-Ito palette; marker and hatch differ too.
IMPORTANT, SUB_IMPORTANT = '#0072B2', '#E69F00'


def _overlay(axes: Axes, image: np.ndarray, heat: np.ndarray, low: float = 0.0) -> AxesImage:
    """A map over the image in grey, both over the same square whatever their resolutions; colours from `low` to 1."""
    extent = (0, 1, 1, 0)
    grey = image @ np.array([0.299, 0.587, 0.114])
    axes.imshow(grey, cmap='gray', vmin=0, vmax=255, extent=extent, interpolation='nearest')
    drawn = axes.imshow(heat, cmap=HEAT, vmin=low, vmax=1, alpha=0.6, extent=extent)
    axes.set_aspect(image.shape[0] / image.shape[1])
    axes.set_axis_off()
    return drawn


def draw_gradcam(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    models: Sequence[str],
    explanations: Sequence[Sequence[Explanation]],
    method: str = 'gradcam',
) -> Figure:
    """As Fig. 5 of the HAM paper: a row an image with its label on top, a column a model with its prediction.

    Args:
        images: The pictures as they were given.
        titles: What stands over each of them, the true label where it is known.
        models: Names of the networks.
        explanations: For each image, what each of the networks makes of it.
        method: What the maps are called.
    """
    rows, columns = len(images), 1 + len(models)
    figure = Figure(figsize=(2.3 * columns, 2.6 * rows + 1.0), dpi=100, layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for image, title, row, panel in zip(images, titles, explanations, panels):
        panel[0].imshow(image)
        panel[0].set_axis_off()
        panel[0].set_title(title, fontsize=11, fontweight='bold')
        for explanation, axes in zip(row, panel[1:]):
            drawn = _overlay(axes, explanation.seen, explanation.heat)
            target = explanation.label_names[explanation.target]
            lines = [f'{explanation.predicted}  {explanation.probabilities.max():.0%}']
            if target != explanation.predicted:
                lines.append(f'map of: {target}')
            axes.set_title('\n'.join(lines), fontsize=11)
    for name, axes in zip(models, panels[0, 1:]):
        axes.set_title(f'{textwrap.fill(name, 26)}\n\n{axes.get_title()}', fontsize=11)
    bar = figure.colorbar(drawn, ax=panels, orientation='horizontal', aspect=50, fraction=0.03, pad=0.02)
    bar.set_label(f'{method}: share of the largest value in each map', fontsize=10)
    return figure


def _last_of_each_size(maps: Dict[str, HamMaps]) -> Dict[str, HamMaps]:
    """The last module at each resolution, which is the last of each stage."""
    by_size = {tuple(found.spatial_important.shape[1:]): name for name, found in maps.items()}
    return {name: maps[name] for name in by_size.values()}


def _draw_channels(axes: Axes, maps: HamMaps) -> None:
    """Channel attention in falling order, the two groups apart."""
    attention = maps.channel_attention[0].float().cpu().sort(descending=True).values.numpy()
    places, important = np.arange(len(attention)), int(maps.important[0].sum())
    axes.bar(places[:important], attention[:important], 1, color=IMPORTANT)
    axes.bar(places[important:], attention[important:], 1, color=SUB_IMPORTANT, hatch='////', edgecolor='white', lw=0)
    axes.axvline(important - 0.5, color='black', lw=1, ls='--')
    axes.set(ylim=(0, 1.18), xlim=(-0.5, len(attention) - 0.5), yticks=(0, 0.5, 1))
    for place, text, side in (
        (important - 0.5, f'{important} important ', 'right'),
        (important - 0.5, f' {len(attention) - important} sub-important', 'left'),
    ):
        axes.text(place, 1.04, text, ha=side, fontsize=8)
    axes.set_xlabel('channels, sorted', fontsize=9)


def draw_attention(image: np.ndarray, maps: Dict[str, HamMaps], title: str) -> Figure:
    """HAM's maps for one image: a row for the last module of each stage, and alpha and beta along the depth.

    Args:
        image: As the network saw it, uint8 (H, W, 3).
        maps: What `inspect` gives for it; of a batch the first image is drawn.
        title: What stands on top.
    """
    stages = _last_of_each_size(maps)
    figure = Figure(figsize=(9.5, 2.6 * len(stages) + 3.2), dpi=100, layout='constrained')
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(len(stages) + 1, 4, width_ratios=(1, 1, 1, 1.7))
    spatial: List[Axes] = []
    for row, (name, found) in enumerate(stages.items()):
        picture, first, second, channels = (figure.add_subplot(grid[row, column]) for column in range(4))
        picture.imshow(image, extent=(0, 1, 1, 0), interpolation='nearest')
        picture.set_aspect(image.shape[0] / image.shape[1])
        picture.set_axis_off()
        height, width = found.spatial_important.shape[1:]
        picture.set_title(f'{name}\n{found.important.shape[1]} x {height} x {width}', fontsize=9)
        for axes, text, heat in (
            (first, 'spatial map,\nimportant channels', found.spatial_important),
            (second, 'spatial map,\nsub-important channels', found.spatial_sub_important),
        ):
            drawn = _overlay(axes, image, heat[0].float().cpu().numpy(), low=0.5)
            axes.set_title(text, fontsize=9)
            spatial.append(axes)
        _draw_channels(channels, found)
        channels.set_title('channel attention', fontsize=9)
    bar = figure.colorbar(drawn, ax=spatial, orientation='horizontal', aspect=40, fraction=0.04, pad=0.02)
    bar.set_label('spatial attention: 0.5 is where the ReLU is off', fontsize=9)
    depth = figure.add_subplot(grid[-1, :])
    places = range(1, len(maps) + 1)
    depth.plot(places, [found.alpha for found in maps.values()], 'o-', color=IMPORTANT, label='alpha, of the average')
    depth.plot(
        places, [found.beta for found in maps.values()], 's--', color=SUB_IMPORTANT, label='beta, of the maximum'
    )
    depth.set(ylim=(0, 1), xlabel='HAM module, from input to output')
    depth.set_title('weights of the two poolings', fontsize=9)
    depth.xaxis.set_major_locator(MaxNLocator(integer=True))
    depth.grid(alpha=0.3)
    depth.legend(fontsize=9)
    return figure
