"""The arithmetic of one update: factors, rows, rounding, and the share of the update that is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loudmerge.arithmetic import meeting
from loudmerge.arithmetic.delta import Update, Workspace, dora_weight
from loudmerge.arithmetic.factors import Factors, factors
from loudmerge.arithmetic.kept import Kept
from loudmerge.layout import Axes, LoraBLayout, Orientation, Span
from loudmerge.planning.plan import Site, Term
from tests.unit.builders import EXPERTS, pair, values

E, R, OUT, IN = 3, 2, 6, 4
CPU = torch.device("cpu")


def site(experts: int, *, reads_input: bool = True, layout: LoraBLayout | None = None) -> Site:
    shapes = ((R * max(experts, 1), IN), (OUT, R * max(experts, 1)))
    orientation = Orientation.STANDARD if experts else None
    return Site(
        pair(EXPERTS, *shapes), f"{EXPERTS}.down_proj", experts, R, 0.5, reads_input, orientation, layout
    )


def term(
    axes: Axes = Axes.OUT_IN, *, rows: Span | None = None, out: Span | None = None, expert: int = -1
) -> Term:
    return Term(0, expert, rows or Span(0, OUT), -1, axes, out or Span(0, OUT))


def apply(
    matrix: Tensor, found: Factors, what: Term, *, first: int = 0, rounding: str = "nearest",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Kept]:  # fmt: skip
    result = matrix.to(dtype or matrix.dtype, copy=True)
    kept = Update.of(what, found).apply(matrix, first, rounding, Workspace(CPU), result)
    return result, kept


# --- one update ----------------------------------------------------------------------------------


@pytest.fixture
def dense() -> Factors:
    return factors(site(0), values(R, IN, seed=1).numpy(), values(OUT, R, seed=2).numpy())


def full_delta(found: Factors, expert: int = 0) -> Tensor:
    return torch.from_numpy(found.left[expert] @ found.right[expert] * np.float32(found.scaling))


@pytest.mark.parametrize("axes", list(Axes))
def test_the_whole_matrix_gets_the_whole_update(axes: Axes, dense: Factors) -> None:
    weight = values(OUT, IN, seed=3)
    disk = weight if axes is Axes.OUT_IN else weight.T.contiguous()
    result, kept = apply(disk, dense, term(axes))
    expected = weight + full_delta(dense)
    torch.testing.assert_close(result, expected if axes is Axes.OUT_IN else expected.T)
    assert kept.ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("axes", list(Axes))
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pieces_of_a_matrix_get_their_part_of_the_update(axes: Axes, rows: int, dense: Factors) -> None:
    weight = values(OUT, IN, seed=3)
    disk = weight if axes is Axes.OUT_IN else weight.T.contiguous()
    whole, kept = apply(disk, dense, term(axes))
    parts, total = [], Kept()
    for first in range(0, disk.shape[0], rows):
        part, share = apply(disk[first : first + rows], dense, term(axes), first=first)
        parts.append(part)
        total.add(share)
    torch.testing.assert_close(torch.cat(parts), whole)
    assert total.total == pytest.approx(kept.total)


@pytest.mark.parametrize("axes", list(Axes))
def test_rows_of_the_factor_go_to_their_place_and_leave_the_rest(axes: Axes, dense: Factors) -> None:
    """gate and up alternate on disk (a step of 2) and are halves in memory."""
    weight = values(2 * 3, IN, seed=3)
    disk = weight if axes is Axes.OUT_IN else weight.T.contiguous()
    result, _ = apply(disk, dense, term(axes, rows=Span(3, 3), out=Span(1, 3, 2)))
    back = result if axes is Axes.OUT_IN else result.T
    torch.testing.assert_close(back[1::2], weight[1::2] + full_delta(dense)[3:6])
    assert torch.equal(back[0::2], weight[0::2])


def test_a_piece_outside_the_updates_rows_stays_as_it_is(dense: Factors) -> None:
    weight = values(4, IN, seed=3)
    result, kept = apply(weight, dense, term(rows=Span(0, 2), out=Span(0, 2)), first=2)
    assert torch.equal(result, weight)
    assert (kept.along, kept.total, kept.ratio) == (0.0, 0.0, 1.0)


def test_an_experts_update_uses_its_slices() -> None:
    found = factors(
        site(E, layout=LoraBLayout.RANK_MAJOR), values(E * R, IN).numpy(), values(OUT, E * R).numpy()
    )
    weight = values(OUT, IN, seed=3)
    result, _ = apply(weight, found, term(expert=2))
    torch.testing.assert_close(result, weight + full_delta(found, 2))


@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 20), st.integers(1, 8))
def test_the_part_of_a_span_inside_a_piece_is_its_intersection(
    start: int, count: int, step: int, first: int, rows: int
) -> None:
    found = meeting._inside(Span(start, count, step), first, rows)
    wanted = [i for i in (start + step * k for k in range(count)) if first <= i < first + rows]
    assert [found.start + step * k for k in range(max(found.count, 0))] == wanted


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, dense: Factors) -> None:
    weight = values(OUT, IN, seed=3)
    whole, kept = apply(weight, dense, term())
    monkeypatch.setattr(meeting, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(meeting, "BLOCK_ELEMENTS", 5)
    monkeypatch.setattr(meeting, "BLOCK_COLUMNS", 3)  # one row at a time, in two parts
    parts = list(meeting.blocks(OUT, IN))
    assert parts[:3] == [
        (slice(0, 1), slice(0, 3)),
        (slice(0, 1), slice(3, 4)),
        (slice(1, 2), slice(0, 3)),
    ]
    blocked, share = apply(weight, dense, term())
    torch.testing.assert_close(blocked, whole)
    assert share.total == pytest.approx(kept.total)


# --- rounding ------------------------------------------------------------------------------------


def test_nearest_rounds_the_sum_once(dense: Factors) -> None:
    weight = values(OUT, IN, seed=3, dtype=torch.bfloat16)
    result, _ = apply(weight, dense, term())
    once = (weight.float() + full_delta(dense)).to(torch.bfloat16)
    assert torch.equal(result, once)


def test_peft_rounds_the_update_first_and_the_sum_again(dense: Factors) -> None:
    weight = values(OUT, IN, seed=3, dtype=torch.bfloat16)
    result, _ = apply(weight, dense, term(), rounding="peft")
    assert torch.equal(result, weight + full_delta(dense).to(torch.bfloat16))


def test_peft_adds_a_linears_update_in_float32_and_rounds_once(dense: Factors) -> None:
    weight = values(OUT, IN, seed=3, dtype=torch.bfloat16)
    linear = replace(dense, peft_rounds_delta=False)
    assert torch.equal(apply(weight, linear, term(), rounding="peft")[0], apply(weight, linear, term())[0])


def test_a_linear_is_merged_as_peft_merges_it_bit_for_bit() -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    model = peft.get_peft_model(layer, peft.LoraConfig(r=R, lora_alpha=1, target_modules=["0"]))
    part = model.base_model.model[0]
    with torch.no_grad():
        part.lora_B["default"].weight.copy_(values(64, R))
    weight = part.base_layer.weight.detach().clone()
    a, b = (part.lora_A["default"].weight.detach(), part.lora_B["default"].weight.detach())
    dense_site = replace(site(0), peft_rounds_delta=False)
    rows = Span(0, 64)
    found = factors(dense_site, a.float().numpy(), b.float().numpy())
    result, _ = apply(weight, found, term(rows=rows, out=rows), rounding="peft")
    assert torch.equal(result, model.merge_and_unload()[0].weight)


def test_the_two_roundings_differ_somewhere() -> None:
    """Else the tests of either say nothing: 1 + 2^-8 + 2^-17 is above the tie, its rounded update not."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    found = Factors(np.full((1, 1, 1), 2.0**-8 + 2.0**-17, np.float32), np.ones((1, 1, 1), np.float32), 1.0)
    what = term(rows=Span(0, 1), out=Span(0, 1))
    assert apply(weight, found, what)[0].item() == 1 + 2.0**-7
    assert apply(weight, found, what, rounding="peft")[0].item() == 1.0


def test_another_dtype_is_rounded_once_from_the_float32_sum(dense: Factors) -> None:
    weight = values(OUT, IN, seed=3)
    result, _ = apply(weight, dense, term(), dtype=torch.float16)
    assert torch.equal(result, (weight + full_delta(dense)).to(torch.float16))


def test_what_rounding_swallows_is_not_kept() -> None:
    weight = torch.ones(1, 2, dtype=torch.bfloat16)
    small, large = 2.0**-10, 2.0**-2
    found = Factors(np.ones((1, 1, 1), np.float32), np.array([[[small, large]]], np.float32), 1.0)
    result, kept = apply(weight, found, term(rows=Span(0, 1), out=Span(0, 1)))
    assert result.tolist() == [[1.0, 1.25]]
    assert kept.total == pytest.approx(small**2 + large**2)
    assert kept.ratio == pytest.approx(large**2 / (small**2 + large**2))


def test_no_update_at_all_is_kept_whole() -> None:
    assert Kept().ratio == 1.0
    assert Kept(0.0, 0.0).ratio == 1.0
    assert Kept(1.0, 2.0).ratio == 0.5


def test_a_workspace_grows_and_never_shrinks() -> None:
    space = Workspace(CPU)
    small = space.blocks(2, 3)
    assert [part.shape for part in small] == [(2, 3)] * 4
    assert len({part.data_ptr() for part in small}) == 4
    large = space.blocks(5, 7)
    assert space.blocks(2, 3)[0].data_ptr() == large[0].data_ptr()


# --- DoRA ----------------------------------------------------------------------------------------


def test_dora_scales_each_row_to_its_magnitude() -> None:
    weight, change, magnitude = values(OUT, IN), values(OUT, IN, seed=5), values(OUT).abs()
    merged = dora_weight(weight, change, magnitude).double().numpy()
    summed = (weight.double() + change.double()).numpy()
    norm = np.sqrt((summed**2).sum(axis=1, keepdims=True))
    assert np.allclose(merged, magnitude.double().numpy()[:, None] / norm * summed, rtol=1e-5)
    assert np.allclose(np.sqrt((merged**2).sum(axis=1)), magnitude.double().numpy(), rtol=1e-5)


def test_dora_is_as_peft_merges_it() -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    model = peft.get_peft_model(
        layer, peft.LoraConfig(r=R, lora_alpha=3, target_modules=["0"], use_dora=True)
    )
    part = model.base_model.model[0]
    with torch.no_grad():
        part.lora_B["default"].weight.copy_(values(OUT, R))
        part.lora_magnitude_vector["default"].weight.copy_(values(OUT).abs())
        update = part.lora_B["default"].weight @ part.lora_A["default"].weight * (3 / R)
        magnitude = part.lora_magnitude_vector["default"].weight.clone()
        expected = dora_weight(part.base_layer.weight.clone(), update, magnitude)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged[0].weight.data, expected)
