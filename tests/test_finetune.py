"""Training from weights on: the new head, what is frozen, learning rates by layer, and the folder at the end."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from timm_ham import TimmHamError
from timm_ham.models.loading import describe_weights, load_classifier
from timm_ham.models.weights import hub_folders
from timm_ham.publishing.export import export
from timm_ham.training import finetune, trainer
from timm_ham.training.evaluate import check_classes
from timm_ham.training.finetune import from_weights
from timm_ham.training.recipes import RECIPES, Saving
from timm_ham.training.run import Run
from timm_ham.training.sources import open_dataset

from .test_cli import run as command
from .test_sources import image_folder

NAME = 'resnet20_ham.cifar10'
FOLDER = next(folder for folder in hub_folders() if folder.name == NAME)
TINY = dict(epochs=1, batch_size=8, holdout=0.0, precision='fp32', warmup_epochs=0, image_size=8)


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp('data') / 'pets', ('train', 'test'), classes=('ant', 'bee', 'cat'))


def recipe(pets, weights=NAME, **changed):
    return from_weights(replace(RECIPES['finetune'], dataset=pets, **{**TINY, **changed}), weights)


def started(pets, tmp_path, **changed):
    """A trainer that has done nothing yet."""
    return trainer.Trainer(recipe(pets, **changed), Run(tmp_path / 'run'))


@pytest.mark.parametrize('weights', [NAME, str(FOLDER), f'local-dir:{FOLDER}'])
def test_it_starts_from_the_weights_under_a_new_head(pets, tmp_path, weights):
    state = started(pets, tmp_path, weights=weights).model.state_dict()
    wanted = timm.create_model(NAME, pretrained=True).state_dict()
    for name, tensor in state.items():
        if name.startswith('head.fc'):
            assert len(tensor) == 3
        else:
            assert torch.equal(tensor, wanted[name]), name


def test_the_head_is_new_even_for_as_many_classes(tmp_path):
    folder = image_folder(tmp_path / 'ten', ('train', 'test'), classes='abcdefghij', count=1)
    model = started(folder, tmp_path).model
    assert not torch.equal(model.head.fc.weight, timm.create_model(NAME, pretrained=True).head.fc.weight)


def test_learning_rates_fall_from_the_classifier_to_the_stem(pets, tmp_path):
    training = started(pets, tmp_path, layer_decay=0.5)
    training.schedule.step_update(0)
    rates = {id(p): group['lr'] for group in training.optimizer.param_groups for p in group['params']}
    rate = {name: rates[id(parameter)] for name, parameter in training.model.named_parameters()}
    top = training.recipe.learning_rate
    assert rate['head.fc.weight'] == rate['head.fc.bias'] == training.rate == pytest.approx(top)
    for block in range(9):  # nine blocks between classifier and stem
        name = f'stages.{2 - block // 3}.{2 - block % 3}.conv1.weight'
        assert rate[name] == pytest.approx(top * 0.5 ** (block + 1))
    assert rate['stem.conv.weight'] == pytest.approx(top * 0.5**10)


def test_a_frozen_backbone_stays_bit_for_bit_what_it_was(pets, tmp_path):
    run = Run(tmp_path / 'run')
    trainer.train(recipe(pets, freeze=True, learning_rate=0.5, layer_decay=1.0), 'finetune', run)
    model = load_classifier(str(export(run, tmp_path))).model
    before = timm.create_model(NAME, pretrained=True).state_dict()
    differing = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert differing == ['head.fc.weight', 'head.fc.bias']  # not even the norms' running statistics


def test_command_ends_with_a_folder_of_the_persons_classes(pets, tmp_path, monkeypatch, capsys, fresh):
    monkeypatch.chdir(tmp_path)
    words = ['--epochs', '1', '--batch-size', '8', '--holdout', '0.2', '--precision', 'fp32', '--image-size', '12']
    assert command('finetune', FOLDER, '--dataset', pets, *words) == 0
    folder = 'runs/resnet20_ham.finetune/resnet20_ham.pets'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    cfg = model.pretrained_cfg
    assert model.num_classes == 3 and list(cfg['label_names']) == ['ant', 'bee', 'cat']
    assert tuple(cfg['input_size']) == (3, 12, 12) and tuple(cfg['mean']) == describe_weights(NAME).cfg['mean']
    assert load_classifier(folder).label_names == ('ant', 'bee', 'cat')
    record = json.loads((tmp_path / folder / 'run.json').read_text())
    assert (record['recipe']['weights'], record['recipe']['dataset']) == (NAME, 'pets')  # no path of this machine
    card = (tmp_path / folder / 'README.md').read_text()
    assert f'fine-tuned from `{NAME}`' in card and 'from scratch' not in card and str(tmp_path) not in card
    Image.new('RGB', (30, 20)).save('photo.png')
    capsys.readouterr()
    assert command('predict', 'photo.png', '--model', folder) == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == {'ant', 'bee', 'cat'}
    # And these are weights to start from.
    assert recipe(pets, weights=folder).model == 'resnet20_ham'


def test_a_run_is_gone_on_with_without_its_weights(pets, tmp_path, monkeypatch, fresh):
    mixed = recipe(pets, epochs=2, mixup=0.2, random_erasing=0.5, accumulation=2)
    whole = Run(tmp_path / 'whole')
    metrics = trainer.train(mixed, 'finetune', whole)
    fresh()
    cut = Run(tmp_path / 'cut')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        original = trainer.Trainer.train_step

        def stop(self, *batch):
            if self.steps == 4:  # in the midst of the second epoch
                raise KeyboardInterrupt
            return original(self, *batch)

        patched.setattr(trainer.Trainer, 'train_step', stop)
        trainer.train(mixed, 'finetune', cut, Saving(checkpoint_steps=1))
    assert cut.checkpoints()[-1].name == 'checkpoint-4.safetensors'  # of three steps an epoch
    fresh()
    monkeypatch.setattr(finetune, 'describe_weights', None)
    monkeypatch.setattr(finetune, 'load_model', None)
    assert trainer.resume(cut) == metrics
    assert whole.weights_file.read_bytes() == cut.weights_file.read_bytes()


def test_what_is_refused(pets, tmp_path, capsys):
    with pytest.raises(TimmHamError, match="no weights for 'resnet20_plain': choose from"):
        recipe(pets, weights='resnet20_plain')
    with pytest.raises(TimmHamError, match="holds weights of 'resnet20_ham', not of 'resnet20_se'"):
        trainer.Trainer(replace(recipe(pets), model='resnet20_se'), Run(tmp_path / 'run'))
    assert command('finetune', NAME, '--model', 'resnet20_se', '--dataset', pets) == 1
    assert 'decides model and weights' in capsys.readouterr().err


def test_classes_that_do_not_match_the_weights(tmp_path):
    model = timm.create_model(NAME, pretrained=True)
    names = model.pretrained_cfg['label_names']
    for classes, message in ((names, None), (sorted(names), None), ([*names[:9], 'zebra'], "'truck' and 'zebra'")):
        data = open_dataset(image_folder(tmp_path / classes[-1], ('train',), classes, count=1))
        if message is None:
            check_classes(NAME, model, data)
        else:
            with pytest.raises(TimmHamError, match=f'different classes by the same number, such as {message}'):
                check_classes(NAME, model, data)
    data = open_dataset(image_folder(tmp_path / 'numbered', ('train',), [str(n) for n in range(10)], count=1))
    check_classes(NAME, model, data)
