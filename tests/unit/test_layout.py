"""The layout algebra: what the shapes of one pair prove."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loudmerge
from loudmerge.layout import Orientation, PairShape, Span, detect_layout, shape_of

SIZES = st.integers(1, 9)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ((8, 6), (10, 8), ("standard", 2)),
        ((8, 10), (6, 8), ("swapped", 2)),
        ((8, 10), (10, 8), ("unknown", 2)),
        ((8, 6), (6, 8), ("unknown", 2)),
        ((8, 6), (10, 4), ("unknown", None)),
        ((4, 6), (10, 8), ("unknown", None)),
        ((6, 6), (10, 6), ("unknown", None)),
        ((0, 6), (10, 0), ("unknown", None)),
        ((4, 2, 6), (10, 8), ("unknown", None)),
        ((8, 6), (4, 10, 2), ("unknown", None)),
        ((8,), (10, 8), ("unknown", None)),
    ],
    ids=[
        "standard", "swapped", "both read out", "both read in", "more rows than columns",
        "more columns than rows", "rows no multiple of the experts", "no rank at all", "A of three axes",
        "B of three axes", "A of one axis",
    ],
)  # fmt: skip
def test_the_shapes_of_one_pair_prove_its_layout(
    a: Sequence[int], b: Sequence[int], found: tuple[str, int | None]
) -> None:
    """Four experts whose matrix is (10, 6) as a Linear's weight."""
    assert detect_layout(a, b, 4, 10, 6) == found


def test_a_square_matrix_fits_both_ways_and_its_rank_is_known() -> None:
    assert detect_layout((8, 6), (6, 8), 4, 6, 6) == ("ambiguous", 2)


def test_no_expert_has_no_rank() -> None:
    assert detect_layout((8, 6), (10, 8), 0, 10, 6) == ("unknown", None)


def test_tensors_and_shapes_say_the_same_by_the_names_of_the_contract() -> None:
    a, b = torch.zeros(8, 6), torch.zeros(10, 8)
    named = loudmerge.detect_layout(lora_A=a, lora_B=b, num_experts=4, out_dim=10, in_dim=6)
    assert named == detect_layout(a.shape, b.shape, 4, 10, 6) == ("standard", 2)


@given(SIZES, SIZES, SIZES, SIZES, st.booleans())
def test_a_pair_is_read_as_it_was_made(experts: int, rank: int, out: int, into: int, swapped: bool) -> None:
    rows = experts * rank
    a, b = ((rows, out), (into, rows)) if swapped else ((rows, into), (out, rows))
    made = "swapped" if swapped else "standard"
    assert detect_layout(a, b, experts, out, into) == ("ambiguous" if out == into else made, rank)


@pytest.mark.parametrize(("a", "b"), [((8, 6, 1), (10, 8)), ((8, 6), (10,))])
def test_a_pair_shape_needs_matrices(a: Sequence[int], b: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"lora_A \[8, 6.*\] and lora_B \[10.*\] must have two axes each"):
        PairShape.of(a, b)


def test_the_rank_needs_as_many_columns_as_rows() -> None:
    assert PairShape(8, 6, 10, 8).rank(4) == 2
    assert PairShape(8, 6, 10, 4).rank(4) is None


def test_the_shape_of_a_tensor_is_plain_numbers() -> None:
    assert shape_of(torch.zeros(3, 2)) == shape_of([3, 2]) == (3, 2)
    assert all(type(dim) is int for dim in shape_of(torch.zeros(3, 2)))


def test_flipping_an_orientation_twice_changes_nothing() -> None:
    assert Orientation.STANDARD.flipped() is Orientation.SWAPPED
    assert Orientation.SWAPPED.flipped() is Orientation.STANDARD


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 3))
def test_a_span_is_its_indices(start: int, count: int, step: int) -> None:
    indices = list(range(40))[Span(start, count, step).places]
    assert indices == [start + step * i for i in range(count)]


@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 3))
def test_spans_meet_where_they_have_an_index_in_common(
    start: int, count: int, other: int, more: int, step: int
) -> None:
    one, two = Span(start, count, step), Span(other, more, step)
    indices = [set(range(40)[span.places]) for span in (one, two)]
    assert one.meets(two) is two.meets(one) is bool(indices[0] & indices[1])
