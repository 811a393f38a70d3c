"""``python -m fxdistill``: the command line."""

import sys

from fxdistill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
