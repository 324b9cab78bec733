"""``python -m lightning_rejuv`` is the command ``lightning-rejuv``."""

import sys

from lightning_rejuv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
