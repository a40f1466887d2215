"""What each of several processes does in test_processes.py: python -m tests.two_processes FOLDER_OF_DATA FOLDER."""

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file

from timm_ham.training import trainer
from timm_ham.training.recipes import RECIPES
from timm_ham.training.run import Run
from timm_ham.training.stopping import StoppedError, StopRequest

RECIPE = replace(
    RECIPES['digits_quick'],
    epochs=2,
    batch_size=30,
    holdout=0.0,
    learning_rate=0.1,
    warmup_epochs=0,
    precision='fp32',
    channels_last=False,
)
CASES = {
    'without_norms': dict(model='test_nfnet', accumulation=1),
    'sync_batch_norm': dict(model='resnet20_ham', sync_batch_norm=True),
    'accumulated': dict(model='test_nfnet', accumulation=4),
}


class NoBar:
    """A progress bar that nobody sees."""

    def update(self, count):
        pass

    def set_postfix_str(self, text, refresh):
        pass


def two_steps(name, data, folder):
    """Weights after two steps, and the metrics of the test images, as each process has them."""
    it = trainer.Trainer(replace(RECIPE, dataset=str(data), **CASES[name]), Run(folder / name))
    steps = it.train_steps(NoBar(), StopRequest())
    next(steps), next(steps)
    rank = it.accelerator.process_index
    state = {key: value.contiguous() for key, value in it.trained.state_dict().items()}
    save_file(state, folder / f'{name}.{rank}.safetensors')
    (folder / f'{name}.{rank}.json').write_text(json.dumps(asdict(it.measure('test'))))
    return it


def stopped(data, folder):
    """The signal and the number of steps with which a run ends of which one process alone gets a signal."""
    original = trainer.Trainer.train_step

    def signalled(self, *batch):
        if self.steps == 7 and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *batch)

    trainer.Trainer.train_step = signalled
    run = Run(folder / 'stopped')
    try:
        trainer.train(replace(RECIPE, dataset=str(data), model='test_nfnet', batch_size=12), 'digits_quick', run)
    except StoppedError as stop:
        (folder / f'stopped.{os.environ["RANK"]}.json').write_text(json.dumps(stop.signal))


def main(data, folder):
    for name in CASES:
        it = two_steps(name, data, folder)
    maps = Path('/proc/self/maps').read_text() if Path('/proc/self/maps').is_file() else None
    images = it.batches.split.images
    report = dict(mapped=maps and any('timm_ham/' in line and '.safetensors' in line for line in maps.splitlines()))
    report['images'] = len(images)
    (folder / f'memory.{it.accelerator.process_index}.json').write_text(json.dumps(report))
    stopped(data, folder)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
