"""``python -m vgkern``: the same as ``vgkern``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
