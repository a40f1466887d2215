"""What others wrote, in folders, repositories, caches and datasets, is read as data, and never as code or as a path."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from timm_ham import TimmHamError, add_attention
from timm_ham.models import weights
from timm_ham.models.loading import load_model
from timm_ham.publishing.card import model_card
from timm_ham.publishing.export import export
from timm_ham.publishing.golden import golden_logits
from timm_ham.training.recipes import RECIPES
from timm_ham.training.run import Run, environment
from timm_ham.training.sources import open_dataset
from timm_ham.training.trainer import build_model

from . import hub_client
from .conftest import BUNDLED, make_dataset, random_images, save_parquet


@pytest.fixture
def config(folder):
    """Changes config.json by keywords; keys of pretrained_cfg have an underscore in front."""

    def change(**values):
        config = json.loads((folder / 'config.json').read_text())
        for key, value in values.items():
            (config['pretrained_cfg'] if key.startswith('_') else config)[key.removeprefix('_')] = value
        (folder / 'config.json').write_text(json.dumps(config))

    return change


def plant_pickle(folder):
    """A pickle that would load well, of other weights: whoever reads it gives other logits."""
    state = load_file(BUNDLED / 'model.safetensors')
    state['head.fc.bias'] += 1
    torch.save(state, folder / 'pytorch_model.bin')
    return folder / 'pytorch_model.bin'


@pytest.fixture(scope='module')
def wanted():
    return golden_logits(load_model(str(BUNDLED)).eval())


@pytest.fixture(autouse=True)
def nothing_unpickles(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError('a pickle is read')

    monkeypatch.setattr(torch, 'load', refuse)


def test_a_pickle_beside_the_weights(folder, wanted):
    plant_pickle(folder)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(golden_logits(model), wanted)


def test_a_pickle_in_place_of_the_weights(folder):
    pickle = plant_pickle(folder)
    (folder / 'model.safetensors').unlink()
    for load in (load_model, lambda name: timm.create_model(f'local-dir:{name}', pretrained=True)):
        with pytest.raises(TimmHamError, match=r'model\.safetensors is missing: only safetensors weights are loaded'):
            load(str(folder))
    for overlay in (dict(file=str(pickle)), dict(url=pickle.as_uri(), file=None)):
        with pytest.raises(TimmHamError, match='safetensors'):
            timm.create_model('resnet20_ham', pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_pickle_by_the_name_of_the_weights(folder, config):
    plant_pickle(folder).rename(folder / 'model.safetensors')
    config(weights_sha256=None)
    with pytest.raises(TimmHamError, match='can not be loaded: Error while deserializing header'):
        load_model(str(folder))


def test_a_config_that_names_a_pickle(folder, config, wanted):
    """timm's own keys for where the weights are, and for a loader of the model's own, do not count in a folder."""
    pickle = str(plant_pickle(folder))
    config(_file=pickle, _url=pickle, _hf_hub_id='x/y', _hf_hub_filename=pickle, _custom_load=True, _source='')
    assert torch.equal(golden_logits(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()), wanted)
    config(_state_dict={'head.fc.bias': [0.0]})
    assert torch.equal(golden_logits(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()), wanted)
    config(model_args={'checkpoint_path': pickle})
    with pytest.raises(TimmHamError, match='checkpoint_path'):
        load_model(str(folder))


def test_an_added_attentions_config_that_names_a_pickle(folder, tmp_path):
    pickle = str(plant_pickle(folder))
    model = add_attention(timm.create_model('resnet20_plain', num_classes=10), 'eca')
    timm.models.save_for_hf(model, tmp_path / 'net', safe_serialization=True)
    config = json.loads((tmp_path / 'net/config.json').read_text())
    for changed in ({'checkpoint_path': pickle}, {'base': f'local-dir:{folder}'}):
        (tmp_path / 'net/config.json').write_text(
            json.dumps({**config, 'model_args': {**config['model_args'], **changed}})
        )
        with pytest.raises(TimmHamError, match='is no network to add an attention to'):
            timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
    (tmp_path / 'net/config.json').write_text(json.dumps(config))
    (tmp_path / 'net/model.safetensors').unlink()
    plant_pickle(tmp_path / 'net')
    with pytest.raises(TimmHamError, match='only safetensors weights are loaded'):
        timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


def test_recipes_name_no_pickle():
    recipe = replace(RECIPES['digits_quick'], model_args={'checkpoint_path': 'x.bin'})
    with pytest.raises(TimmHamError, match='model_args takes no checkpoint_path'):
        build_model(recipe, Run(BUNDLED).data())


def huge(file):
    with file.open('wb') as sparse:
        sparse.truncate(2**30)


@pytest.mark.parametrize(
    'write, message',
    [
        (huge, 'is larger than 10 MB: it is no config'),
        (lambda file: file.write_text('[' * 1_000_000), r'is not JSON \(maximum recursion depth'),
        (
            lambda file: file.write_text('{"a":' * 100_000 + '1' + '}' * 100_000),
            r'is not JSON \(maximum recursion depth',
        ),
        (lambda file: file.write_bytes(b'\xff\xfe\x00'), 'is not JSON'),
        (lambda file: file.write_text('[]'), 'names no architecture'),
        (lambda file: file.write_text('{"architecture": ["resnet18"]}'), 'names no architecture'),
        (lambda file: file.write_text('{"architecture": "os.system"}'), "is of 'os.system', which neither timm nor"),
        (
            lambda file: file.write_text('{"architecture": "resnet18"}'),
            "holds weights of 'resnet18', not of resnet20_ham",
        ),
    ],
)
def test_hostile_configs(folder, write, message, monkeypatch):
    write(folder / 'config.json')
    with pytest.raises(TimmHamError, match=message):
        load_model(str(folder))
    monkeypatch.setattr(weights, 'hub_folders', lambda: iter([folder]))
    with pytest.warns(UserWarning, match='config.json is left out'):
        assert weights.bundled_cfgs({'resnet20_ham': {}}) == {}


def test_weights_of_another_architecture(folder, config):
    config(architecture='resnet32_ham')
    with pytest.raises(TimmHamError, match="holds weights of 'resnet32_ham', not of resnet20_ham"):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    folder = folder.rename(folder.with_name('resnet18.mine'))  # a name that promises nothing
    with pytest.raises(TimmHamError, match=r'resnet18\.mine can not be loaded: Error.* in loading state_dict for '):
        load_model(str(folder))


def test_the_hub_and_the_cache(online, hub, client, folder, config, wanted):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pickle = plant_pickle(folder).read_bytes()
    config(_hf_hub_filename='pytorch_model.bin', _custom_load='hf')
    planted = {**files, 'pytorch_model.bin': pickle, 'config.json': (folder / 'config.json').read_bytes()}
    alone = {name: content for name, content in planted.items() if name != 'model.safetensors'}
    home, name = online[2], BUNDLED.name
    hub.add(f'planted/{name}', planted)
    assert client(hub_client.golden, f'hf-hub:planted/{name}')[0] == wanted.tolist()
    status, said = client.cli('verify', f'hf-hub:planted/{name}')
    assert status == 1 and 'holds pytorch_model.bin: remove it' in said

    hub.add(f'alone/{name}', alone)
    with pytest.raises(TimmHamError, match='only safetensors weights are loaded'):
        client(hub_client.golden, f'hf-hub:alone/{name}')
    # In the cache too: here beside the config of that repository, as an older client may have left it.
    (config_file,) = (home / 'hub').glob('models--alone--*/snapshots/*/config.json')
    (config_file.parent / 'pytorch_model.bin').write_bytes(pickle)
    with pytest.raises(TimmHamError, match='only safetensors weights are loaded'):
        client(hub_client.golden, f'hf-hub:alone/{name}')
    assert not hub.sent('GET', 'pytorch_model.bin') and not hub.sent('HEAD', 'pytorch_model.bin')

    hub.add('other/resnet20_ham.x', {**files, 'config.json': files['config.json'].replace(b'20_ham', b'18_ham')})
    with pytest.raises(TimmHamError, match="holds weights of 'resnet18_ham', not of resnet20_ham"):
        client(hub_client.golden, 'hf-hub:other/resnet20_ham.x')
    hub.add('huge/x', {'config.json': b' ' * 10_000_001})
    status, said = client.cli('evaluate', 'hf-hub:huge/x')
    assert status == 1 and 'has 10,000,001 bytes: it is not what its name says' in said
    assert not hub.sent('GET', 'huge/x/resolve')

    outside = {f'{"../" * depth}evil.json': b'{}' for depth in range(1, 9)}
    hub.add(f'paths/{name}', {**files, **outside, 'hubconf.py': b'raise SystemExit("code is run")'})
    assert client.cli('verify', f'hf-hub:paths/{name}')[0] == 0
    assert not [path for path in home.parent.rglob('*') if path.name in ('evil.json', 'hubconf.py')]
    for bad in ('hf-hub:../../x', 'hf-hub:a/../b', 'hf-hub:a/b@../../../x', 'hf-hub:/etc'):
        status, said = client.cli('evaluate', bad)
        assert status == 1 and said.startswith(f'timm-ham: {bad}'), said


def test_no_code_of_a_dataset_is_run(tmp_path):
    split = make_dataset(random_images(4), [0, 1, 0, 1])
    folder = save_parquet(tmp_path / 'pets', train=split, test=split)
    script = folder / 'helper.py'
    script.write_text(f'open({str(tmp_path / "ran")!r}, "w")\n')
    assert open_dataset(str(folder)).label_names == ('cat', 'dog')
    script.rename(folder / 'pets.py')
    with pytest.raises(TimmHamError, match=r'scripts are no longer supported, but found pets\.py'):
        open_dataset(str(folder))
    assert not (tmp_path / 'ran').exists()


HOSTILE = '---\nlicense: x\n---\n</td><script>alert(1)</script> ``` | [x](javascript:1) `a`'


def test_names_stay_text_in_the_card(tmp_path):
    record = Run(BUNDLED).record()
    record['data'].update(name=HOSTILE, source=HOSTILE, label_names=[HOSTILE, '# cat', 'dog'])
    record['recipe'].update(dataset=HOSTILE)
    record['starts'][-1]['hardware'] = HOSTILE
    model_card('resnet20_ham.x', record, Run(BUNDLED).metrics()).save(tmp_path / 'README.md')
    text = (tmp_path / 'README.md').read_text()
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data.license == 'apache-2.0' and card.data.eval_results[0].dataset_name == ' '.join(HOSTILE.split())
    lines = text.splitlines()
    assert lines.count('---') == 2 and not [line for line in lines if line.startswith(('license: x', '# cat'))]
    blocks = re.findall(r'^```.*?^```', card.text, re.DOTALL | re.MULTILINE)
    assert card.text.count('```') == 2 * len(blocks) == 6  # those of the template, and no other
    (command,) = blocks[1].splitlines()[1:-1]
    assert command.startswith('timm-ham train')
    prose = card.text.replace(blocks[1], '')
    assert '<script' not in prose and '[x](' not in prose and r'\[x\](javascript:1) \`a\`' in prose


def test_paths_from_a_record_stay_in_the_folder(tmp_path):
    run = Run(shutil.copytree(BUNDLED, tmp_path / 'run'))
    record = run.record()
    for model in ('../../evil', '/tmp/evil', 'resnet20_ham./../../evil', 'hf-hub:a/evil', 'local-dir:evil'):
        run.note(recipe={**record['recipe'], 'model': model})
        with pytest.raises(TimmHamError, match='evil'):
            export(run, tmp_path / 'in' / 'hub')
    run.note(recipe=record['recipe'], data={**record['data'], 'name': '../../evil'})
    assert export(run, tmp_path / 'in' / 'hub') == tmp_path / 'in' / 'hub' / 'resnet20_ham._evil'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'run']
    assert [path.name for path in (tmp_path / 'in').iterdir()] == ['hub']


def test_tokens_stay_in_the_environment(tmp_path, monkeypatch, folder):
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'GITHUB_TOKEN'):
        monkeypatch.setenv(name, 'hf_verysecret')
    run = Run(folder)
    run.note(starts=[environment(1, torch.device('cpu'))])
    exported = export(run, tmp_path / 'hub')
    for path in [*folder.iterdir(), *exported.iterdir()]:
        assert b'verysecret' not in path.read_bytes(), path
