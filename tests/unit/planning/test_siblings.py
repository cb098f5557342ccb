"""A layer that the config targets and the base has must be trained, or the adapter is not complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.planning.plan import Counts
from tests.unit.builders import EXPERTS, World, expert_tensors, fused_lora, lora, values

E, H, I = 3, 6, 4  # noqa: E741
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LAYERS = {f"model.layers.{n}.self_attn.q_proj.weight": values(8, H) for n in range(3)}


def q_of(*layers: int) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for layer in layers:
        held |= lora(f"model.layers.{layer}.self_attn.q_proj", 8, H)
    return held


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_layer_that_the_config_targets_and_the_adapter_lacks_is_missing(world: World) -> None:
    error = world.refuse(LAYERS, q_of(0, 2), target_modules=["q_proj"])
    assert str(error).startswith(
        "missing-adapter-tensor: model.layers.1.self_attn.q_proj: found no LoRA, though the config targets it"
    )
    assert "The adapter file is not complete" in error.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
        {"target_modules": r".*layers\.[02]\..*q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
        {},
    ],
)
def test_a_layer_that_the_config_leaves_out_is_not_missing(fields: dict[str, Any], world: World) -> None:
    assert world.plan(LAYERS, q_of(0, 2), **fields).counts.dense == 2


def test_layers_on_disk_past_the_models_are_not_trained(world: World) -> None:
    """Multi-token prediction: the checkpoint has a layer that no model class loads."""
    plan = world.plan(LAYERS, q_of(0, 1), {"num_hidden_layers": 2}, target_modules=["q_proj"])
    assert plan.counts.copied == 1
    assert plan.counts.dense == 2


def test_a_deeper_vision_tower_says_nothing_of_the_text_models_layers(world: World) -> None:
    """Step-3.7-Flash: 45 layers and three for multi-token prediction, beside 47 layers of vision."""
    model = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 5}}
    assert world.plan(LAYERS, q_of(0, 1), model, target_modules=["q_proj"]).counts.dense == 2


def test_keys_and_values_that_layers_share_are_not_trained(world: World) -> None:
    """gemma3n and gemma4: their last layers use an earlier one's, and have their own on disk only."""
    keys = {f"model.layers.{n}.self_attn.k_proj.weight": values(8, H) for n in range(3)}
    held = {**q_of(0, 1, 2), **lora("model.layers.0.self_attn.k_proj", 8, H)}
    model = {"num_hidden_layers": 3, "num_kv_shared_layers": 2}
    fields = {"target_modules": ["q_proj", "k_proj"]}
    assert world.plan({**LAYERS, **keys}, held, model, **fields).counts.dense == 4
    error = world.refuse({**LAYERS, **keys}, held, {**model, "num_kv_shared_layers": 1}, **fields)
    assert error.where == "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("shared", ["2", [1], None])
def test_what_is_no_number_of_shared_layers_shares_none(shared: object, world: World) -> None:
    model = {"num_hidden_layers": 3, "num_kv_shared_layers": shared}
    assert world.plan(LAYERS, q_of(0, 1, 2), model, target_modules=["q_proj"]).counts.dense == 3


def test_layers_of_a_nested_config_count_too(world: World) -> None:
    model = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 1}}
    assert world.refuse(LAYERS, q_of(0, 1), model, target_modules=["q_proj"]).code == "missing-adapter-tensor"


def test_another_kind_of_module_is_no_sibling(world: World) -> None:
    """Dense layers beside layers of experts: `mlp.down_proj` here, `mlp.experts.0.down_proj` there."""
    targets = r".*\.(q_proj|experts\.\d\.down_proj)"
    base = {**LAYERS, "model.layers.1.mlp.down_proj.weight": values(H, I), **expert_tensors(E, H, I)}
    held = q_of(0, 1, 2)
    for e in range(E):
        held |= lora(f"{EXPERTS}.{e}.down_proj", H, I)
    assert world.plan(base, held, target_modules=targets).counts == Counts(3, 3, 0, 7)


def test_an_expert_that_the_adapter_lacks_is_missing(world: World) -> None:
    held = lora(f"{EXPERTS}.0.down_proj", H, I) | lora(f"{EXPERTS}.2.down_proj", H, I)
    error = world.refuse(expert_tensors(E, H, I), held, target_modules=["down_proj"])
    assert [problem.where for problem in error.problems] == [f"{EXPERTS}.1.down_proj"]


def test_a_layer_of_experts_that_the_adapter_lacks_is_missing(world: World) -> None:
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E)
    error = world.refuse(expert_tensors(E, H, I, layers=2), held, target_parameters=BOTH)
    assert [problem.where for problem in error.problems] == ["model.layers.1.mlp.experts"]
    full_names = [f"{EXPERTS}.{name.rpartition('.')[2]}" for name in BOTH]
    plan = world.plan(expert_tensors(E, H, I, layers=2), held, target_parameters=full_names)
    assert plan.counts == Counts(3 * E, 0, 0, 3 * E)


def test_a_layer_whose_experts_have_other_names_on_disk_is_missing_too(world: World) -> None:
    """granitemoe under transformers 5.5: `input_linear.weight` is a parameter of a module of its own."""
    base: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        moe = f"model.layers.{layer}.block_sparse_moe"
        base[f"{moe}.input_linear.weight"] = values(E, 2 * I, H)
        base[f"{moe}.output_linear.weight"] = values(E, H, I)
    held = fused_lora("model.layers.0.block_sparse_moe.input_linear", [(2 * I, H)], experts=E)
    error = world.refuse(base, held, {"model_type": "granitemoe"}, target_parameters=["input_linear.weight"])
    assert error.code == "missing-adapter-tensor"
    assert "layers.1.block_sparse_moe" in error.where


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.experts.2.up_proj.weight", ""])
def test_a_layer_that_was_refused_for_another_reason_is_not_missing_too(lost: str, world: World) -> None:
    """The base lacks one expert's matrix, or holds a layer's experts apart and fused."""
    base = expert_tensors(E, H, I, layers=2)
    if lost:
        del base[lost]
    else:
        base["model.layers.1.mlp.experts.gate_up_proj"] = values(E, 2 * I, H)
    held: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        held |= fused_lora(f"model.layers.{layer}.mlp.experts", [(H, I), (2 * I, H)], experts=E)
    error = world.refuse(base, held, target_parameters=BOTH)
    assert [problem.code for problem in error.problems] == [
        "experts-incomplete" if lost else "unsupported-base"
    ]
