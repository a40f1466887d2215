"""accelerate launch scripts/train.py --recipe cifar_fast: `timm-ham train` for accelerate's launcher."""

import sys

from timm_ham.cli import main

main(['train', *sys.argv[1:]])
