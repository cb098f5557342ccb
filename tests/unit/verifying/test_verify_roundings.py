"""verify under stochastic and automatic rounding, and of tensors that change their dtype."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loudmerge.arithmetic.balance import Bands, bands
from loudmerge.layout import Span
from loudmerge.planning.plan import OutputTensor
from loudmerge.verifying import rules as taken
from loudmerge.verifying.bounds import carried
from loudmerge.verifying.redraw import Redraw, make_table
from tests.unit.reference import DTYPES, rounded, tensor
from tests.unit.verifying.verify_world import CODES, SHARDS, Array, Wide, World, make, moved, wide


def stochastic(value: Array, dtype: str, rng: np.random.Generator) -> Array:
    """Rounded up or down with the probabilities that make the expectation exact."""
    nearest = tensor(rounded(value, dtype), dtype)
    toward = torch.from_numpy(np.where(nearest.double().numpy() < value, np.inf, -np.inf)).to(nearest.dtype)
    other = torch.nextafter(nearest.float(), toward.float()) if dtype == "float32" else step(nearest, toward)
    low, high = nearest.double().numpy(), other.double().numpy()
    chance = np.divide(value - low, high - low, out=np.zeros_like(value), where=value != low)
    result: Array = np.where(rng.random(value.shape) < chance, high, low)
    return result


def step(nearest: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    bits = nearest.view(torch.int16)
    away = (toward > 0) == (nearest > 0)
    return torch.where(away, bits + 1, bits - 1).view(nearest.dtype)


def seeded(value: Array, dtype: str, key: str) -> Array:
    """As the merge draws for the tensor `key`, whose float32 sum is `value`."""
    exact = torch.from_numpy(value)
    held = carried(exact, Redraw(key, 0, make_table()).block(0, *exact.shape), DTYPES[dtype])
    result: Array = held.numpy()
    return result


def balanced(case: Wide, dtype: str) -> Array:
    """As the merge balances the tensor `w`."""
    weight = torch.from_numpy(case.weight).float()
    delta = torch.from_numpy(case.exact - case.weight).float()
    drawn = Redraw("w", 0, make_table()).block(0, *weight.shape).int()
    held = weight + delta
    for part in bands(Span(0, len(held))):
        band = Bands(Span(part.start, len(held[part])), 0)
        band.round_(held[part], weight[part], delta[part], drawn[part], DTYPES[dtype])
    result: Array = held.numpy()
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_is_recomputed_and_other_draws_are_wrong(tmp_path: Path, dtype: str) -> None:
    case = wide(tmp_path, dtype)
    case.write(seeded(case.exact, dtype, "w"))
    assert case.world.verify(rounding="stochastic").ok
    assert not case.world.verify(rounding="nearest").ok
    for other in (
        seeded(case.exact, dtype, "v"),
        stochastic(case.exact, dtype, np.random.default_rng(1)),
        rounded(case.exact, dtype),
    ):
        case.write(other)
        assert case.world.verify(rounding="stochastic").mismatches[0].wrong > case.exact.size // 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_auto_is_what_the_nearest_keeps_asks_for_throughout(tmp_path: Path, dtype: str) -> None:
    """Here the nearest keeps half of the update in bfloat16, nearly all in float16."""
    case = wide(tmp_path, dtype)
    kept, nearest = balanced(case, dtype), rounded(case.exact, dtype)
    right, other = (kept, nearest) if dtype == "bfloat16" else (nearest, kept)
    case.write(right)
    assert case.world.verify(rounding="auto").ok
    case.world.edit("w", lambda t: moved(t, (7, 8), 1))
    (found,) = case.world.verify(rounding="auto").mismatches
    assert (found.key, found.index, found.wrong) == ("w", (7, 8), 1)
    for wrong in (other, np.concatenate((kept[:100], nearest[100:])), seeded(case.exact, dtype, "w")):
        case.write(wrong)
        assert [m.key for m in case.world.verify(rounding="auto").mismatches] == ["w"]


@pytest.mark.parametrize(
    ("kept", "closing", "rules"),
    [
        (0.5, False, {"balanced"}),
        (0.9895, False, {"nearest", "balanced"}),
        (0.9905, True, {"nearest", "stochastic"}),
        (0.995, True, {"nearest"}),
        (0.9, True, {"stochastic"}),
        (0.4995, True, {"stochastic", "balanced"}),
        (0.4, True, {"balanced"}),
        (math.nan, False, {"nearest", "balanced"}),
        (math.nan, True, {"nearest", "stochastic", "balanced"}),
    ],
)
def test_near_a_limit_auto_may_have_taken_either(
    world_w: OutputTensor, kept: float, closing: bool, rules: set[str]
) -> None:
    assert set(taken.rules_of_auto(replace(world_w, closing=closing), kept)) == rules
    drawn = {rule if rule != "balanced" else "stochastic" for rule in rules}
    rows = replace(world_w, closing=closing, token_rows=((0,), world_w.source))
    assert set(taken.rules_of_auto(rows, kept)) == drawn


@pytest.fixture
def world_w(tmp_path: Path) -> OutputTensor:
    """The output that `wide` has."""
    outputs = wide(tmp_path, "bfloat16").world.plan.outputs
    return next(output for output in outputs if output.key == "w")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_balanced_rounding_is_recomputed_and_others_are_wrong(tmp_path: Path, dtype: str) -> None:
    case = wide(tmp_path, dtype)
    case.write(balanced(case, dtype))
    assert case.world.verify(rounding="balanced").ok
    for other in (seeded(case.exact, dtype, "w"), rounded(case.exact, dtype), case.weight):
        case.write(other)
        assert case.world.verify(rounding="balanced").mismatches[0].wrong > case.exact.size // 100


def test_what_no_term_updates_is_the_nearest_beside_what_is_balanced(tmp_path: Path) -> None:
    whole = wide(tmp_path, "bfloat16")
    exact = np.concatenate((whole.exact[:150], whole.weight[150:]))
    upper = Span(0, 150)

    def part(output: OutputTensor) -> OutputTensor:
        return replace(output, terms=tuple(replace(term, rows=upper, out=upper) for term in output.terms))

    plan = replace(whole.world.plan, outputs=tuple(map(part, whole.world.plan.outputs)))
    case = Wide(World(plan, whole.world.out, "bfloat16"), exact, whole.weight)
    case.write(balanced(case, "bfloat16"))
    assert case.world.verify(rounding="balanced").ok
    case.world.edit("w", lambda t: moved(t, (170, 8), 1))
    (found,) = case.world.verify(rounding="balanced").mismatches
    assert (found.key, found.index, found.wrong) == ("w", (170, 8), 1)


def test_peft_s_rounding_of_experts_and_of_linears(tmp_path: Path) -> None:
    """PEFT rounds an expert's update before it adds it, a Linear's only from an adapter in half precision."""
    once = make(tmp_path / "once", "bfloat16", "nearest", size=0.3)
    found = once.verify(rounding="peft").mismatches
    experts = {o.key for o in once.plan.outputs if any(term.expert >= 0 for term in o.terms)}
    assert {m.key for m in found} == experts
    twice = make(tmp_path / "twice", "bfloat16", "peft", size=0.3)
    assert twice.verify().ok
    assert {m.key for m in twice.verify(rounding="nearest").mismatches} > experts


def test_a_value_beyond_the_neighbours_is_no_stochastic_rounding(tmp_path: Path) -> None:
    case = wide(tmp_path, "bfloat16")
    case.write(seeded(case.exact, "bfloat16", "w"))
    case.world.edit("w", lambda t: moved(t, (7, 8), 2))
    found = case.world.verify(rounding="stochastic").mismatches
    assert [(m.key, m.index, m.wrong) for m in found] == [("w", (7, 8), 1)]


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_a_conversion_is_compared_as_the_rounding_of_the_base(tmp_path: Path, out_dtype: str) -> None:
    """`--dtype`: copies, too, have to be the base's numbers in the new dtype."""
    world, sizes = make(tmp_path, "bfloat16"), 0
    for shard in SHARDS:
        held = {
            key: t.to(DTYPES[out_dtype]) if t.is_floating_point() else t
            for key, t in load_file(world.out / shard).items()
        }
        sizes += sum(t.numel() * t.element_size() for t in held.values())
        save_file(held, world.out / shard, metadata={"format": "pt"})
    index = json.loads((world.out / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = sizes
    (world.out / "model.safetensors.index.json").write_text(json.dumps(index))
    outputs = tuple(
        replace(o, dtype=CODES[out_dtype]) if o.dtype == "BF16" else o for o in world.plan.outputs
    )
    converted = World(replace(world.plan, outputs=outputs), world.out, out_dtype)
    wrong = {m.key for m in converted.verify().mismatches}
    # Rounded to bfloat16 before, so every merged tensor is wrong; the copies are right.
    assert wrong == {o.key for o in outputs if o.terms or o.bias or o.token_rows or o.replaced}
    converted.edit("model.norm.weight", lambda t: moved(t, (3,), 1))
    assert {m.key for m in converted.verify().mismatches} == wrong | {"model.norm.weight"}
