"""Train, measure, export and compare image classifiers with the Hybrid Attention Module, in timm's formats."""

# Each command imports what it needs when it runs: accelerate and datasets take seconds, which `list` can do without.

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Callable, Dict, Literal, Optional, Sequence, Tuple

import torch
import tyro
from PIL import Image

from timm_ham import ARCHITECTURES, ATTENTIONS, autoload
from timm_ham.errors import TimmHamError
from timm_ham.inspection.benchmark import Settings
from timm_ham.inspection.gradcam import METHODS
from timm_ham.models.weights import NAMESPACE
from timm_ham.training.recipes import RECIPES, Recipe, Saving, named_recipe

__all__ = ['main']

DEFAULT_RECIPE = 'digits_quick'
PAPER_RECIPE = 'cifar_paper'
DEFAULT_FINETUNE = 'finetune'
DEFAULT_BENCHMARK = Settings()
DEFAULT_SAVING = Saving()
Tracker = Literal['tensorboard', 'trackio']


def _printable(text: str) -> str:
    """Without control characters: names of classes and files may come from anywhere."""
    return ''.join(character if character.isprintable() else '?' for character in text)


def train_command(recipe_name: Optional[str], resumed: Optional[Path]) -> Callable[..., None]:
    """`timm-ham train`, its options defaulting to the fields of the named recipe, else of the run to go on with."""
    if resumed and recipe_name is None:
        from timm_ham.training.run import Run

        named = Run(resumed).recipe()
    else:
        named = named_recipe(recipe_name or DEFAULT_RECIPE)

    def command(
        options: Annotated[Recipe, tyro.conf.arg(name='')] = named,
        recipe: Literal[tuple(RECIPES)] = recipe_name or DEFAULT_RECIPE,
        run: Optional[Path] = None,
        resume: Optional[Path] = None,
        change_recipe: bool = False,
        saving: Annotated[Saving, tyro.conf.arg(name='')] = DEFAULT_SAVING,
        tracker: Optional[Tracker] = None,
    ) -> None:
        """Train a model; leave a run folder and, in it, the folder that timm loads and the Hub takes.

        Args:
            options: Fields of the recipe; the values shown are those of the recipe named by --recipe.
            recipe: Named recipe to start from.
            run: Folder for the run, a new one; runs/<model>.<recipe> if not given.
            resume: Folder of a run to go on with, from its last checkpoint, by its own recipe.
            change_recipe: Go on with --resume although other options, or the dataset, are not what it was started with.
            saving: When the state of the run is written.
            tracker: Send the metrics there too; metrics.jsonl is always written.
        """
        if not resume:
            return train_and_export(options, recipe, run, saving, tracker)
        if run:
            raise TimmHamError(f'--resume goes on in {resume}: leave --run out')
        from timm_ham.training import trainer

        finish_and_export(resume, lambda started: trainer.resume(started, options, change_recipe, saving, tracker))

    return command


def finetune_command(recipe_name: str) -> Callable[..., None]:
    """`timm-ham finetune`, its options defaulting to the fields of the named recipe."""
    named = named_recipe(recipe_name)

    def command(
        weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='WEIGHTS')],
        /,
        options: Annotated[Recipe, tyro.conf.arg(name='')] = named,
        recipe: Literal[tuple(RECIPES)] = recipe_name,
        run: Optional[Path] = None,
        saving: Annotated[Saving, tyro.conf.arg(name='')] = DEFAULT_SAVING,
        tracker: Optional[Tracker] = None,
    ) -> None:
        """Train from weights on, under a new classifier for the classes of a dataset; go on by timm-ham train --resume.

        Args:
            weights: Name of pretrained weights, such as resnet20_ham.cifar10, a folder with config.json, or
                hf-hub:<owner>/<name>. They decide the model.
            options: Fields of the recipe; the values shown are those of the recipe named by --recipe.
            recipe: Named recipe to start from.
            run: Folder for the run, a new one; runs/<model>.<recipe> if not given.
            saving: When the state of the run is written.
            tracker: Send the metrics there too; metrics.jsonl is always written.
        """
        from timm_ham.training.finetune import from_weights

        if options.weights or options.model != named.model:
            raise TimmHamError(f'{weights} decides model and weights: leave --model and --weights out')
        train_and_export(from_weights(options, weights), recipe, run, saving, tracker)

    return command


def train_and_export(
    recipe: Recipe, recipe_name: str, run: Optional[Path], saving: Saving, tracker: Optional[Tracker]
) -> None:
    """Train in a new folder, and leave the one that timm loads."""
    from timm_ham.training import trainer
    from timm_ham.training.run import new_run_folder

    folder = run or new_run_folder(recipe, recipe_name)
    finish_and_export(folder, lambda started: trainer.train(recipe, recipe_name, started, saving, tracker))


def finish_and_export(folder: Path, train: Callable) -> None:
    """Train the run of a folder to its end, and leave the folder that timm loads; if stopped, say how to go on."""
    from accelerate.utils import broadcast_object_list

    from timm_ham.publishing.export import export
    from timm_ham.training.processes import start_processes
    from timm_ham.training.run import Run, writing
    from timm_ham.training.stopping import StoppedError

    state = start_processes()
    run = Run(Path(broadcast_object_list([str(folder)])[0]))
    try:
        metrics = train(run)
    except (KeyboardInterrupt, StoppedError) as stop:
        if state.is_main_process and run.record_file.is_file():
            print(f'\nstopped: go on by timm-ham train --resume {run.folder}', file=sys.stderr)
        sys.exit(128 + (stop.signal if isinstance(stop, StoppedError) else signal.SIGINT))
    if state.is_main_process:
        with writing(run.folder):
            folder = export(run, run.folder)
        print(f'test accuracy  {metrics.accuracy:.2%} of {metrics.images} images, after the last epoch')
        print(f'curves         {run.curves_file}')
        print(f'weights        {folder}/, read back by timm: the logits are identical')
        print(f"load           timm.create_model('local-dir:{folder}', pretrained=True)")
        print(f'register       timm-ham export {run.folder}')


def evaluate_command(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='MODEL')],
    /,
    dataset: str = 'digits',
    split: Literal['test', 'train'] = 'test',
    batch_size: int = 100,
    image_column: Optional[str] = None,
    label_column: Optional[str] = None,
    full: bool = False,
    output: Optional[Path] = None,
    overwrite: bool = False,
    dataset_config: Optional[str] = None,
    dataset_revision: Optional[str] = None,
    test_share: float = 0.0,
    workers: int = 2,
) -> None:
    """Measure weights on a dataset, in float32.

    Args:
        model: Name of pretrained weights, such as resnet20_ham.cifar10, a folder with config.json, or
            hf-hub:<owner>/<name>.
        dataset: Any that timm-ham train takes.
        split: Images to measure on.
        batch_size: Images in a batch.
        image_column: Column of the images; found by its type if not given.
        label_column: Column of the labels; found by its type if not given.
        full: Measure all that a card can tell: top-5, calibration, classes, speed, and 20 times as many corrupted
            images; written as quality.json and quality.png.
        output: Folder for these two files; that of the weights if not given.
        overwrite: Replace the two files.
        dataset_config: Config (subset) of a dataset that has several.
        dataset_revision: Branch, tag or commit of a dataset on the Hub.
        test_share: As it was in training.
        workers: Processes that open images.
    """
    from accelerate import PartialState

    from timm_ham.training.evaluate import measure

    if full:
        if split != 'test':
            raise TimmHamError('--full is measured on the test split: leave --split out')
        if dataset_config or dataset_revision or test_share:
            raise TimmHamError('--full takes a dataset as it is: leave config, revision and test share out')
        return _evaluate_fully(model, dataset, batch_size, image_column, label_column, output, overwrite)

    metrics = measure(
        model,
        dataset,
        split,
        batch_size,
        image_column,
        label_column,
        dataset_config,
        dataset_revision,
        test_share,
        workers,
    )
    PartialState().print(
        f'accuracy {metrics.accuracy:.2%}   loss {metrics.loss:.4f} nats   {metrics.images} {split} images'
    )


def _evaluate_fully(
    model: str,
    dataset: str,
    batch_size: int,
    image_column: Optional[str],
    label_column: Optional[str],
    output: Optional[Path],
    overwrite: bool,
) -> None:
    from timm_ham.models.loading import HUB_PREFIX
    from timm_ham.publishing.verify import find_folder
    from timm_ham.training.quality import QUALITY_FILE, describe, measure_quality, write_quality

    weights = find_folder(model)
    folder = output or weights
    if output is None and model.startswith(HUB_PREFIX):
        raise TimmHamError(f'{model} lies in a cache: name a folder for the result by --output')
    if (folder / QUALITY_FILE).exists() and not overwrite:
        raise TimmHamError(f'{folder / QUALITY_FILE} exists: replace it by --overwrite, or name a folder by --output')
    quality = measure_quality(weights, dataset, batch_size, image_column, label_column)
    write_quality(quality, folder, f'{Path(model).name} on {quality["dataset"]}')
    print(describe(quality))
    print(f'written to {folder}/')
    if output is None:
        print(f'card           timm-ham export {folder} --overwrite shows them in the card')


def export_command(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')],
    /,
    hub: Path = Path('hub'),
    tag: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Put a finished run into hub/<model>.<tag>/, where `import timm_ham` finds and registers it.

    Args:
        run: Folder of the run.
        hub: Folder that holds the folders of weights.
        tag: What the weights are of; the dataset's name if not given.
        overwrite: Replace a folder of that name.
    """
    from timm_ham.publishing.export import export
    from timm_ham.training.run import Run

    print(f'exported to {export(Run(run), hub, tag, overwrite)}/')


def weights_command(markdown: bool = False) -> None:
    """List the weights under hub/, from the records of their runs.

    Args:
        markdown: Print Markdown.
    """
    from timm_ham.publishing.card import weights_table

    print(weights_table(markdown))


def predict_command(
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='IMAGE')],
    /,
    model: str = 'resnet20_ham',
    top: int = 5,
) -> None:
    """Classify an image.

    Args:
        image: Image file.
        model: Name of pretrained weights, such as resnet20_ham.cifar10, a folder with config.json, or
            hf-hub:<owner>/<name>.
        top: How many classes to show.
    """
    from timm_ham.inspection.images import open_image
    from timm_ham.inspection.predict import predict
    from timm_ham.models.loading import load_classifier

    for name, probability in predict(load_classifier(model), open_image(image), top):
        print(f'{probability:8.2%}  {_printable(name)}')


def export_onnx_command(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='MODEL')],
    /,
    output: Optional[Path] = None,
) -> None:
    """Write a model with its weights as an ONNX file, and check it in onnxruntime.

    Args:
        model: Name of pretrained weights, such as resnet20_ham.cifar10, a folder with config.json, or
            hf-hub:<owner>/<name>.
        output: File to write; called after the model if not given.
    """
    from timm_ham.models.loading import load_model
    from timm_ham.publishing.onnx import export_onnx

    file = output or Path(f'{Path(model).name}.onnx')
    error = export_onnx(load_model(model), file)
    print(f"{file}: onnxruntime's logits differ from torch's by {error:.1e} at most")


def publish_command(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='FOLDER')],
    /,
    namespace: str = NAMESPACE,
    yes: bool = False,
    private: bool = False,
    revision: Optional[str] = None,
    pr: bool = False,
) -> None:
    """Check a folder of weights and show what would go to the Hub; with --yes upload it, tag it, and read it back.

    Args:
        folder: hub/<model>.<tag>, as timm-ham export leaves it.
        namespace: User or organization on the Hub.
        yes: Upload; without, nothing is sent anywhere.
        private: Make the repository private; one that is there has to be.
        revision: Branch to upload to, made if it is not there; main, and the tag of this version on it, if not given.
        pr: Open a pull request instead, on a repository that is there.
    """
    from timm_ham.publishing.publish import Upload

    upload = Upload(folder, namespace, private, revision, pr)
    print(upload.describe())
    if yes:
        print(f'published: {upload.publish()}')
    else:
        print('nothing was uploaded: do so by --yes')


def verify_command(
    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar='WEIGHTS')], /, dataset: Optional[str] = None
) -> None:
    """Hold weights against what they say of themselves: files, hash, config, golden logits, card, accuracy.

    Args:
        weights: Name under hub/, such as resnet20_ham.cifar10, a folder, or hf-hub:<owner>/<name>.
        dataset: Measure the accuracy on its test split: as for timm-ham evaluate.
    """
    from timm_ham.publishing.verify import find_folder, verify

    failed = 0
    for check in verify(find_folder(weights), dataset):
        print(f'{"ok" if check.passed else "FAILED":8}{check.title:16}{_printable(check.found)}')
        failed += not check.passed
    if failed:
        raise TimmHamError(f'{weights}: {failed} of the checks failed')


def list_command(pattern: Annotated[str, tyro.conf.Positional] = '*', /) -> None:
    """List the models: parameters, multiply-adds, weights.

    Args:
        pattern: Which ones, with * and ?, such as 'resnet18_*'.
    """
    from timm_ham.inspection.complexity import model_table

    print(model_table(pattern))


def complexity_command(pattern: Annotated[str, tyro.conf.Positional] = '*', /, markdown: bool = False) -> None:
    """Show parameters, GFLOPs and Memory of the models beside the paper's figures.

    Args:
        pattern: Which models, with * and ?, such as 'resnet18_*'.
        markdown: Print Markdown.
    """
    from timm_ham.inspection.complexity import complexity_table

    print(complexity_table(pattern, markdown))


def _check_new(file: Path, overwrite: bool) -> None:
    if not file.parent.is_dir():
        raise TimmHamError(f'there is no folder {file.parent}: make it, or name another file by --output')
    if file.exists() and not overwrite:
        raise TimmHamError(f'{file} exists: replace it by --overwrite, or name another by --output')


def bench_command(
    settings: Annotated[Settings, tyro.conf.arg(name='')] = DEFAULT_BENCHMARK,
    output: Path = Path('benchmark'),
    overwrite: bool = False,
) -> None:
    """Measure what the attentions cost in time and memory on this machine, as ratios.

    Args:
        settings: What is measured.
        output: Beginning of the names of the files for the result, .json and .png.
        overwrite: Replace files of those names.
    """
    from timm_ham.inspection.benchmark import benchmark, draw, table
    from timm_ham.training.run import environment

    unknown = [name for name in settings.architectures if name not in ('all', *ARCHITECTURES)]
    unknown += [name for name in settings.attentions if name not in ATTENTIONS]
    if unknown:
        choices = ', '.join((*ARCHITECTURES, *ATTENTIONS))
        raise TimmHamError(f'unknown architecture or attention {unknown[0]!r}: choose from {choices}')
    files = [output.with_name(f'{output.name}.{kind}') for kind in ('json', 'png')]
    for file in files:
        _check_new(file, overwrite)
    measurements = benchmark(settings)
    print(table(measurements))
    result = {
        'environment': environment(1, torch.device('cpu')),
        'threads': torch.get_num_threads(),
        'settings': asdict(settings),
        'measurements': [asdict(measurement) for measurement in measurements],
    }
    files[0].write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    draw(measurements, files[1])
    print(f'written to {files[0]} and {files[1]}')


def gradcam_command(
    images: Annotated[Tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar='IMAGE ...')] = (),
    /,
    *,
    models: Tuple[str, ...],
    target: Optional[str] = None,
    method: Literal[tuple(METHODS)] = 'gradcam',
    dataset: Optional[str] = None,
    split: Literal['test', 'train'] = 'test',
    rows: Tuple[int, ...] = (0, 1, 2, 3),
    output: Path = Path('gradcam.png'),
    overwrite: bool = False,
) -> None:
    """Draw where models look: a row an image, a column a model, with what it takes the image for.

    Args:
        images: Image files.
        models: Names of pretrained weights, such as resnet20_ham.cifar10, folders with config.json, or
            hf-hub:<owner>/<name>.
        target: Name or number of the class to look for; each model's own prediction if not given.
        method: Grad-CAM, or one of its kin in the grad-cam package.
        dataset: Take images from a dataset too, as for evaluate; their true labels stand over them.
        split: Which of its splits.
        rows: Which of its rows.
        output: PNG to write.
        overwrite: Replace a file of that name.
    """
    from tabulate import tabulate

    from timm_ham.inspection.drawing import draw_gradcam
    from timm_ham.inspection.gradcam import explain, short_names
    from timm_ham.inspection.images import open_image
    from timm_ham.models.loading import load_classifier

    _check_new(output, overwrite)
    pictures = [(path.stem, open_image(path)) for path in images]
    if dataset:
        from timm_ham.training.data import decode
        from timm_ham.training.sources import open_dataset

        data = open_dataset(dataset)
        part = data.part(split)
        labelled = decode(part.take(rows) if rows is not None else part)
        for pixels, label in zip(labelled.images, labelled.labels):
            pictures.append((data.label_names[label], Image.fromarray(pixels.numpy())))
    if not pictures:
        raise TimmHamError('no image: name image files, or a dataset by --dataset')
    classifiers = {short: load_classifier(name) for name, short in short_names(models).items()}
    found = [[explain(each, image, target, method) for each in classifiers.values()] for _, image in pictures]
    titles, opened = zip(*pictures)
    draw_gradcam(opened, titles, list(classifiers), found, method).savefig(output, format='png')
    said = [
        (_printable(title), name, _printable(seen.predicted), f'{seen.probabilities.max():.1%}')
        for title, row in zip(titles, found)
        for name, seen in zip(classifiers, row)
    ]
    print(tabulate(said, ('image', 'model', 'prediction', 'confidence'), disable_numparse=True))
    print(f'written to {output}')


def attention_command(
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='IMAGE')],
    /,
    model: str = 'resnet20_ham.cifar10',
    output: Path = Path('attention.png'),
    overwrite: bool = False,
) -> None:
    """Draw what HAM weighs in each stage: both spatial maps, the channel attention, alpha and beta.

    Args:
        image: Image file.
        model: Name of pretrained weights with HAM, a folder with config.json, or hf-hub:<owner>/<name>.
        output: PNG to write.
        overwrite: Replace a file of that name.
    """
    from timm_ham.inspection.drawing import draw_attention
    from timm_ham.inspection.gradcam import seen_by
    from timm_ham.inspection.images import open_image
    from timm_ham.models.loading import load_classifier
    from timm_ham.models.maps import inspect

    _check_new(output, overwrite)
    opened, classifier = open_image(image), load_classifier(model)
    batch = classifier.transform(opened)[None]
    maps = inspect(classifier.model, batch)
    title = f'{Path(model).name}, {image.name}'
    draw_attention(seen_by(classifier.model, batch[0]), maps, title).savefig(output, format='png')
    print(f'written to {output}')


def localization_command(
    models: Annotated[Tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='MODEL ...')],
    /,
    dataset: str = 'cifar10',
    split: Literal['test', 'train'] = 'test',
    count: int = 1000,
    seed: int = 0,
    method: Literal[tuple(METHODS)] = 'gradcam',
    markdown: bool = False,
    output: Path = Path('localization.json'),
    overwrite: bool = False,
) -> None:
    """Measure how much of the Grad-CAM maps lies on the object, in images pasted into images of other classes.

    Args:
        models: Names of pretrained weights, folders with config.json, or hf-hub:<owner>/<name>; the first is what the
            others are compared to.
        dataset: Where objects and backgrounds are taken from, as for evaluate.
        split: Which of its splits.
        count: Images to make.
        seed: Of the choice of objects, backgrounds and quarters.
        method: Grad-CAM, or one of its kin in the grad-cam package.
        markdown: Print Markdown.
        output: File for the result.
        overwrite: Replace a file of that name.
    """
    from timm_ham.inspection.gradcam import short_names
    from timm_ham.inspection.localization import CHANCE, estimates, localization_table, localize, paste_objects
    from timm_ham.models.loading import load_model
    from timm_ham.training.data import decode
    from timm_ham.training.evaluate import check_classes
    from timm_ham.training.run import environment
    from timm_ham.training.sources import open_dataset

    _check_new(output, overwrite)
    networks = {short: load_model(name).eval() for name, short in short_names(models).items()}
    data = open_dataset(dataset)
    for name, network in networks.items():
        check_classes(name, network, data)
    pasted = paste_objects(decode(data.part(split)), count, seed)
    found = estimates({name: localize(network, pasted, method) for name, network in networks.items()})
    print(localization_table(found, markdown))
    result = {
        'environment': environment(1, torch.device('cpu')),
        'settings': {'dataset': data.name, 'split': split, 'count': count, 'seed': seed, 'method': method},
        'chance': CHANCE,
        'estimates': {
            name: {quantity: estimate._asdict() for quantity, estimate in quantities.items()}
            for name, quantities in found.items()
        },
    }
    output.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    print(f'written to {output}')


def demo_command(
    models: Annotated[Tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='MODEL ...')] = (),
    /,
    port: Optional[int] = None,
) -> None:
    """Serve a page on 127.0.0.1 on which to drop an image and look.

    Args:
        models: Models to choose from, as for gradcam; the bundled ones if not given.
        port: TCP port; the first free one from 7860 on if not given.
    """
    from timm_ham.inspection.demo import launch_demo

    launch_demo(models, port)


def compare_command(
    runs: Annotated[Tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar='RUN ...')],
    /,
    markdown: bool = False,
    output: Path = Path('comparison.png'),
    overwrite: bool = False,
) -> None:
    """Set finished runs beside each other: mean and standard deviation over seeds, paired differences to plain.

    Args:
        runs: Folders of runs, such as runs/*.
        markdown: Print Markdown.
        output: File for the picture.
        overwrite: Replace it.
    """
    from timm_ham.training.compare import compare, comparison_table, draw_groups

    _check_new(output, overwrite)
    groups, left_out = compare(runs)
    print(comparison_table(groups, markdown))
    draw_groups(groups, 'Test error', output)
    for line in left_out:
        print(f'left out: {line}', file=sys.stderr)
    print(f'written to {output}', file=sys.stderr)


def reproduce_command(recipe_name: str) -> Callable[..., None]:
    """`timm-ham reproduce`, its options defaulting to the fields of the named recipe."""
    named = named_recipe(recipe_name)

    def command(
        table: int,
        arch: str,
        options: Annotated[Recipe, tyro.conf.arg(name='')] = named,
        recipe: Literal[tuple(RECIPES)] = recipe_name,
        attn: Tuple[str, ...] = ('all',),
        seeds: int = 3,
        folder: Path = Path('runs/reproduce'),
        output: Optional[Path] = None,
        train: bool = True,
        card: Optional[Path] = None,
    ) -> None:
        """Train rows of the paper's tables, as far as they are not there yet, and set them beside the paper's figures.

        Args:
            table: Number of the table, 1 to 6.
            arch: Architecture, such as resnet20; one that is not in the table takes the place of that which is.
            options: Fields of the recipe, all but model, model_args and seed.
            recipe: Named recipe to start from.
            attn: Rows of the table: all, or attentions such as plain ham ham.kernel_size=3.
            seeds: Runs of each row, with seeds from 0 on.
            folder: Holds the runs, <arch>_<attention>.<seed>; those that are there are taken, or gone on with.
            output: JSON file for the results, with a picture beside it; <folder>/table<N>-<arch>-<dataset>.json if not
                given.
            train: --no-train takes the finished runs that are there, and starts none.
            card: Card to put the comparison into, of all table*.json beside the output.
        """
        from timm_ham.publishing.reproduce import Reproduction, describe, write_card

        if any(getattr(options, field) != getattr(named, field) for field in ('model', 'model_args', 'seed')):
            raise TimmHamError('model, model_args and seed follow from --arch, --attn and --seeds: leave them out')
        rows = () if attn == ('all',) else attn
        task = Reproduction(table, arch, rows, seeds, options, recipe, folder)
        file = output or folder / f'table{table}-{arch}-{task.dataset}.json'
        print(describe(task.go(file, train)))
        print(f'written to {file} and {file.with_suffix(".png")}')
        if card:
            write_card(card, file.parent)
            print(f'comparison put into {card}')

    return command


def autoload_command(action: Annotated[Literal['on', 'off', 'status'], tyro.conf.Positional], /) -> None:
    """Make `import timm` bring timm_ham along in this environment, or no more.

    Args:
        action: on writes a small start-up file into site-packages, off removes it, status tells whether it is there.
    """
    if action == 'on':
        print(f'on: `import timm` now registers the models of timm_ham, by {autoload.switch_on()}')
    elif action == 'off':
        print('\n'.join(f'off: removed {file}' for file in autoload.switch_off()) or 'off: it was off')
    else:
        file = autoload.installed()
        print(f'on, by {file}' if file else 'off: scripts need `import timm_ham`')


def commands(recipe_name: Optional[str], resumed: Optional[Path]) -> Dict[str, Callable[..., None]]:
    """The commands by name; those that train take their defaults from a recipe, their own if None."""
    return {
        'train': train_command(recipe_name, resumed),
        'finetune': finetune_command(recipe_name or DEFAULT_FINETUNE),
        'compare': compare_command,
        'reproduce': reproduce_command(recipe_name or PAPER_RECIPE),
        'evaluate': evaluate_command,
        'export': export_command,
        'export-onnx': export_onnx_command,
        'predict': predict_command,
        'publish': publish_command,
        'verify': verify_command,
        'weights': weights_command,
        'list': list_command,
        'complexity': complexity_command,
        'bench': bench_command,
        'gradcam': gradcam_command,
        'attention': attention_command,
        'localization': localization_command,
        'demo': demo_command,
        'autoload': autoload_command,
    }


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a command. A TimmHamError is printed as one line, with exit status 1."""
    args = list(sys.argv[1:] if args is None else args)
    # The recipe is needed before the rest is parsed: its values are the defaults of the other options.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument('--recipe', nargs='?')
    finder.add_argument('--resume', nargs='?', type=Path)
    try:
        found = finder.parse_known_args(args)[0]
        chosen = commands(found.recipe, found.resume)
        tyro.extras.subcommand_cli_from_dict(chosen, prog='timm-ham', description=__doc__, args=args)
    except TimmHamError as error:
        print(f'timm-ham: {_printable(str(error))}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
