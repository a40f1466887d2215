"""A model as an ONNX file, checked in onnxruntime."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from timm_ham.errors import TimmHamError

__all__ = ['export_onnx']

NEEDED = ('onnx', 'onnxscript', 'onnxruntime')
TOLERANCE = 1e-4  # of a logit, relative where it is larger than 1


def export_onnx(model: nn.Module, file: Path) -> float:
    """Write a model as ONNX: `images`, float32 (batch, 3, H, W), normalized, to `logits`, (batch, classes).

    The batch is free, the image size is that of the model's `pretrained_cfg`.

    Args:
        model: Any of timm's.
        file: To be written; the folder must exist.

    Returns:
        Largest difference between onnxruntime's logits and the model's, on noise in another batch size.

    Raises:
        TimmHamError: If a package is missing, the file exists or its folder does not, or the logits differ.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise TimmHamError(f"ONNX needs {', '.join(missing)}: pip install 'timm_ham[onnx]'")
    if not file.parent.is_dir():
        raise TimmHamError(f'there is no folder {file.parent}: make it, or name another file by --output')
    if file.exists():
        raise TimmHamError(f'{file} exists: name another file by --output')
    import onnxruntime

    model = model.cpu().eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        model,
        (images,),
        file,
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    images = torch.cat([images, images.flip(0)])[:3]
    (logits,) = onnxruntime.InferenceSession(file).run(None, {'images': images.numpy()})
    with torch.inference_mode():
        wanted = model(images)
    error = (torch.from_numpy(logits) - wanted).abs().max().item()
    if not error <= TOLERANCE * max(1, wanted.abs().max().item()):
        raise TimmHamError(f'{file} gives logits that differ by {error:.2g} in onnxruntime: do not use it')
    return error
