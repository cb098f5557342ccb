"""Where the update of a term meets some rows of its matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from loudmerge.arithmetic.sizes import BLOCK_COLUMNS, BLOCK_ELEMENTS, SMALL_ELEMENTS
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import Term


class Meeting(NamedTuple):
    """rows, columns: of the matrix on disk. first: which of the update's rows, as they lie on disk, is the
    first of these. axis: along which the outputs lie.
    """

    rows: Span
    columns: Span
    first: int
    axis: int

    def inside(self, first_row: int) -> tuple[slice, slice]:
        """Places in the rows of the matrix from the `first_row` on."""
        rows = Span(self.rows.start - first_row, self.rows.count, self.rows.step)
        return rows.places, self.columns.places

    @property
    def factor(self) -> slice:
        """Rows of the factor that has the update's rows."""
        return slice(self.first, self.first + self.rows.count)


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """The parts of a matrix that are rounded to the nearest at a time: rows and columns."""
    if 0 < rows * columns <= SMALL_ELEMENTS:
        yield slice(0, rows), slice(0, columns)
        return
    step = max(1, BLOCK_ELEMENTS // min(max(columns, 1), BLOCK_COLUMNS))
    for row, column in product(range(0, rows, step), range(0, columns, BLOCK_COLUMNS)):
        yield slice(row, min(row + step, rows)), slice(column, min(column + BLOCK_COLUMNS, columns))


def meeting(term: Term, first_row: int, rows: int, columns: int) -> Meeting | None:
    """Of `rows` rows of a matrix, from the `first_row` on; None where the update has none of them."""
    place = term.out
    if term.axes is Axes.IN_OUT:
        return Meeting(Span(first_row, rows), place, first_row, 1)
    inside = _inside(place, first_row, rows)
    if inside.count <= 0:
        return None
    return Meeting(inside, Span(0, columns), (inside.start - place.start) // place.step, 0)


def _inside(span: Span, first: int, count: int) -> Span:
    """The part of a span that lies in first, …, first + count - 1."""
    skip = max(0, -(-(first - span.start) // span.step))
    end = min(span.count, -(-(first + count - span.start) // span.step))
    return Span(span.start + skip * span.step, end - skip, span.step)
