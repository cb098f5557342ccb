"""What computes a piece, one of two lanes, and what became of it.

Most of what a merge computes is LoRA on bfloat16, rounded to the nearest; `HalfLane` does that without torch,
whose import takes a second. `tensorlane.py` does all of it, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from loudmerge.arithmetic.auto import chosen, sampled
from loudmerge.arithmetic.compiled import Halves, Kernel
from loudmerge.arithmetic.factors import Factors
from loudmerge.arithmetic.halves import HalfUpdate
from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.sizes import BLOCK_ELEMENTS
from loudmerge.executing.content import Content, Lent
from loudmerge.executing.pieces import Piece
from loudmerge.system.arrays import HALF_INFINITY, HALF_SIZE, Floats
from loudmerge.system.memory import Array, Bytes, array


class Done(NamedTuple):
    """content: what OUT gets. kept: of the update, and rounding: how it was rounded.

    broken: which elements are not finite; None where it is known that all are.
    """

    content: Bytes
    kept: Kept
    rounding: str
    broken: Array | None


def settled(piece: Piece, rounding: str) -> str | None:
    """How a piece is rounded where the option `rounding` says so: the same for all of a matrix.

    None where it hangs on what the nearest keeps of the update of a few of its rows.
    """
    output = piece.output
    if rounding == "balanced":
        return output.balanced
    if rounding != "auto":
        return rounding
    return "nearest" if output.dtype not in {"BF16", "F16"} or not piece.terms or output.head else None


def by_sample(piece: Piece, kept: Kept) -> str:
    """How a piece is rounded by what the nearest keeps in a sample of its matrix."""
    found = chosen(kept.ratio, closing=piece.output.closing)
    return piece.output.balanced if found == "balanced" else found


def samples(piece: Piece) -> Iterator[tuple[int, int]]:
    """The rows of the piece's matrix that are looked at: the first, and the one after the last."""
    return sampled(piece.output.shape[-2])


class HalfLane:
    """LoRA on bfloat16 to the nearest, by the compiled kernel."""

    def __init__(self, kernel: Kernel, content: Content, rounding: str) -> None:
        self._kernel, self._content, self._rounding = kernel, content, rounding
        self._spaces: Lent[Floats] = Lent(lambda: array([BLOCK_ELEMENTS], np.float32))

    def compute(self, piece: Piece, values: Bytes, found: Sequence[Factors]) -> Done | None:
        """The piece in the place of its `values`; None, and they stay, where it is no such piece."""
        if not is_plain(piece):
            return None
        updates = [HalfUpdate.of(term, its) for term, its in zip(piece.terms, found, strict=True)]
        if not all(update.product.is_usual for update in updates):
            return None
        with self._spaces.one() as space:
            return self._computed(piece, values.view(np.int16).reshape(piece.rows, -1), updates, space)

    def _computed(
        self, piece: Piece, matrix: Halves, updates: Sequence[HalfUpdate], space: Floats
    ) -> Done | None:
        rounding = settled(piece, self._rounding) or self._by_sample(piece, matrix, updates, space)
        if rounding != "nearest":
            return None
        kept = Kept()
        for update in updates:
            kept.add(update.apply(self._kernel, matrix, piece.first, matrix, space))
        # The sums are finite only if all of the results are: then they need no second look.
        finite = np.isfinite(kept.along + kept.total)
        broken = None if finite else (matrix & HALF_SIZE) >= HALF_INFINITY
        return Done(matrix.reshape(-1).view(np.uint8), kept, rounding, broken)

    def _by_sample(self, piece: Piece, matrix: Halves, updates: Sequence[HalfUpdate], space: Floats) -> str:
        kept = Kept()
        for first, last in samples(piece):
            if piece.rows == piece.output.shape[-2]:
                sample = matrix[first:last]
            else:
                content = self._content.sample(piece, matrix.itemsize, first, last)
                sample = content.view(np.int16).reshape(last - first, -1)
            rounded = self._content.bytes("rounded", sample.nbytes).view(np.int16).reshape(sample.shape)
            for update in updates:
                kept.add(update.apply(self._kernel, sample, first, rounded, space))
        return by_sample(piece, kept)


def is_plain(piece: Piece) -> bool:
    """Whether all that becomes of a piece is LoRA, on bfloat16 that stays so."""
    output = piece.output
    special = output.dora or output.bias or output.token_rows or output.replaced
    return bool(piece.terms) and output.source.dtype == output.dtype == "BF16" and not special
