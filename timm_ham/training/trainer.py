"""Recipe to run folder: the training loop, on accelerate."""

import difflib
import math
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Dict, Optional

import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from safetensors.torch import save_file
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
from timm_ham.training.batches import TrainBatches
from timm_ham.training.curves import draw_curves
from timm_ham.training.data import DataInfo, load_splits
from timm_ham.training.evaluate import Metrics, evaluate_split
from timm_ham.training.recipes import Recipe
from timm_ham.training.run import Run, checkpoint_epoch, environment
from timm_ham.training.tracking import Tracker, check_tracker, start_tracking

__all__ = ['resume', 'train']

SHOW_EVERY = 10  # steps between looks at the loss, each of which waits for the device


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
    """SGD; timm leaves one-dimensional parameters without weight decay unless told not to."""
    return create_optimizer_v2(
        model,
        opt='sgd' if recipe.nesterov else 'momentum',
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_norm_and_bias,
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


class Trainer:
    """The state of one run: model, optimizer, schedule, data. `run` is its folder."""

    def __init__(self, recipe: Recipe, run: Run, tracker: Optional[Tracker] = None):
        check_model_name(recipe.model)  # before the data, which takes a while
        check_tracker(tracker)
        self.recipe, self.run, self.tracker = recipe, run, tracker
        bf16 = recipe.precision == 'bf16' or (recipe.precision == 'auto' and bf16_is_native(PartialState().device))
        self.accelerator = Accelerator(
            mixed_precision='bf16' if bf16 else 'no', log_with=tracker, project_dir=str(run.folder)
        )
        set_seed(recipe.seed)
        self.data, splits = load_splits(recipe.dataset, recipe.holdout, recipe.image_column, recipe.label_column)
        self.splits = {name: split.to(self.accelerator.device) for name, split in splits.items()}
        self.batches = TrainBatches(
            self.splits['train'],
            self.data.mean,
            self.data.std,
            min(recipe.batch_size, len(self.splits['train'])),
            recipe.crop_padding,
            recipe.flip,
            recipe.cutout,
            recipe.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self._build()

    def _build(self) -> None:
        recipe = self.recipe
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        network = build_model(recipe, self.data).to(memory_format=self.memory_format)
        self.ema: Optional[ModelEmaV3] = None
        if recipe.ema_decay > 0:  # a copy, taken before `prepare` wraps the forward in autocast
            self.ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=True, device=self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.model, self.optimizer = self.accelerator.prepare(network, build_optimizer(recipe, network))
        self.schedule = build_schedule(recipe, self.optimizer, len(self.batches))
        self.forward = torch.compile(self.model) if recipe.compile else self.model

    @property
    def trained(self) -> nn.Module:
        """The network that is measured and exported: the average of the weights if there is one."""
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    def resume(self) -> int:
        """Load the last checkpoint, if any; returns the number of epochs done."""
        done = 0
        for checkpoint in self.run.checkpoints()[-1:]:
            self.accelerator.load_state(str(checkpoint))
            done = checkpoint_epoch(checkpoint)
        self.schedule.step_update(done * len(self.batches))
        return done

    def save_checkpoint(self, epoch: int) -> None:
        """Write the state after `epoch` epochs; it gets its name when it is whole, and then the one before goes."""
        whole = self.run.checkpoint(epoch)
        part = whole.with_name(whole.name + '.part')
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(part, whole)
            self.run.keep_last_checkpoint()

    def train_epoch(self, epoch: int, bar: tqdm) -> Dict[str, float]:
        """One pass over the training images; returns what metrics.jsonl says of it."""
        self.model.train()
        learning_rate = self.optimizer.param_groups[0]['lr']
        totals = torch.zeros(3, device=self.accelerator.device)  # loss, correct, images: no wait for the device
        for step, (images, labels) in enumerate(self.batches.epoch(epoch)):
            logits = self.forward(images.contiguous(memory_format=self.memory_format))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            update = epoch * len(self.batches) + step + 1
            self.schedule.step_update(update)
            if self.ema:
                self.ema.update(self.accelerator.unwrap_model(self.model), step=update)
            totals[0] += loss.detach() * len(labels)
            totals[1] += (logits.argmax(1) == labels).sum()
            totals[2] += len(labels)
            bar.update(self.batches.batch_size)
            if step % SHOW_EVERY == 0 or step == len(self.batches) - 1:
                self._show(bar, epoch, totals)
        loss, correct, images = self.accelerator.reduce(totals, reduction='sum').tolist()
        return dict(learning_rate=learning_rate, train_loss=loss / images, train_accuracy=correct / images)

    def _show(self, bar: tqdm, epoch: int, totals: torch.Tensor) -> None:
        loss, correct, images = totals.tolist()
        if not math.isfinite(loss):
            raise TimmHamError(
                f'the loss is {loss} in epoch {epoch + 1} at learning rate {self.optimizer.param_groups[0]["lr"]:.4g}: '
                'start again with a lower learning_rate, a longer warmup_epochs or precision fp32'
            )
        bar.set_postfix_str(
            f'epoch {epoch + 1}/{self.recipe.epochs} loss {loss / images:.3f} acc {correct / images:.1%}', refresh=False
        )

    def measure(self, split: str) -> Metrics:
        """Metrics of the trained network on a split, in the precision of the enclosing autocast, if any."""
        return evaluate_split(self.trained, self.splits[split], self.data.mean, self.data.std, self.accelerator)

    def run_epoch(self, epoch: int, bar: tqdm) -> None:
        """Train an epoch, measure the held-out part, write both down, draw, checkpoint."""
        start = time.perf_counter()
        line = {'epoch': epoch + 1, **self.train_epoch(epoch, bar)}
        line['images_per_second'] = len(self.batches) * self.batches.batch_size / (time.perf_counter() - start)
        if 'holdout' in self.splits:
            with self.accelerator.autocast():
                held_out = self.measure('holdout')
            line.update(holdout_loss=held_out.loss, holdout_accuracy=held_out.accuracy)
        line['seconds'] = time.perf_counter() - start
        self.accelerator.log(line, step=epoch + 1)
        if self.accelerator.is_main_process:
            lines = [*self.run.metrics()[:epoch], line]
            self.run.write_metrics(lines)
            draw_curves(lines, f'{self.recipe.model} on {self.data.name}', self.run.curves_file)
            bar.write(describe_epoch(line, self.recipe.epochs), file=sys.stderr)
        self.save_checkpoint(epoch + 1)

    def describe(self, done: int) -> str:
        """What is about to be trained, for the terminal."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        sizes = ', '.join(f'{size} {part}' for part, size in self.data.sizes.items())
        return (
            f'{self.recipe.model}, {parameters:,} parameters, on {self.data.name} ({sizes}); '
            f'{self.accelerator.num_processes} x {self.accelerator.device.type}, '
            f'precision {self.accelerator.mixed_precision.replace("no", "fp32")}'
            + (f'; after epoch {done}' if done else '')
            + ('; compiling takes a minute or two' if self.recipe.compile else '')
        )

    def fit(self) -> None:
        """Train the epochs that are not done yet."""
        done = self.resume()
        self.accelerator.print(self.describe(done), file=sys.stderr)
        images = len(self.batches) * self.batches.batch_size
        bar = tqdm(
            total=images * self.recipe.epochs,
            initial=images * done,
            unit=' images',
            unit_scale=True,
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar:
            for epoch in range(done, self.recipe.epochs):
                self.run_epoch(epoch, bar)

    def finish(self) -> Metrics:
        """Measure the test split, this once, in float32; write the weights and the results."""
        if not self.ema:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        metrics = self.measure('test')
        self.accelerator.log({'test_loss': metrics.loss, 'test_accuracy': metrics.accuracy}, step=self.recipe.epochs)
        if self.accelerator.is_main_process:
            state = {name: tensor.contiguous() for name, tensor in self.trained.state_dict().items()}
            save_file(state, self.run.weights_file)
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


def train(recipe: Recipe, recipe_name: str, run: Run, tracker: Optional[Tracker] = None) -> Metrics:
    """Train a recipe in a new run folder, made once data and model are there.

    Args:
        recipe: What to train and how.
        recipe_name: Key in RECIPES of what it was made from.
        run: The run, whose folder must not exist.
        tracker: Where else the metrics go, beside metrics.jsonl.

    Returns:
        Metrics of the test split after the last epoch.

    Raises:
        TimmHamError: If the folder exists, the model or dataset can't be had, or the loss is not finite.
    """
    run.check_new()
    trainer = Trainer(recipe, run, tracker)
    if trainer.accelerator.is_main_process:
        run.create(recipe, recipe_name, trainer.data)
    return _fit_and_measure(trainer)


def resume(run: Run, tracker: Optional[Tracker] = None) -> Metrics:
    """Go on with a run by its own recipe, from its last checkpoint.

    Returns:
        Metrics of the test split after the last epoch.

    Raises:
        TimmHamError: If there is no such run, or it is finished, or as in `train`.
    """
    if 'results' in run.record():
        raise TimmHamError(f'{run.folder} is finished: start a new run, or export it by timm-ham export {run.folder}')
    return _fit_and_measure(Trainer(run.recipe(), run, tracker))


def _fit_and_measure(trainer: Trainer) -> Metrics:
    accelerator, run = trainer.accelerator, trainer.run
    if accelerator.is_main_process:
        run.note(starts=[*run.record()['starts'], environment(accelerator.num_processes, accelerator.device)])
    accelerator.wait_for_everyone()
    start_tracking(accelerator, trainer.tracker, run, trainer.recipe)
    trainer.fit()
    metrics = trainer.finish()
    accelerator.end_training()
    return metrics
