"""What inspect says of an adapter: its layout and the evidence for it, with and without a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loudmerge.inspecting.inspect import Inspection, inspect
from loudmerge.inspecting.inspect_page import render
from tests.unit.builders import (
    EXPERTS,
    Q_PROJ,
    Tensors,
    expert_tensors,
    fused_lora,
    lora,
    values,
    write_adapter,
    write_base,
)

E, H, I = 4, 6, 5  # noqa: E741
BOTH: dict[str, Any] = {
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "peft_version": "0.19.1",
}
UNSLOTH: dict[str, Any] = {"auto_mapping": {"unsloth_fixed": True}}
RANKS = {"gate_up_proj": 3}


def both() -> dict[str, Any]:
    """LoRA of rank 3 on gate_up_proj, inside that of rank 2 on down_proj, and a dense one."""
    outer = fused_lora(EXPERTS, [(H, I)], experts=E)
    inner = lora(f"{EXPERTS}.base_layer", 2 * I, H, rank=3 * E)
    return outer | inner | lora(Q_PROJ, H, H)


def alone(path: Path, tensors: Tensors | None = None, **fields: Any) -> Inspection:
    written = both() if tensors is None else tensors
    return inspect(write_adapter(path / "adapter", written, **{**BOTH, "rank_pattern": RANKS, **fields}))


def said(found: Inspection, source: str) -> list[tuple[str, str]]:
    return [(one.site, one.says) for one in found.layout.evidence if one.source == source]


@pytest.mark.parametrize("with_base", [False, True])
def test_each_kind_of_site_has_its_own_rank_and_experts(with_base: bool, tmp_path: Path) -> None:
    found = alone(tmp_path)
    if with_base:
        base = {**expert_tensors(E, H, I), f"{Q_PROJ}.weight": values(H, H)}
        found = inspect(tmp_path / "adapter", write_base(tmp_path / "base", base))
        assert found.plan is not None
    ranks = [(one["parameter"], one["rank"], one["experts"]) for one in found.to_json()["sites"]]
    assert ranks == [("down_proj", 2, E), ("gate_up_proj", 3, E), (None, 2, None)]
    assert "(base_layer x1): A [12, 6] B [10, 12], rank 3 for each of 4 experts of gate_up_proj" in (
        found.summary()
    )
    assert f"{Q_PROJ.replace('0', '*')}: A [2, 6] B [6, 2], rank 2\n" in found.summary()
    assert "<td>4 of gate_up_proj</td>" in render(found)


def test_a_rank_that_the_config_does_not_explain_is_unknown(tmp_path: Path) -> None:
    found = alone(tmp_path, r=64, rank_pattern={})
    assert [one["rank"] for one in found.to_json()["sites"]] == [None, None, 2]
    assert "B [10, 12], rank unknown: the config's does not fit" in found.summary()
    assert found.layout.lora_b_layout == "undecided"


def test_a_targeted_router_has_the_rank_of_its_rows(tmp_path: Path) -> None:
    gate = "model.layers.0.mlp.gate"
    found = alone(tmp_path, lora(gate, E, H), target_parameters=["mlp.gate.weight"])
    assert [(one.rank, one.experts) for one in found.kinds] == [(2, 0)]


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("0.18.1", ["swapped"]),
        ("0.19.0", ["swapped", "standard"]),
        ("0.19.1", ["standard", "swapped"]),
        ("none of them", [""]),
    ],
)
def test_without_a_base_pefts_version_speaks_for_each_experts_class(
    version: str, says: list[str], tmp_path: Path
) -> None:
    found = alone(tmp_path, peft_version=version)
    assert said(found, "peft_version") == [("", one) for one in says]
    assert all(version in one.detail for one in found.layout.evidence if one.source == "peft_version")
    assert found.to_json()["layout"]["orientation"] == "undecided"
    assert "layout    orientation undecided without --base, rank_major" in found.summary()
    assert "Layout: orientation undecided without --base, rank_major" in render(found)


def test_which_classes_pefts_version_speaks_for_is_said(tmp_path: Path) -> None:
    text = alone(tmp_path).summary()
    assert "peft_version says standard: peft_version 0.19.1, unless the experts class is_transposed" in text
    assert "peft_version says swapped: peft_version 0.19.1, if the experts class is_transposed" in text


def test_the_option_settles_the_orientation_without_a_base(tmp_path: Path) -> None:
    alone(tmp_path)
    found = inspect(tmp_path / "adapter", orientation="swapped", lora_b_layout="grouped_by_expert")
    assert (found.layout.orientation, found.layout.lora_b_layout) == ("swapped", "grouped_by_expert")
    assert ("", "swapped") in said(found, "option")


def test_the_packing_is_assumed_without_a_marker(tmp_path: Path) -> None:
    found = alone(tmp_path)
    parameters = [f"{EXPERTS}.{leaf}" for leaf in ("down_proj", "gate_up_proj")]
    assert sorted(said(found, "module")) == [(one, "rank_major") for one in parameters]
    assert found.refusal is None


def test_what_the_weights_show_is_said_once(tmp_path: Path) -> None:
    found = alone(tmp_path)
    assert said(found, "weights") == [("down_proj", ""), ("gate_up_proj", "")]
    assert found.summary().count("lora_B's columns") == 2


@pytest.mark.parametrize("place", ["lora_B_layout", "auto_mapping.lora_B_layout"])
def test_a_marker_is_evidence_without_a_base(place: str, tmp_path: Path) -> None:
    outer, _, inner = place.rpartition(".")
    fields = {outer: {inner: "grouped_by_expert"}} if outer else {inner: "grouped_by_expert"}
    found = alone(tmp_path, **fields)
    layout = found.to_json()["layout"]
    assert layout["lora_b_layout"] == "grouped_by_expert"
    marked = [one for one in layout["evidence"] if one["source"] == "marker"]
    assert {(one["says"], one["detail"]) for one in marked} == {("grouped_by_expert", place)}
    assert f"marker says grouped_by_expert ({EXPERTS}.down_proj): {place}" in found.summary()


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"alpha_pattern": {"q_proj": 8}, "lora_dropout": 0.1}
    assert alone(tmp_path, peft_version=None, **rest).odd == (
        "no peft_version: PEFT up to 0.17, or another tool, wrote it",
        "lora_dropout on fused experts: PEFT itself would not load it again",
        "rank_pattern: {'gate_up_proj': 3}",
        "alpha_pattern: {'q_proj': 8}",
    )
    assert alone(tmp_path, rank_pattern={}).odd == ()


def test_the_notes_of_a_plan_are_odd_and_its_prediction_is_shown(tmp_path: Path) -> None:
    alone(tmp_path, lora_B_layout="rank_major")
    base = write_base(tmp_path / "base", {**expert_tensors(E, H, I), f"{Q_PROJ}.weight": values(H, H)})
    found = inspect(tmp_path / "adapter", base, lora_b_layout="grouped_by_expert")
    assert found.plan is not None
    assert found.plan.notes
    assert found.odd[1:] == found.plan.notes
    assert all(f"  odd       {note}" in found.summary() for note in found.odd)
    assert "  touches   12 expert projections, 1 dense weight, 0 replaced, 0 copied" in found.summary()
    assert "  predicted from a sample, 13 of 13 matrices: keeps 1.0000" in found.summary()


def test_what_the_packing_would_refuse_is_said_without_a_base(tmp_path: Path) -> None:
    found = alone(tmp_path, **UNSLOTH)
    assert found.layout.lora_b_layout == "undecided"
    assert found.to_json()["refusal"]["code"] == "ambiguous-layout"
    assert "  refused   ambiguous-layout" in found.summary()
    assert "\n            1 more problem:\n" in found.summary()


def test_a_refused_merge_leaves_what_the_adapter_alone_says(tmp_path: Path) -> None:
    alone(tmp_path)
    found = inspect(tmp_path / "adapter", write_base(tmp_path / "base", expert_tensors(E, H, I + 1)))
    assert found.refusal is not None
    assert "layout    orientation undecided, rank_major" in found.summary()
    assert [one["rank"] for one in found.to_json()["sites"]] == [2, 3, 2]


def test_the_layout_of_a_plan_is_the_plans(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E), **BOTH)
    document = inspect(tmp_path / "adapter", write_base(tmp_path / "base", expert_tensors(E, H, I))).to_json()
    assert document["layout"] == document["plan"]["layout"]
    assert document["layout"]["orientation"] == "standard"


def test_an_adapter_without_fused_experts_has_no_layout(tmp_path: Path) -> None:
    found = alone(tmp_path, lora(Q_PROJ, H, H), target_parameters=None)
    assert found.to_json()["layout"] == {"orientation": "none", "lora_b_layout": "none", "evidence": []}
