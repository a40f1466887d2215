"""Runs to folders, folders to timm: config, card, hashes, and what is refused."""

import importlib
import json
import shlex
import shutil
from dataclasses import asdict, replace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_ham import MODELS, TimmHamError
from timm_ham.models import weights, zoo
from timm_ham.models.loading import load_model
from timm_ham.models.weights import check_weights
from timm_ham.publishing.card import command_line
from timm_ham.publishing.export import export
from timm_ham.training import trainer
from timm_ham.training.recipes import RECIPES
from timm_ham.training.run import Run


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run on images whose path must not leave the machine."""
    from accelerate.state import AcceleratorState

    from .conftest import make_dataset, random_images, save_parquet

    data = make_dataset(random_images(32, size=(8, 12)), [0, 1] * 16)
    folder = save_parquet(tmp_path_factory.mktemp('secret') / 'pets', train=data, test=data)
    run = Run(tmp_path_factory.mktemp('runs') / 'run')
    recipe = replace(RECIPES['digits_quick'], dataset=str(folder), epochs=1, batch_size=16, seed=5)
    trainer.train(recipe, 'digits_quick', run)
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


@pytest.fixture
def folder(finished, tmp_path):
    return export(finished, tmp_path / 'hub')


@pytest.fixture
def registered(folder, monkeypatch):
    """The folder stands under the package's hub/ while a test runs."""
    monkeypatch.setattr(weights, 'hub_folders', lambda: iter([folder]))
    with pytest.warns(UserWarning, match='Overwriting'):
        importlib.reload(zoo)
    yield folder
    monkeypatch.undo()
    with pytest.warns(UserWarning, match='Overwriting'):
        importlib.reload(zoo)


IMAGES = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def run_model(run):
    model = timm.create_model('resnet20_ham', num_classes=2)
    model.load_state_dict(load_file(run.weights_file))
    return model.eval()


def test_folder_holds_what_the_hub_holds(finished, folder):
    assert folder.name == 'resnet20_ham.pets'
    record = {'run.json', 'metrics.jsonl', 'curves.png'}
    names = {path.name for path in folder.iterdir()}
    assert names == {'README.md', 'config.json', 'model.safetensors', 'golden.json'} | record
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'resnet20_ham' and config['num_classes'] == 2
    assert 'num_classes' not in config['model_args']  # transformers takes it from the root, and stumbles over two
    assert config['label_names'] == ['cat', 'dog']
    data = finished.data()
    cfg = config['pretrained_cfg']
    assert (cfg['mean'], cfg['std']) == (list(data.mean), list(data.std))
    assert (cfg['input_size'], cfg['pool_size'], cfg['crop_pct'], cfg['tag']) == ([3, 8, 12], [2, 3], 1.0, 'pets')
    assert not list(folder.parent.glob('.export-*'))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # weights readable by whom the rest is
    for path in folder.iterdir():
        assert b'secret' not in path.read_bytes(), path


def test_an_ablation_reloads(finished, tmp_path):
    """What makes the model differ from its name's is in config.json, by timm's own means."""
    shutil.copytree(finished.folder, tmp_path / 'run')
    run = Run(tmp_path / 'run')
    attn_kwargs = {'kernel_size': 3, 'separation_rate': 0.5}
    recipe = replace(run.recipe(), model_args={'attn_kwargs': attn_kwargs})
    run.note(recipe=asdict(recipe))
    model = timm.create_model('resnet20_ham', num_classes=2, attn_kwargs=attn_kwargs).eval()
    save_file(model.state_dict(), run.weights_file)
    folder = export(run, tmp_path / 'hub')
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert reloaded.stages[0][0].se.spatial_conv.kernel_size == (3, 3)
    assert torch.equal(reloaded(IMAGES), model(IMAGES))
    assert '"kernel_size": 3' in (folder / 'README.md').read_text()


def test_reload_gives_the_same_logits(finished, folder):
    wanted = run_model(finished)(IMAGES)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(model(IMAGES), wanted)
    assert torch.equal(load_model(str(folder)).eval()(IMAGES), wanted)
    assert list(model.pretrained_cfg['label_names']) == ['cat', 'dog']
    config = timm.data.resolve_model_data_config(model)
    assert config['input_size'] == (3, 8, 12) and tuple(config['mean']) == finished.data().mean


def test_a_folder_under_hub_is_registered(finished, registered):
    assert timm.list_pretrained('*_ham*') == ['resnet20_ham.pets']
    assert timm.is_model_pretrained('resnet20_ham') and not timm.is_model_pretrained('resnet32_ham')
    wanted = run_model(finished)(IMAGES)
    for name in ('resnet20_ham', 'resnet20_ham.pets'):
        model = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(model(IMAGES), wanted)
    assert model.pretrained_cfg['tag'] == 'pets'
    untrained = timm.create_model('resnet20_ham')
    assert untrained.num_classes == 2 and not torch.equal(untrained.eval()(IMAGES), wanted)


def test_pretrained_weights_adapt_as_timms_do(registered):
    source = load_file(registered / 'model.safetensors')
    model = timm.create_model('resnet20_ham', pretrained=True, num_classes=5, in_chans=1)
    assert model(IMAGES[:, :1]).shape == (4, 5)
    assert torch.equal(model.state_dict()['stages.0.0.conv1.weight'], source['stages.0.0.conv1.weight'])
    # timm sums the input convolution over the colours for one channel.
    torch.testing.assert_close(model.stem.conv.weight, source['stem.conv.weight'].sum(1, keepdim=True))
    features = timm.create_model('resnet20_ham', pretrained=True, features_only=True)
    assert len(features(IMAGES)) == 4


def test_a_tag_without_weights_has_none(folder, registered):
    (folder / 'model.safetensors').unlink()
    with pytest.warns(UserWarning, match='Overwriting'):
        importlib.reload(zoo)
    assert timm.list_pretrained('*_ham*') == []
    assert timm.create_model('resnet20_ham.pets').num_classes == 2
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('resnet20_ham.pets', pretrained=True)


def test_a_broken_folder_is_left_out_with_a_warning(folder, monkeypatch, tmp_path):
    texts = ['{', '[]', '{"architecture": "resnet20_ham"}', '{"architecture": "resnet18", "pretrained_cfg": {}}']
    for index, text in enumerate(texts):
        broken = tmp_path / f'{index}' / 'resnet20_ham.pets'
        shutil.copytree(folder, broken)
        (broken / 'config.json').write_text(text)
        monkeypatch.setattr(weights, 'hub_folders', lambda broken=broken: iter([broken]))
        with pytest.warns(UserWarning, match=rf'{index}/resnet20_ham.pets/config.json is left out'):
            assert weights.bundled_cfgs(MODELS) == {}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b'')


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, empty, flip_a_bit])
def test_damaged_weights_are_refused_by_name(folder, registered, damage):
    damage(folder / 'model.safetensors')
    for name in (f'local-dir:{folder}', 'resnet20_ham', 'resnet20_ham.pets'):
        with pytest.raises(TimmHamError, match=r'resnet20_ham.pets/model.safetensors is not the file .* get it again'):
            timm.create_model(name, pretrained=True)
    timm.create_model(f'local-dir:{folder}')  # without weights it is still a description of a model


def test_weights_without_a_hash_pass(folder):
    """A folder that timm wrote names no hash, and a file of one's own has no config beside it."""
    config = json.loads((folder / 'config.json').read_text())
    del config['weights_sha256']
    (folder / 'config.json').write_text(json.dumps(config))
    check_weights(folder)
    (folder / 'config.json').unlink()
    check_weights(folder / 'model.safetensors')


def test_export_refuses(finished, folder, tmp_path):
    with pytest.raises(TimmHamError, match=r'resnet20_ham.pets exists: replace it by --overwrite'):
        export(finished, folder.parent)
    assert export(finished, folder.parent, tag='cats').name == 'resnet20_ham.cats'
    (folder / 'model.safetensors').write_bytes(b'')
    assert (export(finished, folder.parent, overwrite=True) / 'model.safetensors').stat().st_size > 1e6
    unfinished = Run(tmp_path / 'unfinished')
    shutil.copytree(finished.folder, unfinished.folder)
    record = unfinished.record()
    del record['results']
    unfinished.record_file.write_text(json.dumps(record))
    with pytest.raises(TimmHamError, match=r'is not finished: go on with it by timm-ham train --resume'):
        export(unfinished, tmp_path / 'hub')
    with pytest.raises(TimmHamError, match=r"tag '../x' may hold letters, digits"):
        export(finished, folder.parent, tag='../x')


def test_card_says_what_the_record_says(finished, folder):
    card = ModelCard.load(folder / 'README.md')
    results = finished.record()['results']
    accuracy, loss = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ('accuracy', round(100 * results['test']['accuracy'], 2))
    assert (loss.metric_type, loss.metric_value) == ('loss', round(results['test']['loss'], 4))
    assert (card.data.library_name, card.data.license) == ('timm', 'apache-2.0')
    assert card.data.datasets is None  # of a local folder there is no id
    for text in (f'{results["test"]["accuracy"]:.2%}'[:4], '270,147', '12x8', 'cat, dog', '--epochs 1', '--seed 5'):
        assert text in card.text, text
    assert 'None' not in card.text and '{{' not in card.text
    assert card.text.partition('```python\n')[2].startswith('import timm_ham')
    assert 'gradcam' not in card.text


def test_card_has_the_hub_id_of_the_dataset_and_the_picture_of_gradcam(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / 'run')
    run = Run(tmp_path / 'run')
    run.note(data={**run.record()['data'], 'source': 'ann/pets on the Hugging Face Hub'})
    (run.folder / 'gradcam.png').write_bytes(b'a picture')
    folder = export(run, tmp_path / 'hub')
    card = ModelCard.load(folder / 'README.md')
    assert card.data.datasets == ['ann/pets'] and card.data.eval_results[0].dataset_type == 'ann/pets'
    assert '](gradcam.png)' in card.text and (folder / 'gradcam.png').read_bytes() == b'a picture'


def test_export_of_an_exported_folder_writes_it_again(folder):
    """The record is all that a folder is made from: what a newer version adds to it comes that way."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / 'golden.json').unlink()
    assert export(Run(folder), folder.parent, overwrite=True) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_command_line_is_read_back(monkeypatch):
    from timm_ham import cli

    recipe = replace(
        RECIPES['cifar_paper'],
        model_args={'attn_kwargs': {'kernel_size': 3}, 'drop_rate': 0.1},
        milestones=(3, 5),
        flip=False,
        nesterov=True,
        epochs=7,
        learning_rate=0.05,
        seed=2,
    )
    trained = []
    monkeypatch.setattr(trainer, 'train', lambda *arguments: trained.append(arguments) or cli.sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main(shlex.split(command_line(recipe, 'cifar_paper'))[1:])
    assert trained[0][:2] == (recipe, 'cifar_paper')
