"""Recipe to run folder: the training loop, on accelerate."""

import contextlib
import difflib
import math
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from timm_ham.errors import TimmHamError
from timm_ham.layers import ATTENTIONS
from timm_ham.models import ARCHITECTURES
from timm_ham.training.checkpoints import (
    DamagedError,
    finite,
    of_prefix,
    optimizer_tensors,
    prefixed,
    read_state,
    restore_optimizer,
    write_state,
)
from timm_ham.training.curves import draw_curves
from timm_ham.training.data import DataInfo
from timm_ham.training.evaluate import Metrics, evaluate
from timm_ham.training.feed import open_feed
from timm_ham.training.finetune import freeze, starting_cfg, starting_model, train_mode
from timm_ham.training.mixing import Mixer
from timm_ham.training.processes import start_processes, synchronize_batch_norms, take_buffers_of_first
from timm_ham.training.recipes import Recipe, Saving, differences
from timm_ham.training.run import Run, environment, write_file, writing
from timm_ham.training.stopping import StoppedError, StopRequest, stop_requests
from timm_ham.training.tracking import Tracker, check_tracker, start_tracking

__all__ = ['resume', 'train']

LOOK_EVERY = 10  # steps between looks at the loss, each of which waits for the device and the other processes


def bf16_is_native(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, rather than emulating it."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()  # of x86 and of ARM
    return device.type == 'cpu' and (able.get('avx512_bf16', False) or able.get('bf16', False))


def check_model_name(name: str) -> None:
    """Raise a TimmHamError that lists the choices if timm knows no such model."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f', did you mean {near[0]!r}' if near else ''
        raise TimmHamError(
            f'unknown model {name!r}{hint}? Choose <architecture>_<attention> from {", ".join(ARCHITECTURES)} and '
            f"{', '.join(ATTENTIONS)}, or any of timm's own models"
        )


def build_model(recipe: Recipe, data: DataInfo) -> nn.Module:
    """The recipe's model, untrained, with a class for each of the dataset's.

    Raises:
        TimmHamError: If there is no such model, or it does not take the recipe's model_args.
    """
    check_model_name(recipe.model)
    if 'checkpoint_path' in recipe.model_args:  # which timm would read as a pickle
        raise TimmHamError('model_args takes no checkpoint_path: only safetensors weights are loaded')
    try:
        return timm.create_model(recipe.model, num_classes=len(data.label_names), **recipe.model_args)
    except (TypeError, ValueError) as error:
        raise TimmHamError(f'{recipe.model} can not be made with model_args {recipe.model_args}: {error}') from error


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD on what is not frozen; timm leaves one-dimensional parameters without weight decay unless told not to."""
    return create_optimizer_v2(
        model,
        opt='sgd' if recipe.nesterov else 'momentum',
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_norm_and_bias,
        layer_decay=recipe.layer_decay if recipe.layer_decay != 1 else None,
    )


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's scheduler, stepped at every update. Its state is the number of updates alone."""
    if recipe.schedule == 'multistep':
        return MultiStepLRScheduler(
            optimizer,
            # NOTE timm's scheduler decays one update before the milestone.
            decay_t=[milestone * steps_per_epoch + 1 for milestone in recipe.milestones],
            decay_rate=recipe.decay_rate,
            t_in_epochs=False,
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch,
        warmup_t=recipe.warmup_epochs * steps_per_epoch,
        warmup_lr_init=1e-5,
        t_in_epochs=False,
    )


def start_accelerator(recipe: Recipe, run: Run, tracker: Optional[Tracker]) -> Accelerator:
    """accelerate, in the recipe's precision.

    Raises:
        TimmHamError: If the device can't have it.
    """
    device = start_processes().device
    precision = 'bf16' if recipe.precision == 'auto' and bf16_is_native(device) else recipe.precision
    if precision == 'fp16' and device.type == 'cpu':
        raise TimmHamError('precision fp16 needs a GPU: choose bf16, fp32 or auto')
    mixed = precision if precision in ('bf16', 'fp16') else 'no'
    return Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=str(run.folder))


class Trainer:
    """The state of one run: model, optimizer, schedule, data, and how far it is. `run` is its folder.

    epoch, step: Finished epochs, and steps of the one that is under way.
    learning_rate: With which that epoch began.
    totals: Loss and correct answers, summed over the images of that epoch so far.
    seconds: What that epoch has taken so far, in earlier processes too.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        saving: Saving = Saving(),  # noqa: B008, it is frozen
        tracker: Optional[Tracker] = None,
    ):
        check_model_name(recipe.model)  # before the data, which takes a while
        check_tracker(tracker)
        self.recipe, self.run, self.saving, self.tracker = recipe, run, saving, tracker
        self.accelerator = start_accelerator(recipe, run, tracker)
        set_seed(recipe.seed)
        self.begun = bool(run.checkpoints())  # then the weights that it started from are needed no more
        self.feed = open_feed(recipe, starting_cfg(recipe, run.data() if self.begun else None), self.accelerator)
        self.data, self.batches = self.feed.data, self.feed.batches
        parts = recipe.accumulation * self.accelerator.num_processes
        if not 0 < parts <= self.batches.batch_size:
            raise TimmHamError(
                f'{self.batches.batch_size} images in a step are not enough for accumulation {recipe.accumulation} in '
                f'{self.accelerator.num_processes} processes: choose a larger batch_size or another accumulation'
            )
        self.mixer = Mixer(recipe, len(self.data.label_names), self.batches.batch_size, self.accelerator)
        self.epoch = self.step = 0
        self.learning_rate, self.totals, self.seconds = 0.0, [0.0, 0.0], 0.0
        # Learning rate, and what the totals grow by, of each step since the last look.
        self._unread: List[Tuple[float, torch.Tensor]] = []
        self._build()

    def _build(self) -> None:
        recipe = self.recipe
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        starts = recipe.weights and not self.begun
        network = starting_model(recipe, self.data) if starts else build_model(recipe, self.data)
        network = network.to(memory_format=self.memory_format)
        if recipe.freeze:
            freeze(network)
        if recipe.sync_batch_norm:
            network = synchronize_batch_norms(network, self.accelerator.device)
        self.ema: Optional[ModelEmaV3] = None
        if recipe.ema_decay > 0:  # a copy, taken before `prepare` wraps the forward in autocast
            self.ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=True, device=self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(network, build_optimizer(recipe, network))
        self.schedule = build_schedule(recipe, self.optimizer, len(self.batches))
        self.schedule.step_update(0)
        self.forward = torch.compile(self.model) if recipe.compile else self.model

    @property
    def trained(self) -> nn.Module:
        """The network that is measured and exported: the average of the weights if there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    @property
    def rate(self) -> float:
        """Learning rate of the next step: that of the classifier, the largest where it differs between layers."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    @property
    def steps(self) -> int:
        """Steps done, over all epochs."""
        return self.epoch * len(self.batches) + self.step

    def save_checkpoint(self) -> None:
        """Write all that going on needs. Random numbers are no part of it: each step draws from streams of its own."""
        if not finite(self.model):
            raise self._not_finite('a weight', self.step, self.rate)
        if self.accelerator.is_main_process:
            network = self.accelerator.unwrap_model(self.model)
            tensors = prefixed('model', network.state_dict())
            tensors.update(prefixed('optimizer', optimizer_tensors(self.optimizer, network)))
            if self.ema:
                tensors.update(prefixed('ema', self.ema.module.state_dict()))
            facts = dict(epoch=self.epoch, step=self.step, steps_per_epoch=len(self.batches))
            facts.update(learning_rate=self.learning_rate, totals=self.totals, seconds=self.seconds)
            if self.accelerator.scaler:
                facts['scaler'] = self.accelerator.scaler.state_dict()
            with writing(self.run.folder):
                write_state(self.run.checkpoint(self.steps), tensors, facts)
                self.run.keep_checkpoints(self.saving.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go to where the last checkpoint is that can be read; to the beginning if there never was one.

        Raises:
            TimmHamError: If all are damaged, or the last one is that of another network.
        """
        files = self.run.checkpoints()
        for file in reversed(files):
            try:
                self._restore(*read_state(file))
                return
            except DamagedError as error:
                self.accelerator.print(f'warning: {file} is damaged ({error}), passed over', file=sys.stderr)
            except (RuntimeError, ValueError) as error:
                reason = str(error).strip().split('\n')[0]
                raise TimmHamError(f'{file} is of another network ({reason}): start a new run') from error
        if files:
            raise TimmHamError(f'no checkpoint in {self.run.folder} can be read: start a new run')

    def _restore(self, tensors: Dict[str, torch.Tensor], facts: Dict[str, Any]) -> None:
        network = self.accelerator.unwrap_model(self.model)
        network.load_state_dict(of_prefix('model', tensors))
        restore_optimizer(self.optimizer, network, of_prefix('optimizer', tensors))
        if self.ema:
            # Without an average so far, as when the recipe has changed, it starts here.
            self.ema.module.load_state_dict(of_prefix('ema', tensors) or of_prefix('model', tensors))
        if self.accelerator.scaler and 'scaler' in facts:
            self.accelerator.scaler.load_state_dict(facts['scaler'])
        # The same step, unless a changed recipe has other batches: then the same share of the epoch.
        self.epoch, self.step = facts['epoch'], facts['step'] * len(self.batches) // facts['steps_per_epoch']
        self.learning_rate, self.totals, self.seconds = (facts[k] for k in ('learning_rate', 'totals', 'seconds'))
        self.schedule.step_update(self.steps)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One update by this process's share of a batch, float32 (b, C, H, W) and int64 (b,)."""
        stream = np.random.SeedSequence((self.recipe.seed, self.steps, self.accelerator.process_index))
        set_seed(stream.generate_state(1).item())  # of mixing, dropout and the like: the same after any stop
        rate = self.rate
        images, targets = self.mixer(images, labels)
        # The gradient of the mean over the whole batch, of which the mean over the processes is taken.
        scale = self.accelerator.num_processes / self.batches.batch_size
        parts = self.recipe.accumulation
        loss_and_correct = torch.zeros(2, device=self.accelerator.device)
        shares = zip(*(tensor.tensor_split(parts) for tensor in (images, targets, labels)))
        for part, (x, target, y) in enumerate(shares):
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                logits = self.forward(x.contiguous(memory_format=self.memory_format))
                smoothing = self.recipe.label_smoothing
                loss = F.cross_entropy(logits.float(), target, label_smoothing=smoothing, reduction='sum')
                self.accelerator.backward(loss * scale)
            loss_and_correct += torch.stack((loss.detach(), (logits.argmax(1) == y).sum()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.schedule.step_update(self.steps)
        if self.ema:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=self.steps)
        self._unread.append((rate, loss_and_correct))

    def train_steps(self, bar: tqdm, stop: StopRequest) -> Iterator[None]:
        """The rest of an epoch's steps, one each time something is asked for.

        Raises:
            StoppedError: If a signal asks for it, after a checkpoint.
            TimmHamError: If the loss is not finite, or a checkpoint can't be written.
        """
        train_mode(self.accelerator.unwrap_model(self.model), self.recipe.freeze)
        if self.step == 0:
            self.learning_rate = self.rate
        start = time.perf_counter() - self.seconds
        alone = self.accelerator.num_processes == 1
        for images, labels in self.batches.epoch(self.epoch, self.step):
            self.train_step(images, labels)
            bar.update(self.batches.batch_size)
            ended = self.step == len(self.batches)
            save = self.saving.checkpoint_steps and self.step % self.saving.checkpoint_steps == 0 and not ended
            # All processes look at the same steps, as they tell each other of signals there.
            if save or ended or self.step % LOOK_EVERY == 0 or (alone and stop.signal):
                signal_number = self._look(bar, stop)
                self.seconds = time.perf_counter() - start
                if save or signal_number:
                    self.save_checkpoint()
                if signal_number:
                    raise StoppedError(signal_number)
            yield

    def next_epoch(self) -> None:
        """Stand at the beginning of the epoch after this one."""
        self.epoch, self.step, self.totals, self.seconds = self.epoch + 1, 0, [0.0, 0.0], 0.0

    def _look(self, bar: tqdm, stop: StopRequest) -> int:
        """Add up and show what the steps since the last look gave; returns the signal that any process got, or 0."""
        asked = torch.tensor([float(stop.signal), 0.0], device=self.accelerator.device)
        rates, added = zip(*self._unread)
        rows = self.accelerator.reduce(torch.stack([*added, asked]), reduction='sum').tolist()
        self._unread.clear()
        for back, (rate, (loss, correct)) in enumerate(zip(rates, rows), -len(rates)):
            if not math.isfinite(loss):
                raise self._not_finite('the loss', self.step + back + 1, rate)
            self.totals = [self.totals[0] + loss, self.totals[1] + correct]
        loss, correct = (total / (self.step * self.batches.batch_size) for total in self.totals)
        bar.set_postfix_str(
            f'epoch {self.epoch + 1}/{self.recipe.epochs} loss {loss:.3f} acc {correct:.1%}', refresh=False
        )
        return (stop.signal or int(signal.SIGTERM)) if rows[-1][0] else 0

    def _not_finite(self, what: str, step: int, rate: float) -> TimmHamError:
        return TimmHamError(
            f'{what} is not finite at step {step} of epoch {self.epoch + 1}, at learning rate {rate:.4g}: start again '
            'with a lower learning_rate, a longer warmup_epochs or precision fp32'
        )

    def measure(self, split: str) -> Metrics:
        """Metrics of the trained network on a split, in the precision of the enclosing autocast, if any."""
        take_buffers_of_first(self.trained)
        return evaluate(self.trained, self.feed.evaluation[split](), self.accelerator)

    def run_epoch(self, bar: tqdm, stop: StopRequest) -> None:
        """Train an epoch to its end, measure the held-out part, write both down, draw, checkpoint."""
        for _ in self.train_steps(bar, stop):
            pass
        images = len(self.batches) * self.batches.batch_size
        line = dict(epoch=self.epoch + 1, learning_rate=self.learning_rate)
        line.update(train_loss=self.totals[0] / images, train_accuracy=self.totals[1] / images)
        line['images_per_second'] = images / self.seconds
        start = time.perf_counter() - self.seconds
        if 'holdout' in self.feed.evaluation:
            with self.accelerator.autocast():
                held_out = self.measure('holdout')
            line.update(holdout_loss=held_out.loss, holdout_accuracy=held_out.accuracy)
        line['seconds'] = time.perf_counter() - start
        self.accelerator.log(line, step=self.epoch + 1)
        if self.accelerator.is_main_process:
            lines = [*self.run.metrics()[: self.epoch], line]
            with writing(self.run.folder):
                self.run.write_metrics(lines)
                draw_curves(lines, f'{self.recipe.model} on {self.data.name}', self.run.curves_file)
            bar.write(describe_epoch(line, self.recipe.epochs), file=sys.stderr)
        self.next_epoch()
        self.save_checkpoint()

    def describe(self) -> str:
        """What is about to be trained, for the terminal."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        sizes = ', '.join(f'{size} {part}' for part, size in self.data.sizes.items())
        return (
            f'{self.recipe.model}, {parameters:,} parameters, on {self.data.name} ({sizes}); '
            f'{self.feed.where}; '
            f'{self.accelerator.num_processes} x {self.accelerator.device.type}, '
            f'precision {self.accelerator.mixed_precision.replace("no", "fp32")}'
            + (f'; after epoch {self.epoch}' if self.steps else '')
            + (f' and {self.step} steps' if self.step else '')
            + ('; compiling takes a minute or two' if self.recipe.compile else '')
        )

    def fit(self) -> None:
        """Train what is not done yet."""
        self.accelerator.print(self.describe(), file=sys.stderr)
        bar = tqdm(
            total=len(self.batches) * self.batches.batch_size * self.recipe.epochs,
            initial=self.steps * self.batches.batch_size,
            unit=' images',
            unit_scale=True,
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar, stop_requests() as stop:
            while self.epoch < self.recipe.epochs:
                self.run_epoch(bar, stop)
            if stop.signal:  # it came when no step was left to ask after it
                raise StoppedError(stop.signal)

    def finish(self) -> Metrics:
        """Measure the test split, this once, in float32; write the weights and the results."""
        if not self.ema:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        metrics = self.measure('test')
        self.accelerator.log({'test_loss': metrics.loss, 'test_accuracy': metrics.accuracy}, step=self.recipe.epochs)
        if self.accelerator.is_main_process:
            state = {name: tensor.cpu().contiguous() for name, tensor in self.trained.state_dict().items()}
            with writing(self.run.folder):
                write_file(self.run.weights_file, safetensors.torch.save(state))
            lines = self.run.metrics()
            self.run.note(
                results={
                    'test': asdict(metrics),
                    'epochs': self.recipe.epochs,
                    'train_seconds': round(sum(line['seconds'] for line in lines), 1),
                    'images_per_second': round(sorted(line['images_per_second'] for line in lines)[len(lines) // 2], 1),
                    'parameters': sum(parameter.numel() for parameter in self.trained.parameters()),
                    'precision': self.accelerator.mixed_precision,
                }
            )
        return metrics


def describe_epoch(line: Dict[str, float], epochs: int) -> str:
    """A line of metrics.jsonl as a line for the terminal."""
    held_out = f'   held-out {line["holdout_accuracy"]:.2%}' if 'holdout_accuracy' in line else ''
    left = timedelta(seconds=round(line['seconds'] * (epochs - line['epoch'])))
    return (
        f'epoch {line["epoch"]}/{epochs}   lr {line["learning_rate"]:.4g}   loss {line["train_loss"]:.4f}   '
        f'accuracy {line["train_accuracy"]:.2%}{held_out}   {line["images_per_second"]:.0f} images/s   left {left}'
    )


def train(
    recipe: Recipe,
    recipe_name: str,
    run: Run,
    saving: Saving = Saving(),  # noqa: B008
    tracker: Optional[Tracker] = None,
) -> Metrics:
    """Train a recipe in a new run folder, made once data and model are there.

    Args:
        recipe: What to train and how.
        recipe_name: Key in RECIPES of what it was made from.
        run: The run, whose folder must not exist.
        saving: When to write checkpoints.
        tracker: Where else the metrics go, beside metrics.jsonl.

    Returns:
        Metrics of the test split after the last epoch.

    Raises:
        TimmHamError: If the folder exists, the model or dataset can't be had, the loss is not finite, or the disk takes
            no more.
        StoppedError: If SIGINT or SIGTERM came, after a checkpoint.
    """
    run.check_new()
    trainer = Trainer(recipe, run, saving, tracker)
    if trainer.accelerator.is_main_process:
        run.create(recipe, recipe_name, trainer.data)
    return _fit_and_measure(trainer, [])


def resume(
    run: Run,
    recipe: Optional[Recipe] = None,
    change_recipe: bool = False,
    saving: Saving = Saving(),  # noqa: B008
    tracker: Optional[Tracker] = None,
) -> Metrics:
    """Go on with a run from its last checkpoint.

    Args:
        run: The run.
        recipe: To go on by; the run's own if None.
        change_recipe: Go on although the recipe, or the dataset, is no longer what the run was started with.
        saving: When to write checkpoints.
        tracker: As in `train`.

    Returns:
        Metrics of the test split after the last epoch.

    Raises:
        TimmHamError: If there is no such run, it is finished, recipe or dataset has changed and that was not asked for,
            or as in `train`.
        StoppedError: As in `train`.
    """
    if 'results' in run.record():
        raise TimmHamError(f'{run.folder} is finished: start a new run, or export it by timm-ham export {run.folder}')
    recipe = recipe or run.recipe()
    changed = differences(run.recipe(), recipe)
    if changed and not change_recipe:
        told = ', '.join(f'{field} {old!r}, not {new!r}' for field, (old, new) in changed.items())
        raise TimmHamError(
            f'{run.folder} was started with {told}: leave that out, or go on all the same by --change-recipe'
        )
    trainer = Trainer(recipe, run, saving, tracker)
    if trainer.data != run.data() and not change_recipe:
        then, now = asdict(run.data()), asdict(trainer.data)
        told = ', '.join(
            f'{field} was {then[field]!r}, is {now[field]!r}' for field in now if then[field] != now[field]
        )
        raise TimmHamError(
            f'the dataset is not what {run.folder} was started with ({told}): bring it back, or go on all the same by '
            '--change-recipe'
        )
    trainer.resume()
    if change_recipe and trainer.accelerator.is_main_process:
        run.note(recipe=asdict(recipe), data=asdict(trainer.data))
    return _fit_and_measure(trainer, list(changed))


def _fit_and_measure(trainer: Trainer, changed: Sequence[str]) -> Metrics:
    accelerator, run = trainer.accelerator, trainer.run
    if accelerator.is_main_process:
        start = environment(accelerator.num_processes, accelerator.device)
        if changed:
            start['changed'] = changed  # the names alone: a value may be a path
        run.note(starts=[*run.record()['starts'], start])
    accelerator.wait_for_everyone()
    start_tracking(accelerator, trainer.tracker, run, trainer.recipe)
    try:
        trainer.fit()
        metrics = trainer.finish()
    except StoppedError:
        accelerator.end_training()
        raise
    accelerator.end_training()
    return metrics
