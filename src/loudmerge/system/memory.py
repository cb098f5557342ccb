"""Memory for the bytes of tensors, taken from the operating system and given back to it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

LARGE_BYTES = 1 << 20
"""From this size on they are worth pages of their own."""

_TILE = 1 << 17
"""Elements that are turned at a time: they stay in a core's cache."""


def buffer(nbytes: int) -> Bytes:
    """New bytes. Large ones start on a page, and their memory is gone with their last user.

    malloc keeps the space of what was freed, up to 32 MiB, split among its arenas: with each layer a merge
    would hold a little more of it (mallopt(3), M_MMAP_THRESHOLD).
    """
    if nbytes < LARGE_BYTES:
        return np.empty(nbytes, np.uint8)
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def array(shape: Sequence[int], dtype: Any) -> Array:
    """A new array, its memory as that of `buffer`."""
    made: Array = buffer(math.prod(shape) * np.dtype(dtype).itemsize).view(dtype)
    return made.reshape(shape)


def turned(matrix: Array) -> Array:
    """(rows, columns) -> (columns, rows), copied, in memory as that of `array`."""
    rows, columns = matrix.shape
    made = array((columns, rows), matrix.dtype)
    step = max(1, _TILE // max(1, columns))
    for start in range(0, rows, step):
        made[:, start : start + step] = matrix[start : start + step].T
    return made
