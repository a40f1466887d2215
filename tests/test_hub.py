"""Publishing and downloading, by the real clients over HTTP, against a small Hub."""

import hashlib
import importlib

import pytest
from safetensors.torch import load_file, save

from timm_ham import TimmHamError, __version__
from timm_ham.models.loading import load_model
from timm_ham.publishing.golden import golden_logits

from . import hub_client
from .conftest import BUNDLED, make_dataset, random_images, save_parquet
from .hub_client import Client
from .hub_server import TOKENS

NAME = BUNDLED.name
UPLOADED = {'README.md', 'config.json', 'model.safetensors', 'golden.json', 'run.json', 'metrics.jsonl', 'curves.png'}
UPLOADED |= {'quality.json', 'quality.png', 'gradcam.png'}
WRITER = 'hf_writer'


@pytest.fixture(scope='module')
def offline(online, tmp_path_factory):
    with Client('http://127.0.0.1:9', online[2], offline=True) as client:
        yield client


@pytest.fixture(scope='module')
def wanted():
    return golden_logits(load_model(str(BUNDLED)).eval()).tolist()


@pytest.fixture
def published(hub, folder):
    return hub.add(f'org/{NAME}', {path.name: path.read_bytes() for path in folder.iterdir()})


def test_publish_shows_and_then_uploads_in_one_commit(hub, client, folder, online):
    (folder / 'notes.txt').write_text('mine')
    status, said = client.cli('publish', folder, '--namespace', 'org')
    assert status == 0 and 'nothing was uploaded: do so by --yes' in said and not hub.requests
    for name in UPLOADED:
        assert name in said
    assert '1,105,444  f190d2b9e60b7b4c4e2100fd49630468205bee848076f8be8b85023979abdc5b' in said

    status, said = client.cli('publish', folder, '--namespace', 'org', '--yes', '--private', token=WRITER)
    assert status == 0, said
    repo = hub.repos['models', f'org/{NAME}']
    assert repo.private and len(repo.commits) == 2 and repo.tags == {f'v{__version__}': repo.branches['main']}
    assert set(repo.files()) == UPLOADED and f'{hub.url}/org/{NAME}/commit/{repo.branches["main"]}' in said
    assert repo.files()['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    card = repo.files()['README.md'].decode()
    assert f"timm.create_model('hf-hub:org/{NAME}', pretrained=True)" in card
    assert hub.sent('GET', 'resolve/.*/model.safetensors')  # it was read back
    assert WRITER not in said
    for path in [*folder.rglob('*'), *online[2].rglob('*')]:
        assert path.is_dir() or WRITER.encode() not in path.read_bytes(), path
    assert not (folder / 'published.json').exists()  # a fork's commit is not what the package's own names stand for


@pytest.mark.parametrize('step', ['PUT /lfs/', 'POST .*/commit/', 'POST .*/tag/', 'GET .*model.safetensors'])
def test_interrupted_publishing_goes_on(hub, client, folder, step):
    words = ('publish', folder, '--namespace', 'org', '--yes')
    hub.lfs.clear()
    hub.failing.add(step)
    status, said = client.cli(*words, token=WRITER)
    assert status == 1 and 'published' not in said and said.splitlines()[-1].startswith('timm-ham: ')
    hub.failing.clear()
    hub.requests.clear()
    puts = set(hub.lfs)
    assert client.cli(*words, token=WRITER)[0] == 0
    again = {path.rpartition('/')[2] for path in hub.sent('PUT', '/lfs/')}
    assert not again & puts and len(again | puts) == 4  # weights and three pictures, each once
    repo = hub.repos['models', f'org/{NAME}']
    assert len(repo.commits) == 2 and list(repo.tags.values()) == [repo.branches['main']]

    hub.requests.clear()
    assert client.cli(*words, token=WRITER)[0] == 0
    assert len(repo.commits) == 2 and not hub.sent('PUT', '') and not hub.sent('POST', '/commit/')


def test_other_weights_do_not_take_the_tag(hub, client, folder):
    words = ('publish', folder, '--namespace', 'org', '--yes')
    assert client.cli(*words, token=WRITER)[0] == 0
    metrics = (folder / 'metrics.jsonl').read_text()
    (folder / 'metrics.jsonl').write_text(metrics + metrics.splitlines()[-1] + '\n')
    status, said = client.cli(*words, token=WRITER)
    assert status == 1 and f'has a tag v{__version__} already, on other files' in said


def test_a_public_repository_takes_nothing_private(hub, client, folder):
    hub.add(f'org/{NAME}', {})
    words = ('publish', folder, '--namespace', 'org', '--yes')
    status, said = client.cli(*words, '--private', token=WRITER)
    assert status == 1 and 'is there and public' in said and not hub.repos['models', f'org/{NAME}'].files()


def test_what_comes_back_is_compared(hub, client, folder):
    """A copy that is whole by its own hash but not the one that was sent."""
    state = load_file(folder / 'model.safetensors')
    state['head.fc.bias'] += 1e-6
    content = save(state)
    digests = [hashlib.sha256(c).hexdigest() for c in ((folder / 'model.safetensors').read_bytes(), content)]
    config = (folder / 'config.json').read_text().replace(*digests).encode()
    hub.swapped.update({'model.safetensors': content, 'config.json': config})
    status, said = client.cli('publish', folder, '--namespace', 'org', '--yes', token=WRITER)
    assert status == 1 and 'gives other logits than' in said and 'published' not in said


def test_branches_and_pull_requests(hub, client, folder):
    words = ('publish', folder, '--namespace', 'org', '--yes')
    assert client.cli(*words, '--revision', 'next', token=WRITER)[0] == 0
    repo = hub.repos['models', f'org/{NAME}']
    assert set(repo.files('next')) == UPLOADED and not repo.files() and not repo.tags
    for _ in range(2):  # the second call finds the pull request of the first
        status, said = client.cli(*words, '--pr', token=WRITER)
        assert status == 0 and len(repo.pull_requests) == 1, said
    assert set(repo.files('refs/pr/1')) == UPLOADED and not repo.files()


@pytest.mark.parametrize(
    'token, namespace, message',
    [
        (None, 'org', 'no token for the Hub: log in by hf auth login, or set HF_TOKEN'),
        ('hf_unknown', 'org', 'the Hub does not know the token'),
        ('hf_reader', 'org', 'the token can only read: make one that can write'),
        (WRITER, 'others', "'others' is not yours: choose --namespace from ann, org"),
        (WRITER, 'a b', 'a b'),
    ],
)
def test_who_may_not_publish(hub, client, folder, token, namespace, message):
    status, said = client.cli('publish', folder, '--namespace', namespace, '--yes', token=token)
    assert status == 1 and message in said.splitlines()[-1] and said.splitlines()[-1].startswith('timm-ham: ')
    assert not hub.repos and not any(name in said for name in TOKENS)


def test_what_is_not_published(hub, client, folder):
    (folder / 'pytorch_model.bin').write_bytes(b'')
    assert 'holds pytorch_model.bin: remove it' in client.cli('publish', folder, '--yes', token=WRITER)[1]
    (folder / 'pytorch_model.bin').unlink()
    (folder / 'golden.json').unlink()
    assert 'lacks golden.json: export the run again' in client.cli('publish', folder, '--yes', token=WRITER)[1]
    assert 'there is no folder nowhere' in client.cli('publish', 'nowhere', '--yes', token=WRITER)[1]
    assert not hub.requests


def test_download_then_offline(hub, client, offline, published, wanted):
    for name in (f'hf-hub:org/{NAME}', f'hf-hub:org/{NAME}@{published.branches["main"]}'):
        logits, labels = client(hub_client.golden, name)
        assert logits == wanted and labels[3] == 'cat'
    assert not hub.sent('GET', 'pytorch_model')
    assert offline(hub_client.golden, f'hf-hub:org/{NAME}') == (wanted, labels)
    status, said = client.cli('verify', f'hf-hub:org/{NAME}')
    assert status == 0 and said.count('ok  ') == 5, said
    status, said = offline.cli('verify', f'hf-hub:org/{NAME}')
    assert status == 0 and said.count('ok  ') == 5, said
    status, said = offline.cli('verify', 'hf-hub:org/other.cifar10')
    assert status == 1 and said.startswith('timm-ham: hf-hub:org/other.cifar10/config.json: ')


def test_the_cards_code_runs(hub, client, folder):
    hub.add(f'timm-ham/{NAME}', {path.name: path.read_bytes() for path in folder.iterdir()})
    code = (folder / 'README.md').read_text().partition('```python\n')[2].partition('```')[0]
    assert (
        client(hub_client.run, code, image=random_images(1, (40, 50))[0])['label']
        in load_model(NAME).pretrained_cfg['label_names']
    )
    assert hub.sent('GET', f'timm-ham/{NAME}/resolve/.*safetensors')


def test_no_such_repository(hub, client):
    status, said = client.cli('evaluate', f'hf-hub:org/{NAME}')
    assert status == 1 and said.startswith(f'timm-ham: hf-hub:org/{NAME}/config.json: it does not exist, or no valid')


def test_damaged_in_the_cache(hub, client, offline, published, online):
    """A file cut short or altered after its download is reported, by the name of what to remove, and then got again."""
    client(hub_client.golden, f'hf-hub:org/{NAME}')
    (weights,) = (online[2] / 'hub').glob('models--*/snapshots/*/model.safetensors')
    content = weights.read_bytes()
    for damaged in (content[:-1000], content[:-1] + bytes([content[-1] ^ 1]), b''):
        weights.resolve().write_bytes(damaged)
        for process in (client, offline):
            with pytest.raises(TimmHamError, match=r'SHA-256 differs\): it is truncated or altered, remove it') as told:
                process(hub_client.golden, f'hf-hub:org/{NAME}')
            assert str(weights.resolve()) in str(told.value)
    weights.resolve().unlink()
    client(hub_client.golden, f'hf-hub:org/{NAME}')


def test_a_swapped_file_on_the_hub(hub, client, published):
    """What the server has is held against the config too."""
    files = dict(published.files())
    files['model.safetensors'] = files['model.safetensors'][:-1] + b'\0'
    published.branches['main'] = published.commit(files)
    with pytest.raises(TimmHamError, match='SHA-256 differs'):
        client(hub_client.golden, f'hf-hub:org/{NAME}')


@pytest.fixture
def register(client, offline):
    """Registers a folder alone, in both processes, while a test runs."""

    def register(folder):
        offline(hub_client.registered, [folder], 'org')
        return client(hub_client.registered, [folder], 'org')

    yield register
    for process in (client, offline):
        process(hub_client.registered)


def test_weights_left_out_of_the_wheel(client, offline, register, published, folder, wanted):
    """Without its weights a folder stands for the commit it was published as, and only for the very same weights."""
    (folder / 'model.safetensors').unlink()
    assert register(folder) == (None, [])
    commit = published.branches['main']
    (folder / 'published.json').write_text(f'{{"revision": "{commit}"}}')
    assert register(folder) == (f'org/{NAME}@{commit}', [NAME])
    for process in (client, offline):
        assert process(hub_client.golden, 'resnet20_ham')[0] == wanted
    # Another config and other weights in the repository agree with each other, but not with the package.
    config = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(config.replace('f190d2b9', '00000000'))
    register(folder)
    with pytest.raises(TimmHamError, match='SHA-256 differs'):
        client(hub_client.golden, 'resnet20_ham')


def test_the_namespaces_own_commit_is_noted(hub, client, folder):
    client(hub_client.set_namespace, 'org')
    try:
        assert client.cli('publish', folder, '--namespace', 'org', '--yes', token=WRITER)[0] == 0
    finally:
        client(hub_client.set_namespace, 'timm-ham')
    repo = hub.repos['models', f'org/{NAME}']
    assert (folder / 'published.json').read_text() == f'{{"revision": "{repo.branches["main"]}"}}\n'
    assert 'published.json' not in repo.files()


def test_the_namespace_is_overridden_by_the_environment(monkeypatch):
    from timm_ham.models import weights

    assert weights.NAMESPACE == 'timm-ham'
    monkeypatch.setenv('TIMM_HAM_NAMESPACE', 'mirror')
    assert importlib.reload(weights).NAMESPACE == 'mirror'
    monkeypatch.undo()
    importlib.reload(weights)


def test_a_dataset_from_the_hub(hub, client, tmp_path):
    split = make_dataset(random_images(4), [0, 1, 0, 1])
    files = save_parquet(tmp_path / 'pets', train=split, test=split).iterdir()
    hub.add(
        'org/pets', {'README.md': b'# pets\n', **{f'data/{path.name}': path.read_bytes() for path in files}}, 'datasets'
    )
    source, labels, shape = client(hub_client.open_dataset, 'org/pets')
    assert source == 'org/pets on the Hugging Face Hub' and labels == ('cat', 'dog') and shape == (4, 8, 8, 3)
