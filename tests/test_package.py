"""What importing the package costs."""

import subprocess
import sys


def test_import_is_light():
    """torch and timm alone: a person who only loads a model needs neither accelerate nor datasets in memory."""
    code = 'import timm, sys; before = set(sys.modules); import timm_ham; print(*set(sys.modules) - before)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'timm_ham' in out
    assert {module.partition('.')[0] for module in out} <= {'timm_ham', 'hashlib', '_hashlib', '_blake2'}
