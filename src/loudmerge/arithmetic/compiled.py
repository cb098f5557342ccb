"""The compiled kernel, where there is one, for the tensors of a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loudmerge.arithmetic.balance import Bands
from loudmerge.arithmetic.rounding import Draws

Sums = tuple[float, float]
"""<W' - W, dW> and <dW, dW>."""


def kernel_for(source: Tensor, target: Tensor) -> Kernel | None:
    """It is for bfloat16 in and out, on the CPU."""
    alike = source.dtype is target.dtype is torch.bfloat16
    return kernel() if alike and source.device.type == target.device.type == "cpu" else None


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

    source, delta, target: (rows, columns), delta float32 and contiguous. The last may be the first.
    """

    module: ModuleType

    def nearest(self, source: Tensor, delta: Tensor, target: Tensor) -> Sums:
        """Writes the nearest of source + delta to `target`."""
        weight, out = _side_by_side(source, target)
        sums: Sums = self.module.nearest(*_flat(weight), delta.numpy(), *_flat(out))
        if out is not target:
            target.copy_(out)
        return sums

    def balanced(
        self, source: Tensor, delta: Tensor, target: Tensor, drawn: Drawn, first: int, bands: Bands
    ) -> Sums | None:
        """As nearest, but rounds as Bands.round_; None, and nothing is written, where something is unusual.

        first: the number of the block's first row in `drawn`. bands: those of the block.
        """
        weight, out = _side_by_side(source, target)
        block = *_flat(weight), delta.numpy(), *_flat(out)
        limits = torch.tensor([0, *(part.stop for part in bands.parts())])
        is_done, sums = self.module.balanced(*block, *drawn, first, limits.numpy(), bands.axis)
        if is_done and out is not target:
            target.copy_(out)
        return sums if is_done else None


Drawn = tuple[Any, Any, Any, Any, int]
"""The numbers u of some rows, as the kernel takes them."""


def as_drawn(draws: Draws) -> Drawn:
    """To be made once for all blocks."""
    starts, counts = torch.tensor(draws.segments).T.contiguous()
    arrays = draws.table, torch.stack(draws.offsets), pad(counts.cumsum(0), (1, 0)), starts
    table, offsets, edges, first = (each.numpy() for each in arrays)
    return table, offsets, edges, first, draws.step


def _side_by_side(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are, or twice one copy where the columns of either do not lie one beside the next."""
    if source.stride(1) == target.stride(1) == 1:
        return source, target
    copy = torch.empty(source.shape, dtype=source.dtype).copy_(source)
    return copy, copy


def _flat(block: Tensor) -> tuple[Any, int]:
    """From the first element to the last, as int16, and how far it is from row to row."""
    rows, columns = block.shape
    stride = block.stride(0)
    return block.as_strided(((rows - 1) * stride + columns,), (1,)).view(torch.int16).numpy(), stride
