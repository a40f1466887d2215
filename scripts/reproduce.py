"""python scripts/reproduce.py --table 4 --arch resnet20 --seeds 3: `timm-ham reproduce` from a checkout."""

import sys

from timm_ham.cli import main

main(['reproduce', *sys.argv[1:]])
