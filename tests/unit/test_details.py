"""Of every merged tensor: what it keeps of its update and how it was rounded, by merge and by verify."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loudmerge
from loudmerge.verifying.verify import verify
from tests.support.command import Ended, run_inside
from tests.unit.builders import EXPERTS, Q_PROJ, fused_lora, lora, values, write_adapter, write_base

E, H, I = 3, 40, 32  # noqa: E741
FUSED = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
SMALL = 1e-4


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return partial(run_inside, capsys)


def world(path: Path, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """Fused experts and a projection. q: a large update. gate_up: small. down: small in expert 0 alone."""
    base = {
        FUSED[0]: values(E, H, I, dtype=dtype),
        FUSED[1]: values(E, 2 * I, H, dtype=dtype),
        f"{Q_PROJ}.weight": values(H, H, dtype=dtype),
        "untouched": values(4, dtype=dtype),
    }
    # Outermost first; the columns of expert 0 are every E-th.
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(Q_PROJ, H, H)
    for key in held:
        if "base_layer.lora_B" in key:
            held[key].mul_(SMALL)
        elif "experts.lora_B" in key:
            held[key][:, ::E].mul_(SMALL)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = write_adapter(path / "adapter", held, target_parameters=targets, peft_version="0.19.1")
    return write_base(path / "base", base, num_experts=E), adapter


def test_merge_and_verify_say_it_of_every_merged_tensor_in_the_plans_order(
    tmp_path: Path, run: Callable[..., Ended]
) -> None:
    base, adapter = world(tmp_path)
    merged = run("merge", base, adapter, tmp_path / "out", "--json", "--details").document
    order = [output.key for output in loudmerge.plan(base, adapter).outputs if output.terms]
    assert [one["tensor"] for one in merged["details"]] == order
    assert {one["tensor"]: one["rounding"] for one in merged["details"]} == {
        FUSED[0]: "mixed",
        FUSED[1]: "balanced",
        f"{Q_PROJ}.weight": "nearest",
    }
    least = min(merged["details"], key=lambda one: one["kept"])
    assert merged["delta_kept"]["least"] == {"tensor": least["tensor"], "kept": least["kept"]}
    found = run(
        "verify", tmp_path / "out", "--base", base, "--adapter", adapter, "--json", "--details"
    ).document
    for ours, theirs in zip(merged["details"], found["details"], strict=True):
        assert ours.keys() == theirs.keys() == {"tensor", "kept", "rounding"}
        assert (ours["tensor"], ours["rounding"]) == (theirs["tensor"], theirs["rounding"])
        assert ours["kept"] == pytest.approx(theirs["kept"], abs=1e-4)


def test_the_kept_part_is_that_of_the_file(tmp_path: Path) -> None:
    """By hand: <W' - W, dW> / <dW, dW>, with W' and W read back."""
    base, adapter = world(tmp_path)
    report = loudmerge.merge(base, adapter, tmp_path / "out", threads=1, rounding="nearest")
    kept = {one.tensor: one.kept for one in report.details}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    key = f"{Q_PROJ}.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{Q_PROJ}.lora_{half}.weight"] for half in "AB")
    delta = 2.0 * b @ a
    along = ((after[key].float() - before[key].float()) * delta).sum() / delta.square().sum()
    assert kept[key] == pytest.approx(float(along), abs=1e-5)
    assert kept[FUSED[1]] < 0.5 < kept[FUSED[0]]
    assert {one.rounding for one in report.details} == {"nearest"}


@pytest.mark.parametrize("rounding", ["nearest", "balanced", "stochastic", "peft"])
def test_what_was_asked_for_is_what_every_tensor_has(rounding: str, tmp_path: Path) -> None:
    base, adapter = world(tmp_path)
    report = loudmerge.merge(base, adapter, tmp_path / "out", threads=1, rounding=rounding)
    assert {one.rounding for one in report.details} == {rounding}
    found = verify(tmp_path / "out", base, adapter)
    assert {one.rounding for one in found.details} <= {rounding, "nearest"}
    assert found.details[0].rounding == rounding


def test_without_the_option_neither_is_long(tmp_path: Path, run: Callable[..., Ended]) -> None:
    base, adapter = world(tmp_path)
    assert "details" not in run("merge", base, adapter, tmp_path / "out", "--json").document
    assert "details" not in (tmp_path / "out" / "merge_report.json").read_text()
    inputs = (tmp_path / "out", "--base", base, "--adapter", adapter)
    assert "details" not in run("verify", *inputs, "--json").document


def test_a_person_gets_a_line_for_each_tensor(tmp_path: Path, run: Callable[..., Ended]) -> None:
    base, adapter = world(tmp_path)
    merged = run("merge", base, adapter, tmp_path / "out", "--details").stdout.splitlines()
    found = run("verify", tmp_path / "out", "--base", base, "--adapter", adapter, "--details").stdout
    for lines in (merged, found.splitlines()):
        assert [line.split()[1:] for line in lines[-3:]] == [
            ["mixed", FUSED[0]],
            ["balanced", FUSED[1]],
            ["nearest", f"{Q_PROJ}.weight"],
        ]
