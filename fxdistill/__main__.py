"""``python -m fxdistill``: the command line."""

import sys

from fxdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
