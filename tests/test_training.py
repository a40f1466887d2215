"""Recipes, the loop, its record, and going on after a stop."""

import json
import math
from dataclasses import asdict, replace

import pytest
import timm
import torch
from torch import nn

from timm_ham import TimmHamError
from timm_ham.training import trainer
from timm_ham.training.data import Split
from timm_ham.training.evaluate import evaluate
from timm_ham.training.recipes import RECIPES, Recipe, changes, named_recipe
from timm_ham.training.run import Run, new_run_folder

TINY = replace(
    RECIPES['digits_quick'],
    model='resnet20_ham',
    epochs=3,
    batch_size=16,
    holdout=0.25,
    learning_rate=0.05,
    precision='fp32',
)


def tiny(folder, **changed):
    return replace(TINY, dataset=str(folder), **changed)


def start(folder, run, **changed):
    run = Run(run)
    return run, trainer.train(tiny(folder, **changed), 'digits_quick', run)


def test_the_paper_recipe_is_the_papers():
    recipe = named_recipe('cifar_paper')
    assert (recipe.epochs, recipe.batch_size, recipe.holdout) == (200, 128, 0)
    assert (recipe.momentum, recipe.nesterov, recipe.label_smoothing, recipe.ema_decay) == (0.9, False, 0, 0)
    assert (recipe.crop_padding, recipe.flip, recipe.precision) == (4, True, 'fp32')
    model = timm.create_model('resnet20_ham')
    optimizer = trainer.build_optimizer(recipe, model)
    # Weight decay on everything, norms and the attention's scalars among it.
    assert {group['weight_decay'] for group in optimizer.param_groups} == {5e-4}
    schedule = trainer.build_schedule(recipe, optimizer, steps_per_epoch=391)
    rates = {}
    for epoch in range(200):
        for step in (0, 390):
            schedule.step_update(epoch * 391 + step)
            rates[epoch, step] = optimizer.param_groups[0]['lr']
    for (epoch, _), rate in rates.items():
        assert rate == pytest.approx(0.1 / 5 ** sum(epoch >= milestone for milestone in (60, 120, 160)))


def test_the_stl10_recipe_is_the_papers():
    recipe = named_recipe('stl10_paper')
    differing = dict(dataset='stl10', model='resnet18_ham', test_share=0.3, batch_size=64, crop_padding=12)
    assert replace(named_recipe('cifar_paper'), **differing) == recipe


def test_the_fast_recipe_warms_up_and_ends_at_zero():
    recipe = named_recipe('cifar_fast')
    optimizer = trainer.build_optimizer(recipe, timm.create_model('resnet20_ham'))
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == [0, 5e-4]
    schedule = trainer.build_schedule(recipe, optimizer, steps_per_epoch=100)
    rates = []
    for update in range(recipe.epochs * 100 + 1):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]['lr'])
    warmup, total = recipe.warmup_epochs * 100, recipe.epochs * 100
    for update, rate in enumerate(rates):
        cosine = recipe.learning_rate * (1 + math.cos(math.pi * update / total)) / 2
        linear = 1e-5 + (recipe.learning_rate - 1e-5) * update / warmup
        assert rate == pytest.approx(linear if update < warmup else cosine, abs=1e-9)


def test_recipes_are_documented_and_listed():
    assert all(recipe == Recipe(**asdict(recipe)) for recipe in RECIPES.values())
    assert changes(replace(RECIPES['cifar_fast'], epochs=3), 'cifar_fast') == {'epochs': 3}
    with pytest.raises(TimmHamError, match="unknown recipe 'slow': choose from digits_quick, cifar_paper, cifar_fast"):
        named_recipe('slow')


def test_loss_falls_on_digits(tmp_path):
    run = Run(tmp_path / 'run')
    recipe = replace(
        RECIPES['digits_quick'], model='resnet20_plain', epochs=3, batch_size=32, learning_rate=0.05, warmup_epochs=1
    )
    metrics = trainer.train(recipe, 'digits_quick', run)
    first, _, last = run.metrics()
    assert last['train_loss'] < 0.7 * first['train_loss']
    assert metrics.images == 360 and metrics.accuracy > 0.5


def test_a_run_leaves_its_record(tiny_folder, tmp_path):
    run, metrics = start(tiny_folder, tmp_path / 'run')
    record = run.record()
    assert Recipe(**{**record['recipe'], 'milestones': ()}) == tiny(tiny_folder) == run.recipe()
    assert record['data']['label_names'] == ['cat', 'dog'] == list(run.data().label_names)
    assert record['data']['sizes'] == {'train': 144, 'holdout': 48, 'test': 16}
    assert record['results']['test'] == asdict(metrics)
    (begun,) = record['starts']
    assert begun['versions']['torch'] == torch.__version__.partition('+')[0] and begun['hardware']
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [1, 2, 3]
    assert all(line['images_per_second'] > 0 and 0 <= line['holdout_accuracy'] <= 1 for line in lines)
    assert run.curves_file.read_bytes().startswith(b'\x89PNG')
    assert [path.name for path in run.checkpoints()] == ['checkpoint-18.safetensors', 'checkpoint-27.safetensors']
    # Brightness tells the classes apart, so the network that was measured can do it.
    assert metrics.images == 16 and metrics.accuracy > 0.9


def test_what_can_not_be_started_or_resumed(tiny_folder, tmp_path):
    run, _ = start(tiny_folder, tmp_path / 'run', epochs=1)
    with pytest.raises(TimmHamError, match='run is finished: start a new run'):
        trainer.resume(run)
    with pytest.raises(TimmHamError, match='run exists: go on with it by --resume'):
        start(tiny_folder, run.folder)
    with pytest.raises(TimmHamError, match=r'is not the folder of a run: it has no run.json'):
        trainer.resume(Run(tmp_path))
    with pytest.raises(TimmHamError, match="unknown model 'resnet20_hm', did you mean 'resnet20_ham'"):
        start(tiny_folder, tmp_path / 'other', model='resnet20_hm')
    assert not (tmp_path / 'other').exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_folder, tmp_path):
    with pytest.raises(
        TimmHamError,
        match=r'the loss is not finite at step 2 of epoch 1, at learning rate 9.997e\+29: .* lower learning_rate',
    ):
        start(tiny_folder, tmp_path / 'run', learning_rate=1e30, warmup_epochs=0, epochs=10)


def test_run_folders_are_never_taken_twice(tmp_path):
    recipe = RECIPES['digits_quick']
    names = []
    for _ in range(3):
        folder = new_run_folder(recipe, 'digits_quick', tmp_path)
        folder.mkdir()
        names.append(folder.name)
    assert names == ['resnet20_ham.digits_quick', 'resnet20_ham.digits_quick-2', 'resnet20_ham.digits_quick-3']


def test_any_timm_model_trains(tiny_folder, tmp_path):
    run, metrics = start(tiny_folder, tmp_path / 'run', model='test_resnet', epochs=1)
    assert metrics.images == 16 and run.weights_file.is_file()


def test_channels_last_bf16_and_compile(tiny_folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model: compiled.append(model) or model)
    run, _ = start(
        tiny_folder,
        tmp_path / 'run',
        precision='bf16',
        channels_last=True,
        compile=True,
        epochs=1,
        model='resnet20_plain',
    )
    assert len(compiled) == 1 and run.record()['results']['precision'] == 'bf16'


@pytest.mark.parametrize('ema_decay', [0.0, 0.9])
def test_bf16_trains_in_bfloat16_and_the_test_is_in_float32(tiny_folder, tmp_path, monkeypatch, ema_decay):
    seen = []

    def watched(recipe, data):
        model = timm.create_model(recipe.model, num_classes=2)
        model.stem.conv.register_forward_hook(lambda module, inputs, out: seen.append((module.training, out.dtype)))
        return model

    monkeypatch.setattr(trainer, 'build_model', watched)
    start(tiny_folder, tmp_path / 'run', precision='bf16', epochs=1, ema_decay=ema_decay)
    training = [dtype for mode, dtype in seen if mode]
    measuring = [dtype for mode, dtype in seen if not mode]
    assert len(training) == 9 and set(training) == {torch.bfloat16}
    assert measuring == [torch.bfloat16, torch.float32]  # held out, test


class Fixed(nn.Module):
    """The image's first pixels as logits."""

    def forward(self, x):
        return x.flatten(1)[:, :2]


def test_evaluate_equals_loops():
    from accelerate import Accelerator

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.5, 0.0], [1.0, 4.0]])
    labels = torch.tensor([0, 1, 1, 0, 0])
    model = Fixed().train()
    metrics = evaluate(model, zip(logits[:, None, None].split(2), labels.split(2)), Accelerator())
    losses = [(logits[i].exp().sum().log() - logits[i, labels[i]]).item() for i in range(5)]
    assert metrics.loss == pytest.approx(sum(losses) / 5)
    assert (metrics.accuracy, metrics.images) == (3 / 5, 5) and model.training


def test_split_moves_to_a_device():
    split = Split(torch.zeros(2, 1, 1, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)).to(torch.device('meta'))
    assert split.images.is_meta and split.labels.is_meta and len(split) == 2
