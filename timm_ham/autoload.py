"""Make `import timm` bring timm_ham along, by a start-up file that a person switches on and off.

Python executes the lines of `*.pth` files in site-packages that begin with `import` when it starts. Ours puts a finder
in front of the import system that does nothing until `timm` is imported, and then imports timm_ham after it. Once
timm_ham is uninstalled, the file does nothing.
"""

import os
import site
import sysconfig
from pathlib import Path
from typing import List, Optional

from timm_ham.errors import TimmHamError

__all__ = ['START_UP_FILE', 'installed', 'start_up_line', 'switch_off', 'switch_on']

START_UP_FILE = 'timm_ham_autoload.pth'

# Runs in every start of the interpreter, so it imports nothing that is not there anyway.
_HOOK = """
class TimmHamAutoload:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if name != 'timm' or self.busy:
            return None
        self.busy = True  # for the others to find it
        try:
            from importlib.util import find_spec
            spec = find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            def load_both(module):
                load(module)
                try:
                    import timm_ham
                except Exception as error:  # timm must work whatever has become of timm_ham
                    if getattr(error, 'name', None) != 'timm_ham':
                        print('timm_ham was not loaded with timm:', repr(error), file=sys.stderr)
            spec.loader.exec_module = load_both
        return spec
sys.meta_path.insert(0, TimmHamAutoload())
"""


def start_up_line() -> str:
    """The line that the start-up file holds."""
    return f'import sys; exec({_HOOK!r})\n'


def _folders() -> List[Path]:
    """Where start-up files are read from, the environment's own first."""
    paths = [sysconfig.get_path('purelib'), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return list(dict.fromkeys(map(Path, paths)))


def installed() -> Optional[Path]:
    """The start-up file, if there is one."""
    return next((file for folder in _folders() if (file := folder / START_UP_FILE).exists()), None)


def switch_on() -> Path:
    """Write the start-up file; returns where.

    Raises:
        TimmHamError: If no folder of the environment can be written to.
    """
    folders = _folders()
    for folder in [file.parent for file in [installed()] if file] or folders:
        try:
            part = folder / f'{START_UP_FILE}.part'
            part.write_text(start_up_line(), encoding='utf-8')
            os.replace(part, folder / START_UP_FILE)
        except OSError:
            continue
        return folder / START_UP_FILE
    raise TimmHamError(
        f'no permission to write {START_UP_FILE} to {" or ".join(map(str, folders))}: '
        'use an environment of your own, or put `import timm_ham` into your script'
    )


def switch_off() -> List[Path]:
    """Remove the start-up file wherever it is; returns what was removed.

    Raises:
        TimmHamError: If it can't be removed.
    """
    removed = []
    while file := installed():
        try:
            file.unlink()
        except OSError as error:
            raise TimmHamError(f'no permission to remove {file}: ask its owner ({error.strerror})') from None
        removed.append(file)
    return removed
