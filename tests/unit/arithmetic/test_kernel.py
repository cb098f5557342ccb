"""The compiled kernel: the bits of the tensor functions, and when it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loudmerge
from loudmerge import arithmetic
from loudmerge.arithmetic import compiled, delta, kernel, meeting
from loudmerge.arithmetic.balance import Bands
from loudmerge.arithmetic.compiled import Halves, Kernel, strip
from loudmerge.arithmetic.delta import Update, Workspace
from loudmerge.arithmetic.kept import Sums
from loudmerge.arithmetic.rounding import Dither, Draws, dither_table
from loudmerge.arithmetic.sizes import BAND
from loudmerge.executing import worker
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import Term
from tests.unit.reference import build
from tests.unit.synthetic import FAMILIES, Case

KERNEL = Kernel(kernel)
TABLE = dither_table(torch.device("cpu"))


class Made(NamedTuple):
    """(outputs, inputs), or turned. draws: of just these rows and columns."""

    weight: Tensor
    update: Tensor
    draws: Draws


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    """Whether there is a numba is found out anew."""
    compiled.kernel.cache_clear()
    yield
    compiled.kernel.cache_clear()


def made(
    seed: int,
    outputs: Span,
    inputs: Span,
    size: float,
    *,
    weights: str = "normal",
    axis: int = 0,
    some: int = 3,
) -> Made:
    """some: of so many inputs one has an update of a size that hardly counts: its cells have few shares."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs.count, inputs.count, generator=draw)
    if weights == "powers":
        weight = weight.sign() * 2.0 ** torch.randint(-20, 20, weight.shape, generator=draw)
    weight = weight.to(torch.bfloat16)
    update = torch.randn(weight.shape, generator=draw) * size
    update[:, ::some] *= 2.0**-20
    update = update.abs().clamp(min=2.0**-49).copysign(update)
    update = torch.where(weight + update == 0, 2 * update, update)
    places = (outputs, inputs) if axis == 0 else (inputs, outputs)
    if axis:
        weight, update = weight.T.contiguous(), update.T.contiguous()
    return Made(weight, update, Dither(TABLE, f"w{seed}").of(*places))


def by_tensors(case: Made, bands: Bands) -> Tensor:
    """As it is without the kernel."""
    weight = case.weight.to(torch.float32)
    result = weight + case.update
    drawn = case.draws.fill(0, torch.empty(result.shape, dtype=torch.int32))
    bands.round_(result, weight, case.update, drawn, torch.bfloat16)
    return result.to(torch.bfloat16)


def bits_of(halves: Tensor) -> Halves:
    return halves.view(torch.int16).numpy()


def balanced(case: Made, out: Tensor, bands: Bands, first: int = 0) -> Sums | None:
    """By the kernel."""
    weight, update, draws = case
    limits = [part.stop for part in bands.parts()]
    return KERNEL.balanced(
        bits_of(weight), update.numpy(), bits_of(out), draws.arrays(), first, limits, bands.axis
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def assert_sums(found: tuple[float, float] | None, case: Made, result: Tensor) -> None:
    moved, update = result.double() - case.weight.double(), case.update.double()
    assert found is not None
    scale = (moved * update).abs().sum().item()
    assert found[0] == pytest.approx((moved * update).sum().item(), rel=1e-5, abs=1e-5 * scale)
    assert found[1] == pytest.approx((update * update).sum().item(), rel=1e-5)


@given(
    seed=st.integers(0, 1 << 30),
    first=st.integers(0, 200),
    outputs=st.integers(1, 3 * BAND),
    inputs=st.sampled_from([1, 127, 128, 129, 300]),
    size=st.integers(-9, 1),
    weights=st.sampled_from(["normal", "powers"]),
    axis=st.sampled_from([0, 1]),
    some=st.sampled_from([1, 3]),
)
def test_it_balances_with_the_bits_of_the_tensor_functions(
    seed: int, first: int, outputs: int, inputs: int, size: int, weights: str, axis: int, some: int
) -> None:
    bands = Bands(Span(first, outputs), axis)
    case = made(seed, bands.outputs, Span(5, inputs), 10.0**size, weights=weights, axis=axis, some=some)
    wanted, result = by_tensors(case, bands), torch.empty_like(case.weight)
    sums = balanced(case, result, bands)
    assert same(result, wanted)
    assert_sums(sums, case, wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_it_balances_in_place_over_segments_and_in_steps(axis: int) -> None:
    """Gate and up in turns: every other column is the term's, or every other row."""
    outputs, inputs = Span(1, 2 * BAND, 2), Span(3, 4500)
    if axis:
        outputs, inputs = Span(4000, 150, 2), Span(0, 200)
    bands = Bands(outputs, axis)
    case = made(4, outputs, inputs, 1e-4, axis=axis)
    rows, columns = case.weight.shape
    whole = torch.zeros(rows * (2 - axis), columns * (1 + axis), dtype=torch.bfloat16)
    place = whole[:, ::2] if axis else whole[1::2]
    place.copy_(case.weight)
    wanted = by_tensors(case, bands)
    assert len(case.draws.segments) == 2
    assert balanced(case._replace(weight=place), place, bands) is not None
    assert same(place.contiguous(), wanted)
    assert not (whole[:, 1::2] if axis else whole[::2]).any()


def test_a_block_has_the_numbers_of_its_own_rows() -> None:
    bands = Bands(Span(40, 3 * BAND), 0)
    case = made(5, bands.outputs, Span(0, 200), 1e-4)
    part = slice(24, 24 + BAND)
    wanted, result = by_tensors(case, bands)[part], torch.empty(BAND, 200, dtype=torch.bfloat16)
    block = case._replace(weight=case.weight[part], update=case.update[part])
    assert balanced(block, result, bands.of(part), 24) is not None
    assert same(result, wanted)


def test_what_leads_onto_a_number_takes_no_step_beside_the_smallest_shares() -> None:
    bands = Bands(Span(0, BAND), 0)
    weight, update = torch.full((BAND, 70), 0.5), torch.full((BAND, 70), 2.0**-30)
    weight[::2], update[::2] = 1 + 2.0**-7, -(2.0**-7)
    draws = Dither(torch.zeros_like(TABLE), "w").of(bands.outputs, Span(0, 70))
    case = Made(weight.to(torch.bfloat16), update, draws)
    rounded = torch.empty_like(case.weight)
    balanced(case, rounded, bands)
    assert same(rounded, by_tensors(case, bands))
    assert (rounded[::2] == 1.0).all()
    # They do step, with the lowest number drawn.
    assert (rounded[1::2] > 0.5).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-51, 2.0**51, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["sum", "update"])
def test_it_leaves_what_is_not_usual_as_it_is(value: float, which: str) -> None:
    bands = Bands(Span(0, BAND), 0)
    case = made(3, bands.outputs, Span(0, 70), 1e-4)
    small = 2.0**-49
    case.weight[5, 66], case.update[5, 66] = (1.0, value) if which == "update" else (value - small, small)
    before = case.weight.clone()
    assert balanced(case, case.weight, bands) is None
    assert same(case.weight, before)


@pytest.mark.parametrize("limits", [[], [0], [0, 76], [0, 64], [1, 8, 76], [0, 8, 4, 76], [0, 64, 128]])
def test_it_writes_to_no_memory_but_the_block(limits: list[int]) -> None:
    outputs = Span(0, 76)
    weight, update, draws = made(6, outputs, Span(0, 70), 1e-4)
    flat = weight.view(-1).view(torch.int16).numpy()
    good: list[Any] = [flat, 70, update.numpy(), flat, 70, *draws.arrays(), 0]
    with pytest.raises(ValueError, match="the limits are not those of the bands"):
        kernel.balanced(*good, np.array(limits, np.int64), 0)
    shape, numbers = "the blocks differ in shape", "the numbers drawn"
    offsets = draws.arrays()[1]
    wrong: list[tuple[int, Any, str]] = [
        (0, flat[:-1], shape),
        (1, -1, shape),
        (3, flat[:-1], shape),
        (4, 71, shape),
        (5, TABLE.numpy()[:-1], numbers),
        (6, offsets - (1 << 20), numbers),
        (6, offsets + (1 << 20), numbers),
        (7, np.array([0, 71]), numbers),
        (8, np.array([4095]), numbers),
        (9, 0, numbers),
        (10, 1, numbers),
    ]
    for place, value, match in wrong:
        given_ = [value if number == place else one for number, one in enumerate(good)]
        with pytest.raises(ValueError, match=match):
            kernel.balanced(*given_, np.array([0, 64, 76]), 0)
    with pytest.raises(ValueError, match="the blocks differ in shape"):
        kernel.nearest(flat, 71, update.numpy(), flat, 70)


def test_no_band_lies_in_two_segments() -> None:
    weight, update, draws = made(6, Span(4064, 96), Span(0, 70), 1e-4, axis=1)
    flat = weight.view(-1).view(torch.int16).numpy()
    good = flat, 96, update.numpy(), flat, 96, *draws.arrays(), 0
    with pytest.raises(ValueError, match="the numbers drawn"):
        kernel.balanced(*good, np.array([0, 64, 96]), 1)
    assert kernel.balanced(*good, np.array([0, 32, 96]), 1)[0]


@given(
    bits=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40),
    change=st.floats(width=32),
    wide=st.booleans(),
)
def test_it_rounds_any_sum_to_the_nearest_as_torch_does(bits: list[int], change: float, wide: bool) -> None:
    halves = torch.tensor(bits, dtype=torch.int32).to(torch.int16)
    weight = halves.view(torch.bfloat16).repeat(20 if wide else 1)[None]
    update = torch.full(weight.shape, change)
    result = torch.empty_like(weight)
    KERNEL.nearest(strip(bits_of(weight)), update.numpy(), strip(bits_of(result)))
    wanted = (weight.float() + update).to(torch.bfloat16)
    number = ~wanted.isnan()
    assert torch.equal(result.isnan(), ~number)
    assert same(result[number], wanted[number])


@pytest.mark.parametrize(
    "place",
    [
        (slice(None), slice(None)),
        (slice(1, None, 2), slice(None)),
        (slice(None), slice(100, 700)),
    ],
)
def test_it_rounds_parts_of_a_matrix_in_place(place: tuple[slice, slice]) -> None:
    whole = torch.randn(90, 1100).to(torch.bfloat16)
    before, some = whole.clone(), whole[place]
    update = torch.randn(some.shape) * 1e-3
    case = Made(some.clone(), update, Dither(TABLE, "w").of(Span(0, 1), Span(0, 1)))
    wanted = (some.float() + update).to(torch.bfloat16)
    block = strip(bits_of(some))
    sums = KERNEL.nearest(block, update.numpy(), block)
    assert same(whole[place].contiguous(), wanted)
    assert_sums(sums, case, wanted)
    whole[place] = before[place]
    assert same(whole, before)


def update_of(axes: Axes, outputs: Span, rows: Tensor, columns: Tensor) -> Update:
    """dW = rows @ columns, (outputs, inputs), or turned."""
    factors = (rows, columns) if axes is Axes.OUT_IN else (columns.T.contiguous(), rows.T.contiguous())
    term = Term(0, -1, Span(0, outputs.count), -1, axes, outputs)
    return Update(term, *factors, 1.0, peft_rounds_delta=True)


@pytest.mark.parametrize("elements", [1, 150 * 100, 1 << 20])
@pytest.mark.parametrize("axes", [Axes.OUT_IN, Axes.IN_OUT])
@pytest.mark.parametrize("rounding", ["nearest", "peft", "balanced", "balanced, with a zero"])
def test_it_rounds_blocks_of_whole_bands_as_the_tensor_functions(
    elements: int, axes: Axes, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "BALANCED_FROM", 1)
    monkeypatch.setattr(meeting, "SMALL_ELEMENTS", 0)
    for module in (delta, meeting):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    weight = torch.randn(400, 100).to(torch.bfloat16)
    matrix = weight.T.contiguous() if axes is Axes.IN_OUT else weight
    # Numbers of few bits, whose product is exact however it is blocked; none is 0.
    left = torch.randint(1, 10, (370, 1)) * 2.0**-11
    right = torch.randint(1, 300, (1, 100)) * 2.0**-14 * (-1) ** torch.arange(100)
    if rounding.endswith("zero"):
        left[7] = 0.0
    update, space = update_of(axes, Span(30, 370), left, right), Workspace(torch.device("cpu"))
    results = []
    for is_whole in (False, True):
        if is_whole:
            monkeypatch.setattr(delta, "kernel", lambda: None)
            for module in (delta, meeting):
                monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 20)
        out, how = matrix.clone(), rounding.partition(",")[0]
        kept = update.apply(out, 0, how, space, out, Dither(TABLE, "w"))
        results.append(out)
        assert kept.total == pytest.approx((left @ right).double().square().sum().item(), rel=1e-5)
    assert same(*results)
    assert not same(results[0], matrix)


@pytest.mark.parametrize("axes", [Axes.OUT_IN, Axes.IN_OUT])
def test_what_is_large_enough_is_balanced_by_it(axes: Axes, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[bool]()

    class Counted(Kernel):
        def balanced(self, *given: Any) -> Any:
            sums = super().balanced(*given)
            done.append(sums is not None)
            return sums

    monkeypatch.setattr(delta, "kernel", lambda: Counted(kernel))
    for inputs in (delta.BALANCED_FROM // BAND - 1, delta.BALANCED_FROM // BAND):
        weight = torch.randn(BAND, inputs).to(torch.bfloat16)
        out = weight.T.contiguous() if axes is Axes.IN_OUT else weight
        update = update_of(axes, Span(0, BAND), torch.full((BAND, 1), 0.01), torch.full((1, inputs), 0.01))
        update.apply(out, 0, "balanced", Workspace(torch.device("cpu")), out, Dither(TABLE, "w"))
    assert done == [True]


def test_without_numba_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.kernel() == KERNEL
    monkeypatch.delitem(sys.modules, "loudmerge.arithmetic.kernel")
    monkeypatch.delattr(arithmetic, "kernel")
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.kernel.cache_clear()
    assert compiled.kernel() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_is_for_bfloat16_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("another dtype")

    monkeypatch.setattr(delta, "kernel", never)
    monkeypatch.setattr(delta, "BALANCED_FROM", 1)
    update = update_of(Axes.OUT_IN, Span(0, 4), torch.ones(4, 1), torch.ones(1, 3))
    for source, target in ((torch.bfloat16, dtype), (dtype, torch.bfloat16)):
        weight, out = torch.ones(4, 3, dtype=source), torch.ones(4, 3, dtype=target)
        update.apply(weight, 0, "balanced", Workspace(torch.device("cpu")), out, Dither(TABLE, "w"))
        assert (out == 2).all()


def test_where_nothing_can_be_kept_it_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(_signature: object, *, cache: bool = False) -> object:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernel, "_njit", njit)
    assert kernel.compiled()(abs) is abs
    assert asked == [True, False]


@pytest.mark.parametrize("rounding", ["nearest", "auto", "balanced"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_fused", "llama4_text", "gpt_oss"])
def test_a_merge_writes_the_same_bytes_with_it(
    family: str, rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts apart, fused, in the other order, and with gate and up in turns."""
    used = set()

    class Counted(Kernel):
        def nearest(self, *given: Any) -> Any:
            used.add("nearest")
            return super().nearest(*given)

        def balanced(self, *given: Any) -> Any:
            used.add("balanced")
            return super().balanced(*given)

    for module in (delta, worker):
        monkeypatch.setattr(module, "kernel", lambda: Counted(kernel))
    monkeypatch.setattr(delta, "BALANCED_FROM", 1)
    monkeypatch.setattr(worker, "COMPILED_BYTES", 1)
    named = {one.name: one for one in FAMILIES}
    built = build(Case(named[family], fused=("gate_up", "down"), base_dtype="bfloat16"), tmp_path)
    with_it, without = tmp_path / "with", tmp_path / "without"
    first = loudmerge.merge(built.base, built.adapter, with_it, rounding=rounding, verify=False).to_json()
    assert used if rounding == "auto" else used == {rounding}
    for module in (delta, worker):
        monkeypatch.setattr(module, "kernel", lambda: None)
    second = loudmerge.merge(built.base, built.adapter, without, rounding=rounding).to_json()
    for file in without.glob("*.safetensors"):
        assert (with_it / file.name).read_bytes() == file.read_bytes()
    assert first["delta_kept"]["overall"] == pytest.approx(second["delta_kept"]["overall"], rel=1e-5)
    assert first["rounding"] == second["rounding"]


def test_small_merges_do_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("half a second is lost")

    for module in (delta, worker):
        monkeypatch.setattr(module, "kernel", never)
    built = build(Case(FAMILIES[0], fused=("gate_up", "down"), base_dtype="bfloat16"), tmp_path)
    for rounding in ("nearest", "balanced"):
        loudmerge.merge(built.base, built.adapter, tmp_path / rounding, rounding=rounding)
