"""What is worked on at a time: every element once, whole bands, and copies between what is computed."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loudmerge.executing import pieces as module
from loudmerge.executing.pieces import interleaved, split
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import OutputTensor, Term
from tests.unit.builders import entry

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


def output(shape: tuple[int, ...], *, stacked: bool = False, **more: Any) -> OutputTensor:
    terms: tuple[Term, ...] = ()
    if stacked and len(shape) == 3:
        terms = tuple(
            Term(0, e, Span(0, shape[1]), e, Axes.OUT_IN, Span(0, shape[1])) for e in range(shape[0])
        )
    return OutputTensor("a", "f", entry("a", shape), more.pop("dtype", "F32"), shape, terms=terms, **more)


@given(SHAPES, st.booleans(), st.sampled_from(("F32", "BF16", "F64")), st.integers(1, 60))
def test_pieces_cover_every_element_exactly_once(
    shape: tuple[int, ...], stacked: bool, dtype: str, piece_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        pieces = list(split(output(shape, stacked=stacked, dtype=dtype)))
    covered = Counter(
        element
        for piece in pieces
        for element in range(piece.offset, piece.offset + piece.rows * piece.columns)
    )
    assert covered == Counter(range(math.prod(shape)))
    assert [piece.offset for piece in pieces] == sorted(piece.offset for piece in pieces)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 80))
def test_a_piece_of_stacked_matrices_lies_in_one_and_has_its_terms(
    experts: int, rows: int, columns: int, piece_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        patch.setattr(module, "BAND", 2)
        pieces = list(split(output((experts, rows, columns), stacked=True)))
    for piece in pieces:
        assert piece.offset == (piece.matrix * rows + piece.first) * columns
        assert [term.index for term in piece.terms] == [piece.matrix]
        assert piece.rows <= 2 or piece.rows * columns * 4 <= piece_bytes
        assert piece.first % 2 == 0, "no band is cut"


def test_dora_needs_the_whole_matrix_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8)
    assert [piece.rows for piece in split(output((6, 4), dora=entry("m", (6,))))] == [6]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 900), st.integers(1, 5)), max_size=8),
    st.integers(8, 60),
    st.integers(0, 2000),
)
def test_what_is_copied_lies_between_what_is_computed(
    kinds: list[tuple[bool, int, int]], piece_bytes: int, ahead: int
) -> None:
    """Every piece once, what is computed in its order, and copies never a piece further than their share.

    But for those that are asked for ahead of all.
    """
    outputs = [output((1, rows, columns), stacked=computed) for computed, rows, columns in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        wanted = [piece for one in outputs for piece in split(one)]
        found = list(interleaved(outputs, ahead))
    assert Counter(map(repr, found)) == Counter(map(repr, wanted))
    computed = [piece for piece in found if not piece.output.is_copied]
    assert computed == [piece for piece in wanted if not piece.output.is_copied]
    while found and found[0].output.is_copied and ahead > 0:
        ahead -= found[0].rows * found[0].columns
        del found[0]
    assert ahead <= 0 or not any(piece.output.is_copied for piece in found)
    to_copy = sum(piece.rows * piece.columns for piece in found if piece.output.is_copied)
    to_compute = sum(piece.rows * piece.columns for piece in computed)
    largest = max((piece.rows * piece.columns for piece in found), default=0)
    copied = done = 0
    for piece in found:
        if piece.output.is_copied:
            copied += piece.rows * piece.columns
        else:
            done += piece.rows * piece.columns
        if done < to_compute:
            assert abs(copied * to_compute - done * to_copy) <= largest * (to_copy + to_compute)
