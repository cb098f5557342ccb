"""W + dW for bfloat16 on the CPU, to the nearest, by numpy and the compiled kernel: torch is not needed.

The bits are those of `delta.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from loudmerge.arithmetic.compiled import Halves, Kernel
from loudmerge.arithmetic.factors import Factors, Product, multiply
from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.meeting import blocks, meeting
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
        """As `delta.Update.apply` to the nearest. space: BLOCK_ELEMENTS."""
        kept = Kept()
        met = meeting(self.term, first_row, *matrix.shape)
        if met is None:
            return kept
        source, target = (each[met.inside(first_row)] for each in (matrix, out))
        left, right, scaling, _ = self.product
        left = left[met.factor]
        for part in blocks(*source.shape):
            block = source[part]
            delta = space[: block.size].reshape(block.shape)
            multiply(left[part[0]], right[:, part[1]], scaling, delta)
            kept.add(Kept(*kernel.nearest(block, delta, target[part])))
        return kept
