"""Balanced rounding: what each cell keeps, where it steps, the ends of the range, and verify's second way."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loudmerge.arithmetic import balance
from loudmerge.arithmetic.balance import Bands, any_, balanced_, bands, is_usual, levels, steps, usual_
from loudmerge.arithmetic.sizes import BAND
from loudmerge.layout import Span
from loudmerge.verifying import bounds, rebalance
from tests.unit.neighbours import neighbours

NARROW = (torch.bfloat16, torch.float16)
WORDS = 1 << 16
SIZES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2)


def _wrong(
    cells: rebalance.Cells, error: Tensor, dtype: torch.dtype = torch.bfloat16, start: int = 0
) -> Tensor:
    """As verify finds what is wrong: a look at all, and a second one at what is in doubt."""
    bad = torch.zeros(error.shape, dtype=torch.bool)
    for part, inputs in rebalance.doubtful(cells, dtype, Span(start, len(error))):
        some = rebalance.Cells(*(each[part, inputs] for each in cells))
        bad[part, inputs] = rebalance.wrong(some, error[part, inputs], dtype)
    return bad


class Case:
    """Some outputs of a matrix with its update, in the merge's float32 and exactly."""

    def __init__(
        self, dtype: torch.dtype, size: float, *, outputs: int = BAND, seed: int = 0, scale: float = 0.02
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.weight = (torch.randn(outputs, 40, generator=draw) * scale).to(dtype).float()
        self.left = torch.randn(outputs, 5, generator=draw)
        self.right = torch.randn(5, 40, generator=draw) * size * scale
        self.delta = self.left @ self.right
        self.drawn = torch.randint(0, WORDS, self.weight.shape, generator=draw, dtype=torch.int32)

    @property
    def value(self) -> Tensor:
        return self.weight + self.delta

    def rounded(self, drawn: Tensor | None = None) -> Tensor:
        numbers = self.drawn if drawn is None else drawn
        result = self.value
        Bands(Span(0, len(result)), 0).round_(result, self.weight, self.delta, numbers, self.dtype)
        return result

    def cells(self, written: Tensor, drawn: Tensor | None = None) -> rebalance.Cells:
        exact = self.left.double() @ self.right.double()
        numbers = self.drawn if drawn is None else drawn
        weight = self.weight.double()
        return rebalance.Cells(weight, exact, weight + exact, written.double(), numbers)

    def errors(self) -> Tensor:
        return bounds.delta_error(self.left.double().abs() @ self.right.double().abs(), 8)

    def wrong(self, written: Tensor, drawn: Tensor | None = None, start: int = 0) -> Tensor:
        return _wrong(self.cells(written, drawn), self.errors(), self.dtype, start)

    def other(self, written: Tensor) -> Tensor:
        """The other neighbour of each element."""
        below, above = neighbours(written.to(self.dtype))
        return torch.where(written > self.value, below, above).float()


# --- two ways to the same bits ---------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.integers(-9, 1), st.sampled_from(["bfloat16", "float32", "powers"]))
def test_the_usual_numbers_have_a_shorter_way_to_the_same_bits(seed: int, size: int, weights: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(BAND, 40, generator=draw)
    if weights == "bfloat16":
        weight = weight.to(torch.bfloat16).float()
    if weights == "powers":
        weight = weight.sign() * 2.0 ** torch.randint(-20, 20, weight.shape, generator=draw)
    delta = torch.randn(weight.shape, generator=draw) * 10.0**size
    drawn = torch.randint(0, WORDS, weight.shape, generator=draw, dtype=torch.int32)
    delta = delta.abs().clamp(min=2.0**-49).copysign(delta)
    delta = torch.where(weight + delta == 0, 2 * delta, delta)
    assert is_usual(weight + delta)
    assert is_usual(delta)
    for axis in (0, 1):
        long = any_(weight + delta, weight, delta, drawn, torch.bfloat16, axis)
        short = usual_(weight + delta, weight, delta, drawn.clone(), axis)
        assert torch.equal(short.view(torch.int32), long.view(torch.int32))


def test_a_number_of_the_dtype_has_no_share_on_the_way_to_zero_either() -> None:
    """W + dW = 1, beside shares so small that they have the level of none. Each number drawn says: step."""
    weight = torch.tensor([[1.0 + 2.0**-10], [1.0]])
    delta = torch.tensor([[-(2.0**-10)], [-(2.0**-26)]])
    drawn = torch.zeros(weight.shape, dtype=torch.int32)
    for sign in (1.0, -1.0):
        value = torch.tensor([[1.0], [1.0]]) * sign
        short = usual_(value, weight * sign, delta * sign, drawn.clone(), 0)
        assert short.tolist() == [[sign], [sign * (1.0 - 2.0**-8)]]


@pytest.mark.parametrize("way", [usual_, any_])
def test_a_step_that_hangs_on_one_number_drawn_is_taken(way: Callable[..., Tensor]) -> None:
    """Share 1000.5 of 65536 of a unit: taken with 1000, not with 1001. And a share of 0 is no part of it."""
    unit = 2.0**-7
    dtype = [torch.bfloat16] if way is any_ else []
    for share, drawn, steps_up in (
        (1000.5, 1000, True),
        (1000.5, 1001, False),
        (1.1, 1, True),
        (1.1, 2, False),
    ):
        weight = torch.ones(2, 1)
        delta = torch.tensor([[unit], [share / WORDS * unit]])
        numbers = torch.tensor([[0], [drawn]], dtype=torch.int32)
        result = way(weight + delta, weight, delta, numbers, *dtype, 0)
        assert result.flatten().tolist() == [1 + unit, 1 + unit * steps_up]


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**51, -(2.0**-51)])
def test_one_other_number_is_enough_for_the_long_way(value: float) -> None:
    numbers = torch.ones(2, 3)
    assert is_usual(numbers)
    numbers[1, 1] = value
    assert not is_usual(numbers)


# --- what each cell keeps --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", SIZES)
def test_each_cell_keeps_its_update_in_expectation(dtype: torch.dtype, size: float) -> None:
    """<W' - W, dW> is <dW, dW>, over the numbers drawn, within five deviations; and over all cells."""
    case = Case(dtype, size)
    draw = torch.Generator().manual_seed(1)
    # Each input has cells of its own: so many copies of the inputs, side by side, are so many draws.
    weight, delta = case.weight.repeat(1, 12), case.delta.repeat(1, 12)
    draws = list[Tensor]()
    for _ in range(25):
        rounded = weight + delta
        drawn = torch.randint(WORDS, weight.shape, generator=draw, dtype=torch.int32)
        Bands(Span(0, BAND), 0).round_(rounded, weight, delta, drawn, dtype)
        draws.append(((rounded - weight) * delta).double().sum(0).view(12, -1))
    kept = torch.cat(draws)
    wanted = ((case.value - case.weight) * case.delta).double().sum(0)
    off = (kept.mean(0) - wanted).abs()
    # One number of 65536 more or less, of the largest gain, is what a chance is exact to.
    exact_to = (wanted + (case.delta.abs().max(0).values * case.value.abs().max(0).values / 128)) / WORDS
    assert (off <= 5 * kept.std(0) / math.sqrt(len(kept)) + 2 * exact_to).all()
    total = (kept.sum(1).mean() - wanted.sum()).abs()
    assert total <= 4.5 * kept.sum(1).std() / math.sqrt(len(kept)) + 2 * exact_to.sum()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", SIZES)
def test_it_disturbs_less_than_chance_and_keeps_more_than_the_nearest(
    dtype: torch.dtype, size: float
) -> None:
    case = Case(dtype, size, outputs=4 * BAND)
    near, unit = steps(case.value, case.delta, dtype)
    share = (case.value - near) / unit
    by_chance = (share * (1 - share) * unit * unit)[unit != 0].double().sum()
    error = (case.rounded() - case.value).double().square().sum()
    assert error < by_chance
    kept = ((case.rounded() - case.weight) * case.delta).double().sum() / case.delta.double().square().sum()
    assert 0.5 < kept < 1.5


@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_no_smaller_share_than_what_stays(size: float) -> None:
    """But for a level's width."""
    case = Case(torch.bfloat16, size)
    near, unit = steps(case.value, case.delta, torch.bfloat16)
    share = ((case.weight - near + case.delta) / unit).clamp(0, 1)
    moved = case.rounded() != near
    lowest = levels(share).masked_fill(~moved, 99).min(0).values
    highest = levels(share).masked_fill(moved | (share == 0), -1).max(0).values
    assert (lowest >= highest).all()
    assert moved.any()


def test_levels_are_four_to_an_octave() -> None:
    edges = torch.tensor([1.0, 1.25, 1.5, 1.75]).repeat(16) * torch.arange(-16, 0).repeat_interleave(4).exp2()
    assert levels(edges).tolist() == list(range(64))
    assert levels(edges[1:] * (1 - 2.0**-23)).tolist() == list(range(63))
    assert levels(torch.tensor([0.0, 1e-20, 1.0])).tolist() == [0, 0, 63]


# --- neighbours and ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 10), size=st.integers(-20, 4))
def test_every_element_goes_to_a_neighbour(dtype: torch.dtype, seed: int, exponent: int, size: int) -> None:
    case = Case(dtype, 2.0**size, seed=seed, scale=2.0**exponent)
    rounded, value = case.rounded(), case.value
    assert torch.equal(rounded.to(dtype).to(torch.float32), rounded)
    below, above = neighbours(rounded.to(dtype))
    inside = (below < value.double()) & (value.double() < above)
    assert ((rounded == value) | inside | (value.abs() > torch.finfo(dtype).max)).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_number_of_the_dtype_stays_whichever_way_the_update_points(dtype: torch.dtype, sign: float) -> None:
    """Every one of them, the subnormal ones too."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float()
    value = numbers[: len(numbers) // BAND * BAND].view(BAND, -1).clone()
    delta = value.abs() * sign * 2.0**-8
    zeros = torch.zeros_like(value, dtype=torch.int32)
    rounded = balanced_(value.clone(), value - delta, delta, zeros, dtype, 0)
    assert torch.equal(rounded.view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("dtype", NARROW)
def test_steps_lead_from_a_number_to_the_next_one(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers != 0)]
    below, above = neighbours(numbers)
    for sign, beyond in ((1.0, above), (-1.0, below)):
        near, unit = steps(numbers.float(), torch.full(numbers.shape, sign), dtype)
        assert torch.equal(near, numbers.float())
        fits = beyond.abs() <= torch.finfo(dtype).max
        assert torch.equal((near + unit).double()[fits], beyond[fits])


@pytest.mark.parametrize("drawn", [0, WORDS - 1])
@pytest.mark.parametrize(
    ("dtype", "largest", "past"),
    [(torch.bfloat16, 2.0**128 - 2.0**120, 3.4e38), (torch.float16, 65504.0, 65535.0)],
)
def test_no_new_infinity_at_the_ends(dtype: torch.dtype, largest: float, past: float, drawn: int) -> None:
    value = torch.tensor([[past, -past, largest, -largest, past, 1.0 + 2.0**-12]])
    delta = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, 2.0**-12]]) * 2.0**-30
    numbers = torch.full(value.shape, drawn, dtype=torch.int32)
    rounded = balanced_(value.clone(), value - delta, delta, numbers, dtype, 0)
    assert rounded[0, :5].tolist() == [largest, -largest, largest, -largest, largest]
    beyond = torch.tensor([[math.inf, -math.inf, math.nan]])
    found = balanced_(beyond.clone(), beyond, torch.ones(1, 3), numbers[:, :3], dtype, 0)
    assert found[0, :2].tolist() == [math.inf, -math.inf]
    assert found[0, 2].isnan()


def test_an_element_without_an_update_goes_to_the_nearest() -> None:
    value = torch.tensor([[1.0 + 2.0**-9], [1.0 + 2.0**-7 - 2.0**-9], [-0.0]])
    rounded = balanced_(value.clone(), value, torch.zeros(3, 1), torch.zeros(3, 1).int(), torch.bfloat16, 0)
    assert rounded.flatten().tolist() == [1.0, 1.0 + 2.0**-7, 0.0]
    assert rounded[2].signbit()


# --- bands -----------------------------------------------------------------------------------------


@given(start=st.integers(0, 300), count=st.integers(0, 400), step=st.sampled_from([1, 2, 3]))
def test_bands_begin_at_whole_multiples_of_their_size(start: int, count: int, step: int) -> None:
    parts = list(bands(Span(start, count, step)))
    places = [place for part in parts for place in range(part.start, part.stop)]
    assert places == list(range(count))
    numbers = [{(start + place * step) // BAND for place in range(part.start, part.stop)} for part in parts]
    assert all(len(inside) == 1 for inside in numbers)
    assert len(set.union(set(), *numbers)) == len(parts)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("inputs", [1, 7, 512])
def test_rows_and_columns_are_rounded_alike_however_many_inputs_at_a_time(
    dtype: torch.dtype, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dtype, 1e-4, outputs=2 * BAND + 5)
    whole = case.rounded()
    monkeypatch.setattr(balance, "INPUTS", inputs)
    assert torch.equal(case.rounded(), whole)
    for part in bands(Span(0, len(whole))):
        alone, drawn = case.value[part], case.drawn[part]
        rounds = Bands(Span(0, len(whole)), 0).of(part)
        rounds.round_(alone, case.weight[part], case.delta[part], drawn, dtype)
        assert torch.equal(alone, whole[part])
    turned = case.value.T.contiguous()
    Bands(Span(0, len(whole)), 1).round_(turned, case.weight.T, case.delta.T, case.drawn.T, dtype)
    assert torch.equal(turned.T, whole)


# --- verify's second way ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), outputs=st.sampled_from([16, BAND, BAND + 9]))
def test_what_is_written_is_accepted_and_the_other_neighbour_is_not(
    dtype: torch.dtype, seed: int, size: float, outputs: int
) -> None:
    case = Case(dtype, size, outputs=outputs, seed=seed)
    written = case.rounded()
    assert not case.wrong(written).any()
    caught = case.wrong(case.other(written)).double().mean()
    assert caught > (0.97 if size < 1e-2 else 0.9)


@pytest.mark.parametrize("zeros", [1, 2])
@pytest.mark.parametrize(("scale", "size"), [(0.02, 1e-18), (1e-20, 1e-3), (1e28, 1e-3), (1e35, 1e-3)])
def test_a_step_times_its_update_may_be_what_float32_cannot_hold(
    scale: float, size: float, zeros: int
) -> None:
    """One weight of so many is 0, and its step is a part of its update. What float64 loses, too: W + dW."""
    case = Case(torch.bfloat16, size, outputs=4 * BAND, scale=scale)
    case.weight[::zeros] = 0.0
    written = case.rounded()
    assert not case.wrong(written).any()
    assert case.wrong(case.other(written))[::zeros].double().mean() > 0.8


@pytest.mark.parametrize("dtype", NARROW)
def test_hardly_an_element_may_be_either_neighbour(dtype: torch.dtype) -> None:
    case = Case(dtype, 1e-4, outputs=16 * BAND)
    assert case.wrong(case.other(case.rounded())).double().mean() > 0.9995


@pytest.mark.parametrize("dtype", NARROW)
def test_what_another_matrix_would_draw_is_not_accepted(dtype: torch.dtype) -> None:
    case = Case(dtype, 1e-4)
    assert case.wrong(case.rounded(case.drawn.flip(0))).sum() > 20


@pytest.mark.parametrize("offset", [1, 32])
def test_bands_that_begin_elsewhere_are_not_accepted(offset: int) -> None:
    case = Case(torch.bfloat16, 1e-4, outputs=2 * BAND)
    assert case.wrong(case.rounded(), start=offset).sum() > 10


def test_neither_a_third_number_nor_one_that_is_none_is_accepted() -> None:
    case = Case(torch.bfloat16, 1e-4)
    written = case.rounded()
    written[3, 4] *= 1.05
    written[5, 6] = math.nan
    assert case.wrong(written).nonzero().tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), other=st.sampled_from([0.0, 0.001, 0.5]))
def test_what_float64_makes_of_the_rule_needs_no_second_look(
    dtype: torch.dtype, seed: int, size: float, other: float
) -> None:
    """Nothing is accepted at the first look that is not at the second."""
    case = Case(dtype, size, seed=seed)
    written = case.rounded()
    draw = torch.Generator().manual_seed(seed)
    written = torch.where(torch.rand(written.shape, generator=draw) < other, case.other(written), written)
    looked_at_all = rebalance.wrong(case.cells(written), case.errors(), dtype)
    assert torch.equal(case.wrong(written), looked_at_all)


def test_the_second_look_is_for_few() -> None:
    case = Case(torch.bfloat16, 1e-3, outputs=32 * BAND)
    cells, outputs = case.cells(case.rounded()), Span(0, 32 * BAND)
    looks = [len(inputs) for _, inputs in rebalance.doubtful(cells, torch.bfloat16, outputs)]
    assert sum(looks) < 0.05 * 32 * 40


@pytest.mark.parametrize("columns", [Span(0, 2 * BAND), Span(BAND, BAND), Span(5, BAND), Span(0, BAND, 2)])
def test_outputs_that_lie_along_the_columns_are_looked_at_alike(columns: Span) -> None:
    case = Case(torch.bfloat16, 1e-3, outputs=columns.count)
    written = torch.empty_like(case.value)
    for part in bands(columns):
        Bands(Span(0, len(written[part])), 0).round_(
            result := case.value[part], case.weight[part], case.delta[part], case.drawn[part], torch.bfloat16
        )
        written[part] = result
    written[3::7, ::5] = case.other(written)[3::7, ::5]
    place = torch.arange(written.numel()).view(written.shape)
    cells = case.cells(written)
    straight = [*cells, case.errors(), place]
    turned, outputs = rebalance.turned([part.T for part in straight], columns)
    found = []
    for parts, numbers in ((straight, columns), (turned, outputs)):
        here: set[int] = set()
        for some in rebalance.doubtful(rebalance.Cells(*parts[:5]), torch.bfloat16, numbers):
            *cell, error, where = (part[some] for part in parts)
            here.update(where[rebalance.wrong(rebalance.Cells(*cell), error, torch.bfloat16)].tolist())
        found.append(here)
    assert found[0] == found[1]
    assert found[0] >= set(place[3::7, ::5][:1].flatten().tolist())


def test_where_nothing_is_updated_all_goes_to_the_nearest() -> None:
    case = Case(torch.bfloat16, 0.0)
    written = case.weight.clone()
    assert not case.wrong(written).any()
    written[3, 4] = case.other(written)[3, 4]
    assert case.wrong(written).nonzero().tolist() == [[3, 4]]


def _one_cell(shares: list[float], drawn: list[int]) -> rebalance.Cells:
    """Of weights 1 with a unit of 2**-7."""
    delta = torch.tensor(shares, dtype=torch.float64)[:, None] * 2.0**-7
    one = torch.ones_like(delta)
    return rebalance.Cells(one, delta, one + delta, one, torch.tensor(drawn)[:, None])


def _wrong_of_one(cells: rebalance.Cells, error: float) -> list[bool]:
    return list(_wrong(cells, torch.full_like(cells.value, error)).flatten().tolist())


def test_a_number_of_the_dtype_may_not_step_beside_the_smallest_shares() -> None:
    cells = _one_cell([1.0, 1e-6], [0, 0])
    stayed = cells._replace(written=torch.tensor([[1.0 + 2.0**-7], [1.0 + 2.0**-7]]).double())
    assert _wrong_of_one(stayed, 1e-12) == [False, False]
    stepped = cells._replace(written=torch.tensor([[1.0 + 2.0**-6], [1.0 + 2.0**-7]]).double())
    assert _wrong_of_one(stepped, 1e-12) == [True, False]


def test_what_has_no_update_goes_to_the_nearest_beside_what_has() -> None:
    cells = _one_cell([0.0, 0.3], [0, 0])
    weight = cells.weight + torch.tensor([[0.8 * 2.0**-7], [0.0]])
    cells = cells._replace(weight=weight, value=weight + cells.delta)
    for first, wrong in ((1.0, True), (1.0 + 2.0**-7, False)):
        written = torch.tensor([[first], [1.0 + 2.0**-7]]).double()
        assert _wrong_of_one(cells._replace(written=written), 1e-12) == [wrong, False]


@pytest.mark.parametrize(("error", "admitted"), [(1e-12, False), (2.0**-20, True)])
def test_where_float32_decides_a_level_both_neighbours_are_accepted(error: float, admitted: bool) -> None:
    """The first share is above the level k, of the second: it steps, and the others stay.

    In float32 the first two may share the level, and the chance to step.
    """
    cells = _one_cell([0.55, 0.5 - 1e-6, 0.1], [40000, 60000, 0])
    stayed = _wrong_of_one(cells, error)
    stepped = cells._replace(written=cells.weight + 2.0**-7)
    moved = _wrong_of_one(stepped, error)
    assert stayed == [not admitted, False, False]
    assert moved == [False, not admitted, True]


@pytest.mark.parametrize(("error", "admitted"), [(1e-12, False), (2.0**-16, True)])
def test_where_float32_decides_a_chance_both_neighbours_are_accepted(error: float, admitted: bool) -> None:
    """One element of share 0.3 steps with probability 0.3."""
    just_over = math.ceil(0.3 * WORDS) + 8
    cells = _one_cell([0.3], [just_over])
    assert _wrong_of_one(cells, error) == [False]
    stepped = cells._replace(written=cells.weight + 2.0**-7)
    assert _wrong_of_one(stepped, error) == [not admitted]
