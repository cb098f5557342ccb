"""A converted adapter has memory's names for its layers, whatever the checkpoint has, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loudmerge.converting.convert import convert
from loudmerge.converting.prefixes import own_linear
from loudmerge.converting.rewrite import GROUPED, PEFT_018, PEFT_019, PER_EXPERT
from loudmerge.errors import MergeRefused
from loudmerge.merging.merge import plan
from loudmerge.reading.adapter_config import WEIGHTS
from loudmerge.reading.families import Family
from loudmerge.reading.names import layer_list
from tests.unit.converting.test_convert import FUSED, check_function, config, qwen, tensors
from tests.unit.reference import Built, build
from tests.unit.strategies import NAMED
from tests.unit.synthetic import Case

QWEN = NAMED["qwen3_moe"]
FAMILIES = {
    "kimi_k25": replace(
        QWEN,
        model_type="kimi_k25",
        disk_layers="language_model.model.blocks",
        memory_layers="model.language_model.layers",
    ),
    "text only": replace(
        QWEN,
        model_type="qwen3_5_moe",
        disk_layers="model.language_model.layers",
        memory_layers="model.layers",
    ),
    "minimax_m3_vl": replace(
        NAMED["mixtral"],
        model_type="minimax_m3_vl",
        disk_layers="language_model.model.layers",
        memory_layers="model.language_model.layers",
    ),
    "nemotron_h": NAMED["nemotron_h"],
}
"""Of each, the checkpoint and the model in memory have other names for the layers."""


def case_of(family: str, dense: tuple[str, ...] = ("q_proj",)) -> Case:
    found = FAMILIES[family]
    return qwen(family=found, fused=(found.first, "down"), dense=dense)


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    """Changes the names of modules, in the file and where the config has them whole."""
    head = "base_model.model."
    held = {head + change(key.removeprefix(head)): tensor for key, tensor in tensors(adapter).items()}
    save_file(held, adapter / WEIGHTS)
    raw = config(adapter)
    raw |= {
        field: [change(name) for name in raw[field] or ()]
        for field in ("target_modules", "target_parameters")
    }
    (adapter / "adapter_config.json").write_text(json.dumps(raw))


def lists(adapter: Path) -> set[str]:
    """What precedes the layers' numbers."""
    return {layer_list(key.removeprefix("base_model.model.")).removesuffix(".") for key in tensors(adapter)}


def same(one: Path, two: Path) -> bool:
    before, after = tensors(one), tensors(two)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def refused(adapter: Path, out: Path, to: str, base: Path) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        convert(adapter, out, to, base=base)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("dense", [("q_proj",), ()], ids=["attention, too", "experts alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_taken_apart_and_joined_keep_memorys_name_for_their_layers(
    family: str, dense: tuple[str, ...], tmp_path: Path
) -> None:
    case = case_of(family, dense)
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base)
    assert lists(tmp_path / "apart") == {case.family.memory_layers}
    assert case.family.disk_layers not in (tmp_path / "apart" / "adapter_config.json").read_text()
    check_function(case, built, tmp_path / "apart", tmp_path)
    convert(tmp_path / "apart", tmp_path / "back", PEFT_019, base=built.base)
    assert same(built.adapter, tmp_path / "back")
    assert case.family.disk_layers not in (tmp_path / "back" / "adapter_config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_under_the_checkpoints_name_get_the_one_that_the_rest_has(
    family: str, tmp_path: Path
) -> None:
    case = case_of(family)
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base)
    memory, disk = case.family.memory_layers, case.family.disk_layers
    rename(tmp_path / "apart", lambda name: name.replace(memory, disk) if ".experts." in name else name)
    assert lists(tmp_path / "apart") == {memory, disk}
    convert(tmp_path / "apart", tmp_path / "back", PEFT_019, base=built.base)
    assert same(built.adapter, tmp_path / "back")


@pytest.mark.parametrize("to", FUSED)
def test_a_fused_adapter_keeps_its_own_names_whatever_the_checkpoint_has(to: str, tmp_path: Path) -> None:
    case = case_of("kimi_k25")
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "converted", to, base=built.base)
    assert tensors(built.adapter).keys() == tensors(tmp_path / "converted").keys()


# --- refusals ------------------------------------------------------------------------------------------


def mixed(built: Built, case: Case, where: Callable[[str], bool]) -> None:
    memory, disk = case.family.memory_layers, case.family.disk_layers
    rename(built.adapter, lambda name: name.replace(memory, disk) if where(name) else name)


@pytest.mark.parametrize("to", [PEFT_018, GROUPED, PER_EXPERT])
def test_fused_experts_under_another_name_than_the_rest_are_refused(to: str, tmp_path: Path) -> None:
    """PEFT would find a part of them, and be silent about the others."""
    case = case_of("text only")
    built = build(case, tmp_path)
    mixed(built, case, lambda name: ".q_proj" in name)
    found = refused(built.adapter, tmp_path / "out", to, built.base)
    assert found.code == "ambiguous-layout"
    assert found.where == "the LoRA of model.layers.0.mlp.experts"
    assert (
        "found several names for the same layers:"
        " model.language_model.layers. in model.language_model.layers.0.self_attn.q_proj,"
        " and model.layers. in model.layers.0.mlp.experts"
    ) in str(found)
    assert "expected one name for layers., the model's in memory" in str(found)
    assert found.hint.startswith("Rename its tensors, and what adapter_config.json says of them")


def test_without_a_base_it_is_refused_as_well(tmp_path: Path) -> None:
    case = case_of("text only")
    built = build(case, tmp_path)
    mixed(built, case, lambda name: ".q_proj" in name)
    with pytest.raises(MergeRefused, match="several names for the same layers"):
        convert(built.adapter, tmp_path / "out", PEFT_018, orientation="standard")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dense", [("q_proj",), ()], ids=["of the rest", "of the experts"])
def test_where_names_of_the_same_layers_differ_none_is_chosen(dense: tuple[str, ...], tmp_path: Path) -> None:
    case = case_of("text only", dense)
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base)
    built = replace(built, adapter=tmp_path / "apart")
    spread_targets(built.adapter)
    part = ".self_attn." if dense else ".experts."
    mixed(built, case, lambda name: part in name and ".layers.1." in name)
    found = refused(built.adapter, tmp_path / "out", PEFT_019, built.base)
    assert found.code == "ambiguous-layout"
    assert "experts" in found.where
    assert "several names for the same layers: model.language_model.layers. in" in str(found)


def spread_targets(adapter: Path) -> None:
    """Has the config name each module whole: the end of a name would also mean what is named otherwise."""
    raw = config(adapter)
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors(adapter)}
    raw["target_modules"] = sorted(modules)
    (adapter / "adapter_config.json").write_text(json.dumps(raw))


def test_the_checkpoints_name_alone_proves_no_name_in_memory(tmp_path: Path) -> None:
    """`blocks.` is in no class; what precedes `layers.` in memory stands nowhere."""
    case = case_of("kimi_k25", ())
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base)
    built = replace(built, adapter=tmp_path / "apart")
    mixed(built, case, lambda _: True)
    found = refused(built.adapter, tmp_path / "out", PEFT_019, built.base)
    assert found.code == "ambiguous-layout"
    assert "language_model.model.blocks.0.mlp.experts.0." in found.where
    assert "found language_model.model.blocks., which is the checkpoint's name for the layers" in str(found)
    assert "which ends with layers." in str(found)


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("model.experts", "model.experts.0.up_proj"),
        ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts.0.up_proj"),
        ("model.layers.1.mlp.experts", "net.layers.1.mlp.experts.0.up_proj"),
    ],
)
def test_an_expert_that_would_be_read_as_another_has_no_name(module: str, key: str, tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    site = plan(built.base, built.adapter).sites[0]
    with pytest.raises(
        MergeRefused, match=f"experts that are {module} in memory, and {key} on disk"
    ) as caught:
        own_linear(site, module, key, Family())
    assert (caught.value.code, caught.value.where) == ("unsupported-base", str(site.pair.a))
