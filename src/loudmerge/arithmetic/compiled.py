"""The compiled kernel, where there is one, for blocks of bfloat16 on the CPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from loudmerge.arithmetic.kept import Sums
from loudmerge.system.arrays import Floats

Halves = npt.NDArray[np.int16]
"""The bits of bfloat16."""

Strip = tuple[Halves, int]
"""A block as the kernel takes it: from its first element to its last, and how far it is from row to row."""

Drawn = tuple[Any, Any, Any, Any, int]
"""The numbers u of some rows, as the kernel takes them: of `rounding.Draws.arrays`."""


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
    """loudmerge.arithmetic.kernel. The target may be the source; delta is contiguous."""

    module: ModuleType

    def nearest(self, source: Strip, delta: Floats, target: Strip) -> Sums:
        """Writes the nearest of source + delta to `target`. delta: (rows, columns)."""
        sums: Sums = self.module.nearest(*source, delta, *target)
        return sums

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
        """As Bands.round_; None, and nothing is written, where something is unusual.

        source, delta, target: (rows, columns). first: the number of the block's first row in `drawn`. bands:
        where each of the block's ends, along the axis.
        """
        weight, out = source, target
        if not source.strides[1] == target.strides[1] == source.itemsize:
            weight = out = source.copy()
        block = *strip(weight), delta, *strip(out)
        is_done, sums = self.module.balanced(*block, *drawn, first, np.array([0, *bands]), axis)
        if is_done and out is not target:
            target[...] = out
        return sums if is_done else None


def strip(block: Halves) -> Strip:
    """A block whose columns lie one beside the next."""
    rows, columns = block.shape
    stride = block.strides[0] // block.itemsize
    count = (rows - 1) * stride + columns
    return np.lib.stride_tricks.as_strided(block, (count,), (block.itemsize,)), stride
