"""The real command on a real, tiny checkpoint and an adapter that the installed PEFT wrote."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from loudmerge import __version__
from tests.support import tiny
from tests.support.command import Ended, run_apart, run_inside

LAYERS, EXPERTS = 2, 4
HALF_A_SHARD = 60_000
"""Bytes: more than each file of OUT but its shard."""


class Inputs(NamedTuple):
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A Qwen3-MoE in bfloat16, with LoRA on its experts and on attention."""
    root = tmp_path_factory.mktemp("inputs")
    # 24 values of bfloat16 are a multiple of 16 bytes, which torch's grouped_mm insists on.
    model = tiny.build("qwen3_moe", dtype=torch.bfloat16, experts=EXPERTS, moe_intermediate_size=24)
    model.save_pretrained(root / "base")
    fused = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") if tiny.expert_parameters(model) else ()
    apart = () if fused else ("gate_proj", "up_proj", "down_proj")  # transformers 4: a Linear for each expert
    tiny.attach_random_lora(
        model, target_parameters=fused, target_modules=("q_proj", "v_proj", *apart), save_to=root / "adapter"
    )
    return Inputs(root / "base", root / "adapter")


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    assert run_apart("merge", *inputs, out).code == 0
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return partial(run_inside, capsys)


def test_merge_reports_every_expert_on_stdout_and_in_out(
    inputs: Inputs, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    ended = run("merge", *inputs, tmp_path / "out", "--json")
    assert ended.code == 0
    report = ended.document
    assert (report["schema"], report["loudmerge"], report["status"]) == (1, __version__, "merged")
    projections = LAYERS * EXPERTS * 3
    assert report["counts"]["expert"] == {"attempted": projections, "applied": projections}
    assert report["counts"]["dense"] == {"attempted": LAYERS * 2, "applied": LAYERS * 2}
    tensors = len(load_file(inputs.adapter / "adapter_model.safetensors"))
    assert report["adapter_tensors"] == {"total": tensors, "consumed": tensors}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == report["files"]


def test_a_person_is_told_how_many_were_applied(inputs: Inputs, tmp_path: Path) -> None:
    ended = run_apart("merge", *inputs, tmp_path / "out", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert f"{LAYERS * EXPERTS * 3}/{LAYERS * EXPERTS * 3}" in ended.stdout


def test_a_dry_run_writes_nothing(inputs: Inputs, tmp_path: Path, run: Callable[..., Ended]) -> None:
    ended = run("merge", *inputs, tmp_path / "out", "--dry-run", "--json")
    assert (ended.code, ended.document["status"]) == (0, "planned")
    assert ended.document["out"] == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_out_is_refused_and_untouched_until_overwrite(
    inputs: Inputs, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    ended = run("merge", *inputs, out, "--json")
    assert (ended.code, ended.document["status"]) == (3, "refused")
    assert ended.document["refusal"]["code"] == "out-exists"
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert run("merge", *inputs, out, "--overwrite").code == 0
    assert not (out / "mine").exists()
    assert (out / "merge_report.json").exists()


def test_an_adapter_for_another_base_is_refused_and_nothing_written(inputs: Inputs, tmp_path: Path) -> None:
    other = tiny.build("qwen3_moe", dtype=torch.bfloat16, experts=EXPERTS, moe_intermediate_size=16)
    other.save_pretrained(tmp_path / "other")
    ended = run_apart("merge", tmp_path / "other", inputs.adapter, tmp_path / "out", "--json")
    assert (ended.code, ended.document["status"]) == (3, "refused")
    assert ended.document["refusal"]["code"] in {"shape-mismatch", "unknown-layout"}
    assert ended.stderr.split(":")[0] == ended.document["refusal"]["code"]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_file_that_cannot_grow_exits_5_and_leaves_nothing(inputs: Inputs, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_A_SHARD, HALF_A_SHARD))

    ended = run_apart("merge", *inputs, tmp_path / "out", "--json", before=limit)
    assert (ended.code, ended.document["status"]) == (5, "failed")
    assert "File too large" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_exits_5(
    inputs: Inputs, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    assert run("merge", *inputs, tmp_path / "out", "--device=cuda").code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounding", ["nearest", "peft"])
def test_a_merge_of_every_rounding_verifies(
    rounding: str, inputs: Inputs, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    out = tmp_path / "out"
    assert run("merge", *inputs, out, f"--rounding={rounding}").code == 0
    assert run("verify", out, "--base", inputs.base, "--adapter", inputs.adapter).code == 0


def test_verify_exits_4_when_one_expert_is_the_base_s(
    inputs: Inputs, merged: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    out, shard = tmp_path / "out", "model.safetensors"
    shutil.copytree(merged, out)
    tensors = load_file(out / shard)
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[key] = load_file(inputs.base / shard)[key]
    save_file(tensors, out / shard, metadata={"format": "pt"})
    ended = run("verify", out, "--base", inputs.base, "--adapter", inputs.adapter)
    assert ended.code == 4
    assert key in ended.stdout


def test_inspect_says_the_layout_and_its_evidence(inputs: Inputs, run: Callable[..., Ended]) -> None:
    ended = run("inspect", inputs.adapter, "--base", inputs.base, "--json")
    assert ended.code == 0
    assert ended.document["refusal"] is None
    assert ended.document["plan"]["layout"].keys() >= {"orientation", "lora_b_layout", "evidence"}


def test_compare_finds_the_merge_equal_to_the_adapter(
    inputs: Inputs, merged: Path, run: Callable[..., Ended]
) -> None:
    ended = run("compare", merged, "--base", inputs.base, "--adapter", inputs.adapter, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.document


def test_compare_exits_4_when_the_update_is_not_in_the_file(
    inputs: Inputs, run: Callable[..., Ended]
) -> None:
    assert run("compare", inputs.base, "--base", inputs.base, "--adapter", inputs.adapter).code == 4
