"""The arithmetic of a merge, in float32: W' = round(W + s * L @ R).

Pure tensor functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loudmerge.arithmetic.balance import Bands
from loudmerge.arithmetic.compiled import Drawn, Kernel, kernel
from loudmerge.arithmetic.factors import Factors, multiply
from loudmerge.arithmetic.kept import Kept, Sums
from loudmerge.arithmetic.meeting import blocks, meeting
from loudmerge.arithmetic.rounding import DROPPED, Dither, Draws, stochastic_
from loudmerge.arithmetic.sizes import BLOCK_ELEMENTS
from loudmerge.planning.plan import Term
from loudmerge.system.tensors import CPU

BALANCED_FROM = 1 << 15
"""Elements from which on the compiled kernel is worth being loaded, half a second once, to balance them."""


class Workspace:
    """Float32 buffers of one thread, reused from block to block."""

    def __init__(self, device: torch.device) -> None:
        self._held: list[Tensor] = []
        self._blocks: dict[tuple[int, int], list[Tensor]] = {}
        self._device = device

    def blocks(self, rows: int, columns: int) -> list[Tensor]:
        """Four buffers (rows, columns) whose content is undefined."""
        shape, count = (rows, columns), rows * columns
        if not self._held or self._held[0].numel() < count:
            self._held = [torch.empty(count, dtype=torch.float32, device=self._device) for _ in range(4)]
            self._blocks = {}
        if shape not in self._blocks:
            self._blocks[shape] = [held[:count].view(shape) for held in self._held]
        return self._blocks[shape]


@dataclass(frozen=True)
class Update:
    """What one term adds to its matrix: `factors.Product`, as tensors."""

    term: Term
    rows: Tensor
    columns: Tensor
    scaling: float
    peft_rounds_delta: bool
    is_usual: bool = True

    @classmethod
    def of(cls, term: Term, found: Factors, device: torch.device = CPU) -> Update:
        """Made once, for all pieces and looks at the matrix."""
        rows, columns, scaling, usual = found.of(term)
        # Of a factor that lies transposed: so torch's product knows it, and so does the one that PEFT makes.
        left, right = (torch.from_numpy(factor).to(device) for factor in (rows, columns))
        return cls(term, left, right, scaling, found.peft_rounds_delta, usual)

    def apply(
        self,
        matrix: Tensor,
        first_row: int,
        rounding: str,
        space: Workspace,
        out: Tensor,
        dither: Dither | None = None,
    ) -> Kept:
        """Updates the part of `matrix` that the term is for, rounding into `out`.

        matrix, out: rows first_row, first_row + 1, … of a matrix on disk, (rows, d2); the base's, and OUT's.
        Both may be the same tensor.
        rounding: "nearest" rounds W + dW once, "peft" rounds dW first where PEFT's merge does, "stochastic"
        and "balanced" draw from `dither`, for which the rows are the matrix's. For "balanced" no band of
        outputs (loudmerge.arithmetic.balance) may be cut.
        """
        met = meeting(self.term, first_row, *matrix.shape)
        if met is None:
            return Kept()
        source, target = (each[met.inside(first_row)] for each in (matrix, out))
        draws = bands = None
        if rounding in {"stochastic", "balanced"} and out.dtype in DROPPED:
            if dither is None:
                raise ValueError(f"{rounding} rounding needs a dither")
            draws = dither.of(met.rows, met.columns)
            outputs = met.columns if met.axis else met.rows
            bands = Bands(outputs, met.axis) if rounding == "balanced" else None
        helps = bands is not None and source.numel() >= BALANCED_FROM and self.is_usual
        faster = kernel() if helps and _are_halves(source, target) else None
        drawn = draws.arrays() if faster and draws else None
        rounds = _Rounding(rounding == "peft", self.peft_rounds_delta, draws, bands, faster, drawn)
        return self._add_blocks(source, target, self.rows[met.factor], space, rounds)

    def _add_blocks(
        self, source: Tensor, target: Tensor, rows: Tensor, space: Workspace, rounds: _Rounding
    ) -> Kept:
        kept = Kept()
        for part in rounds.parts(source):
            block, left, right = source[part], rows[part[0]], self.columns[:, part[1]]
            delta = space.blocks(*block.shape)[0]
            if rounds.as_peft or delta.device.type != "cpu":
                torch.mm(left, right, out=delta)
                if self.scaling != 1.0:
                    delta.mul_(self.scaling)
            else:
                # As without torch (`halves.py`): the last bits hang on what computes them.
                multiply(left.numpy(), right.numpy(), self.scaling, delta.numpy())
            kept.add(rounds.add(part[0], block, delta, target[part], space))
        return kept


def _are_halves(*blocks: Tensor) -> bool:
    return all(block.dtype is torch.bfloat16 and block.device.type == "cpu" for block in blocks)


@dataclass(frozen=True)
class _Rounding:
    """How a part of a matrix is rounded.

    as_peft: by torch's own product, and dW first where it is to be rounded twice. draws: by chance, each
    element for itself or, with bands, balanced in these. kernel: what computes it instead of tensor
    functions, with the draws as it takes them.
    """

    as_peft: bool
    twice: bool
    draws: Draws | None
    bands: Bands | None
    kernel: Kernel | None
    drawn: Drawn | None

    def parts(self, source: Tensor) -> Iterator[tuple[slice, slice]]:
        """The rows and columns that are worked on at a time. No band of them is cut."""
        if self.draws is None and not self.as_peft:
            yield from blocks(*source.shape)
            return
        rows, columns = source.shape
        step = max(1, BLOCK_ELEMENTS // columns)
        for part in self._rows(rows, step):
            yield part, slice(0, columns)

    def _rows(self, rows: int, step: int) -> Iterator[slice]:
        if self.bands is None or self.bands.axis == 1:
            yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
            return
        start = 0
        for band in self.bands.parts():
            if band.stop - start > step and band.start > start:
                yield slice(start, band.start)
                start = band.start
        yield slice(start, rows)

    def add(self, part: slice, source: Tensor, delta: Tensor, target: Tensor, space: Workspace) -> Kept:
        """Writes source + delta to `target`, all of these rows."""
        bands = self.bands and self.bands.of(part)
        sums = self._by_kernel(part.start, source, delta, target, bands)
        if sums is None:
            sums = self._by_tensors(part.start, source, delta, target, bands, space)
        return Kept(*sums)

    def _by_kernel(
        self, first: int, source: Tensor, delta: Tensor, target: Tensor, bands: Bands | None
    ) -> Sums | None:
        if self.kernel is None or self.drawn is None or bands is None:
            return None
        weight, out = (block.view(torch.int16).numpy() for block in (source, target))
        ends = [part.stop for part in bands.parts()]
        return self.kernel.balanced(weight, delta.numpy(), out, self.drawn, first, ends, bands.axis)

    def _by_tensors(
        self, first: int, source: Tensor, delta: Tensor, target: Tensor, bands: Bands | None, space: Workspace
    ) -> Sums:
        _, weight, result, scratch = space.blocks(*source.shape)
        weight.copy_(source)
        torch.add(weight, delta.to(source.dtype) if self.as_peft and self.twice else delta, out=result)
        if self.draws is not None:
            drawn = self.draws.fill(first, scratch.view(torch.int32))
            if bands is None:
                stochastic_(result, drawn, target.dtype)
            else:
                bands.round_(result, weight, delta, drawn, target.dtype)
        target.copy_(result)
        result.copy_(target)
        result.sub_(weight)
        return _sums(result.view(-1), delta.view(-1))


def _sums(change: Tensor, delta: Tensor) -> Sums:
    along, total = torch.dot(change, delta).item(), torch.dot(delta, delta).item()
    if math.isfinite(along + total) and total:
        return along, total
    # Squares of what float32 can hold that it cannot.
    change, delta = change.double(), delta.double()
    return torch.dot(change, delta).item(), torch.dot(delta, delta).item()


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m * (W + dW) / ||W + dW||, the norm over the in axis; all in float32.

    weight, delta: (out, in), magnitude: (out,).
    Source: peft/tuners/lora/variants.py, `DoraLinearVariant.merge_safe`.
    """
    summed = weight + delta
    norm: Tensor = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
    return magnitude[:, None] / norm * summed
