"""Stochastic rounding: neighbours, expectation, what is kept, and the ends of the range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loudmerge.arithmetic.delta import Update, Workspace
from loudmerge.arithmetic.factors import Factors
from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.rounding import Dither, dither_table, stochastic_
from loudmerge.arithmetic.sizes import SEGMENT, TABLE_BITS
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import Term
from loudmerge.verifying.bounds import carried
from loudmerge.verifying.redraw import Redraw, make_table
from tests.unit.neighbours import neighbours

CPU = torch.device("cpu")
NARROW = (torch.bfloat16, torch.float16)
WORDS = 1 << 16


@pytest.fixture(scope="module")
def table() -> Tensor:
    return dither_table(CPU)


def drawn(table: Tensor, shape: tuple[int, int], key: str = "w") -> Tensor:
    out = torch.empty(shape, dtype=torch.int32)
    return Dither(table, key).of(Span(0, shape[0]), Span(0, shape[1])).fill(0, out)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def every_finite(dtype: torch.dtype) -> Tensor:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].to(torch.float32)


def is_neighbour(rounded: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    below, above = neighbours(rounded.to(dtype))
    return (rounded == value) | ((below < value.double()) & (value.double() < above))


# --- what is drawn -------------------------------------------------------------------------------


def test_the_table_holds_every_number_as_often(table: Tensor) -> None:
    once = table[: 1 << TABLE_BITS].long()
    assert torch.bincount(once, minlength=WORDS).eq((1 << TABLE_BITS) // WORDS).all()
    assert torch.equal(table[1 << TABLE_BITS :], table[: SEGMENT - 1])


@pytest.mark.parametrize("step", [1, 2, 3, 64, 768, 2048])
def test_what_is_drawn_at_some_distance_is_unrelated(table: Tensor, step: int) -> None:
    values = table[: 1 << TABLE_BITS].double() / WORDS - 0.5
    correlation = float((values * values.roll(step)).mean() * 12)
    assert abs(correlation) < 5 / math.sqrt(len(values))


@given(
    rows=st.integers(0, 2**31),
    start=st.integers(0, 3 * SEGMENT),
    step=st.sampled_from([1, 2]),
    count=st.integers(1, 40),
)
def test_a_number_depends_on_its_place_alone(rows: int, start: int, step: int, count: int) -> None:
    """Any part of a matrix draws what the whole does; and so does the second implementation."""
    dither = Dither(dither_table(CPU), "layers.0.w", 3)
    columns = Span(start, count, step)
    part = dither.of(Span(rows, 5, 2), columns).fill(2, torch.empty(2, count, dtype=torch.int32))
    again = Redraw("layers.0.w", 3, make_table())
    row = torch.tensor([rows + 4, rows + 6]).repeat_interleave(count)
    column = torch.arange(start, start + count * step, step).repeat(2)
    assert torch.equal(part.flatten(), again.elements(row, column))


def test_a_wide_matrix_is_drawn_in_segments(table: Tensor) -> None:
    wide = drawn(table, (3, 2 * SEGMENT + 7))
    assert torch.equal(wide, Redraw("w", 0, make_table()).block(0, *wide.shape))
    assert not torch.equal(wide[:, :SEGMENT], wide[:, SEGMENT : 2 * SEGMENT])


def test_other_tensors_and_other_matrices_draw_other_numbers(table: Tensor) -> None:
    shape = (4, 100)
    whole = Span(0, 4), Span(0, 100)
    other = Dither(table, "w", 1).of(*whole).fill(0, torch.empty(shape, dtype=torch.int32))
    for found in (drawn(table, shape, "v"), other):
        assert (found == drawn(table, shape)).double().mean() < 0.05


# --- stochastic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
# Past float16's range lies no neighbour: 2**14 times four deviations would be there.
@given(seed=st.integers(0, 2**31), exponent=st.integers(-45, 13))
def test_every_element_goes_to_a_neighbour(dtype: torch.dtype, seed: int, exponent: int) -> None:
    value = normal(7, 33, seed=seed, scale=2.0**exponent)
    if dtype is torch.bfloat16:
        value = value * 2.0 ** (seed % 200 - 100)
    numbers = torch.randint(
        0, WORDS, value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    rounded = stochastic_(value.clone(), numbers.clone(), dtype)
    assert torch.equal(rounded.to(dtype).to(torch.float32), rounded)
    assert is_neighbour(rounded, value, dtype).all()
    if dtype is torch.bfloat16:
        assert torch.equal(rounded.double(), carried(value.double(), numbers, dtype))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("number", [0, 1, 32768, WORDS - 1])
def test_a_number_of_the_dtype_stays(dtype: torch.dtype, number: int) -> None:
    value = every_finite(dtype)[None]
    rounded = stochastic_(value.clone(), torch.full(value.shape, number, dtype=torch.int32), dtype)
    assert torch.equal(rounded.view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [0.7, -0.7, 3e-5, -5.1e-7, 1e-8, 65503.0, 1.0 + 2.0**-20])
def test_the_expectation_is_exact(dtype: torch.dtype, value: float) -> None:
    """All numbers that can be drawn, once each."""
    exact = torch.full((1, WORDS), value)
    rounded = stochastic_(exact.clone(), torch.arange(WORDS, dtype=torch.int32)[None], dtype)
    low, high = float(rounded.min()), float(rounded.max())
    unit = (high - low) or 1.0
    dropped = 2.0**-13 if dtype is torch.float16 and abs(value) >= 2.0**-14 else 2.0**-16
    finest = 0.0 if dtype is torch.bfloat16 or abs(value) >= 2.0**-14 else dropped / 2
    assert abs(float(rounded.double().mean()) - float(exact[0, 0])) <= finest * unit * 1.0001


@pytest.mark.parametrize("dtype", NARROW)
def test_a_matrix_is_rounded_without_bias(dtype: torch.dtype, table: Tensor) -> None:
    value = normal(300, 400, scale=0.02)
    rounded = stochastic_(value.clone(), drawn(table, (300, 400)), dtype)
    error = rounded.double() - value.double()
    below, above = neighbours(rounded.to(dtype))
    other = torch.where(rounded.double() > value.double(), below, above)
    variance = (error * (value.double() - other)).clamp(min=0).sum()
    assert abs(float(error.sum())) < 4.5 * math.sqrt(float(variance))


@pytest.mark.parametrize("number", [0, 30000, WORDS - 1])
@pytest.mark.parametrize(
    ("dtype", "largest", "past", "beyond"),
    [(torch.bfloat16, 2.0**128 - 2.0**120, 3.4e38, None), (torch.float16, 65504.0, 65535.0, 65536.0)],
)
def test_no_new_infinity_at_the_ends(
    dtype: torch.dtype, largest: float, past: float, beyond: float | None, number: int
) -> None:
    value = torch.tensor([[past, -past, largest, -largest, 1.0]])
    rounded = stochastic_(value, torch.full((1, 5), number, dtype=torch.int32), dtype)
    assert rounded.tolist() == [[largest, -largest, largest, -largest, 1.0]]
    if beyond is not None:
        value = torch.tensor([[beyond, -70000.0]])
        rounded = stochastic_(value, torch.full((1, 2), number, dtype=torch.int32), dtype).to(dtype)
        assert rounded.tolist() == [[math.inf, -math.inf]]


@pytest.mark.parametrize("dtype", NARROW)
def test_infinities_and_nans_stay(dtype: torch.dtype) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    value = torch.cat((payloads, torch.tensor([math.inf, -math.inf, 1.0])))[None]
    rounded = stochastic_(value.clone(), torch.full(value.shape, WORDS - 1, dtype=torch.int32), dtype).to(
        dtype
    )
    assert rounded[0, :3].isnan().all()
    assert rounded[0, 3:].tolist() == [math.inf, -math.inf, 1.0]


@pytest.mark.parametrize("dtype", NARROW)
def test_zeros_keep_their_sign(dtype: torch.dtype) -> None:
    value = torch.tensor([[0.0, -0.0, 1e-44, -1e-44]])
    rounded = stochastic_(value, torch.zeros(1, 4, dtype=torch.int32), dtype)
    assert rounded.tolist() == [[0.0] * 4]
    assert rounded.signbit().tolist() == [[False, True, False, True]]


# --- a merge's update ----------------------------------------------------------------------------


def merged(
    weight: Tensor, rounding: str, size: float, *, axes: Axes = Axes.OUT_IN, first: int = 0
) -> tuple[Tensor, Kept]:
    """The rows of `weight` (of 64 outputs) from the `first` on, with an update `size` times as large."""
    left, right = normal(1, 64, 3, seed=1), normal(1, 3, 48, seed=2)
    term = Term(0, -1, Span(0, 64), -1, axes, Span(0, 64))
    result = weight.clone()
    found = Factors(left.numpy(), right.numpy(), 0.02 * size / math.sqrt(3))
    dither = Dither(dither_table(CPU), "w")
    return result, Update.of(term, found).apply(weight, first, rounding, Workspace(CPU), result, dither)


@pytest.mark.parametrize("axes", list(Axes))
@pytest.mark.parametrize("step", [1, 7, 30])
def test_a_matrix_in_pieces_is_drawn_as_the_whole(axes: Axes, step: int) -> None:
    weight = normal(*((64, 48) if axes is Axes.OUT_IN else (48, 64)), scale=0.02).bfloat16()
    whole, kept = merged(weight, "stochastic", 1e-3, axes=axes)
    parts = [
        merged(weight[first : first + step], "stochastic", 1e-3, axes=axes, first=first)[0]
        for first in range(0, len(weight), step)
    ]
    # A product of other shapes may differ in its last bit, and with it a choice, once in 2**16 elements.
    assert (torch.cat(parts) != whole).sum() <= 1
    assert not torch.equal(whole, weight)
    assert 0.7 < kept.ratio < 1.3


def test_no_update_leaves_the_weight_as_it_is() -> None:
    weight = normal(64, 48, scale=0.02).bfloat16()
    weight[5, 6] = 2.0**-133
    result, kept = merged(weight, "stochastic", 0.0)
    assert torch.equal(result.view(torch.int16), weight.view(torch.int16))
    assert kept.ratio == 1.0


def test_a_float32_result_is_not_drawn() -> None:
    weight = normal(64, 48, scale=0.02)
    assert torch.equal(merged(weight, "stochastic", 1e-6)[0], merged(weight, "nearest", 1e-6)[0])


def test_rounding_by_chance_needs_its_dither() -> None:
    weight = normal(4, 3).bfloat16()
    term = Term(0, -1, Span(0, 4), -1, Axes.OUT_IN, Span(0, 4))
    found = Factors(np.ones((1, 4, 1), np.float32), np.ones((1, 1, 3), np.float32), 1.0)
    with pytest.raises(ValueError, match="stochastic rounding needs a dither"):
        Update.of(term, found).apply(weight, 0, "stochastic", Workspace(CPU), weight.clone())
