"""What a model sees in an image."""

from typing import List, Tuple

import torch
from PIL import Image

from timm_ham.models.loading import Classifier

__all__ = ['predict']


@torch.inference_mode()
def predict(classifier: Classifier, image: Image.Image, top: int = 5) -> List[Tuple[str, float]]:
    """The classes of the largest logits, best first, each with its softmax probability.

    Args:
        classifier: The model.
        image: In RGB, of any size.
        top: How many classes, 1 at least and all at most.
    """
    (probabilities,) = classifier.model(classifier.transform(image)[None]).softmax(1)
    values, indices = probabilities.topk(max(1, min(top, len(probabilities))))
    return [(classifier.label_names[index], value) for index, value in zip(indices.tolist(), values.tolist())]
