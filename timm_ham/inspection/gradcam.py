"""Where a network looks for a class: Grad-CAM and its kin, by the grad-cam package.

https://arxiv.org/abs/1610.02391
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.models.loading import Classifier

__all__ = ['METHODS', 'Explanation', 'class_activation_maps', 'explain', 'seen_by', 'short_names']

# Names on the command line to the classes of the grad-cam package; those that need one layer's feature map alone.
METHODS: Dict[str, str] = {
    'gradcam': 'GradCAM',
    'gradcam++': 'GradCAMPlusPlus',
    'gradcam-elementwise': 'GradCAMElementWise',
    'xgradcam': 'XGradCAM',
    'hirescam': 'HiResCAM',
    'layercam': 'LayerCAM',
    'eigencam': 'EigenCAM',
    'eigengradcam': 'EigenGradCAM',
    'scorecam': 'ScoreCAM',
    'ablationcam': 'AblationCAM',
    'random': 'RandomCAM',
}


def _no_maps(model: str) -> TimmHamError:
    return TimmHamError(f'{model} has no stages with feature maps for Grad-CAM: choose a convolutional network of timm')


def _channels_first(model: str, channels: int, output: Any) -> torch.Tensor:
    """The last stage's output as (B, C, H, W)."""
    if not isinstance(output, torch.Tensor) or output.dim() != 4:
        raise _no_maps(model)
    return output if output.shape[1] == channels else output.permute(0, 3, 1, 2)


def class_activation_maps(
    model: nn.Module, images: torch.Tensor, classes: Sequence[int], method: str = 'gradcam'
) -> np.ndarray:
    """Where each image speaks for its class, on the output of the network's last stage.

    It works on a copy, so the model keeps its mode, its gradients and its hooks.

    Args:
        model: A convolutional network of timm; its `feature_info` tells the last stage.
        images: (B, 3, H, W), as the network takes them.
        classes: For each image, the index of the logit that is explained.
        method: Key in METHODS.

    Returns:
        float32 (B, H, W), each map from 0 to 1, as the grad-cam package scales and enlarges it. All zeros where nothing
        speaks for the class.

    Raises:
        TimmHamError: If grad-cam is not installed, or the network has no stages with feature maps.
    """
    try:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise TimmHamError(f"Grad-CAM needs the grad-cam package ({error}): pip install 'timm_ham[inspect]'") from error
    name = type(model).__name__
    if not isinstance(getattr(model, 'feature_info', None), list):
        raise _no_maps(name)
    model = copy.deepcopy(model).eval()
    last = model.feature_info[-1]
    method_class = getattr(pytorch_grad_cam, METHODS[method])
    cam = method_class(
        model=model,
        target_layers=[model.get_submodule(last['module'])],
        reshape_transform=partial(_channels_first, name, last['num_chs']),
    )
    return cam(images, [ClassifierOutputTarget(index) for index in classes])


def short_names(models: Sequence[str]) -> Dict[str, str]:
    """Names, folders and Hub ids to what stands over a column: their last part, where that tells them apart.

    Raises:
        TimmHamError: If there are none.
    """
    if not models:
        raise TimmHamError('no model: name one at least')
    short = {name: Path(name).name for name in models}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


@dataclass(frozen=True)
class Explanation:
    """What a network makes of one image.

    seen: The image as the network saw it, uint8 (H, W, 3), RGB.
    probabilities: Softmax of its logits, (classes,).
    label_names: Of the classes.
    target: The class that is explained.
    heat: Where it sees the target, (H, W) in [0, 1].
    """

    seen: np.ndarray
    probabilities: torch.Tensor
    label_names: Tuple[str, ...]
    target: int
    heat: np.ndarray

    @property
    def predicted(self) -> str:
        """Name of the most probable class."""
        return self.label_names[self.probabilities.argmax()]


def _class_index(label_names: Sequence[str], wanted: str) -> int:
    if wanted in label_names:
        return label_names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(label_names):
        return int(wanted)
    names = ', '.join(label_names[:20]) + (f' ... ({len(label_names)} in all)' if len(label_names) > 20 else '')
    raise TimmHamError(f'no class {wanted!r}: choose a number below {len(label_names)}, or from {names}')


def seen_by(model: nn.Module, image: torch.Tensor) -> np.ndarray:
    """A network's input, float32 (3, H, W), back to uint8 pixels (H, W, 3): its transform without normalization."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def explain(
    classifier: Classifier, image: Image.Image, target: Optional[str] = None, method: str = 'gradcam'
) -> Explanation:
    """A network's prediction for an image, and where it looks for a class.

    Args:
        classifier: The network, as `load_classifier` gives it.
        image: RGB.
        target: Name or number of the class to look for; the predicted one if None.
        method: Key in METHODS.

    Raises:
        TimmHamError: If there is no such class, or as `class_activation_maps` does.
    """
    batch = classifier.transform(image)[None]
    with torch.no_grad():
        probabilities = classifier.model(batch)[0].softmax(0)
    index = probabilities.argmax().item() if target is None else _class_index(classifier.label_names, target)
    heat = class_activation_maps(classifier.model, batch, [index], method)[0]
    return Explanation(seen_by(classifier.model, batch[0]), probabilities, classifier.label_names, index, heat)
