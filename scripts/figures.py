"""python scripts/figures.py --help: the figures of the README and the model cards, drawn anew under hub/."""

from pathlib import Path

import tyro

from timm_ham.cli import main
from timm_ham.models.weights import hub_folders
from timm_ham.training.curves import draw_curves
from timm_ham.training.run import Run

FIGURES, EXAMPLES = Path('hub/figures'), Path('hub/space/examples')


def draw(plain: str, cbam: str, ham: str = 'resnet20_ham.cifar10') -> None:
    """Draw Grad-CAM of three networks, HAM's maps, and the learning curves of all bundled weights.

    Args:
        plain: Weights without attention, by name, folder or hf-hub:<owner>/<name>.
        cbam: Weights with CBAM.
        ham: Weights with HAM.
    """
    FIGURES.mkdir(exist_ok=True)
    images = [str(EXAMPLES / name) for name in ('cat.jpg', 'horse.png', 'ship.png')]
    main(['gradcam', *images, '--models', plain, cbam, ham, '--output', f'{FIGURES}/gradcam.png', '--overwrite'])
    main(['attention', images[1], '--model', ham, '--output', f'{FIGURES}/attention.png', '--overwrite'])
    for run in map(Run, hub_folders()):
        draw_curves(run.metrics(), f'{run.recipe().model} on {run.data().name}', run.curves_file)


tyro.cli(draw)
