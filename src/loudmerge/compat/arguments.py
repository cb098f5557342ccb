"""What several commands of the matrix have: arguments, exit codes, their folder. Standard library only."""

from __future__ import annotations

import argparse
from pathlib import Path

HOME = ".compat"
"""The folder of a checkout that they write into."""

DONE, SHORT, USAGE, ALIKE, NEWER, ENVIRONMENT = 0, 1, 2, 3, 4, 5
"""Exit codes. ALIKE: the ends of a bisection do not differ. NEWER: a release that no cell has is there."""


def add_results(parser: argparse.ArgumentParser) -> None:
    """`--results DIR`"""
    parser.add_argument("--results", type=Path, default=Path(HOME, "results"), metavar="DIR")


def at_least_one(text: str) -> int:
    """An integer from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number from 1 on")
    return int(text)
