"""python scripts/benchmark.py --help: `timm-ham bench` from a checkout."""

import sys

from timm_ham.cli import main

main(['bench', *sys.argv[1:]])
