"""What inspect predicts of a merge, against what the merge then reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge.executing.predict import EXPERTS as EXPERTS_EACH
from loudmerge.executing.predict import MATRICES, predict
from loudmerge.inspecting.inspect import inspect
from loudmerge.reading.names import template
from tests.support.command import Ended, run_inside
from tests.unit.builders import (
    EMBED,
    PREFIX,
    expert_tensors,
    fused_lora,
    lora,
    plan_of,
    values,
    write_adapter,
    write_base,
)

LAYERS, E, H, I = 8, 8, 72, 40  # noqa: E741
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


def experts_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def q_proj(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def world(path: Path, scale: float, *, dtype: torch.dtype = torch.bfloat16, fused: bool = False) -> Path:
    """A base and an adapter whose layers and experts were trained more or less."""
    held = {
        key: tensor * scale * strength(tensor.shape[1]) if "lora_B" in key else tensor
        for key, tensor in pairs().items()
    }
    write_adapter(path / "adapter", held, target_parameters=FUSED, peft_version="0.19.1")
    write_base(path / "base", weights(dtype, fused), num_experts=E)
    return path


@cache
def weights(dtype: torch.dtype, fused: bool) -> Mapping[str, torch.Tensor]:
    base = {f"{q_proj(layer)}.weight": values(H, H, seed=layer, dtype=dtype) for layer in range(LAYERS)}
    if not fused:
        return base | expert_tensors(E, H, I, layers=LAYERS, dtype=dtype)
    for layer in range(LAYERS):
        name = experts_of(layer)
        base[f"{name}.gate_up_proj"] = values(E, 2 * I, H, seed=layer, dtype=dtype)
        base[f"{name}.down_proj"] = values(E, H, I, seed=layer, dtype=dtype)
    return base


@cache
def pairs() -> Mapping[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        held |= fused_lora(experts_of(layer), [(H, I), (2 * I, H)], experts=E)
        held |= lora(q_proj(layer), H, H, seed=layer)
    return held


def strength(columns: int) -> torch.Tensor:
    """One factor for each column, the same for all of an expert (rank-major)."""
    return torch.linspace(0.6, 1.4, E).repeat(columns // E) if columns % E == 0 else torch.ones(columns)


@pytest.mark.parametrize(
    ("rounding", "dtype", "scale"),
    [
        *product(["auto", "nearest"], [torch.bfloat16], [1e-4, 5e-4, 2e-3, 1e-2, 1.0]),
        *product(["auto", "nearest"], [torch.float16], [5e-4, 1.0]),
        *product(["auto"], [torch.float32], [5e-4]),
        *product(["peft", "stochastic", "balanced"], [torch.bfloat16], [2e-3]),
    ],
    ids=str,
)
def test_it_is_within_four_percent_of_the_merge(
    rounding: str, dtype: torch.dtype, scale: float, tmp_path: Path
) -> None:
    world(tmp_path, scale, dtype=dtype)
    found = predict(plan_of(tmp_path / "base", tmp_path / "adapter", rounding=rounding))
    assert found is not None
    assert found.sampled < found.matrices / 2
    report = loudmerge.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=1, rounding=rounding, verify=False
    )
    assert found.kept == pytest.approx(report.to_json()["delta_kept"]["overall"], abs=0.04)
    assert found.rounding.keys() == report.to_json()["rounding"].keys()


def test_small_updates_are_told_from_large_ones(tmp_path: Path) -> None:
    kept = []
    for scale in (1e-4, 1e-2, 1.0):
        found = predict(plan_of(*_inputs(world(tmp_path / str(scale), scale)), rounding="nearest"))
        assert found is not None
        kept.append(found.kept)
    assert kept[0] < 0.3 < kept[1] < kept[2]
    assert kept[2] > 0.99


def _inputs(path: Path) -> tuple[Path, Path]:
    return path / "base", path / "adapter"


def test_of_a_sample_that_holds_everything_it_is_exact(tmp_path: Path) -> None:
    """Four experts of 6 layers, and no more than 64 rows: every element is in the sample."""
    layers, experts, hidden, intermediate = 6, 4, 48, 24
    base = expert_tensors(experts, hidden, intermediate, layers=layers, dtype=torch.bfloat16)
    held: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        sizes = [(hidden, intermediate), (2 * intermediate, hidden)]
        held |= fused_lora(experts_of(layer), sizes, experts=experts)
        for key in held:
            if f"layers.{layer}." in key and "lora_B" in key:
                held[key] *= 10.0**-layer
    write_adapter(tmp_path / "adapter", held, target_parameters=FUSED, peft_version="0.19.1")
    write_base(tmp_path / "base", base, num_experts=experts)
    found = predict(plan_of(*_inputs(tmp_path)))
    report = loudmerge.merge(*_inputs(tmp_path), tmp_path / "out", threads=1)
    assert found is not None
    assert found.sampled == found.matrices == layers * experts * 3
    assert found.kept == pytest.approx(report.to_json()["delta_kept"]["overall"], rel=1e-6)
    assert found.rounding == report.to_json()["rounding"]
    assert len(found.rounding) == 2
    nearest = loudmerge.merge(*_inputs(tmp_path), tmp_path / "other", threads=1, rounding="nearest")
    assert found.nearest == pytest.approx(nearest.to_json()["delta_kept"]["overall"], rel=1e-6)
    kinds = {kind.kind.rsplit(".", 2)[1]: kind for kind in found.kinds}
    for leaf, kind in kinds.items():
        kept = [one.kept for one in nearest.details if leaf in one.tensor]
        assert min(kept) < kind.nearest < max(kept)


def test_fused_tensors_are_sampled_by_expert(tmp_path: Path) -> None:
    world(tmp_path, 1e-3, fused=True)
    found = predict(plan_of(*_inputs(tmp_path)))
    assert found is not None
    assert [(kind.kind, kind.matrices, kind.sampled) for kind in found.kinds] == [
        ("model.layers.*.mlp.experts.down_proj", LAYERS * E, MATRICES),
        ("model.layers.*.mlp.experts.gate_up_proj", LAYERS * E, MATRICES),
        ("model.layers.*.self_attn.q_proj.weight", LAYERS, LAYERS),
    ]


def test_a_kind_is_weighed_by_its_size_and_not_by_its_sample(tmp_path: Path) -> None:
    """The experts lose their update, q_proj keeps it: all of its matrices are sampled, of theirs a third."""
    world(tmp_path, 1e-4)
    rewrite(tmp_path / "base" / "model.safetensors", "q_proj", 1e-3)
    rewrite(tmp_path / "adapter" / "adapter_model.safetensors", "q_proj.lora_B", 4.0)
    found = predict(plan_of(*_inputs(tmp_path), rounding="nearest"))
    report = loudmerge.merge(*_inputs(tmp_path), tmp_path / "out", threads=1, rounding="nearest")
    assert found is not None
    kept = {kind.kind.rsplit(".", 2)[1]: kind.kept for kind in found.kinds}
    assert kept["q_proj"] > 0.99
    assert max(kept["down_proj"], kept["gate_proj"], kept["up_proj"]) < 0.8
    assert found.kept == pytest.approx(report.to_json()["delta_kept"]["overall"], abs=0.02)


def rewrite(file: Path, part: str, factor: float) -> None:
    held = {key: value * factor if part in key else value for key, value in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})


def test_experts_of_every_layer_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(tmp_path, 1.0)
    from loudmerge.executing import predict as module

    seen: dict[str, set[str]] = {}
    choose = module._chosen

    def watched(members: list[module._Matrix]) -> list[module._Matrix]:
        chosen = list(choose(members))
        for matrix in chosen:
            named = re.search(r"layers\.(\d+).*experts\.(\d+)", matrix.pieces[0].output.key)
            if named:
                seen.setdefault(named[1], set()).add(named[2])
        return chosen

    monkeypatch.setattr(module, "_chosen", watched)
    predict(plan_of(*_inputs(tmp_path)))
    assert len(seen) == MATRICES // EXPERTS_EACH
    assert all(len(experts) == EXPERTS_EACH for experts in seen.values())
    assert len(set.union(*seen.values())) == E


def test_dora_is_predicted_too(tmp_path: Path) -> None:
    base = {f"{q_proj(0)}.weight": values(H, H, dtype=torch.bfloat16)}
    held = lora(q_proj(0), H, H)
    held[f"{PREFIX}{q_proj(0)}.lora_magnitude_vector"] = values(H).abs() + 8.0
    write_adapter(tmp_path / "adapter", held, use_dora=True)
    write_base(tmp_path / "base", base)
    found = predict(plan_of(*_inputs(tmp_path)))
    report = loudmerge.merge(*_inputs(tmp_path), tmp_path / "out", threads=1)
    assert found is not None
    assert found.kept == pytest.approx(report.to_json()["delta_kept"]["overall"], rel=1e-6)


def test_where_no_matrix_is_updated_there_is_nothing_to_predict(tmp_path: Path) -> None:
    base = {"lm_head.weight": values(9, H), f"{EMBED}.weight": values(9, H)}
    write_base(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", {f"{PREFIX}lm_head.weight": values(9, H, seed=5)})
    assert predict(plan_of(*_inputs(tmp_path))) is None
    assert inspect(tmp_path / "adapter", tmp_path / "base").to_json()["predicted"] is None


def test_what_the_merge_would_refuse_in_the_sample_is_a_refusal(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {f"{q_proj(0)}.weight": values(H, H)})
    held = lora(q_proj(0), H, H)
    held[f"{PREFIX}{q_proj(0)}.lora_B.weight"][3, 1] = torch.nan
    write_adapter(tmp_path / "adapter", held)
    found = inspect(tmp_path / "adapter", tmp_path / "base")
    assert found.plan is not None
    assert found.predicted is None
    assert found.refusal is not None
    assert found.refusal.code == "non-finite"
    # As a merge says it: what is wrong is the adapter, not the range of a dtype.
    assert found.refusal.where.startswith(f"{PREFIX}{q_proj(0)}.lora_B.weight")
    assert "refused   non-finite" in found.summary()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return partial(run_inside, capsys)


def test_inspect_tells_it_and_says_that_it_is_a_prediction(tmp_path: Path, run: Callable[..., Ended]) -> None:
    base, adapter = _inputs(world(tmp_path, 1e-4))
    document = run("inspect", adapter, "--base", base, "--json").document["predicted"]
    assert (document["sampled"], document["matrices"]) == (3 * MATRICES + LAYERS, LAYERS * (3 * E + 1))
    assert document["option"] == "auto"
    assert set(document["rounding"]) == {"balanced"}
    assert document["delta_kept"]["nearest"] < 0.3
    assert sum(kind["sampled"] for kind in document["kinds"]) == document["sampled"]
    said = run("inspect", adapter, "--base", base).stdout
    assert f"predicted from a sample, {document['sampled']} of {document['matrices']} matrices: " in said
    assert f"{MATRICES} balanced" in said
    assert f"warning   {document['warning']}" in said
    assert "rounding to the nearest, as other tools do, keeps only 0." in document["warning"]
    assert run("inspect", adapter, "--json").document["predicted"] is None


@pytest.mark.parametrize(
    ("scale", "rounding", "says"),
    [
        (1e-4, "auto", "--rounding auto, the default, keeps it"),
        (1e-4, "nearest", "rounding would swallow a part of the update; --rounding auto or --dtype float32"),
        (1e-4, "peft", "rounding would swallow a part of the update; --rounding auto or --dtype float32"),
        (1.0, "auto", None),
        (1.0, "nearest", None),
    ],
)
def test_the_warning_names_the_option(scale: float, rounding: str, says: str | None, tmp_path: Path) -> None:
    found = predict(plan_of(*_inputs(world(tmp_path, scale)), rounding=rounding))
    assert found is not None
    assert (found.warning is None) if says is None else (says in (found.warning or ""))


def test_an_update_that_is_zero_is_not_only_kept(tmp_path: Path) -> None:
    """lora_B begins at zero: what was not trained has nothing that rounding could lose."""
    base, adapter = _inputs(world(tmp_path, 1.0))
    held = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in held.items():
        if "q_proj.lora_B" in name:
            tensor.zero_()
    save_file(held, adapter / "adapter_model.safetensors")
    found = predict(plan_of(base, adapter))
    assert found is not None
    assert [kind.kind for kind in found.kinds if kind.zero] == [template(f"{q_proj(0)}.weight")]
    says = "the update is zero in all that was sampled of model.layers.*.self_attn.q_proj"
    assert says in (found.warning or "")


def test_nothing_is_written(tmp_path: Path) -> None:
    base, adapter = _inputs(world(tmp_path, 1.0))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    inspect(adapter, base)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
