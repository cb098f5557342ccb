"""The tolerance of verify: wide enough for any order of float32 arithmetic, and hardly wider."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loudmerge.verifying.bounds import (
    UNIT,
    carried,
    delta_error,
    gamma,
    is_drawn,
    is_nearest,
    is_peft,
    rounded,
    sum_error,
    unit_in_last_place,
)
from tests.unit.neighbours import is_neighbour, neighbours
from tests.unit.reference import rounded as rounded_once
from tests.unit.reference import ulp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def zero(values: Tensor) -> Tensor:
    return torch.zeros_like(values, dtype=torch.float64)


# --- the pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_neighbours_are_the_next_numbers_in_order(dtype: torch.dtype) -> None:
    ordered = every_finite(dtype).double().unique(sorted=True)  # type: ignore[no-untyped-call]
    below, above = neighbours(ordered.to(dtype))
    assert torch.equal(above[:-1], ordered[1:])
    assert torch.equal(below[1:], ordered[:-1])
    assert above[-1] == torch.inf
    assert below[0] == -torch.inf


def test_neighbours_of_float32_are_numpy_s() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    below, above = neighbours(torch.from_numpy(values))
    assert np.array_equal(above.numpy(), np.nextafter(values, np.float32(np.inf)).astype(np.float64))
    assert np.array_equal(below.numpy(), np.nextafter(values, np.float32(-np.inf)).astype(np.float64))


def test_both_zeros_have_the_same_neighbours() -> None:
    below, above = neighbours(torch.tensor([0.0, -0.0], dtype=torch.bfloat16))
    assert below[0] == below[1] == -(2.0**-133)
    assert above[0] == above[1] == 2.0**-133


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_unit_in_the_last_place_is_the_distance_to_the_next_number_away_from_zero(
    dtype: torch.dtype,
) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    below, above = neighbours(values)
    away = torch.where(values > 0, above, below)
    assert torch.equal(unit_in_last_place(values.double(), dtype), (away - values.double()).abs())
    exact = values.double().numpy()
    assert np.array_equal(unit_in_last_place(values.double(), dtype).numpy(), ulp(exact, name(dtype)))
    subnormal = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    tiny = torch.tensor([2.0**-150, 0.0], dtype=torch.float64)
    assert unit_in_last_place(tiny, dtype).tolist() == [subnormal, subnormal]


def test_gamma_is_the_bound_of_many_roundings() -> None:
    """(1 + u)^n - 1 <= n u / (1 - n u), Higham's lemma 3.1."""
    for n in (1, 3, 35, 1000):
        assert (1 + UNIT) ** n - 1 <= gamma(n) <= 1.001 * n * UNIT


def test_a_weight_without_an_update_has_no_tolerance() -> None:
    none = torch.zeros(3, dtype=torch.float64)
    assert not delta_error(none, 5).any()
    assert not sum_error(torch.ones(3, dtype=torch.float64), none).any()


# --- nearest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_nearest_accepts_exactly_the_nearest_number(dtype: torch.dtype) -> None:
    """Between any two neighbours: the middle goes to the even one, a bit off it to the nearer one."""
    low = every_finite(dtype)
    low = low[(low.abs() > 2.0**-10) & (low.abs() < 2.0**10)]
    below, above = neighbours(low)
    for share in (0.1, 0.49, 0.51, 0.9):
        value = low.double() + share * (above - low.double())
        assert torch.equal(is_nearest(low, value, zero(low)), torch.full(low.shape, share < 0.5))
        up = above.to(dtype)
        assert torch.equal(is_nearest(up, value, zero(low)), torch.full(low.shape, share > 0.5))
    middle = (low.double() + above) / 2
    even = (low.view(torch.int16) % 2) == 0
    assert torch.equal(is_nearest(low, middle, zero(low)), even)
    assert not is_nearest(below.to(dtype), middle, zero(low)).any()


@pytest.mark.parametrize("dtype", NARROW)
def test_near_a_tie_the_tolerance_admits_both_numbers_and_no_third(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=torch.float64)
    step = unit_in_last_place(one, dtype)
    tie = one + step / 2
    eps = step * 2.0**-8
    for k, admitted in ((-1, False), (0, True), (1, True), (2, False)):
        assert bool(is_nearest((one + k * step).to(dtype), tie + eps / 2, eps)) is admitted
    assert not is_nearest(one.to(dtype), tie + 2 * eps, eps)


def test_rounding_twice_on_the_way_from_float64_is_accepted_as_the_merge_s() -> None:
    """v just over a tie: one rounding gives the upper number, two by way of float32 the even, lower one."""
    value = torch.tensor(1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    assert rounded_once(value.view(1).numpy(), "bfloat16") == 1 + 2.0**-7
    assert rounded(value, torch.bfloat16) == 1.0
    assert is_nearest(torch.tensor(1.0, dtype=torch.bfloat16), value, zero(value))
    eps = sum_error(value, torch.tensor(1e-12, dtype=torch.float64))
    for written in (1.0, 1 + 2.0**-7):
        assert is_nearest(torch.tensor(written, dtype=torch.bfloat16), value, eps)


def test_not_a_number_is_right_only_where_the_value_is_none() -> None:
    nan = torch.tensor(torch.nan, dtype=torch.bfloat16)
    one = torch.ones((), dtype=torch.float64)
    assert not is_nearest(nan, one, zero(one))
    assert not is_neighbour(nan, one, zero(one))
    assert is_nearest(nan, one * torch.nan, zero(one))


# --- what float32 arithmetic gives ---------------------------------------------------------------


def float32_sums(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> list[Tensor]:
    """W + s L R in float32, in several ways of doing it; each a legitimate merge."""
    terms = left.T[:, :, None] * right[:, None, :]
    forward, backward = torch.zeros_like(weight), torch.zeros_like(weight)
    for term in terms:
        forward = forward + term
    for term in terms.flip(0):
        backward = backward + term
    pairwise = terms
    while len(pairwise) > 1:
        if len(pairwise) % 2:
            pairwise = torch.cat((pairwise, torch.zeros_like(pairwise[:1])))
        pairwise = pairwise[0::2] + pairwise[1::2]
    return [
        weight + (left @ right) * scaling,
        weight + (left * scaling) @ right,
        weight + left @ (right * scaling),
        weight + forward * scaling,
        weight + backward * scaling,
        weight + pairwise[0] * scaling,
    ]


@given(
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 70),
    scaling=st.sampled_from([1.0, 0.7, 2.0, 1 / 3, 64.0, -1.3]),
    exponents=st.tuples(st.integers(-24, 8), st.integers(-24, 8)),
)
def test_every_order_of_float32_arithmetic_is_within_the_bound(
    seed: int, rank: int, scaling: float, exponents: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, generator=generator)
    left = torch.randn(6, rank, generator=generator) * 2.0 ** exponents[0]
    right = torch.randn(rank, 5, generator=generator) * 2.0 ** exponents[1]
    delta = scaling * (left.double() @ right.double())
    magnitude = abs(scaling) * (left.double().abs() @ right.double().abs())
    error = delta_error(magnitude, rank + 3)
    value = weight.double() + delta
    for held in float32_sums(weight, left, right, scaling):
        for dtype in DTYPES:
            written = held.to(dtype)
            if written.isfinite().all():
                assert is_nearest(written, value, sum_error(value, error)).all()
                assert is_neighbour(written, value, sum_error(value, error)).all()
    for held in ((left @ right) * scaling, (left * scaling) @ right):
        for dtype in DTYPES:
            base = weight.to(dtype)
            written = base + held.to(dtype)
            assert not written.isfinite().all() or is_peft(written, base.double(), delta, error, dtype).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_unit_off_is_nearly_always_wrong_and_a_few_always(dtype: torch.dtype) -> None:
    """For an update that is small beside the weight: rank 32, a hundredth of it."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 200, generator=generator)
    left, right = torch.randn(300, 32, generator=generator), torch.randn(32, 200, generator=generator) / 500
    delta = left.double() @ right.double()
    error = delta_error(left.double().abs() @ right.double().abs(), 35)
    value = weight.double() + delta
    written = (weight + left @ right).to(dtype)
    right_ones = is_nearest(written, value, sum_error(value, error))
    assert right_ones.all()
    bits = written.view(torch.int32 if dtype is torch.float32 else torch.int16)
    large = value.abs() > 0.25
    for steps, caught in ((1, 0.99), (2, 1.0)) if dtype in NARROW else ((2, 0.2), (9, 1.0)):
        moved = (bits + steps).view(dtype)
        wrong = ~is_nearest(moved, value, sum_error(value, error))[large]
        assert wrong.double().mean() >= caught


def test_peft_s_two_roundings_are_told_from_one() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(400, 300, generator=generator).bfloat16()
    delta = torch.randn(400, 300, generator=generator).double() * 0.1
    once = rounded(weight.double() + delta, torch.bfloat16)
    twice = weight + delta.float().bfloat16()
    error = delta_error(delta.abs(), 4)
    value = weight.double() + delta
    assert is_nearest(once, value, sum_error(value, error)).all()
    assert is_peft(twice, weight.double(), delta, error, torch.bfloat16).all()
    differ = once != twice
    assert 0.01 < differ.double().mean() < 0.1
    # A few deltas and sums lie so near a tie that float32 could have gone either way.
    assert is_peft(once, weight.double(), delta, error, torch.bfloat16)[differ].double().mean() < 0.01
    assert is_nearest(twice, value, sum_error(value, error))[differ].double().mean() < 0.01


# --- stochastic ----------------------------------------------------------------------------------


def test_a_neighbour_is_either_of_two_and_a_number_of_the_dtype_is_its_own() -> None:
    one = torch.ones((), dtype=torch.float64)
    step = 2.0**-7
    inside = one + 0.3 * step
    for k, admitted in ((-1, False), (0, True), (1, True), (2, False)):
        assert bool(is_neighbour((one + k * step).bfloat16(), inside, zero(one))) is admitted
        assert bool(is_neighbour((one + k * step).bfloat16(), one, zero(one))) is (k == 0)


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 1.0, 100.0]))
def test_what_is_drawn_is_accepted_and_the_other_neighbour_is_not(
    dtype: torch.dtype, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = (torch.randn(500, generator=generator) * scale).double()
    drawn = torch.randint(0, 1 << 16, value.shape, generator=generator)
    written = carried(value, drawn, dtype).to(dtype)
    assert is_neighbour(written, value, zero(value)).all()
    assert is_drawn(written, value, zero(value), drawn).all()
    below, above = neighbours(written)
    other = torch.where(written.double() > value, below, above).to(dtype)
    # Unless the number drawn is so near the fraction that the rounding of a float32 decides.
    assert (~is_drawn(other, value, zero(value), drawn)).double().mean() > 0.99


def test_what_is_drawn_near_the_fraction_admits_both_neighbours() -> None:
    one = torch.ones((), dtype=torch.float64)
    quarter, drawn = one + 2.0**-9, torch.tensor(3 << 14)
    for error, admitted in ((0.0, False), (2.0**-20, True)):
        eps = one * error
        assert bool(is_drawn(one.bfloat16(), quarter, eps, drawn)) is admitted
        assert is_drawn((one + 2.0**-7).bfloat16(), quarter, eps, drawn)


def test_past_the_largest_number_is_the_largest_and_beyond_is_none() -> None:
    value = torch.tensor([65504.0, 65530.0, -65535.9, 65536.0], dtype=torch.float64)
    assert carried(value, torch.tensor(65535), torch.float16).tolist() == [
        65504.0,
        65504.0,
        -65504.0,
        65536.0,
    ]
