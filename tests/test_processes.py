"""Several processes are one run: the same images, the same weights, each test image counted once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from timm_ham.training import processes
from timm_ham.training.run import Run

from .conftest import make_tiny
from .two_processes import CASES, two_steps

ROOT = Path(__file__).resolve().parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Data, what two processes left, what one leaves."""
    data = make_tiny(tmp_path_factory.mktemp('data') / 'tiny')
    two, one = tmp_path_factory.mktemp('two'), tmp_path_factory.mktemp('one')
    shared = dict(
        os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), OMP_NUM_THREADS='1'
    )
    command = [sys.executable, '-m', 'tests.two_processes', data, two]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=dict(shared, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE='2'))
        for rank in '01'
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in CASES:
        two_steps(name, data, one)
    return data, two, one


@pytest.mark.parametrize('name', CASES)
def test_weights_are_those_of_one_process(folders, name):
    _, two, one = folders
    wanted = load_file(one / f'{name}.0.safetensors')
    for rank in '01':
        out = load_file(two / f'{name}.{rank}.safetensors')
        assert out.keys() == wanted.keys()
        for key, value in out.items():
            torch.testing.assert_close(
                value, wanted[key], rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f'{key}: {text}'
            )


def test_every_test_image_is_counted_once_by_the_same_network(folders):
    _, two, one = folders
    for name in CASES:
        both = [json.loads((two / f'{name}.{rank}.json').read_text()) for rank in '01']
        assert both[0] == both[1] and both[0]['images'] == 16
        alone = json.loads((one / f'{name}.0.json').read_text())
        assert both[0]['accuracy'] == alone['accuracy'] and both[0]['loss'] == pytest.approx(alone['loss'], rel=1e-4)


def test_images_are_mapped_from_one_file(folders):
    for rank in '01':
        assert json.loads((folders[1] / f'memory.{rank}.json').read_text()) == {'mapped': True, 'images': 192}


def test_a_signal_to_one_process_stops_all_at_the_same_step(folders):
    for rank in '01':
        assert json.loads((folders[1] / f'stopped.{rank}.json').read_text()) == signal.SIGTERM
    assert [path.name for path in Run(folders[1] / 'stopped').checkpoints()] == ['checkpoint-10.safetensors']


@pytest.mark.parametrize('shape', [(6, 3, 4, 5), (6, 3)])
def test_batch_norm_over_one_process_is_batch_norm(shape, tmp_path):
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    wanted = kind(3)
    torch.nn.init.normal_(wanted.weight)
    out = kind(3)
    out.load_state_dict(wanted.state_dict())
    processes.synchronize_batch_norms(out, torch.device('cpu'))
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
        upper = torch.randn(shape)
        results = []
        for norm, x in zip((wanted, out), inputs):
            y = norm(x)
            results.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], upper), *norm.buffers()])
            results[-1].append(norm.eval()(x))
        for value, other in zip(*results):
            torch.testing.assert_close(other, value)
    finally:
        torch.distributed.destroy_process_group()


def launch(*options):
    words = ['--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no', '--dynamo_backend', 'no', *options]
    return [sys.executable, '-m', 'accelerate.commands.launch', *words, ROOT / 'scripts' / 'train.py']


@pytest.mark.slow
def test_sigterm_to_the_launcher(tmp_path, folders):
    """A cluster's preemption: a checkpoint of the step it was at, a status that is not 0, and the rest by --resume."""
    options = ['--model', 'resnet20_plain', '--dataset', folders[0], '--epochs', '40', '--batch-size', '16']
    command = [*launch('--num_machines', '1', '--main_process_port', str(free_port())), *options, '--run', 'r']
    process = subprocess.Popen(command, cwd=tmp_path, stderr=(tmp_path / 'log').open('w'))
    while not list(tmp_path.glob('r/checkpoint-*')):
        assert process.poll() is None, (tmp_path / 'log').read_text()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) != 0
    log = (tmp_path / 'log').read_text()
    assert 'stopped: go on by timm-ham train --resume r' in log
    command = [*launch('--num_machines', '1', '--main_process_port', str(free_port())), '--resume', 'r']
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(Run(tmp_path / 'r').metrics()) == 40


@pytest.mark.slow
def test_two_machines(tmp_path, folders):
    """The README's example for several machines, as two launchers on this one."""
    options = [
        '--model',
        'resnet20_plain',
        '--dataset',
        folders[0],
        '--epochs',
        '2',
        '--batch-size',
        '16',
        '--run',
        'r',
    ]
    address = ['--num_machines', '2', '--main_process_ip', '127.0.0.1', '--main_process_port', str(free_port())]
    started = [subprocess.Popen([*launch(*address, '--machine_rank', rank), *options], cwd=tmp_path) for rank in '01']
    assert [process.wait(300) for process in started] == [0, 0]
    assert Run(tmp_path / 'r').record()['starts'][0]['processes'] == 2
