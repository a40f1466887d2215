"""A finished run to a folder as the Hugging Face Hub holds it, which timm loads."""

import hashlib
import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional

import safetensors.torch
import torch
from timm.models import save_for_hf
from torch import nn

from timm_ham.errors import TimmHamError
from timm_ham.models.loading import HUB_PREFIX, load_model
from timm_ham.models.weights import CONFIG_FILE, HASH_KEY, WEIGHTS_FILE
from timm_ham.publishing.card import CARD_FILE, GRADCAM_FILE, folder_card
from timm_ham.publishing.golden import golden_logits, write_golden
from timm_ham.training.quality import QUALITY_FILE, QUALITY_PICTURE
from timm_ham.training.run import Run
from timm_ham.training.trainer import build_model

__all__ = ['export']


def export(run: Run, parent: Path, tag: Optional[str] = None, overwrite: bool = False) -> Path:
    """Write `<parent>/<model>.<tag>/`: weights, config, model card, and the run's record.

    The folder is read back through `timm.create_model` and has to give the same logits, bit for bit, before it is put
    in place.

    Args:
        run: A finished run.
        parent: Folder to put it in.
        tag: What the weights are of; the dataset's name if None.
        overwrite: Replace a folder of that name.

    Returns:
        The folder.

    Raises:
        TimmHamError: If the run is not finished, the folder exists, or the tag can't be part of its name.
    """
    record = run.record()
    if 'results' not in record:
        raise TimmHamError(f'{run.folder} is not finished: go on with it by timm-ham train --resume {run.folder}')
    tag = re.sub(r'[^\w-]+', '_', record['data']['name']) if tag is None else tag
    if not re.fullmatch(r'[\w-]+', tag):
        raise TimmHamError(f'tag {tag!r} may hold letters, digits, _ and - only: choose another --tag')
    folder = parent / f'{record["recipe"]["model"]}.{tag}'
    if folder.exists() and not overwrite:
        raise TimmHamError(f'{folder} exists: replace it by --overwrite, or choose another --tag')
    parent.mkdir(parents=True, exist_ok=True)
    model = _trained_model(run, tag)
    record = _public(record)
    with tempfile.TemporaryDirectory(dir=parent, prefix='.export-') as temporary:
        part = Path(temporary) / folder.name
        _write_weights(model, part)
        (part / 'run.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
        shutil.copy(run.metrics_file, part)
        shutil.copy(run.curves_file, part)
        for name in (GRADCAM_FILE, QUALITY_FILE, QUALITY_PICTURE):
            if (run.folder / name).is_file():
                shutil.copy(run.folder / name, part)
        folder_card(part).save(part / CARD_FILE)
        write_golden(model, part)
        _check_reload(model, part)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    return folder


def _public(record: Dict[str, Any]) -> Dict[str, Any]:
    """The record without the paths of a local dataset and of local weights, which are nobody else's business."""
    recipe = {**record['recipe'], 'dataset': record['data']['name']}
    weights = recipe.get('weights')
    if weights and not weights.startswith(HUB_PREFIX):
        recipe['weights'] = Path(weights).name
    return {**record, 'recipe': recipe}


def _trained_model(run: Run, tag: str) -> nn.Module:
    """The run's model, with its weights, described as timm wants it."""
    data = run.data()
    model = build_model(run.recipe(), data)
    safetensors.torch.load_model(model, run.weights_file)
    model.pretrained_cfg.update(
        tag=tag,
        num_classes=len(data.label_names),
        label_names=data.label_names,
        input_size=(3, *data.image_size),
        pool_size=tuple(math.ceil(size / model.feature_info[-1]['reduction']) for size in data.image_size),
        crop_pct=1.0,
        crop_mode='center',
        interpolation='bicubic',
        mean=data.mean,
        std=data.std,
        license='apache-2.0',
    )
    return model.eval()


def _write_weights(model: nn.Module, folder: Path) -> None:
    digest = hashlib.sha256(safetensors.torch.save(model.state_dict())).hexdigest()
    labels = list(model.pretrained_cfg.pop('label_names'))  # timm keeps them at the root of the config
    save_for_hf(model, folder, model_config={'label_names': labels, HASH_KEY: digest}, safe_serialization=True)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
    # It stands at the root too, where timm and transformers look; transformers stumbles over a second one.
    config['model_args'].pop('num_classes', None)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    # safetensors makes a file that its owner alone can read: of no use in a shared environment.
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def _check_reload(model: nn.Module, folder: Path) -> None:
    if not torch.equal(golden_logits(load_model(str(folder)).eval()), golden_logits(model)):
        raise RuntimeError(f'{folder / WEIGHTS_FILE} does not give back the logits it was written from')
