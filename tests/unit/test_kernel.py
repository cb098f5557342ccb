"""The compiled kernel of balanced rounding: the bits of the tensor functions, and when it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loudmerge
from loudmerge import balance, kernel
from loudmerge.balance import BAND, Bands, is_usual
from loudmerge.layout import Span
from tests.unit.reference import build
from tests.unit.synthetic import FAMILIES, Case

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    """Whether there is a numba is found out anew."""
    balance.compiled.cache_clear()
    yield
    balance.compiled.cache_clear()


def made(seed: int, outputs: int, inputs: int, size: float, weights: str = "bfloat16") -> Four:
    """Values, weight, delta, drawn."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw)
    if weights == "bfloat16":
        weight = weight.to(torch.bfloat16).float()
    if weights == "powers":
        weight = weight.sign() * 2.0 ** torch.randint(-20, 20, weight.shape, generator=draw)
    delta = torch.randn(weight.shape, generator=draw) * size
    # Some inputs have no update of a size that counts, and some hardly any: their cells have few shares.
    delta[:, ::3] *= 2.0**-20
    delta = delta.abs().clamp(min=2.0**-49).copysign(delta)
    delta = torch.where(weight + delta == 0, 2 * delta, delta)
    drawn = torch.randint(0, 1 << 16, weight.shape, generator=draw, dtype=torch.int32)
    return weight + delta, weight, delta, drawn


def by_tensors(four: Four, span: Span, axis: int) -> Tensor:
    """As it is without the kernel."""
    result = four[0].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "compiled", lambda: None)
        Bands(span, axis).round_(result, *four[1:], torch.bfloat16)
    return result


def by_kernel(four: Four, limits: list[int], axis: int = 0) -> Tensor:
    result = four[0].clone()
    others = (each.numpy() for each in four[1:])
    assert kernel.balanced(result.numpy(), *others, np.array(limits), axis)
    return result


@given(
    seed=st.integers(0, 1 << 30),
    outputs=st.integers(1, BAND),
    inputs=st.sampled_from([1, 63, 64, 65, 200]),
    size=st.integers(-9, 1),
    weights=st.sampled_from(["bfloat16", "float32", "powers"]),
)
def test_it_has_the_bits_of_the_tensor_functions(
    seed: int, outputs: int, inputs: int, size: int, weights: str
) -> None:
    four = made(seed, outputs, inputs, 10.0**size, weights)
    wanted = by_tensors(four, Span(0, outputs), 0)
    assert torch.equal(by_kernel(four, [0, outputs]).view(torch.int32), wanted.view(torch.int32))


def test_what_leads_onto_a_number_takes_no_step_beside_the_smallest_shares() -> None:
    weight, delta = torch.full((BAND, 70), 0.5), torch.full((BAND, 70), 2.0**-30)
    weight[::2], delta[::2] = 1 + 2.0**-7, -(2.0**-7)
    four = weight + delta, weight, delta, torch.zeros(BAND, 70, dtype=torch.int32)
    rounded = by_kernel(four, [0, BAND])
    assert torch.equal(rounded, by_tensors(four, Span(0, BAND), 0))
    assert (rounded[::2] == 1.0).all()
    # They do step, with the lowest number drawn.
    assert (rounded[1::2] > 0.5).all()


@pytest.mark.parametrize("start", [0, 40])
def test_each_band_is_rounded_for_itself(start: int) -> None:
    span = Span(start, 2 * BAND + 5)
    four = made(1, span.count, 100, 1e-4)
    limits = [0, *(part.stop for part in Bands(span, 0).parts())]
    assert len(limits) > 3
    values, weight, delta, drawn = (each.T.contiguous() for each in four)
    turned = values, weight, delta, drawn
    wanted = by_tensors(turned, span, 1)
    assert torch.equal(by_kernel(four, limits), wanted.T)
    assert torch.equal(by_kernel(turned, limits, 1), wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_large_enough_goes_to_the_kernel(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: object) -> bool:
        calls.append(given)
        return bool(kernel.balanced(*given))

    monkeypatch.setattr(balance, "compiled", lambda: counted)
    for inputs in (balance.COMPILED_FROM // BAND - 1, balance.COMPILED_FROM // BAND):
        values, weight, delta, drawn = (each.T if axis else each for each in made(2, BAND, inputs, 1e-4))
        four = values.contiguous(), weight.contiguous(), delta.contiguous(), drawn.contiguous()
        wanted = by_tensors(four, Span(0, BAND), axis)
        # A block of rows is one of the bands; the others are none of its business.
        Bands(Span(0, BAND if axis else 5 * BAND), axis).round_(*four, torch.bfloat16)
        assert torch.equal(four[0], wanted)
    assert len(calls) == 1


def test_a_part_of_a_wider_block_is_rounded_in_place() -> None:
    whole = made(7, BAND, 1100, 1e-4)
    values, weight, delta, drawn = (each[:, :1024] for each in whole)
    four, rest = (values, weight, delta, drawn), whole[0][:, 1024:].clone()
    wanted = by_tensors(four, Span(0, BAND), 0)
    Bands(Span(0, BAND), 0).round_(*four, torch.bfloat16)
    assert torch.equal(values, wanted)
    assert torch.equal(whole[0][:, 1024:], rest)


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-51, 2.0**51, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 2])
def test_it_leaves_what_is_not_usual_as_it_is(value: float, which: int) -> None:
    four = made(3, BAND, 70, 1e-4)
    four[which][5, 66] = value
    before = four[0].clone()
    assert not is_usual(four[which])
    assert not kernel.balanced(*(each.numpy() for each in four), np.array([0, BAND]), 0)
    assert torch.equal(four[0].view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    "limits", [[], [0], [0, BAND + 6], [0, BAND], [1, 8, 70], [0, 8, 4, 70], [0, 64, 128]]
)
def test_it_writes_to_no_memory_but_the_blocks(limits: list[int]) -> None:
    four = made(6, BAND + 6, 70, 1e-4)
    with pytest.raises(ValueError, match="the limits are not those of the bands"):
        kernel.balanced(*(each.numpy() for each in four), np.array(limits, np.int64), 0)
    others = [each[:, :69].contiguous().numpy() for each in four[1:]]
    with pytest.raises(ValueError, match="the blocks differ in shape"):
        kernel.balanced(four[0].numpy(), *others, np.array([0, BAND, BAND + 6]), 0)


def test_the_tensor_functions_round_what_is_not_usual() -> None:
    four = made(4, BAND, 1024, 1e-4)
    four[1][0, 0] = four[0][0, 0] = torch.inf
    wanted = by_tensors(four, Span(0, BAND), 0)
    Bands(Span(0, BAND), 0).round_(*four, torch.bfloat16)
    assert torch.equal(four[0], wanted)
    assert four[0][0, 0] == torch.inf


def test_without_numba_the_tensor_functions_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "loudmerge.kernel")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert balance.compiled() is None
    four = made(5, BAND, 1024, 1e-4)
    wanted = by_kernel(four, [0, BAND])
    Bands(Span(0, BAND), 0).round_(*four, torch.bfloat16)
    assert torch.equal(four[0], wanted)


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


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_fused", "llama4_text", "gpt_oss"])
def test_a_merge_writes_the_same_bytes_with_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts apart, fused, in the other order, and with gate and up in turns."""
    monkeypatch.setattr(balance, "COMPILED_FROM", 1)
    named = {one.name: one for one in FAMILIES}
    built = build(Case(named[family], fused=("gate_up", "down"), base_dtype="bfloat16"), tmp_path)
    with_it, without = tmp_path / "with", tmp_path / "without"
    loudmerge.merge(built.base, built.adapter, with_it, rounding="balanced", verify=False)
    monkeypatch.setattr(balance, "compiled", lambda: None)
    loudmerge.merge(built.base, built.adapter, without, rounding="balanced")
    for file in without.glob("*.safetensors"):
        assert (with_it / file.name).read_bytes() == file.read_bytes()
