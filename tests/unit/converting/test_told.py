"""A conversion without a base: the caller says the orientation, and what a merge refuses stays refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.converting.convert import convert
from loudmerge.converting.rewrite import PEFT_018, PER_EXPERT
from loudmerge.errors import MergeRefused
from tests.unit.builders import (
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    fused_lora,
    lora,
    values,
    write_adapter,
    write_base,
)
from tests.unit.converting.test_convert import FUSED, qwen, tensors
from tests.unit.reference import build

GATE_UP, DOWN = (12, 8), (8, 6)
TARGETS = ("experts.gate_up_proj", "experts.down_proj")


def refusal(root: Path, lora: Tensors, *, with_base: bool, **fields: Any) -> MergeRefused:
    """What the conversion of this adapter is refused with; the base tells the same as the option."""
    tensors = {f"{EXPERTS}.gate_up_proj": values(4, *GATE_UP), f"{EXPERTS}.down_proj": values(4, *DOWN)}
    base = write_base(root / "base", tensors, num_experts=4) if with_base else None
    adapter = write_adapter(root / "adapter", lora, peft_version="0.19.1", **fields)
    with pytest.raises(MergeRefused) as caught:
        convert(adapter, root / "out", PEFT_018, base=base, orientation="standard")
    assert not (root / "out").exists()
    return caught.value


@pytest.mark.parametrize("to", FUSED)
def test_without_a_base_the_user_says_the_orientation(to: str, tmp_path: Path) -> None:
    built = build(qwen(rank_pattern={"down_proj": 3}), tmp_path)
    convert(built.adapter, tmp_path / "told", to, orientation="standard")
    convert(built.adapter, tmp_path / "proven", to, base=built.base)
    told, proven = tensors(tmp_path / "told"), tensors(tmp_path / "proven")
    assert told.keys() == proven.keys()
    assert all(torch.equal(told[key], proven[key]) for key in told)


def test_keys_of_rank_pattern_that_saving_sorted_need_a_base(tmp_path: Path) -> None:
    """In training the other key was first: the rows are those of 4 experts of rank 4, or of 8 of rank 2."""
    lora = fused_lora(EXPERTS, [DOWN], experts=4, rank=4)
    saved: dict[str, Any] = {"auto_mapping": None, "inference_mode": True, "layers_pattern": None}
    saved["rank_pattern"] = {"down_proj": 2, "experts.down_proj": 4}
    refused = refusal(tmp_path, lora, with_base=False, target_parameters=list(TARGETS[1:]), **saved)
    assert refused.code == "rank-mismatch"
    assert "a rank of 2 or 4" in str(refused)
    assert refused.hint == "Give --base, whose number of experts tells."


def test_without_a_base_and_without_a_word_it_is_refused(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    with pytest.raises(MergeRefused, match=r"Give --base, or say --orientation") as caught:
        convert(built.adapter, tmp_path / "converted", PEFT_018)
    assert caught.value.code == "ambiguous-layout"
    with pytest.raises(MergeRefused, match=r"Give --base\."):
        convert(built.adapter, tmp_path / "converted", PER_EXPERT, orientation="standard")


@pytest.mark.parametrize(
    ("role", "extra"),
    [
        ("lora_B.bias", {"lora_bias": True}),
        ("lora_magnitude_vector", {"use_dora": True}),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_dora_and_a_lora_bias_on_fused_experts_are_refused_with_a_base_or_without(
    role: str, extra: dict[str, bool], with_base: bool, tmp_path: Path
) -> None:
    lora = {**fused_lora(EXPERTS, [GATE_UP], experts=4), f"{PREFIX}{EXPERTS}.{role}": values(12)}
    found = refusal(tmp_path, lora, with_base=with_base, target_parameters=TARGETS[:1], **extra)
    assert found.code == "unsupported-adapter"
    assert "found DoRA or a LoRA bias on fused experts" in str(found)
    assert role in found.where


@pytest.mark.parametrize(
    ("pairs", "targets", "code"),
    [
        ([GATE_UP, DOWN], TARGETS[:1], "unconsumed-adapter-tensor"),
        ([GATE_UP], TARGETS, "missing-adapter-tensor"),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_one_pair_for_each_target_or_it_is_refused_with_a_base_or_without(
    pairs: list[tuple[int, int]], targets: tuple[str, ...], code: str, with_base: bool, tmp_path: Path
) -> None:
    lora = fused_lora(EXPERTS, pairs, experts=4)
    found = refusal(tmp_path, lora, with_base=with_base, target_parameters=targets)
    assert found.code == code
    assert "one for each of its targeted parameters" in str(found)


def test_a_level_that_is_left_out_is_refused(tmp_path: Path) -> None:
    """As many pairs as targets, but not where PEFT would look for the inner one."""
    lora = {
        key.replace(".base_layer", ".base_layer.base_layer"): tensor
        for key, tensor in fused_lora(EXPERTS, [GATE_UP, DOWN], experts=4).items()
    }
    found = refusal(tmp_path, lora, with_base=False, target_parameters=TARGETS)
    assert "inside 0, 2 base_layer levels" in str(found)


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_a_linear_is_no_parameter_that_a_short_target_names(targets: list[str], tmp_path: Path) -> None:
    """q_proj's rank is four times the config's, as that of a parameter with four experts would be."""
    dense = lora(Q_PROJ, 8, 8, rank=8)
    held = {**fused_lora(EXPERTS, [GATE_UP, DOWN][: len(targets)], experts=4), **dense}
    fields = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 8}, "peft_version": "0.19.1"}
    write_adapter(tmp_path / "adapter", held, target_parameters=targets, **fields)
    convert(tmp_path / "adapter", tmp_path / "out", PEFT_018, orientation="standard")
    found = tensors(tmp_path / "out")
    assert found.keys() == held.keys()
    assert all(torch.equal(found[key], dense[key]) for key in dense)
