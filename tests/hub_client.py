"""A process that uses the Hub, whose address huggingface_hub reads when it is imported, and what to call in it."""

import contextlib
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


class Client:
    """Calls functions in a process of its own, started with the Hub at `url` and what it downloads under `home`."""

    def __init__(self, url, home, offline=False):
        self.environment = {
            'HF_ENDPOINT': url,
            'HF_HOME': str(home),
            'HF_HUB_OFFLINE': str(int(offline)),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        }
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))

    def __enter__(self):
        kept = dict(os.environ)
        os.environ.update(self.environment)
        try:
            self(os.getpid)  # starts the process
        finally:
            os.environ.clear()
            os.environ.update(kept)
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def __call__(self, function, *arguments, **keywords):
        """What the function returns or raises."""
        return self.pool.submit(function, *arguments, **keywords).result()

    def cli(self, *words, token=None):
        """Exit status and all that `timm-ham` with these words prints."""
        return self(cli, [str(word) for word in words], token)


def cli(words, token):
    from timm_ham.cli import main

    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(words)
        except SystemExit as stop:
            status = stop.code
    return status, printed.getvalue()


def golden(name, **keywords):
    """The golden logits of a model by timm's own call, and its labels."""
    import timm

    import timm_ham  # noqa: F401
    from timm_ham.publishing.golden import golden_logits

    model = timm.create_model(name, pretrained=True, **keywords).eval()
    return golden_logits(model).tolist(), model.pretrained_cfg['label_names']


def open_dataset(name):
    """Sizes and class names of a dataset, by the training's own way to it."""
    from timm_ham.training.data import decode
    from timm_ham.training.sources import open_dataset

    data = open_dataset(name)
    images = decode(data.part('test')).images
    return data.source, data.label_names, tuple(images.shape)


def registered(folders=None, namespace=None):
    """Register these folders alone, as of this namespace; the Hub id in timm's cfg, and the names with weights.

    Without arguments all is as it was.
    """
    import importlib
    import warnings

    import timm

    from timm_ham.models import weights, zoo

    importlib.reload(weights)
    if folders is not None:
        weights.hub_folders, weights.NAMESPACE = lambda: iter(folders), namespace
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        importlib.reload(zoo)
    return timm.get_pretrained_cfg('resnet20_ham').hf_hub_id, timm.list_pretrained('resnet20_ham*')


def set_namespace(namespace):
    """What TIMM_HAM_NAMESPACE is for, in a process that runs already."""
    from timm_ham.publishing import publish

    publish.NAMESPACE = namespace


def run(code, **names):
    """Run Python code with these names; its strings."""
    exec(code, names)
    return {name: value for name, value in names.items() if isinstance(value, str)}
