"""The commands as a person types them."""

import re
import signal
import subprocess
import sys
import time

import pytest
import timm

from timm_ham import autoload, cli

TINY = ['--epochs', '1', '--batch-size', '16', '--precision', 'fp32']


def run(*words):
    """Run a command in this process; returns its exit status."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_train_evaluate_export(tiny_folder, tmp_path, monkeypatch, capsys, fresh):
    monkeypatch.chdir(tmp_path)
    assert run('train', '--dataset', tiny_folder, *TINY) == 0
    out = capsys.readouterr().out
    trained = re.search(r'test accuracy +(\S+%) of 16 images', out).group(1)
    code = re.search(r'timm\.create_model\(.*\)', out).group()
    assert eval(code, {'timm': timm}).num_classes == 2
    assert (tmp_path / 'runs/resnet20_ham.digits_quick/curves.png').is_file()
    fresh()
    assert run('evaluate', 'runs/resnet20_ham.digits_quick/resnet20_ham.tiny', '--dataset', tiny_folder) == 0
    assert f'accuracy {trained}   loss' in capsys.readouterr().out
    assert run('export', 'runs/resnet20_ham.digits_quick') == 0
    assert (tmp_path / 'hub/resnet20_ham.tiny/model.safetensors').is_file()
    fresh()
    assert run('train', '--dataset', tiny_folder, *TINY) == 0
    assert (tmp_path / 'runs/resnet20_ham.digits_quick-2').is_dir()


@pytest.mark.parametrize(
    'words, message',
    [
        (['train', '--recipe', 'nope'], 'choose from digits_quick, cifar_paper, cifar_fast'),
        (['train', '--dataset', 'nope'], 'choose from digits, cifar10, cifar100'),
        (
            ['train', '--model', 'resnet20_hm'],
            "did you mean 'resnet20_ham'? Choose <architecture>_<attention> from resnet20, ",
        ),
        (['train', '--label-column', 'kind'], 'choose from image (Image), label (ClassLabel)'),
        (['train', '--model-args', '{"attn_kwargs": {"kernal": 3}}'], "unexpected keyword argument 'kernal'"),
        (['list', 'resnet19*'], "no model is called 'resnet19*'"),
        (['complexity', 'ham'], "no model is called 'ham'"),
        (['train', '--resume', 'nowhere'], 'nowhere is not the folder of a run'),
        (['train', '--resume', 'nowhere', '--run', 'other'], 'nowhere is not the folder of a run'),
        (['evaluate', 'resnet20_plain'], "no weights for 'resnet20_plain': choose from"),
        (['export', 'nowhere'], 'nowhere is not the folder of a run'),
    ],
)
def test_mistakes_are_one_line_and_a_status(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith('timm-ham: ') and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words', [['train', '--epoch', '3'], ['train', '--epochs', 'x'], ['trian'], []])
def test_mistyped_options(words, capsys):
    assert run(*words) == 2


def test_list(capsys):
    assert run('list', 'resnet20_*') == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 11
    (line,) = [line for line in lines if line.startswith('resnet20_ham ')]
    assert line.split() == ['resnet20_ham', '32x32', '270,667', '41.3', 'M', 'cifar10']


def test_autoload(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoload, '_folders', lambda: [tmp_path])
    said = []
    for action in ('status', 'on', 'status', 'off', 'off'):
        assert run('autoload', action) == 0
        said.append(capsys.readouterr().out.strip())
    file = tmp_path / autoload.START_UP_FILE
    assert said[0] == 'off: scripts need `import timm_ham`' and said[1].endswith(f'by {file}')
    assert said[2:] == [f'on, by {file}', f'off: removed {file}', 'off: it was off'] and not list(tmp_path.iterdir())


def test_weights_of_other_classes(tiny_folder, tmp_path, monkeypatch, capsys, fresh):
    monkeypatch.chdir(tmp_path)
    run('train', '--dataset', tiny_folder, *TINY)
    fresh()
    assert run('evaluate', 'runs/resnet20_ham.digits_quick/resnet20_ham.tiny') == 1
    assert 'has 2 classes, but digits has 10' in capsys.readouterr().err


def test_help_names_every_option_with_the_recipes_value(capsys):
    assert run('train', '--recipe', 'cifar_paper', '--help') == 0
    out = capsys.readouterr().out
    assert '(default: 200)' in out and '--label-smoothing' in out and '(default: 60 120 160)' in out


def test_interrupt_says_how_to_go_on(tmp_path):
    """Ctrl-C: exit status 130, and the command that is printed finishes the run, from the step it was at."""
    start = [sys.executable, '-m', 'timm_ham.cli', 'train', '--model', 'resnet20_plain', '--epochs', '2', '--run', 'r']
    start += ['--checkpoint-steps', '4']
    log = tmp_path / 'log'
    with log.open('w') as stderr:
        process = subprocess.Popen(start, cwd=tmp_path, stderr=stderr, stdout=subprocess.DEVNULL)
        while not list(tmp_path.glob('r/checkpoint-*.safetensors')):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    command = re.search(r'stopped: go on by timm-ham (.*)', log.read_text()).group(1)
    done = subprocess.run(
        [sys.executable, '-m', 'timm_ham.cli', *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'resnet20_plain, 269,722 parameters, on digits (1293 train, 144 holdout, 360 test)' in done.stderr
    assert 'after epoch 0 and ' in done.stderr and 'epoch 2/2' in done.stderr
    assert 'test accuracy' in done.stdout
