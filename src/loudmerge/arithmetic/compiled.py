"""The compiled kernel, where there is one, for blocks of bfloat16 on the CPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from loudmerge.arithmetic.kept import Sums
from loudmerge.system.arrays import Floats

Halves = npt.NDArray[np.int16]
"""The bits of bfloat16."""

Drawn = tuple[Any, Any, Any, Any, int]
"""The numbers u of some rows, as the kernel takes them: of `rounding.Draws.arrays`."""

T = TypeVar("T")


@cache
def kernel() -> Kernel | None:
    """None without a numba that fits the numpy there is."""
    try:
        from loudmerge.arithmetic import kernel as module  # noqa: PLC0415 - numba takes its time
    except ImportError:
        return None
    return Kernel(module)


@dataclass(frozen=True)
class Kernel:
    """loudmerge.arithmetic.kernel.

    source, delta, target: (rows, columns), delta contiguous. The last may be the first.
    """

    module: ModuleType

    def nearest(self, source: Halves, delta: Floats, target: Halves) -> Sums:
        """Writes the nearest of source + delta to `target`."""

        def write(weight: Halves, out: Halves) -> Sums:
            sums: Sums = self.module.nearest(*_flat(weight), delta, *_flat(out))
            return sums

        return _side_by_side(source, target, write)

    def balanced(
        self,
        source: Halves,
        delta: Floats,
        target: Halves,
        drawn: Drawn,
        first: int,
        bands: Sequence[int],
        axis: int,
    ) -> Sums | None:
        """As nearest, but rounds as Bands.round_; None, and nothing is written, where something is unusual.

        first: the number of the block's first row in `drawn`. bands: where each of the block's ends, along
        the axis.
        """
        limits = np.array([0, *bands])

        def write(weight: Halves, out: Halves) -> Sums | None:
            block = *_flat(weight), delta, *_flat(out)
            is_done, sums = self.module.balanced(*block, *drawn, first, limits, axis)
            return sums if is_done else None

        return _side_by_side(source, target, write)


def _side_by_side(source: Halves, target: Halves, write: Callable[[Halves, Halves], T]) -> T:
    """Has it written to `target`, or by way of a copy where columns do not lie one beside the next."""
    if source.strides[1] == target.strides[1] == source.itemsize:
        return write(source, target)
    copy = np.ascontiguousarray(source)
    copy = copy.copy() if copy is source else copy
    done = write(copy, copy)
    if done is not None:
        target[...] = copy
    return done


def _flat(block: Halves) -> tuple[Halves, int]:
    """From the first element to the last, and how far it is from row to row."""
    rows, columns = block.shape
    stride = block.strides[0] // block.itemsize
    count = (rows - 1) * stride + columns
    return np.lib.stride_tricks.as_strided(block, (count,), (block.itemsize,)), stride
