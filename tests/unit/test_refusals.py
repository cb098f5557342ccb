"""Every refusal code of the contract: its message, and that nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge.errors import REFUSAL_CODES
from tests.unit.corruptions import Damage
from tests.unit.reference import Built, build
from tests.unit.strategies import NAMED
from tests.unit.synthetic import Case
from tests.unit.test_merge_properties import snapshot

QWEN = NAMED["qwen3_moe"]
BOTH = Case(QWEN, fused=("gate_up", "down"), dense=("q_proj",))
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
Edit = Callable[[Damage], Any]


def adapter_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    return lambda d: d.edit_adapter(edit)


def adapter_fields(**fields: Any) -> Edit:
    return lambda d: d.edit_json(
        d.built.adapter / "adapter_config.json", lambda config: config.update(fields)
    )


def nested(levels: int) -> list[Any]:
    """A list in a list in a list."""
    return [nested(levels - 1)] if levels else []


def model_fields(**fields: Any) -> Edit:
    return lambda d: d.edit_json(d.built.base / "config.json", lambda config: config.update(fields))


def base_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    return lambda d: d.edit_base(edit)


def key_of(name: str) -> str:
    return f"base_model.model.model.layers.0.{name}"


@dataclass(frozen=True)
class Refusal:
    """says: regular expressions that the message must match, in this order."""

    id: str
    code: str
    edit: Edit
    says: tuple[str, ...]
    case: Case = BOTH
    options: Mapping[str, Any] = field(default_factory=dict)


def square(**fields: Any) -> Case:
    values = {"fused": ("down",), "hidden": 4, "intermediate": 4, "peft": "none", **fields}
    return Case(QWEN, **values)


def widen(name: str, axis: int) -> Edit:
    def edit(held: dict[str, torch.Tensor]) -> None:
        key = key_of(name)
        held[key] = torch.cat([held[key], held[key].narrow(axis, 0, 1)], axis)

    return adapter_tensors(edit)


def pickled(name: str, folder: str, original: str) -> Edit:
    def edit(d: Damage) -> None:
        root = getattr(d.built, folder)
        (root / original).unlink()
        (root / name).write_bytes(b"\x80\x04N.")

    return edit


def poison(name: str, value: float) -> Edit:
    return adapter_tensors(lambda held: held[key_of(name)].view(-1)[3:4].fill_(value))


def nothing(_: Damage) -> None:
    """The case as it is."""


def occupied(d: Damage) -> None:
    (d.built.base.parent / "out").mkdir()
    (d.built.base.parent / "out" / "mine.txt").write_text("keep")


def truncated(folder: str, file: str, size: int) -> Edit:
    def edit(d: Damage) -> None:
        path = getattr(d.built, folder) / file
        path.write_bytes(path.read_bytes()[:size])

    return edit


def outside(d: Damage) -> None:
    file = d.built.base / "model.safetensors.index.json"
    d.edit_json(file, lambda v: v["weight_map"].update({"lm_head.weight": "../adapter/evil.safetensors"}))


REFUSALS = (
    Refusal(
        "square, no version", "ambiguous-layout", nothing,
        (r"model\.layers\.0\.mlp\.experts", r"found shapes that fit both", r"--orientation"),
        square(),
    ),
    Refusal(
        "square, stale version", "ambiguous-layout", adapter_fields(peft_version="0.18.1"),
        (r"0\.18\.1 is stale", r"--orientation"), square(peft="0.19.1"),
    ),
    Refusal(
        "square gpt_oss of a new PEFT", "ambiguous-layout", nothing,
        (r"peft_version 0\.19\.1", r"transformers", r"--orientation"),
        Case(NAMED["gpt_oss"], fused=("down",), hidden=4, intermediate=4),
    ),
    Refusal(
        "version against shapes", "ambiguous-layout", nothing,
        (r"layers\.0\.mlp\.experts: found peft_version 0\.18\.1", r"expected standard", r"--orientation"),
        Case(QWEN, fused=("gate_up", "down"), peft="0.18.1"),
    ),
    Refusal(
        "Unsloth without a marker", "ambiguous-layout", adapter_fields(auto_mapping={"unsloth_fixed": True}),
        (r"lora_B\.weight \[\d+, 8\]", r"found an adapter made by Unsloth", r"--lora-b-layout"),
    ),
    Refusal(
        "two markers that differ", "ambiguous-layout",
        adapter_fields(lora_B_layout="rank_major", auto_mapping={"lora_B_layout": "grouped_by_expert"}),
        (r"lora_B_layout of model\.layers\.0", r"grouped_by_expert and rank_major", r"[Rr]emove"),
    ),
    Refusal(
        "unknown marker", "unknown-layout", adapter_fields(lora_B_layout="diagonal"),
        (r"lora_B_layout of model", r"found 'diagonal'", r"rank_major or grouped_by_expert", r"marker"),
    ),
    Refusal(
        "wide lora_A", "shape-mismatch", widen("mlp.experts.base_layer.lora_A.weight", 1),
        (r"layers\.0\.mlp\.experts", r"found .*\[8, 7\]", r"expected .*gate_up_proj: A \[8, 6\]", r"base"),
    ),
    Refusal(
        "wide dense lora_B", "shape-mismatch", widen("self_attn.q_proj.lora_B.weight", 0),
        (r"self_attn\.q_proj\.lora_B", r"to 13", r"to 12", r"base"),
    ),
    Refusal(
        "dense halves of two ranks", "shape-mismatch", widen("self_attn.q_proj.lora_B.weight", 1),
        (r"q_proj\.lora_A", r"found ranks 2 and 3", r"expected one rank", r"save the adapter again"),
    ),
    Refusal(
        "fused halves of two ranks", "shape-mismatch", widen("mlp.experts.lora_B.weight", 1),
        (r"mlp\.experts\.lora_A", r"found 8 rows .* and 9 columns", r"save the adapter again"),
    ),
    Refusal(
        "orientation against shapes", "shape-mismatch", nothing,
        (r"model\.layers\.0\.mlp\.experts", r"--orientation swapped", r"expected standard", r"[Ll]eave"),
        options={"orientation": "swapped"},
    ),
    Refusal(
        "rank of the config", "rank-mismatch", adapter_fields(r=3),
        (r"lora_A\.weight \[8, \d\]", r"found 8 rows: rank 2", r"expected rank 3", r"config"),
        Case(QWEN, fused=("gate_up", "down")),
    ),
    Refusal(
        "rank of the config, beside experts", "rank-mismatch", adapter_fields(r=1),
        (r"lora_A\.weight", r"found rank 2", r"expected rank 1", r"8 experts of rank 1"),
        Case(QWEN, fused=("gate_up", "down"), dense=("q_proj",)),
    ),
    Refusal(
        "rank of a dense pair", "rank-mismatch", adapter_fields(rank_pattern={"q_proj": 5}),
        (r"q_proj\.lora_A\.weight \[2, 6\]", r"found rank 2", r"expected rank 5", r"config"),
    ),
    Refusal(
        "experts of another base", "num-experts-mismatch",
        adapter_tensors(
            lambda held: held.update(
                {key: held[key][:6] if "lora_A" in key else held[key][:, :6].clone() for key in held}
            )
        ),
        (r"lora_A\.weight \[6, \d\]", r"found 6 rows: 3 experts of rank 2", r"expected 4 experts"),
        Case(QWEN, fused=("gate_up", "down")),
    ),
    Refusal(
        "experts of the config", "num-experts-mismatch", model_fields(num_experts=3),
        (r"layers\.0\.mlp\.experts", r"found 4 experts", r"expected 3", r"config\.json"),
    ),
    Refusal(
        "experts of the marker", "num-experts-mismatch",
        adapter_fields(
            unsloth_fused_expert_lora={
                "lora_B_layout": "rank_major",
                "parameters": {"down_proj": {"lora_B_layout": "rank_major", "num_experts": 7}},
            }
        ),
        (r"down_proj in unsloth_fused_expert_lora", r"found num_experts 7", r"expected 4", r"base"),
    ),
    Refusal(
        "an expert is missing", "experts-incomplete",
        base_tensors(lambda held: held.pop("model.layers.0.mlp.experts.2.up_proj.weight", None)),
        (r"layers\.0\.mlp\.experts, up of expert 2", r"no such tensor in any shard", r"4 experts", r"again"),
    ),
    Refusal(
        "an unknown tensor", "unconsumed-adapter-tensor",
        adapter_tensors(lambda held: held.update({key_of("mlp.experts.lora_C.weight"): torch.ones(2)})),
        (r"mlp\.experts\.lora_C\.weight \[2\] F32", r"expected .*lora_A\.weight", r"PEFT"),
    ),
    Refusal(
        "a tensor the config does not name", "unconsumed-adapter-tensor",
        adapter_tensors(lambda held: held.update({key_of("mlp.gate.weight"): torch.ones(4, 6)})),
        (r"mlp\.gate\.weight \[4, 6\]", r"full tensor", r"modules_to_save", r"config"),
    ),
    Refusal(
        "half a pair", "missing-adapter-tensor",
        adapter_tensors(lambda held: held.pop(key_of("self_attn.q_proj.lora_B.weight"))),
        (r"q_proj\.lora_A\.weight \[2, 6\]", r"found no lora_B", r"expected both halves", r"save .* again"),
    ),
    Refusal(
        "an outer pair without its inner one", "missing-adapter-tensor",
        adapter_tensors(
            lambda held: [held.pop(key_of(f"mlp.experts.base_layer.lora_{x}.weight")) for x in "AB"]
        ),
        (r"mlp\.experts\.lora_A\.weight", r"found LoRA on .*inside 0 base_layer", r"down_proj, gate_up_proj"),
    ),
    Refusal(
        "no tensor at all", "missing-adapter-tensor", adapter_tensors(lambda held: held.clear()),
        (r"adapter_model\.safetensors", r"found no tensor at all", r"[Ss]ave the trained model again"),
    ),
    Refusal(
        "DoRA on experts without magnitudes", "missing-adapter-tensor", adapter_fields(use_dora=True),
        (r"found no lora_magnitude_vector", r"use_dora true in the config", r"one and the same save"),
    ),
    Refusal(
        "no q_proj in the base", "missing-base-tensor",
        base_tensors(lambda held: held.pop("model.layers.0.self_attn.q_proj.weight", None)),
        (r"q_proj\.lora_A\.weight", r"found a LoRA for model\.layers\.0\.self_attn\.q_proj\.weight", r"base"),
    ),
    Refusal(
        "a field nobody knows", "unsupported-adapter", adapter_fields(frobnicate=3),
        (r"frobnicate in .*adapter_config\.json", r"found 3", r"not understood"),
    ),
    Refusal(
        "PiSSA", "unsupported-adapter", adapter_fields(init_lora_weights="pissa"),
        (r"init_lora_weights in", r"found 'pissa'", r"leaves the base's weights alone",
         r"path_initial_model_for_weight_conversion"),
    ),
    Refusal(
        "not LoRA", "unsupported-adapter", adapter_fields(peft_type="IA3"),
        (r"peft_type in .*adapter_config\.json", r"found 'IA3'", r"expected 'LORA'", r"merge_and_unload"),
    ),
    Refusal(
        "replicated layers", "unsupported-adapter", adapter_fields(layer_replication=[[0, 1], [0, 1]]),
        (r"layer_replication in", r"expected null", r"save it as a base of its own"),
    ),
    Refusal(
        "a config without weights", "unsupported-adapter",
        lambda d: (d.built.adapter / "adapter_model.safetensors").unlink(),
        (r"adapter", r"found no adapter_model\.safetensors", r"Give the directory that holds it"),
    ),
    Refusal(
        "a pattern that is no expression", "unsupported-adapter", adapter_fields(rank_pattern={"q_proj(": 2}),
        (r"rank_pattern", r"q_proj\("),
    ),
    Refusal(
        "a quantised base", "unsupported-base", model_fields(quantization_config={"quant_method": "fp8"}),
        (r"quantization_config in .*config\.json", r"quantised with fp8", r"unquantised", r"then quantise"),
    ),
    Refusal(
        "no config", "unsupported-base", lambda d: (d.built.base / "config.json").unlink(),
        (r"base", r"no config\.json", r"save_pretrained"),
    ),
    Refusal(
        "NaN in experts", "non-finite", poison("mlp.experts.lora_B.weight", float("nan")),
        (r"mlp\.experts\.lora_B\.weight", r"found .*(nan|NaN)", r"finite"),
    ),
    Refusal(
        "infinity in a dense pair", "non-finite", poison("self_attn.q_proj.lora_A.weight", float("-inf")),
        (r"self_attn\.q_proj", r"found .*inf", r"finite"),
    ),
    Refusal(
        "overflow of float16", "non-finite",
        adapter_tensors(lambda held: [value.mul_(1e6) for key, value in held.items() if "lora_B" in key]),
        (r"layers\.0\..*weight", r"finite"), Case(QWEN, fused=("down",), base_dtype="float16"),
    ),
    Refusal(
        "a shard cut short", "corrupt-file", truncated("base", "model.safetensors", 900),
        (r"base/model\.safetensors", r"safetensors cannot open", r"complete safetensors file", r"again"),
    ),
    Refusal(
        "the adapter cut short", "corrupt-file", truncated("adapter", "adapter_model.safetensors", 100),
        (r"adapter_model\.safetensors", r"cannot open", r"complete safetensors file", r"again"),
    ),
    Refusal(
        "config.json is no JSON", "corrupt-file", truncated("base", "config.json", 20),
        (r"base/config\.json", r"no JSON", r"JSON object"),
    ),
    Refusal(
        "config.json is nested without end", "corrupt-file",
        lambda d: (d.built.base / "config.json").write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
        (r"base/config\.json", r"no JSON \(nested more than 100 levels deep\)", r"JSON object"),
    ),
    Refusal(
        "adapter_config.json is nested deep", "corrupt-file", adapter_fields(note=nested(101)),
        (r"adapter_config\.json", r"no JSON \(nested more than 100 levels deep\)", r"JSON object"),
    ),
    Refusal(
        "an index without its shard", "corrupt-file",
        lambda d: (d.built.base / "model-00002-of-00003.safetensors").unlink(),
        (r"weight_map in .*index\.json", r"no file model-00002-of-00003\.safetensors", r"[Dd]ownload"),
        Case(QWEN, fused=("down",), shards=3),
    ),
    Refusal(
        "a pickled adapter", "unsafe-file",
        pickled("adapter_model.bin", "adapter", "adapter_model.safetensors"),
        (r"adapter_model\.bin", r"pickle", r"adapter_model\.safetensors", r"safe_serialization"),
    ),
    Refusal(
        "a pickled base", "unsafe-file", pickled("pytorch_model.bin", "base", "model.safetensors"),
        (r"pytorch_model\.bin", r"pickled", r"safetensors"),
    ),
    Refusal(
        "a shard outside the checkpoint", "unsafe-file", outside,
        (r"weight_map in", r"\.\./adapter/evil\.safetensors", r"plain file name"),
        Case(QWEN, fused=("down",), shards=3),
    ),
    Refusal("OUT is there", "out-exists", occupied, (r"out", r"[Ff]ound", r"overwrite")),
)  # fmt: skip


def refuse(refusal: Refusal, root: Path) -> tuple[loudmerge.MergeRefused, Built]:
    built = build(refusal.case, root)
    refusal.edit(Damage(refusal.case, built, np.random.default_rng(0)))
    before = snapshot(root)
    with pytest.raises(loudmerge.MergeRefused) as caught:
        loudmerge.merge(built.base, built.adapter, root / "out", **refusal.options)
    assert snapshot(root) == before
    return caught.value, built


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.id.replace(" ", "-"))
def test_a_refusal_says_what_is_wrong_and_writes_nothing(refusal: Refusal, tmp_path: Path) -> None:
    error, _ = refuse(refusal, tmp_path)
    assert error.code == refusal.code
    text = str(error)
    pattern = rf"^{refusal.code}: .*" + ".*".join(refusal.says)
    assert re.search(pattern, text, re.DOTALL), text
    first = error.problems[0]
    assert f"found {first.found}, expected {first.expected}." in text
    assert error.where == first.where != ""
    occupied_before = {"out"} if refusal.code == "out-exists" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"} | occupied_before


def test_every_code_of_the_contract_is_tested_here() -> None:
    assert {refusal.code for refusal in REFUSALS} == REFUSAL_CODES


def test_problems_are_reported_together(tmp_path: Path) -> None:
    """Two unrelated faults in one adapter: both are in the message, so that one run shows all."""

    def edit(held: dict[str, torch.Tensor]) -> None:
        held.pop(key_of("self_attn.q_proj.lora_B.weight"))
        held["base_model.model.scale"] = torch.ones(1)

    error, _ = refuse(Refusal("", "", adapter_tensors(edit), ()), tmp_path)
    assert {problem.code for problem in error.problems} == {
        "missing-adapter-tensor",
        "unconsumed-adapter-tensor",
    }
    assert "1 more problem:" in str(error)


def test_the_option_settles_an_adapter_whose_version_contradicts_its_shapes(tmp_path: Path) -> None:
    """A config that was copied from elsewhere: the weights are proof, and the user confirms them."""
    built = build(Case(QWEN, fused=("gate_up", "down"), peft="0.18.1"), tmp_path)
    report = loudmerge.merge(built.base, built.adapter, tmp_path / "out", orientation="standard")
    assert report is not None
    assert (
        json.loads((tmp_path / "out" / "merge_report.json").read_text())["layout"]["orientation"]
        == "standard"
    )


def test_a_plan_refuses_as_a_merge_does(tmp_path: Path) -> None:
    built = build(square(), tmp_path)
    with pytest.raises(loudmerge.MergeRefused, match=r"^ambiguous-layout: "):
        loudmerge.plan(built.base, built.adapter)


def test_overwrite_keeps_the_old_output_when_the_merge_is_refused(tmp_path: Path) -> None:
    built = build(square(), tmp_path)
    occupied(Damage(square(), built, np.random.default_rng(0)))
    with pytest.raises(loudmerge.MergeRefused):
        loudmerge.merge(built.base, built.adapter, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_non_finite_weight_that_no_update_touches_is_no_refusal(tmp_path: Path) -> None:
    """Unused rows of some real embeddings are infinite; only what is merged must be finite."""
    built = build(BOTH, tmp_path)
    file = built.base / "model.safetensors"
    held = load_file(file)
    held["model.embed_tokens.weight"][0, 0] = float("inf")
    save_file(held, file, metadata={"format": "pt"})
    loudmerge.merge(built.base, built.adapter, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"][0, 0] == float(
        "inf"
    )
