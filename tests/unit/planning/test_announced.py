"""What the config announces and the base has must be in the adapter's file, or the file is not complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.errors import MergeRefused
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    World,
    expert_tensors,
    full,
    fused_lora,
    lora,
    plan_of,
    values,
    write_adapter,
    write_base,
)

E, H, I = 3, 6, 4  # noqa: E741
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
V_PROJ = "model.layers.0.self_attn.v_proj"
GATE = "model.layers.{}.mlp.gate"
Q = lora(Q_PROJ, 8, H)
Fields = Mapping[str, Any]

BASE = {
    f"{EMBED}.weight": values(9, H),
    "lm_head.weight": values(9, H),
    "model.norm.weight": values(H),
    "model.norm.bias": values(H),
    f"{Q_PROJ}.weight": values(8, H),
    f"{V_PROJ}.weight": values(8, H),
    f"{V_PROJ}.bias": values(8),
    "model.layers.0.self_attn.rotary_emb.inv_freq": values(2),
    "model.layers.0.attn.bias": values(1, 1, 4, 4),
    f"{GATE.format(0)}.weight": values(E, H),
    f"{GATE.format(1)}.weight": values(E, H),
    **expert_tensors(E, H, I),
    "model.layers.2.mtp.v_proj.weight": values(8, H),
    "mtp.layers.0.self_attn.v_proj.weight": values(8, H),
    "vision_tower.layers.0.v_proj.weight": values(8, H),
    "vision_tower.out_proj.weight": values(8, H),
}
MODEL = {"num_hidden_layers": 2}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


MISSING: Mapping[str, tuple[Fields, tuple[str, ...], str]] = {
    "a kind of Linear": (
        {"target_modules": ["q_proj", "v_proj"]}, (V_PROJ,),
        "no LoRA, though target_modules in the config announces it",
    ),
    "what an expression names": (
        {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"}, (V_PROJ,),
        "no LoRA, though target_modules",
    ),
    "the embedding and the head": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, (EMBED, "lm_head"), "no LoRA, though",
    ),
    "all experts": (
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
        ("layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj"),
        "no LoRA for experts.down_proj, though target_parameters in the config announces it",
    ),
    "experts by their full name": (
        {"target_parameters": [f"{EXPERTS}.down_proj"]}, ("layers.0.mlp.experts.down_proj",),
        f"no LoRA for {EXPERTS}.down_proj",
    ),
    "a router's parameter": (
        {"target_parameters": ["mlp.gate.weight"]}, (f"{GATE.format(0)}.weight",),
        "no LoRA for mlp.gate.weight",
    ),
    "a whole module": (
        {"modules_to_save": ["lm_head", "gate"]},
        ("lm_head.weight", f"{GATE.format(0)}.weight", f"{GATE.format(1)}.weight"),
        "no full tensor, though modules_to_save in the config announces it",
    ),
    "what ends like a module to save": (
        {"modules_to_save": ["orm"]}, ("model.norm.weight", "model.norm.bias"), "no full tensor",
    ),
    "biases": (
        {"bias": "all"}, ("model.norm.bias", f"{V_PROJ}.bias"),
        "no trained bias, though bias in the config announces it",
    ),
    "token rows": (
        {"trainable_token_indices": [1]}, ("the input embedding",),
        "no trained token rows, though trainable_token_indices in the config announces it",
    ),
    "token rows by name": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, (EMBED, "lm_head"),
        "no trained token rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_is_announced_and_not_in_the_file_is_missing(name: str, world: World) -> None:
    fields, where, found = MISSING[name]
    error = world.refuse(BASE, Q, MODEL, **fields)
    assert {problem.code for problem in error.problems} == {"missing-adapter-tensor"}
    assert sorted(problem.where for problem in error.problems) == sorted(where)
    assert found in error.problems[0].found
    assert "The adapter file is not complete; or the model in training had no such part" in error.hint


ABSENT: Mapping[str, Fields] = {
    "names that the base lacks": {"target_modules": ["q_proj", "w9"], "target_parameters": ["experts.w13"]},
    "layers and towers that no model trained": {"target_modules": ["q_proj", "mtp.v_proj", "out_proj"]},
    "what is left out": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "another layer's": {"target_modules": [Q_PROJ, "v_proj"], "layers_to_transform": [1]},
    "norms": {"target_modules": ["q_proj", "norm"]},
    "all Linears, unresolved": {"target_modules": "all-linear"},
    "Linears of experts, which may have been fused": {"target_modules": ["q_proj", "down_proj"]},
    "a projection that the experts lack": {"target_parameters": ["experts.w13_weight.x", "mlp.up_proj"]},
    "a head that this task has not": {"modules_to_save": ["lm_head", "score"], "task_type": "SEQ_CLS"},
    "no indices": {"trainable_token_indices": []},
    "no indices by name": {"trainable_token_indices": {"embed_tokens": [], "tokens": [1]}},
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_no_model_had_under_that_name_is_not_missing(name: str, world: World) -> None:
    assert world.plan(BASE, Q, MODEL, **ABSENT[name]).counts.dense == 1


def test_a_bare_models_adapter_has_no_head(world: World) -> None:
    """Trained through AutoModel, whose names begin with the layers."""
    bare = lora(Q_PROJ.removeprefix("model."), 8, H)
    assert world.plan(BASE, bare, MODEL, modules_to_save=["lm_head"]).counts.dense == 1
    error = world.refuse(BASE, bare, MODEL, modules_to_save=["embed_tokens"])
    assert [problem.where for problem in error.problems] == ["embed_tokens.weight"]


def test_nothing_is_known_of_a_model_of_which_nothing_is_in_layers(world: World) -> None:
    held = full("lm_head.weight", 9, H)
    assert world.plan(BASE, held, MODEL, modules_to_save=["lm_head", "norm"]).counts.replaced == 1


def test_linears_named_like_fused_experts_were_not_trained_beside_them(world: World) -> None:
    """PEFT >= 0.19 reads `down_proj` in target_modules as the experts'."""
    base = {**BASE, "model.layers.0.mlp.shared_expert.down_proj.weight": values(H, I)}
    held = {**Q, **fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E)}
    fields = {"target_modules": ["q_proj", "down_proj"]}
    assert world.plan(base, held, MODEL, **fields, target_parameters=BOTH).counts.dense == 1
    assert world.refuse(base, Q, MODEL, **fields).where.endswith("shared_expert.down_proj")


def test_experts_that_were_linears_have_no_parameter_to_target(world: World) -> None:
    """Unsloth names the fused parameters for any model; on transformers 4 they match nothing."""
    held = dict(Q)
    for expert in range(E):
        for leaf, b, a in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
            held |= lora(f"{EXPERTS}.{expert}.{leaf}", b, a)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    plan = world.plan(BASE, held, MODEL, target_modules=targets, target_parameters=BOTH)
    assert plan.counts.expert == 3 * E
    downs = {key: tensor for key, tensor in held.items() if "down_proj" in key or Q_PROJ in key}
    error = world.refuse(BASE, downs, MODEL, target_modules=["q_proj", "down_proj"], target_parameters=BOTH)
    assert "no LoRA for experts.gate_up_proj" in str(error)


def test_gate_and_up_may_have_been_one_linear(world: World) -> None:
    """minimax_m3_vl's shared experts; what is not in the base's names is not missed."""
    base = {**BASE, "model.layers.0.mlp.shared_experts.gate_proj.weight": values(I, H)}
    fields = {"target_modules": ["q_proj", "gate_proj"]}
    assert world.plan(base, Q, {**MODEL, "model_type": "minimax_m3_vl"}, **fields).counts.dense == 1
    dense = {**MODEL, "model_type": "llama"}
    assert world.refuse(base, Q, dense, **fields).where.endswith("shared_experts.gate_proj")


def test_a_router_may_have_been_no_linear(world: World) -> None:
    """In transformers 5 it is a module of its own class: trainers with broad expressions leave it out."""
    broad = r"model\.layers\.\d\..*(q_proj|gate)"
    assert world.plan(BASE, Q, MODEL, target_modules=broad).counts.dense == 1


def test_a_renamed_module_is_known_by_a_sibling(world: World) -> None:
    """phimoe's router: `block_sparse_moe.gate` on disk, `mlp.router` in memory."""
    base = {f"model.layers.{n}.block_sparse_moe.gate.weight": values(E, H) for n in (0, 1)} | {
        f"{Q_PROJ}.weight": values(8, H)
    }
    model = {"model_type": "phimoe"}
    held = {**Q, **full("model.layers.0.mlp.router.weight", E, H)}
    error = world.refuse(base, held, model, modules_to_save=["router"])
    assert error.where == "model.layers.1.mlp.router.weight"
    assert world.plan(base, Q, model, modules_to_save=["router"]).counts.dense == 1
    assert world.plan(base, held, model, modules_to_save=["layers.0.mlp.router"]).counts.replaced == 1


TIED = {**MODEL, "tie_word_embeddings": True}
HEADLESS = {key: value for key, value in BASE.items() if key != "lm_head.weight"}


def test_a_tied_head_that_is_announced_is_missing_too(world: World) -> None:
    """It is no tensor of the base, but the model has it."""
    for fields in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}):
        assert world.refuse(HEADLESS, Q, TIED, **fields).where.startswith("lm_head")


def test_a_config_that_does_not_say_ties_a_head_that_is_not_on_disk(tmp_path: Path) -> None:
    """As transformers 4 saves gemma."""
    base = write_base(tmp_path / "base", HEADLESS)
    (base / "config.json").write_text('{"model_type": "qwen3_moe", "num_hidden_layers": 2}')
    adapter = write_adapter(tmp_path / "adapter", Q, target_modules=["q_proj", "lm_head"])
    with pytest.raises(MergeRefused, match="missing-adapter-tensor: lm_head: found no LoRA"):
        plan_of(base, adapter)


@pytest.mark.parametrize("base", [BASE, HEADLESS])
def test_embedding_and_head_that_are_tied_may_be_saved_once(
    base: dict[str, torch.Tensor], world: World
) -> None:
    tied: Fields = {"ensure_weight_tying": True}
    saved = {**Q, **full(f"{EMBED}.weight", 9, H)}
    plan = world.plan(base, saved, TIED, **tied, modules_to_save=["lm_head", "embed_tokens"])
    assert plan.counts.replaced == 1
    embedding = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, 9),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(H, 2),
    }
    plan = world.plan(
        base, {**Q, **embedding}, TIED, **tied, target_modules=["q_proj", "embed_tokens", "lm_head"]
    )
    assert plan.counts.dense == 2
    rows = {**Q, **full(f"{EMBED}.token_adapter.trainable_tokens_delta", 1, H)}
    indices = {"embed_tokens": [1], "lm_head": [1]}
    # Each of the two that is on disk has them.
    stored = len({f"{EMBED}.weight", "lm_head.weight"} & base.keys())
    assert world.plan(base, rows, TIED, trainable_token_indices=indices).counts.replaced == stored
    assert world.refuse(base, Q, TIED, **tied, modules_to_save=["embed_tokens"]).where == f"{EMBED}.weight"
