"""W + dW for bfloat16 on the CPU, to the nearest, by numpy and the compiled kernel: torch is not needed.

The bits are those of `delta.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loudmerge.arithmetic.compiled import Halves, Kernel, Strip
from loudmerge.arithmetic.factors import Factors, Product, multiply
from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.meeting import Meeting, blocks, meeting
from loudmerge.planning.plan import Term
from loudmerge.system.arrays import Floats


@dataclass(frozen=True)
class HalfUpdate:
    """What one term adds to its matrix."""

    term: Term
    product: Product

    @classmethod
    def of(cls, term: Term, found: Factors) -> HalfUpdate:
        return cls(term, found.of(term))

    def apply(self, kernel: Kernel, matrix: Halves, first_row: int, out: Halves, space: Floats) -> Kept:
        """As `delta.Update.apply` to the nearest. matrix, out: contiguous. space: BLOCK_ELEMENTS."""
        met = meeting(self.term, first_row, *matrix.shape)
        if met is None:
            return Kept()
        rows, columns = met.inside(first_row)
        if columns.step == 1:
            return self._add(
                kernel, met, _Part.of(matrix, rows, columns), _Part.of(out, rows, columns), space
            )
        # Gate and up in turns: the kernel takes columns that lie one beside the next.
        copy = matrix[rows, columns].copy()
        part = _Part(copy.reshape(-1), 0, copy.shape[1])
        kept = self._add(kernel, met, part, part, space)
        out[rows, columns] = copy
        return kept

    def _add(self, kernel: Kernel, met: Meeting, source: _Part, target: _Part, space: Floats) -> Kept:
        kept, (left, right, scaling, _) = Kept(), self.product
        left = left[met.factor]
        for rows, columns in blocks(met.rows.count, met.columns.count):
            shape = rows.stop - rows.start, columns.stop - columns.start
            delta = space[: shape[0] * shape[1]].reshape(shape)
            multiply(left[rows], right[:, columns], scaling, delta)
            kept.add(Kept(*kernel.nearest(source.strip(rows, columns), delta, target.strip(rows, columns))))
        return kept


class _Part(NamedTuple):
    """Some rows and columns of a matrix: where they start in it, and how far it is from row to row."""

    flat: Halves
    start: int
    stride: int

    @classmethod
    def of(cls, matrix: Halves, rows: slice, columns: slice) -> _Part:
        width = matrix.shape[1]
        return cls(matrix.reshape(-1), rows.start * width + columns.start, width * rows.step)

    def strip(self, rows: slice, columns: slice) -> Strip:
        first = self.start + rows.start * self.stride + columns.start
        count = (rows.stop - rows.start - 1) * self.stride + columns.stop - columns.start
        return self.flat[first : first + count], self.stride
