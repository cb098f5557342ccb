"""Arguments that several commands of the matrix take. Standard library only."""

from __future__ import annotations

import argparse


def at_least_one(text: str) -> int:
    """An integer from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number
