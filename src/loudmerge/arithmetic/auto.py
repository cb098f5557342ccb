"""How `auto` rounds a matrix: by what the nearest keeps of the update of a few of its rows."""

from __future__ import annotations

from collections.abc import Iterator

NEAREST_KEEPS = 0.99
"""Where the nearest keeps as much of an update, `auto` takes it: it costs least (docs/rounding.md)."""

CLOSING_KEEPS = 0.5
"""Where the nearest keeps as much of what a last layer's MLP writes through, `auto` leaves it to chance."""

_SAMPLES, _SAMPLE_ROWS = 2, 32
"""How many runs of how many rows tell what rounding to the nearest keeps of a matrix's update."""


def sampled(rows: int) -> Iterator[tuple[int, int]]:
    """The first row, and the one after the last, of each run of a matrix's rows that `auto` looks at."""
    for first in range(0, rows, max(_SAMPLE_ROWS, rows // _SAMPLES)):
        yield first, min(first + _SAMPLE_ROWS, rows)


def chosen(kept: float, *, closing: bool) -> str:
    """What `auto` rounds a matrix by. kept: by the nearest, of its update. closing: `planning.closing`."""
    if kept >= NEAREST_KEEPS:
        return "nearest"
    return "stochastic" if closing and kept >= CLOSING_KEEPS else "balanced"
