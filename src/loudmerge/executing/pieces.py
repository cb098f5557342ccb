"""The pieces that a tensor is worked on in, and their order.

A piece is a run of rows of one matrix of one tensor, and holds whole bands (loudmerge.arithmetic.balance).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loudmerge.arithmetic.sizes import BAND
from loudmerge.planning.plan import OutputTensor, Term

PIECE_BYTES = 8 << 20
"""Bytes of a tensor that one thread holds at a time."""


class Piece(NamedTuple):
    """Rows first, …, first + rows - 1 of one matrix; `offset` counts elements from the tensor's start."""

    output: OutputTensor
    matrix: int
    first: int
    rows: int
    columns: int
    offset: int
    terms: tuple[Term, ...]


def split(output: OutputTensor) -> Iterator[Piece]:
    """A tensor's pieces, in the order of its bytes; a single one for what has no rows to split at."""
    count = math.prod(output.shape)
    if len(output.shape) < 2 or count == 0:
        yield Piece(output, -1, 0, 1, count, 0, output.terms)
        return
    stacked = len(output.shape) == 3 and any(term.index >= 0 for term in output.terms)
    matrices, rows = (output.shape[0], output.shape[1]) if stacked else (1, output.shape[0])
    columns = count // (matrices * rows)
    by_matrix: dict[int, list[Term]] = defaultdict(list)
    for term in output.terms:
        by_matrix[max(term.index, 0)].append(term)
    itemsize = max(output.source.nbytes, output.nbytes) / count
    step = rows if output.dora is not None else _whole_bands(int(PIECE_BYTES / (columns * itemsize)))
    for matrix in range(matrices):
        for first in range(0, rows, step):
            held = min(step, rows - first)
            offset = (matrix * rows + first) * columns
            yield Piece(output, matrix, first, held, columns, offset, tuple(by_matrix[matrix]))


def interleaved(outputs: Sequence[OutputTensor], ahead: int = 0) -> Iterator[Piece]:
    """The pieces of a shard: what is only copied lies between what is computed, as evenly as it goes.

    Copying waits for the disk, and computing leaves it idle.
    ahead: so many elements are copied before any is computed.
    """
    copied = [output for output in outputs if output.is_copied]
    computed = [output for output in outputs if not output.is_copied]
    to_copy, to_compute = (sum(math.prod(one.shape) for one in them) for them in (copied, computed))
    copies = (piece for output in copied for piece in split(output))
    while ahead > 0 and (copy := next(copies, None)) is not None:
        yield copy
        ahead -= copy.rows * copy.columns
        to_copy -= copy.rows * copy.columns
    behind = 0
    for piece in (piece for output in computed for piece in split(output)):
        yield piece
        behind += piece.rows * piece.columns * to_copy
        while behind > 0 and (copy := next(copies, None)) is not None:
            yield copy
            behind -= copy.rows * copy.columns * to_compute
    yield from copies


def _whole_bands(rows: int) -> int:
    """So many rows, or less, that no band is cut; one band at least."""
    return max(BAND, rows - rows % BAND)
