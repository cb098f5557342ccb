"""Arguments that several commands of the matrix take. Standard library only."""

from __future__ import annotations

import argparse


def at_least_one(text: str) -> int:
    """An integer from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number from 1 on")
    return int(text)
