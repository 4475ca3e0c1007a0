"""``python -m alignlab`` and ``torchrun -m alignlab``: the same as the command ``alignlab``."""

import sys

from alignlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
