"""``python -m asyncio_native``: the command line, see `asyncio_native.cli`."""

import sys

from asyncio_native.cli import main

# The guard counts: a process that multiprocessing spawns imports this module under another name.
if __name__ == "__main__":
    sys.exit(main())
