"""Metrics in TensorBoard, and what is said where a tracker is missing."""

from dataclasses import replace

import pytest

from timm_ham import TimmHamError
from timm_ham.training import tracking, trainer
from timm_ham.training.recipes import RECIPES
from timm_ham.training.run import Run


def test_tensorboard_has_what_the_metrics_file_has(tiny_folder, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run = Run(tmp_path / 'run')
    changed = dict(model='test_resnet', epochs=2, batch_size=16, holdout=0.25, precision='fp32', learning_rate=0.01)
    recipe = replace(RECIPES['digits_quick'], dataset=str(tiny_folder), **changed)
    metrics = trainer.train(recipe, 'digits_quick', run, tracker='tensorboard')
    events = accumulator.EventAccumulator(str(run.folder / 'tensorboard')).Reload()
    lines = run.metrics()
    for name in lines[0]:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line['epoch'], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    (test_accuracy,) = events.Scalars('test_accuracy')
    assert (test_accuracy.step, test_accuracy.value) == (2, pytest.approx(metrics.accuracy))
    assert len(list(run.folder.glob('tensorboard/*/hparams.yml'))) == 1


def test_a_missing_tracker_is_named_before_anything_is_made(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, 'find_spec', lambda name: None)
    with pytest.raises(TimmHamError, match=r"tracker trackio is not installed: get it by pip install 'timm_ham\[tr"):
        trainer.train(RECIPES['digits_quick'], 'digits_quick', Run(tmp_path / 'run'), tracker='trackio')
    assert not (tmp_path / 'run').exists()
    tracking.check_tracker(None)
