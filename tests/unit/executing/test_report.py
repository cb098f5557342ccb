"""The report is the contract's JSON, and its summary says in words what a person must know."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loudmerge
from loudmerge.errors import MergeRefused, Problem
from loudmerge.executing.report import MergeReport, dump, planned_report, refused_report
from loudmerge.merging.merge import peak_rss_bytes, planned
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    expert_tensors,
    fused_lora,
    lora,
    plan_of,
    values,
)

from tests.unit.builders import write_adapter, write_base  # isort: skip

E, H, I, V = 3, 6, 4, 9  # noqa: E741
FIELDS = {
    "schema", "loudmerge", "status", "base", "adapter", "out", "layout", "num_experts", "counts",
    "adapter_tensors", "delta_kept", "rounding", "files", "refusal", "seconds", "peak_rss_bytes",
}  # fmt: skip


def world(path: Path, scale: float = 1.0) -> tuple[Path, Path]:
    dtype = torch.bfloat16
    base = expert_tensors(E, H, I, dtype=dtype) | {
        f"{Q_PROJ}.weight": values(8, H, dtype=dtype),
        "n": values(3),
    }
    base[f"{EMBED}.weight"] = values(V, H, dtype=dtype)
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(Q_PROJ, 8, H)
    held = {key: value * (scale if "lora_B" in key else 1) for key, value in held.items()}
    held[f"{PREFIX}{EMBED}.weight"] = values(V, H, dtype=dtype)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return (
        write_base(path / "base", base, num_experts=E),
        write_adapter(path / "adapter", held, target_parameters=targets, peft_version="0.19.1"),
    )


def merged(path: Path, scale: float = 1.0, **options: Any) -> MergeReport:
    base, adapter = world(path, scale)
    return loudmerge.merge(base, adapter, path / "out", threads=1, **options)


def test_a_merges_report_has_the_fields_of_the_contract_with_what_was_done(tmp_path: Path) -> None:
    document = merged(tmp_path).to_json()
    assert document.keys() >= FIELDS
    assert (document["schema"], document["status"], document["refusal"]) == (1, "merged", None)
    assert document["loudmerge"] == loudmerge.__version__
    assert document["base"] == {"path": str(tmp_path / "base"), "model_type": "qwen3_moe"}
    assert document["adapter"] == {"path": str(tmp_path / "adapter"), "peft_version": "0.19.1", "rank": 2}
    assert document["out"] == str(tmp_path / "out")
    assert document["num_experts"] == E
    assert document["counts"] == {
        "expert": {"attempted": 3 * E, "applied": 3 * E},
        "dense": {"attempted": 1, "applied": 1},
        "replaced": {"attempted": 1, "applied": 1},
        "copied": 1,
    }
    assert document["adapter_tensors"] == {"total": 7, "consumed": 7}
    assert (document["layout"]["orientation"], document["layout"]["lora_b_layout"]) == (
        "standard",
        "rank_major",
    )
    assert sum(document["rounding"].values()) == 3 * E + 1
    assert document["verified"] is True
    assert document["seconds"] > 0
    assert document["peak_rss_bytes"] > 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["zusammenführen".encode(), b"caf\xe9"])
def test_the_memory_of_a_process_whose_name_is_not_ascii_is_read(name: bytes) -> None:
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes(name)
    try:
        assert peak_rss_bytes() > 1 << 20
    finally:
        comm.write_bytes(before.rstrip(b"\n"))


def test_every_piece_of_evidence_has_its_source_and_confidence(tmp_path: Path) -> None:
    evidence = merged(tmp_path).to_json()["layout"]["evidence"]
    assert {item["source"] for item in evidence} >= {"shape", "peft_version", "module"}
    for item in evidence:
        assert item.keys() == {"source", "site", "says", "confidence", "detail"}
        assert 0 <= item["confidence"] <= 1


def test_the_report_in_out_is_the_one_that_is_returned_and_lists_the_files_there(tmp_path: Path) -> None:
    report = merged(tmp_path)
    text = (tmp_path / "out" / "merge_report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report.to_json()))
    assert text.endswith("}\n")
    assert report.to_json()["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_what_the_document_says_is_an_attribute(tmp_path: Path) -> None:
    report = merged(tmp_path)
    assert (report.status, report.counts, report.out) == (
        "merged",
        report.document["counts"],
        str(tmp_path / "out"),
    )
    assert copy.copy(report) == report
    with pytest.raises(AttributeError, match="'size'"):
        report.size  # noqa: B018


def test_the_summary_names_counts_layout_and_what_was_kept(tmp_path: Path) -> None:
    lines = merged(tmp_path).summary().splitlines()
    assert lines[0] == f"merged: {tmp_path / 'out'}"
    assert f"  expert    {3 * E}/{3 * E}" in lines
    assert "  dense     1/1" in lines
    assert "  replaced  1/1" in lines
    assert "  copied    1" in lines
    assert "  layout    standard, rank_major" in lines
    assert any(line.startswith("  kept      ") for line in lines)
    assert not any("warning" in line for line in lines)
    assert "verified, " in lines[-1]
    assert "GiB" in lines[-1]


def test_an_update_that_rounding_swallows_is_a_warning_with_the_option_that_helps(tmp_path: Path) -> None:
    report = merged(tmp_path, 1e-6, rounding="nearest", verify=False)
    document = report.to_json()
    assert document["delta_kept"]["overall"] < 0.5
    least = document["delta_kept"]["least"]
    assert least["kept"] <= document["delta_kept"]["overall"]
    summary = report.summary()
    assert "warning" in summary
    assert least["tensor"] in summary
    assert "--rounding auto or --dtype float32" in summary
    assert "not verified, " in summary


def test_a_merge_without_any_update_keeps_all_of_it(tmp_path: Path) -> None:
    """Only a full tensor is replaced: there is no update that rounding could swallow."""
    base = write_base(tmp_path / "base", {"lm_head.weight": values(V, H), f"{EMBED}.weight": values(V, H)})
    adapter = write_adapter(tmp_path / "adapter", {f"{PREFIX}lm_head.weight": values(V, H, seed=5)})
    report = loudmerge.merge(base, adapter, tmp_path / "out", threads=1)
    assert report.to_json()["delta_kept"] == {"overall": 1.0, "least": None}
    assert "expert" not in report.summary()
    assert "kept      1.0000" in report.summary()


def test_a_plans_report_has_attempted_nothing_yet(tmp_path: Path) -> None:
    base, adapter = world(tmp_path)
    report = planned_report(plan_of(base, adapter), tmp_path / "out")
    document = report.to_json()
    assert document.keys() >= FIELDS
    assert (report.status, document["out"]) == ("planned", str(tmp_path / "out"))
    assert document["counts"]["expert"] == {"attempted": 3 * E, "applied": 0}
    assert document["delta_kept"] is document["rounding"] is document["seconds"] is None
    assert f"  expert    {3 * E}" in report.summary().splitlines()
    assert "kept" not in report.summary()
    assert planned_report(plan_of(base, adapter)).summary().startswith(f"planned: {base}")


def test_a_dry_run_says_for_which_out_and_what_it_took(tmp_path: Path) -> None:
    base, adapter = world(tmp_path)
    document = planned(base, adapter, tmp_path / "out", rounding="nearest").to_json()
    assert (document["status"], document["out"]) == ("planned", str(tmp_path / "out"))
    assert document["options"]["rounding"] == "nearest"
    assert document["seconds"] > 0
    assert document["peak_rss_bytes"] > 1 << 20
    assert not (tmp_path / "out").exists()


def test_notes_are_in_the_summary(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{EMBED}.weight": values(V, H)}, tie_word_embeddings=True)
    report = planned_report(plan_of(base, write_adapter(tmp_path / "adapter", lora("lm_head", V, H))))
    assert report.to_json()["config_edits"] == {"tie_word_embeddings": False}
    assert "  note      lm_head.weight becomes a weight of its own" in report.summary()


@pytest.mark.parametrize("out", [None, "/o"])
def test_a_refusals_report_has_every_problem_and_the_message(out: str | None) -> None:
    problems = [
        Problem("shape-mismatch", "x", "[1]", "[2]", "Try y."),
        Problem("missing-base-tensor", "z", "none", "one", "Get z."),
    ]
    report = refused_report("/b", "/a", out, MergeRefused(problems))
    document = json.loads(dump(report))
    assert (report.status, document["out"], document["base"]["path"]) == ("refused", out, "/b")
    refusal = document["refusal"]
    assert (refusal["code"], refusal["where"], refusal["hint"]) == ("shape-mismatch", "x", "Try y.")
    assert refusal["message"].startswith("shape-mismatch: x: found [1], expected [2]. Try y.")
    assert [problem["code"] for problem in refusal["problems"]] == ["shape-mismatch", "missing-base-tensor"]
    assert report.summary() == f"refused: {refusal['message']}"


def shape(value: Any) -> Any:
    """The names in a document, down to what is no object."""
    return {name: shape(inner) for name, inner in value.items()} if isinstance(value, dict) else None


def test_a_refusal_has_every_name_that_a_merge_has_so_that_its_reader_needs_no_second_way(
    tmp_path: Path,
) -> None:
    done = merged(tmp_path).to_json()
    error = MergeRefused(Problem("shape-mismatch", "x", "1", "2", "Try 2."))
    refused = refused_report(str(tmp_path / "base"), str(tmp_path / "adapter"), "o", error).to_json()
    for name in ("options", "config_edits", "delta_kept", "rounding", "refusal"):
        assert name in refused
        done[name] = refused[name]
    assert shape(refused) == shape(done)
    assert refused["base"] == done["base"]
    assert refused["adapter"] == done["adapter"]
    assert refused["counts"]["expert"] == {"attempted": None, "applied": 0}
    assert (refused["files"], refused["layout"]["evidence"], refused["seconds"]) == ([], [], None)


@pytest.mark.parametrize(
    "config", [None, b"{", b"[]", b"\xff", b"[" * 10**5, b'{"model_type": 3, "peft_version": [], "r": true}']
)
def test_a_config_that_cannot_be_read_makes_no_second_refusal(tmp_path: Path, config: bytes | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
        (tmp_path / "adapter_config.json").write_bytes(config)
    error = MergeRefused(Problem("corrupt-file", "x", "1", "2", "Get it again."))
    document = refused_report(str(tmp_path), str(tmp_path), None, error).to_json()
    assert document["base"] == {"path": str(tmp_path), "model_type": None}
    assert document["adapter"] == {"path": str(tmp_path), "peft_version": None, "rank": None}


def test_what_is_no_ascii_stays_readable(tmp_path: Path) -> None:
    error = MergeRefused(Problem("shape-mismatch", "größe", "1", "2", "Try ß."))
    assert "größe".encode() in dump(refused_report(str(tmp_path), "/a", None, error))
