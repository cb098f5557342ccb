"""verify compares what OUT's report says, and every byte of the JSON that the merge wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loudmerge.comparing.compare import compare
from loudmerge.converting.convert import convert
from loudmerge.errors import MergeRefused, Mismatch
from loudmerge.hub import client, upload
from loudmerge.merging.merge import merge
from loudmerge.verifying.outfiles import TensorMismatch
from loudmerge.verifying.verify import Verification, verify
from tests.unit.builders import EXPERTS, fused_lora, lora, values, write_adapter, write_base
from tests.unit.reference import build
from tests.unit.verifying.test_verify_merged import MERGED, dense

CONFIG, INDEX, REPORT = "config.json", "model.safetensors.index.json", "merge_report.json"
ROUNDINGS = ("auto", "nearest", "balanced", "stochastic", "peft")


class Place:
    """OUT with its inputs."""

    def __init__(self, root: Path, base: Path, adapter: Path, **options: Any) -> None:
        self.out, self.base, self.adapter = root / "out", base, adapter
        merge(base, adapter, self.out, verify=False, threads=1, **options)

    def verify(self) -> Verification:
        return verify(self.out, self.base, self.adapter)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / REPORT).read_text())
        return found

    def say(self, report: dict[str, Any]) -> None:
        (self.out / REPORT).write_text(json.dumps(report))

    def only(self) -> TensorMismatch:
        (found,) = self.verify().mismatches
        return found


def place(root: Path, **options: Any) -> Place:
    built = build(MERGED["per-expert"], root)
    return Place(root, built.base, built.adapter, **options)


def weaken(adapter: Path, scale: float) -> None:
    """Makes every update so much smaller."""
    file = adapter / "adapter_model.safetensors"
    scaled = {
        key: (value * (scale if "_B" in key else 1)).contiguous() for key, value in load_file(file).items()
    }
    save_file(scaled, file, metadata={"format": "pt"})


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-6, 0])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", MERGED)
def test_what_a_merge_of_experts_reports_is_what_is_recomputed(
    tmp_path: Path, name: str, rounding: str, scale: float
) -> None:
    built = build(MERGED[name], tmp_path)
    weaken(built.adapter, scale)
    found = Place(tmp_path, built.base, built.adapter, rounding=rounding).verify()
    assert found.ok, found.summary()


@pytest.mark.parametrize("scale", [1, 1e-4, 0])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "bias", "embedding", "rows"])
def test_what_a_merge_of_dense_adapters_reports_is_what_is_recomputed(
    tmp_path: Path, kind: str, dtype: str, rounding: str, scale: float
) -> None:
    base, adapter = dense(tmp_path, kind, dtype)
    weaken(adapter, scale)
    found = Place(tmp_path, base, adapter, rounding=rounding, dtype="bfloat16").verify()
    assert found.ok, found.summary()


def told_kept(report: dict[str, Any], value: float) -> None:
    report["delta_kept"]["overall"] = value


EVIDENCE = {"source": "shape", "site": "", "says": "standard", "detail": ""}


def told_layout(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report["layout"][name] for name in ("orientation", "lora_b_layout")}


def recount(report: dict[str, Any], replaced: int, copied: int) -> None:
    """Adds to these counts."""
    counts = report["counts"]
    counts["copied"] += copied
    counts["replaced"] = {name: count + replaced for name, count in counts["replaced"].items()}


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "status": (
        lambda report: report.update(status="refused"),
        'status: found "refused", expected "merged"',
    ),
    "refusal": (
        lambda report: report.update(refusal={"code": "x"}),
        'refusal: found {"code": "x"}, expected null',
    ),
    "counts": (
        lambda report: report["counts"].update(expert={"attempted": 999, "applied": 3}),
        'counts: found {"copied": .*"applied": 3, "attempted": 999',
    ),
    "copied": (
        lambda report: report["counts"].update(copied=0),
        "counts: found",
    ),
    "a count's kind": (
        lambda report: report["counts"]["replaced"].update(attempted=[]),
        r'counts: found {"copied": .*"attempted": \[\]',
    ),
    "a count of tensors' kind": (
        lambda report: report["adapter_tensors"].update(total={}, consumed={}),
        'adapter_tensors: found {"consumed": {}, "total": {}}, expected',
    ),
    "no counts": (
        lambda report: report.pop("counts"),
        "counts: found null, expected {",
    ),
    "experts": (
        lambda report: report.update(num_experts=999),
        "num_experts: found 999, expected",
    ),
    "adapter_tensors": (
        lambda report: report["adapter_tensors"].update(consumed=1),
        'adapter_tensors: found {"consumed": 1, ',
    ),
    "copied beside replaced": (
        lambda report: recount(report, 1, -1),
        'counts: found {"copied": .*, expected {"copied": ',
    ),
    "a count that is true": (
        lambda report: report["counts"]["replaced"].update(applied=True),
        r'counts: found {.*"replaced": {"applied": true, "attempted": 1}}, expected',
    ),
    "the adapter's tensors": (
        lambda report: report["adapter_tensors"].update(total=7, consumed=7),
        'adapter_tensors: found {"consumed": 7, "total": 7}, expected',
    ),
    "schema": (lambda report: report.update(schema=2), "schema: found 2, expected 1"),
    "no options": (lambda report: report.pop("options"), "options: found null, expected {"),
    "an option more": (
        lambda report: report["options"].update(more="x"),
        r'options: found {.*"more": "x".*}, expected {',
    ),
    "model_type": (
        lambda report: report["base"].update(model_type="llama"),
        'base.model_type: found "llama", expected "',
    ),
    "rank": (lambda report: report["adapter"].update(rank=99), "adapter.rank: found 99, expected "),
    "peft_version": (
        lambda report: report["adapter"].update(peft_version="0.0"),
        'adapter.peft_version: found "0.0", expected ',
    ),
    "orientation": (
        lambda report: report["layout"].update(orientation="mixed"),
        'layout.orientation: found "mixed", expected "',
    ),
    "lora_b_layout": (
        lambda report: report["layout"].update(lora_b_layout="mixed"),
        'layout.lora_b_layout: found "mixed", expected "',
    ),
    "no layout": (
        lambda report: report.update(layout=told_layout(report)),
        'layout.evidence: found null, expected "a list of what spoke for it',
    ),
    "evidence": (
        lambda report: report["layout"]["evidence"].append({"source": "shape"}),
        "layout.evidence: found .*, expected",
    ),
    "evidence's confidence": (
        lambda report: report["layout"].update(evidence=[{**EVIDENCE, "confidence": 2}]),
        "layout.evidence: found .*, expected",
    ),
    "base's path": (lambda report: report.update(base={**report["base"], "path": 3}), "base.path: found 3"),
    "out": (lambda report: report.update(out=None), 'out: found null, expected "a path or name"'),
    "config_edits": (
        lambda report: report.update(config_edits=[]),
        r"config_edits: found \[\], expected {}",
    ),
    "an edit of the config that there is not": (
        lambda report: report.update(config_edits={"dtype": "float16"}),
        r'config_edits: found {"dtype": "float16"}, expected {}',
    ),
    "notes": (lambda report: report.update(notes=[3]), r'notes: found \[3\], expected "a list of texts"'),
    "verified": (lambda report: report.update(verified="yes"), 'verified: found "yes", expected "true or'),
    "seconds": (lambda report: report.update(seconds=-1), "seconds: found -1, expected"),
    "peak_rss_bytes": (
        lambda report: report.update(peak_rss_bytes="x"),
        'peak_rss_bytes: found "x", expected "a number of bytes"',
    ),
    "a file's name without end": (
        lambda report: report["files"].append("x" * 300),
        r'files: found .*, expected "those of OUT; not named: \[\], not there: .*xxx',
    ),
    "a file that is elsewhere": (
        lambda report: report["files"].append("../out/config.json"),
        r'files: found .*, expected "those of OUT; not named: \[\], not there: .*\.\./out',
    ),
    "files": (
        lambda report: report.update(files=["nothing"]),
        r'files: found \["nothing"\], expected "those of OUT; not named: .*LICENSE.*, not there: .*nothing',
    ),
    "a file that is not there": (
        lambda report: report["files"].append("nothing"),
        r'files: found .*, expected "those of OUT; not named: \[\], not there: .*nothing',
    ),
    "a file that is not named": (
        lambda report: report["files"].remove("config.json"),
        r'files: found .*, expected "those of OUT; not named: .*config.json.*, not there: \[\]',
    ),
    "rounding": (
        lambda report: report.update(rounding={"nearest": 1}),
        'rounding: found {"nearest": 1}, expected',
    ),
    "rounding's rule": (
        lambda report: report.update(rounding={"peft": sum(report["rounding"].values())}),
        'rounding: found {"peft"',
    ),
    "rounding's kind": (
        lambda report: report.update(rounding=[1]),
        r"rounding: found \[1\], expected {",
    ),
    "overall": (
        lambda report: told_kept(report, 0.1),
        "delta_kept.overall: found 0.1, expected",
    ),
    "overall a little": (
        lambda report: told_kept(report, report["delta_kept"]["overall"] + 2e-4),
        "delta_kept.overall: found",
    ),
    "overall without end": (
        lambda report: told_kept(report, 10**400),
        "delta_kept.overall: found 1000000.*…, expected",
    ),
    "least without end": (
        lambda report: report["delta_kept"]["least"].update(kept=10**400),
        'delta_kept.least: found {"kept": 1000000.*…, expected',
    ),
    "least": (
        lambda report: report["delta_kept"]["least"].update(kept=0.5),
        "delta_kept.least: found",
    ),
    "least's name": (
        lambda report: report["delta_kept"]["least"].update(tensor="x"),
        "delta_kept.least: found",
    ),
    "no least": (
        lambda report: report["delta_kept"].update(least=None),
        "delta_kept.least: found null",
    ),
}


@pytest.mark.parametrize(("edit", "says"), EDITS.values(), ids=EDITS.keys())
def test_what_is_edited_in_the_report_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    made = place(tmp_path)
    report = made.report()
    edit(report)
    made.say(report)
    found = made.only()
    assert (found.key, found.what) == (REPORT, "report")
    assert re.match(says, found.detail)


def test_the_report_of_a_merge_of_the_adapter_elsewhere_may_have_its_own_counts_and_layout(
    tmp_path: Path,
) -> None:
    """Saved in another way, it has other tensors: one more that is replaced is one less that is copied."""
    made = place(tmp_path)
    report = made.report()
    report["adapter"].update(path="elsewhere", peft_version="0.1.0")
    report["config_edits"] = {"dtype": "float32"}  # Which may be no change.
    report["layout"].update(orientation="swapped", lora_b_layout="grouped_by_expert")
    report["adapter_tensors"].update(total=7, consumed=7)
    recount(report, 1, -1)
    made.say(report)
    assert made.verify().ok


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda report: recount(report, 1, 1), "counts: found"),
        (lambda report: recount(report, 1, -2), "counts: found"),
        (lambda report: recount(report, 500, -99), 'counts: found {"copied": -'),
        (lambda report: recount(report, -2, 1), 'counts: found {"copied"'),
        (lambda report: report["adapter_tensors"].update(total=-7, consumed=-7), "adapter_tensors: found"),
        (lambda report: report["adapter"].update(rank=99), "adapter.rank: found 99"),
        (lambda report: report.update(config_edits=[]), r'config_edits: found \[\], expected "an object'),
        (lambda report: report["adapter"].update(path=3), "adapter.path: found 3, expected"),
        (lambda report: report["adapter"].update(peft_version=3), "adapter.peft_version: found 3, expected"),
        (lambda report: report["layout"].update(orientation="up"), 'layout.orientation: found "up", expect'),
        (lambda report: report["layout"].update(lora_b_layout=[]), r"layout.lora_b_layout: found \[\], ex"),
    ],
)
def test_what_no_way_of_saving_an_adapter_makes_is_named_all_the_same(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    made = place(tmp_path)
    report = made.report()
    report["adapter"]["path"] = "elsewhere"
    edit(report)
    made.say(report)
    assert re.match(says, made.only().detail)


def test_that_another_tensor_keeps_less_is_named(tmp_path: Path) -> None:
    made = place(tmp_path, rounding="nearest")
    report = made.report()
    best = max(made.verify().details, key=lambda one: one.kept)
    assert best.kept > report["delta_kept"]["least"]["kept"] + 1e-3
    report["delta_kept"]["least"] = {"tensor": best.tensor, "kept": best.kept}
    made.say(report)
    assert made.only().detail.startswith("delta_kept.least: found")


def test_a_report_says_nothing_of_rounding_where_tensors_are_wrong(tmp_path: Path) -> None:
    """What is recomputed is then that of a damaged file."""
    made = place(tmp_path)
    file = max(made.out.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({key: value * 2 for key, value in tensors.items()}, file, metadata={"format": "pt"})
    assert {found.what for found in made.verify().mismatches} <= {"value", "bytes"}


@pytest.mark.parametrize("more", [" ", "\n\n"])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_every_byte_of_json_counts(tmp_path: Path, name: str, dtype: str, more: str) -> None:
    made = place(tmp_path, dtype=dtype)
    content = (made.out / name).read_bytes()
    (made.out / name).write_bytes(content + more.encode())
    found = made.only()
    assert (found.key, found.what) == (name, "bytes")
    says = "says what a merge of this base writes, but not in the same bytes"
    assert found.detail == f"{says}, from byte {len(content)} on"


def reformat(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))


def test_without_a_report_json_need_only_say_the_same(tmp_path: Path) -> None:
    """OUT may be another tool's."""
    made = place(tmp_path, rounding="nearest")
    (made.out / REPORT).unlink()
    reformat(made.out / CONFIG)
    reformat(made.out / INDEX)
    assert made.verify().ok


def test_the_out_of_another_loudmerge_is_compared_by_what_it_says(tmp_path: Path) -> None:
    made = place(tmp_path)
    report = made.report() | {"loudmerge": "0.0.9", "files": []}
    made.say(report)
    reformat(made.out / CONFIG)
    reformat(made.out / INDEX)
    found = made.verify()
    assert found.ok, found.summary()
    assert found.notes[0].startswith(f"{REPORT} is that of loudmerge 0.0.9, this is ")
    made.say(report | {"status": "planned"})
    assert made.only().detail == 'status: found "planned", expected "merged"'


def test_a_base_that_lost_a_file_which_no_loader_reads_is_no_mismatch(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    built = build(MERGED["per-expert"], tmp_path / "base")
    (built.base / "notes.md").write_text("Notes.\n")
    made = Place(tmp_path, built.base, built.adapter)
    (built.base / "notes.md").unlink()
    found = made.verify()
    assert found.ok, found.summary()


def test_the_same_adapter_saved_in_another_way_has_another_number_of_tensors(tmp_path: Path) -> None:
    built = build(MERGED["grouped"], tmp_path)
    made = Place(tmp_path, built.base, built.adapter)
    convert(built.adapter, tmp_path / "apart", to="per-expert", base=built.base)
    found = verify(made.out, built.base, tmp_path / "apart")
    assert found.ok, found.summary()


def test_an_update_that_is_as_good_as_none_has_no_part_of_it_to_compare(tmp_path: Path) -> None:
    matrices = {f"model.layers.{n}.self_attn.q_proj": 1 - n * (1 - 1e-16) for n in (0, 1)}
    held = {
        key: (value * (scale if "lora_B" in key else 1)).contiguous()
        for module, scale in matrices.items()
        for key, value in lora(module, 64, 48).items()
    }
    weights = {f"{module}.weight": values(64, 48, dtype=torch.bfloat16) for module in matrices}
    found = Place(tmp_path, write_base(tmp_path / "b", weights), write_adapter(tmp_path / "a", held)).verify()
    assert found.ok, found.summary()


SILENT: dict[str, dict[str, Any]] = {
    "orientation": {},
    "lora_b_layout": {"auto_mapping": {"unsloth_fixed": True}},
}
"""Configs of adapters of a square parameter that do not say this of themselves."""
SAID: dict[str, Any] = {"orientation": "standard", "lora_b_layout": "grouped_by_expert"}
OTHER: dict[str, Any] = {"orientation": "swapped", "lora_b_layout": "rank_major"}


def laid(root: Path, option: str, **options: str) -> Place:
    """Experts whose gate_up_proj is square, and an adapter that does not say the option of itself."""
    held = {f"{EXPERTS}.gate_up_proj": values(4, 12, 12), f"{EXPERTS}.down_proj": values(4, 12, 6)}
    fields = {"target_parameters": ["experts.gate_up_proj"], **SILENT[option]}
    adapter = write_adapter(root / "adapter", fused_lora(EXPERTS, [(12, 12)], experts=4), **fields)
    return Place(root, write_base(root / "base", held, num_experts=4), adapter, **options)


@pytest.mark.parametrize("option", SILENT)
def test_another_tool_s_merge_is_verified_in_the_layout_that_is_said(tmp_path: Path, option: str) -> None:
    """Its OUT has no report, and neither adapter nor base say how the adapter is laid."""
    made = laid(tmp_path, option, rounding="nearest", **SAID)
    (made.out / REPORT).unlink()
    for call in (verify, compare):
        with pytest.raises(MergeRefused, match=r"Give --") as caught:
            call(made.out, made.base, made.adapter, **(SAID | {option: "auto"}))
        assert caught.value.code == "ambiguous-layout"
    found = verify(made.out, made.base, made.adapter, **SAID)
    assert found.ok, found.summary()
    assert found.notes[0].endswith("nearest, orientation standard, lora_b_layout grouped_by_expert")
    assert not verify(made.out, made.base, made.adapter, **(SAID | {option: OTHER[option]})).ok


@pytest.mark.parametrize("option", SILENT)
def test_a_layout_that_is_said_and_is_not_that_of_the_report_is_a_mismatch(
    tmp_path: Path, option: str
) -> None:
    made = laid(tmp_path, option, **SAID)
    read = f'"{SAID[option]}", expected "{OTHER[option]}"'
    for call in (verify, compare):
        with pytest.raises(Mismatch, match=f"{REPORT}: found that the adapter was read as {read}, as --"):
            call(made.out, made.base, made.adapter, **{option: OTHER[option]})


@pytest.mark.parametrize("option", SILENT)
def test_a_layout_that_is_said_may_be_that_of_the_report(tmp_path: Path, option: str) -> None:
    made = laid(tmp_path, option, **SAID)
    found = verify(made.out, made.base, made.adapter, **{option: SAID[option]})
    assert found.ok, found.summary()


@pytest.mark.parametrize(("rank", "packing"), [(2, "rank_major"), (1, "grouped_by_expert")])
def test_what_was_found_by_itself_may_be_said_too(tmp_path: Path, rank: int, packing: str) -> None:
    """Here by the shapes, and by how PEFT packs; with rank 1 both packings are the same columns."""
    held = {f"{EXPERTS}.gate_up_proj": values(4, 12, 8), f"{EXPERTS}.down_proj": values(4, 8, 6)}
    tensors = fused_lora(EXPERTS, [(12, 8)], experts=4, rank=rank)
    fields = {"target_parameters": ["experts.gate_up_proj"], "r": rank, "peft_version": "0.19.1"}
    base = write_base(tmp_path / "base", held, num_experts=4)
    made = Place(tmp_path, base, write_adapter(tmp_path / "adapter", tensors, **fields))
    found = verify(made.out, base, made.adapter, orientation="standard", lora_b_layout=packing)
    assert found.ok, found.summary()


def test_an_orientation_of_the_report_that_the_adapter_cannot_have_is_a_mismatch(tmp_path: Path) -> None:
    """Not a refusal: base and adapter can be merged, and the report is not that of their merge."""
    held = {f"{EXPERTS}.gate_up_proj": values(4, 12, 8), f"{EXPERTS}.down_proj": values(4, 8, 6)}
    fields = {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.19.1"}
    adapter = write_adapter(tmp_path / "adapter", fused_lora(EXPERTS, [(12, 8)], experts=4), **fields)
    made = Place(tmp_path, write_base(tmp_path / "base", held, num_experts=4), adapter)
    report = made.report()
    report["options"]["orientation"] = "swapped"
    made.say(report)
    for call in (verify, compare):
        with pytest.raises(
            Mismatch, match=f'{REPORT}: options.orientation: found "swapped", expected'
        ) as caught:
            call(made.out, made.base, made.adapter)
        assert "model.layers.0.mlp.experts: found --orientation swapped" in str(caught.value)
    write_adapter(made.adapter, fused_lora(EXPERTS, [(12, 8)], experts=3), **fields)
    with pytest.raises(MergeRefused):  # as it is of an adapter that cannot be merged at all
        made.verify()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "a JSON list"),
        (b"{", "is no report of a merge: "),
        (b'{"options": 3}', "its options are 3"),
        (b'{"options": {"rounding": "up"}}', "rounding is 'up'"),
    ],
)
def test_a_report_that_is_none_is_a_mismatch_for_every_reader(
    tmp_path: Path, content: bytes, says: str
) -> None:
    made = place(tmp_path)
    (made.out / REPORT).write_bytes(content)
    for call in (verify, compare):
        with pytest.raises(Mismatch, match=says):
            call(made.out, made.base, made.adapter)


def test_a_card_that_is_added_and_the_names_that_a_push_gives_are_no_mismatch(tmp_path: Path) -> None:
    made = place(tmp_path)
    report = upload._public(made.report(), "me/base", "me/adapter", client.HubId("me/model"))
    (made.out / REPORT).write_bytes(report)
    (made.out / "README.md").write_text("# A model\n")
    assert made.verify().ok
