"""Exported or published weights, held against what they say of themselves."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, Optional

from huggingface_hub import HfApi, ModelCard, is_offline_mode, snapshot_download
from jinja2 import TemplateError

from timm_ham.errors import TimmHamError
from timm_ham.models.hub import download, hub_errors
from timm_ham.models.loading import FOLDER_PREFIX, HUB_PREFIX, load_model
from timm_ham.models.weights import (
    CONFIG_FILE,
    HASH_KEY,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    check_weights,
    hub_folders,
    read_config,
)
from timm_ham.publishing.card import CARD_FILE, GRADCAM_FILE, folder_card
from timm_ham.publishing.golden import GOLDEN_FILE, golden_error
from timm_ham.training.evaluate import measure
from timm_ham.training.quality import QUALITY_FILE, QUALITY_PICTURE
from timm_ham.training.recipes import Recipe
from timm_ham.training.run import Run

__all__ = ['FILES', 'Check', 'find_folder', 'verify']

# What a folder of weights holds, and may hold.
FILES = (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, GOLDEN_FILE, 'run.json', 'metrics.jsonl', 'curves.png')
OPTIONAL_FILES = (GRADCAM_FILE, QUALITY_FILE, QUALITY_PICTURE)
# Formats that run code when they are read. Nothing here reads them, but others who take the folder might.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle', '.joblib', '.tar', '.npy', '.npz')
SAME_ACCURACY = 1e-3  # other processors round otherwise, which moves a few images of ten thousand


@dataclass(frozen=True)
class Check:
    """What was checked, whether it holds, and what was found."""

    title: str
    passed: bool
    found: str


def _refuse_pickles(names: Iterable[str], where: str) -> None:
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise TimmHamError(f'{where} holds {", ".join(pickles)}: remove it, weights are safetensors only')


def find_folder(name: str, cache_dir: Optional[Path] = None) -> Path:
    """The folder of weights, by path, name under hub/ or `hf-hub:<owner>/<name>[@revision]`, which is downloaded.

    Raises:
        TimmHamError: If there is none, or the repository holds pickles.
    """
    if name.startswith(HUB_PREFIX):
        repo_id = name.removeprefix(HUB_PREFIX).partition('@')[0]
        config = download(name.removeprefix(HUB_PREFIX), CONFIG_FILE, cache_dir, MAX_CONFIG_BYTES)
        commit = config.parent.name
        with hub_errors(name):
            if not is_offline_mode():
                _refuse_pickles(HfApi().list_repo_files(repo_id, revision=commit), name)
            wanted = [*FILES, *OPTIONAL_FILES]
            return Path(snapshot_download(repo_id, revision=commit, allow_patterns=wanted, cache_dir=cache_dir))
    folder = Path(name.removeprefix(FOLDER_PREFIX))
    registered = {folder.name: folder for folder in hub_folders()}
    if not (folder / CONFIG_FILE).is_file() and name not in registered:
        choices = ', '.join([*registered, f'a folder with {CONFIG_FILE}', f'{HUB_PREFIX}<owner>/<name>'])
        raise TimmHamError(f'no weights {name!r}: choose from {choices}')
    return folder if (folder / CONFIG_FILE).is_file() else registered[name]


def _files(folder: Path) -> str:
    if not folder.is_dir():
        raise TimmHamError(f'there is no folder {folder}: make one by timm-ham export')
    names = [path.name for path in folder.iterdir()]
    _refuse_pickles(names, str(folder))
    missing = [name for name in FILES if name not in names]
    if missing:
        raise TimmHamError(f'{folder} lacks {", ".join(missing)}: export the run again')
    return f'{len(FILES)} files, no pickle'


def _hash(folder: Path) -> str:
    expected = read_config(folder / CONFIG_FILE).get(HASH_KEY)
    if not expected:
        raise TimmHamError(f'{CONFIG_FILE} names no {HASH_KEY}')
    check_weights(folder)
    return f'SHA-256 {expected[:16]}...'


def _config(folder: Path) -> str:
    config, record = read_config(folder / CONFIG_FILE), Run(folder).record()
    cfg, data = config['pretrained_cfg'], record['data']
    pairs = {
        'architecture': (config['architecture'], record['recipe']['model']),
        'label_names': (config['label_names'], data['label_names']),
        'num_classes': (config['num_classes'], len(data['label_names'])),
        'input_size': (cfg['input_size'], [3, *data['image_size']]),
        'mean': (cfg['mean'], data['mean']),
        'std': (cfg['std'], data['std']),
        'model_args': (config['model_args'], {**config['model_args'], **record['recipe'].get('model_args', {})}),
    }
    _compare(pairs, CONFIG_FILE)
    model = load_model(str(folder))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _compare({'parameters': (parameters, record['results']['parameters'])}, f'{config["architecture"]} as registered')
    return f'{config["architecture"]}, {parameters:,} parameters, {config["num_classes"]} classes'


def _compare(pairs: Dict[str, tuple], what: str) -> None:
    for key, (found, wanted) in pairs.items():
        if found != wanted:
            raise TimmHamError(f'{what} has {key} {found!r}, but the record in run.json {wanted!r}')


def _golden(folder: Path) -> str:
    return f'largest difference {golden_error(load_model(str(folder)).eval(), folder):.1e}'


def _card(folder: Path) -> str:
    with (folder / CARD_FILE).open(encoding='utf-8') as file:
        card = ModelCard(file.read())
    found, wanted = card.data.to_dict(), folder_card(folder).data.to_dict()
    keys = ('library_name', 'license', 'datasets', 'model-index')
    _compare({key: (found.get(key), wanted.get(key)) for key in keys}, CARD_FILE)
    if 'import timm_ham' not in card.text:
        raise TimmHamError(f'{CARD_FILE} does not say that timm_ham is to be imported')
    return ', '.join(f'{result.metric_type} {result.metric_value}' for result in card.data.eval_results)


def _accuracy(folder: Path, dataset: str) -> str:
    record = Run(folder).record()
    stated, recipe = record['results']['test']['accuracy'], Recipe.from_json(record['recipe'])
    metrics = measure(
        str(folder),
        dataset,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        dataset_config=recipe.dataset_config,
        test_share=recipe.test_share,
    )
    text = f'{metrics.accuracy:.2%} of {metrics.images} test images'
    if abs(metrics.accuracy - stated) > SAME_ACCURACY:
        raise TimmHamError(f'{text}, but the card says {stated:.2%}')
    return text


def verify(folder: Path, dataset: Optional[str] = None) -> Iterator[Check]:
    """Check a folder of weights: files, hash, config, golden logits, card, and the accuracy if a dataset is given.

    Args:
        folder: As `timm-ham export` leaves it or as `find_folder` returns it.
        dataset: As for `open_dataset`; its test split is measured and held against the record's accuracy.

    Yields:
        A Check each. None after one of files, hash or config that failed: the others trust what these are about.
    """
    steps: Dict[str, Callable[[Path], str]] = {
        'files': _files,
        'hash': _hash,
        'config': _config,
        'golden logits': _golden,
        'card': _card,
    }
    if dataset is not None:
        steps['accuracy'] = partial(_accuracy, dataset=dataset)
    for title, step in steps.items():
        try:
            yield Check(title, True, step(folder))
        # A TimmHamError is a ValueError; the card's template fails by a TemplateError where a record lacks something.
        except (OSError, ValueError, KeyError, TypeError, RecursionError, TemplateError) as error:
            found = error if isinstance(error, TimmHamError) else repr(error)
            yield Check(title, False, ' '.join(str(found).split()))
            if title in ('files', 'hash', 'config'):
                return
