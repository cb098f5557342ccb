"""`python -m loudmerge`, and the console script `loudmerge`: the command, in a process of its own."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from loudmerge.cli import main

OBJECTS = 100_000
"""New objects between two garbage collections: to import torch makes a million, which all stay."""


def run() -> NoReturn:
    """Runs the command and ends the process with its exit code.

    Only a process's owner may collect so seldom and end without taking the interpreter apart. Together this
    saves a quarter of what importing torch costs.
    """
    gc.set_threshold(OBJECTS)
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    run()
