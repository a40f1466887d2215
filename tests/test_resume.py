"""Going on after a stop: at any step, after any end, to the weights of a run that was never stopped."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from timm_ham import TimmHamError
from timm_ham.training import run as run_module
from timm_ham.training import trainer
from timm_ham.training.checkpoints import DamagedError, read_state, write_state
from timm_ham.training.recipes import RECIPES, Saving
from timm_ham.training.run import CHECKPOINT, Run
from timm_ham.training.stopping import StoppedError, stop_requests

from .conftest import make_tiny

# Two epochs of nine steps, with random numbers in the network too.
RECIPE = replace(
    RECIPES['digits_quick'],
    model='test_resnet',
    model_args={'drop_rate': 0.3},
    epochs=2,
    batch_size=16,
    holdout=0.25,
    cutout=2,
    learning_rate=0.05,
    warmup_epochs=1,
    ema_decay=0.9,
    accumulation=2,
    precision='fp32',
    channels_last=False,
)
SAVING = Saving(checkpoint_steps=2)


class Killed(BaseException):
    """What no handler in the loop expects."""


def start(folder, path, saving=SAVING, **changed):
    run = Run(path)
    return run, trainer.train(replace(RECIPE, dataset=str(folder), **changed), 'digits_quick', run, saving)


def kill_at(monkeypatch, place, call):
    """Make the call of that number to a function end as a kill would, before it or in the midst of it."""
    owner, name = place
    original, calls = getattr(owner, name), [0]

    def killed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)


def losses(run):
    same = ('learning_rate', 'train_loss', 'train_accuracy', 'holdout_loss', 'holdout_accuracy')
    return [[line[key] for key in same] for line in run.metrics()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('data') / 'tiny')


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """A run that nothing stopped, and its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return start(folder, tmp_path_factory.mktemp('runs') / 'whole')


@pytest.fixture
def cut(folder, whole, tmp_path, fresh):
    """The same run, ended in the midst of the second epoch."""
    fresh()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, (trainer.Trainer, 'train_step'), 15)
        start(folder, tmp_path / 'cut')
    fresh()
    return Run(tmp_path / 'cut')


def check_equal(whole, cut, metrics):
    """Weights, metrics and the last state, optimizer and all, are bit for bit those of the whole run."""
    run, wanted = whole
    assert metrics == wanted and losses(cut) == losses(run)
    pairs = [(load_file(run.weights_file), load_file(cut.weights_file))]
    assert [path.name for path in cut.checkpoints()] == ['checkpoint-17.safetensors', 'checkpoint-18.safetensors']
    pairs.append([read_state(each.checkpoints()[-1])[0] for each in (run, cut)])
    for one, other in pairs:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(cut.folder.glob('*.part'))


@pytest.mark.parametrize(
    'place, call',
    [
        ((trainer.Trainer, 'train_step'), 6),  # inside the first epoch
        ((trainer, 'evaluate'), 1),  # trained, but not measured
        ((run_module.os, 'fsync'), 4),  # a checkpoint is written, but has not got its name
        ((trainer, 'draw_curves'), 2),  # the metrics are there, the picture and the checkpoint are not
        ((Run, 'keep_checkpoints'), 3),
    ],
)
def test_resuming_gives_the_weights_of_an_uncut_run(folder, whole, tmp_path, monkeypatch, place, call, fresh):
    fresh()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, place, call)
        start(folder, tmp_path / 'cut')
    cut = Run(tmp_path / 'cut')
    assert 'results' not in cut.record()
    fresh()
    check_equal(whole, cut, trainer.resume(cut, saving=SAVING))
    assert len(cut.record()['starts']) == 2


def test_a_damaged_checkpoint_is_passed_over(whole, cut, capsys):
    older, last = cut.checkpoints()
    assert (older.name, last.name) == ('checkpoint-11.safetensors', 'checkpoint-13.safetensors')
    last.write_bytes(last.read_bytes()[:-1000])
    metrics = trainer.resume(cut, saving=SAVING)
    assert f'warning: {last} is damaged' in capsys.readouterr().err
    check_equal(whole, cut, metrics)


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'other', 'facts'])
def test_damage_is_found(tmp_path, damage):
    file = tmp_path / 'checkpoint-1.safetensors'
    tensors = {'a': torch.arange(1000.0), 'b': torch.ones(3, 4, dtype=torch.bfloat16), 'c': torch.tensor(7)}
    write_state(file, tensors, {'epoch': 1, 'totals': [0.1, 2.0]})
    out, facts = read_state(file)
    assert facts == {'epoch': 1, 'totals': [0.1, 2.0]} and all(
        torch.equal(out[name], tensors[name]) for name in tensors
    )
    data = bytearray(file.read_bytes())
    if damage == 'flipped':
        data[-5] ^= 1
    data = {
        'cut': data[:-1],
        'empty': b'',
        'other': safetensors.torch.save(tensors),
        'facts': bytes(data).replace(b'2.0', b'3.0'),
    }.get(damage, data)
    file.write_bytes(data)
    with pytest.raises(DamagedError):
        read_state(file)


def test_nothing_left_to_go_on_from(cut):
    for file in cut.checkpoints():
        file.write_bytes(b'')
    with pytest.raises(TimmHamError, match=r'no checkpoint in .* can be read: start a new run'):
        trainer.resume(cut)


def test_another_recipe_is_refused_unless_told(cut, folder, fresh):
    other = replace(cut.recipe(), epochs=3, weight_decay=0.0)
    told = 'was started with epochs 2, not 3, weight_decay 0.0005, not 0.0: leave that out, or .* --change-recipe'
    with pytest.raises(TimmHamError, match=told):
        trainer.resume(cut, other)
    assert cut.recipe().epochs == 2 and len(cut.record()['starts']) == 1
    fresh()
    with pytest.raises(TimmHamError, match=r'checkpoint-13.safetensors is of another network \('):
        trainer.resume(cut, replace(cut.recipe(), model='resnet20_plain', model_args={}), change_recipe=True)
    fresh()
    trainer.resume(cut, replace(other, model='test_resnet', model_args={'drop_rate': 0.3}), change_recipe=True)
    assert cut.recipe().epochs == 3 and len(cut.metrics()) == 3
    assert sorted(cut.record()['starts'][-1]['changed']) == ['epochs', 'weight_decay']


def test_another_dataset_is_refused(cut):
    record = cut.record()
    cut.note(data={**record['data'], 'label_names': ['cat', 'hound']})
    with pytest.raises(TimmHamError, match=r"label_names was \('cat', 'hound'\), is \('cat', 'dog'\)\): bring it back"):
        trainer.resume(cut)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_a_checkpoint(folder, whole, tmp_path, monkeypatch, fresh, number):
    fresh()
    original = trainer.Trainer.train_step

    def signalled(self, *batch):
        if self.steps == 12:
            os.kill(os.getpid(), number)
        original(self, *batch)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched, pytest.raises(StoppedError) as stop:
        patched.setattr(trainer.Trainer, 'train_step', signalled)
        start(folder, tmp_path / 'cut')
    assert stop.value.signal == number and signal.getsignal(number) is before
    cut = Run(tmp_path / 'cut')
    assert cut.checkpoints()[-1].name == 'checkpoint-13.safetensors'
    fresh()
    check_equal(whole, cut, trainer.resume(cut, saving=SAVING))


def test_a_second_interrupt_does_not_wait():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as launchers repeat it
        assert stop.signal == signal.SIGTERM
    with stop_requests() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_a_full_disk_is_one_line_and_loses_nothing(folder, whole, tmp_path, monkeypatch, fresh):
    fresh()

    def full(descriptor, written=[0]):  # noqa: B006
        written[0] += 1
        if written[0] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(run_module.os, 'fsync', full)
        with pytest.raises(TimmHamError, match=r'can not be written \(No space left on device\): .*train --resume'):
            start(folder, tmp_path / 'cut')
    cut = Run(tmp_path / 'cut')
    assert not list(cut.folder.glob('*.part')) and len(cut.checkpoints()) == 2
    fresh()
    check_equal(whole, cut, trainer.resume(cut, saving=SAVING))


def test_a_folder_that_can_not_be_made(folder, tmp_path, fresh):
    (tmp_path / 'file').write_text('')
    with pytest.raises(TimmHamError, match=r'file/run can not be written \(Not a directory\): .* or choose --run'):
        start(folder, tmp_path / 'file' / 'run')


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch, fresh):
    original = trainer.Trainer.train_step

    def broken(self, *batch):
        original(self, *batch)
        if self.step == 4:
            next(self.model.parameters()).data[0] = float('inf')

    monkeypatch.setattr(trainer.Trainer, 'train_step', broken)
    with pytest.raises(TimmHamError, match='a weight is not finite at step 4 of epoch 1, at learning rate'):
        start(folder, tmp_path / 'run')
    assert [path.name for path in Run(tmp_path / 'run').checkpoints()] == ['checkpoint-2.safetensors']


@pytest.mark.slow
def test_kill_9_at_any_moment(folder, tmp_path):
    """Two runs of the same commands, one of which is killed again and again, also while it writes."""
    command = [sys.executable, '-m', 'timm_ham.cli', 'train']
    options = ['--model', 'resnet20_plain', '--dataset', str(folder), '--epochs', '12', '--batch-size', '16']
    options += ['--checkpoint-steps', '1', '--ema-decay', '0.9', '--precision', 'fp32']
    subprocess.run([*command, *options, '--run', 'whole'], cwd=tmp_path, check=True)
    words, kills, cut = [*options, '--run', 'cut'], 0, Run(tmp_path / 'cut')
    while 'results' not in (cut.record() if cut.record_file.is_file() else {}):
        process = subprocess.Popen([*command, *words], cwd=tmp_path)
        goal = (int(CHECKPOINT.fullmatch(cut.checkpoints()[-1].name)[1]) if cut.checkpoints() else 0) + 25
        while process.poll() is None and not cut.checkpoint(goal).is_file():
            time.sleep(random.random() / 100)
        if process.poll() is None:
            time.sleep(random.random() / 10)
            process.kill()
            kills += 1
        process.wait()
        words = ['--resume', 'cut', '--checkpoint-steps', '1']
    whole = Run(tmp_path / 'whole')
    assert kills >= 3 and losses(whole) == losses(cut)
    one, other = (load_file(each.weights_file) for each in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
