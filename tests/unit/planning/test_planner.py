"""Every tensor of both sides has one place in the plan; what cannot have one is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.executing.report import planned_report
from loudmerge.layout import Axes, Span
from loudmerge.planning import planner
from loudmerge.planning.draft import Draft
from loudmerge.planning.plan import Counts, OutputTensor
from loudmerge.reading.families import FAMILIES, Family
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    World,
    entry,
    expert_tensors,
    full,
    fused_lora,
    lora,
    outputs,
    plan_of,
    values,
    write_adapter,
    write_base,
)

E, H, I, V = 3, 6, 4, 9  # noqa: E741
Q = {f"{Q_PROJ}.weight": values(8, H)}
TIED = {f"{EMBED}.weight": values(V, H, seed=7), **Q}
UNTIED = {**TIED, "lm_head.weight": values(V, H, seed=8)}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CONV1D = next(name for name, family in FAMILIES.items() if family.conv1d)
TIE = {"tie_word_embeddings": True}
ROWS = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- the plan ------------------------------------------------------------------------------------


def test_every_tensor_of_the_base_is_an_output_in_its_order_and_shard(tmp_path: Path) -> None:
    keys = sorted(UNTIED)
    write_base(tmp_path / "base", UNTIED, shards=(keys[1:], keys[:1]))
    write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H))
    plan = plan_of(tmp_path / "base", tmp_path / "adapter")
    assert [output.key for output in plan.outputs] == list(plan.base.entries)
    assert {output.key: output.shard for output in plan.outputs} == {
        key: held.file.name for key, held in plan.base.entries.items()
    }
    assert plan.counts == Counts(expert=0, dense=1, replaced=0, copied=2)
    assert (plan.num_experts, plan.notes, plan.config_edits) == (None, (), {})


def test_a_fused_adapter_counts_each_projection_of_each_expert(world: World) -> None:
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(Q_PROJ, 8, H)
    plan = world.plan({**Q, **expert_tensors(E, H, I)}, held, target_parameters=BOTH)
    assert plan.counts == Counts(expert=3 * E, dense=1, replaced=0, copied=0)
    assert plan.num_experts == E
    assert plan.layout.orientation == "standard"
    assert {site.parameter for site in plan.sites} == {
        f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", f"{Q_PROJ}.weight",
    }  # fmt: skip
    up = outputs(plan)[f"{EXPERTS}.1.up_proj.weight"]
    (term,) = up.terms
    assert plan.sites[term.site].parameter == f"{EXPERTS}.gate_up_proj"
    assert (term.expert, term.rows, term.index, term.out) == (1, Span(I, I), -1, Span(0, I))


def test_every_tensor_of_the_adapter_is_used_by_the_plan(world: World) -> None:
    """And by one part of it only."""
    base = {**UNTIED, **expert_tensors(E, H, I), f"{Q_PROJ}.bias": values(8), "norm.bias": values(3)}
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | full("lm_head.weight", V, H)
    held |= {ROWS: values(1, H), **full("norm.bias", 3), **full(f"{Q_PROJ}.bias", 8), **lora(Q_PROJ, 8, H)}
    held |= {**full("lm_head.modules_to_save.weight", V, H), **full("lm_head.original_module.weight", V, H)}
    plan = world.plan(
        base,
        held,
        target_parameters=BOTH,
        trainable_token_indices=[1],
        bias="all",
        modules_to_save=["lm_head"],
    )
    used = [part.name for site in plan.sites for part in site.pair.entries]
    used += [output.source.name for output in plan.outputs if output.replaced]
    used += [output.token_rows[1].name for output in plan.outputs if output.token_rows]
    used += [copy.name for _, copy in plan.adapter.copies] + [part.name for part in plan.adapter.originals]
    assert sorted(used) == sorted(held)
    assert plan.consumed == Counter(dict.fromkeys(held, 1))


def test_a_tensor_that_the_planner_would_forget_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong in the rooms before: the plan itself is counted."""
    monkeypatch.setattr(Draft, "add_full", lambda *_: None)
    error = world.refuse(UNTIED, full("lm_head.weight", V, H))
    assert error.code == "unconsumed-adapter-tensor"
    assert "lm_head.weight [9, 6] F32 in adapter_model.safetensors: found used 0 times" in str(error)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("model_type", "plain"), [("qwen3_moe", True), ("llama4_text", False)])
def test_the_factors_read_the_input_as_orientation_and_axes_say(
    model_type: str, plain: bool, swapped: bool, world: World
) -> None:
    base: Tensors = expert_tensors(E, H, I)
    sizes = [(H, I), (2 * I, H)]
    if not plain:
        base = {f"{EXPERTS}.gate_up_proj": values(E, H, 2 * I), f"{EXPERTS}.down_proj": values(E, I, H)}
        sizes = [(d2, d1) for d1, d2 in sizes]
    held = fused_lora(EXPERTS, sizes, experts=E, swapped=swapped)
    plan = world.plan(base, held, {"model_type": model_type}, target_parameters=BOTH)
    assert plan.layout.orientation == ("swapped" if swapped else "standard")
    assert {site.reads_input for site in plan.sites} == {plain is not swapped}


def test_an_adapter_of_one_linear_for_each_expert_has_no_fused_layout(world: World) -> None:
    plan = world.plan(expert_tensors(E, H, I), lora(f"{EXPERTS}.0.up_proj", I, H))
    assert (plan.counts.expert, plan.num_experts) == (1, E)
    assert (plan.layout.orientation, plan.layout.lora_b_layout) == ("none", "none")


@pytest.mark.parametrize("option", ["auto", "nearest", "stochastic", "peft"])
def test_the_rounding_of_the_plan_is_that_of_the_option(option: str, world: World) -> None:
    assert world.plan(Q, lora(Q_PROJ, 8, H), rounding=option).rounding == option


def test_weights_that_are_left_out_are_noted(world: World) -> None:
    world.plan(Q, lora(Q_PROJ, 8, H))
    for number in range(1, 13):
        (world.path / "base" / f"model-{number:02}.gguf").write_bytes(b"x")
    (note,) = plan_of(world.path / "base", world.path / "adapter").notes
    assert note.startswith(
        "other weights, and adapters, are not copied from the base: model-01.gguf, model-02"
    )
    assert note.endswith("model-10.gguf and 2 more")


def test_two_alphas_for_one_name_are_refused(world: World) -> None:
    saved = dict.fromkeys(("auto_mapping", "inference_mode", "layers_pattern", "corda_config"))
    error = world.refuse(Q, lora(Q_PROJ, 8, H), **saved, alpha_pattern={r".*q_proj": 1, "q_proj": 2})
    assert error.code == "unsupported-adapter"
    assert f"found an alpha of 1 or 2 for {Q_PROJ}, by which key of alpha_pattern counts" in str(error)


@pytest.mark.parametrize(("stamp", "said"), [("peft-0.18", "swapped"), ("peft-0.19.1", "standard")])
def test_nemo_automodel_says_how_a_square_matrix_is_laid(world: World, stamp: str, said: str) -> None:
    base, down = expert_tensors(E, H, H), fused_lora(EXPERTS, [(H, H)], experts=E)
    error = world.refuse(base, down, target_parameters=["experts.down_proj"])
    assert error.code == "ambiguous-layout"
    beside = world.path / "adapter" / "automodel_peft_config.json"
    beside.write_text(json.dumps({"moe_rank_scaling": False, "paramwrapper_layout": stamp}))
    assert plan_of(world.path / "base", world.path / "adapter").layout.orientation == said


def test_what_an_option_overrules_is_noted(world: World) -> None:
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E)
    world.plan(expert_tensors(E, H, I), held, target_parameters=BOTH, lora_B_layout="rank_major")
    inputs = world.path / "base", world.path / "adapter"
    assert plan_of(*inputs).notes == ()
    (note,) = plan_of(*inputs, lora_b_layout="grouped_by_expert").notes
    assert note.startswith("--lora-b-layout grouped_by_expert decided, but marker of ")


# --- refusals ------------------------------------------------------------------------------------


def test_a_refused_family_is_refused_before_anything_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "family_of", lambda _: Family(refused="experts of two kinds"))
    error = world.refuse(Q, lora(Q_PROJ, 8, H))
    assert error.code == "unsupported-base"
    assert "model_type qwen3_moe of " in error.where
    assert "found experts of two kinds, expected a family that can be merged into." in str(error)


def test_two_loras_for_one_weight_are_refused(world: World) -> None:
    """Under two names of one module in memory."""
    other = f"model.language_model.{Q_PROJ.removeprefix('model.')}"
    error = world.refuse(Q, lora(Q_PROJ, 8, H) | lora(other, 8, H))
    assert error.code == "unsupported-adapter"
    assert f"a second LoRA for weights that the LoRA of {other}.weight already updates" in str(error)
    assert f"for {Q_PROJ}.weight [8, 6] F32 in model.safetensors" in error.where


def test_a_fused_lora_and_one_of_an_expert_for_one_weight_are_refused(world: World) -> None:
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(f"{EXPERTS}.1.up_proj", I, H)
    error = world.refuse(expert_tensors(E, H, I), held, target_parameters=BOTH)
    assert error.code == "unsupported-adapter"
    assert "already updates, expected one LoRA for each weight." in str(error)


def test_two_tensors_that_replace_one_weight_are_refused(world: World) -> None:
    """Under two names of one module in memory."""
    held = full("lm_head.weight", V, H) | full("model.lm_head.weight", V, H)
    error = world.refuse(UNTIED, held, modules_to_save=["lm_head"])
    assert error.code == "unsupported-adapter"
    assert "found a second tensor that replaces, or is added to, lm_head.weight [9, 6] F32" in str(error)


def test_a_lora_and_a_full_tensor_for_one_module_to_save_are_refused(world: World) -> None:
    """modules_to_save replaces the module: PEFT puts no LoRA on it."""
    held = lora("lm_head", V, H) | full("lm_head.weight", V, H)
    assert world.refuse(UNTIED, held, modules_to_save=["lm_head"]).code == "unsupported-adapter"


def test_the_saved_base_weight_beside_an_embeddings_lora_is_its_base(world: World) -> None:
    """save_embedding_layers writes the frozen weight beside the LoRA."""
    held = lora("lm_head", V, H) | full("lm_head.base_layer.weight", V, H)
    found = outputs(world.plan(UNTIED, held))["lm_head.weight"]
    assert (found.replaced, len(found.terms)) == (True, 1)
    assert found.source.name == f"{PREFIX}lm_head.base_layer.weight"


def test_problems_of_every_kind_are_reported_together(world: World) -> None:
    held = (
        fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E, rank=3)  # rank-mismatch
        | lora("gone", 8, H)  # missing-base-tensor
        | full(f"{Q_PROJ}.bias", 8)  # missing-base-tensor
        | {ROWS: values(1, H + 1)}  # shape-mismatch
    )
    base = {**TIED, **expert_tensors(E, H, I)}
    error = world.refuse(base, held, target_parameters=BOTH, bias="all", trainable_token_indices=[1])
    assert sorted(problem.code for problem in error.problems) == [
        "missing-base-tensor", "missing-base-tensor", "rank-mismatch", "shape-mismatch",
    ]  # fmt: skip
    assert "3 more problems:" in str(error)


# --- full tensors --------------------------------------------------------------------------------


def test_a_full_tensor_replaces_the_bases(world: World) -> None:
    plan = world.plan(UNTIED, full("lm_head.weight", V, H), modules_to_save=["lm_head"])
    found = outputs(plan)["lm_head.weight"]
    assert (found.replaced, found.touched, found.source.name) == (True, True, f"{PREFIX}lm_head.weight")
    assert plan.counts == Counts(0, 0, 1, 2)


def test_whole_experts_that_were_trained_fused_are_not_taken_apart(world: World) -> None:
    error = world.refuse(
        expert_tensors(E, H, I), full(f"{EXPERTS}.down_proj", E, H, I), modules_to_save=["experts"]
    )
    assert error.code == "missing-base-tensor"
    assert "trained fused, are not taken apart" in error.hint


def test_a_trained_bias_replaces_the_bases(world: World) -> None:
    base = {**Q, f"{Q_PROJ}.bias": values(8)}
    plan = world.plan(base, full(f"{Q_PROJ}.bias", 8), bias="all")
    assert outputs(plan)[f"{Q_PROJ}.bias"].replaced


def test_a_conv1d_is_told_from_a_linear_by_its_shape_or_by_its_name(world: World) -> None:
    """PEFT sets fan_in_fan_out for the whole config, at each layer that it wraps: the last one stands."""
    family = {"model_type": CONV1D}
    for shape, axes in (((6, 8), Axes.IN_OUT), ((8, 6), Axes.OUT_IN)):
        (term,) = outputs(world.plan({"h.0.c.weight": values(*shape)}, lora("h.0.c", 8, 6), family))[
            "h.0.c.weight"
        ].terms
        assert term.axes is axes
    for name, axes in (("h.0.c", Axes.OUT_IN), ("h.0.c_proj", Axes.IN_OUT)):
        base, held = {f"{name}.weight": values(6, 6)}, lora(name, 6, 6)
        for flag in (False, True):
            (term,) = outputs(world.plan(base, held, family, fan_in_fan_out=flag))[f"{name}.weight"].terms
            assert term.axes is axes
    base, held = {"h.0.c_proj.weight": values(6, 6)}, lora("h.0.c_proj", 6, 6)
    error = world.refuse(base, held, {**family, "auto_map": {"AutoModel": "modeling.Model"}})
    assert error.code == "ambiguous-layout"
    assert (
        "found a LoRA on the square h.0.c_proj.weight [6, 6] F32 in model.safetensors with fan_in_fan_out"
        in str(error)
    )


def test_a_heads_bias_is_resized_with_its_weight(world: World) -> None:
    base = {f"{EMBED}.weight": values(9, H), "lm_head.weight": values(9, H), "lm_head.bias": values(9)}
    weights = full(f"{EMBED}.weight", 11, H) | full("lm_head.weight", 11, H)
    plan = world.plan(base, weights | full("lm_head.bias", 11))
    assert {key: output.shape[0] for key, output in outputs(plan).items()} == dict.fromkeys(base, 11)
    error = world.refuse(base, weights)
    assert error.code == "shape-mismatch"
    assert "lm_head.bias [9] F32 in model.safetensors: found [9], expected [11], one for each row of" in str(
        error
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_that_is_not_in_the_file_is_missing(bias: str, world: World) -> None:
    """PEFT before 0.21 trains the biases of lora_only and does not save them."""
    base = {**Q, f"{Q_PROJ}.bias": values(8)}
    error = world.refuse(base, lora(Q_PROJ, 8, H), bias=bias)
    assert error.code == "missing-adapter-tensor"
    assert f"{Q_PROJ}.bias, beside " in error.where
    assert f"found no trained bias, though the config says bias={bias!r}" in str(error)
    assert world.plan(Q, lora(Q_PROJ, 8, H), bias=bias).counts.dense == 1


def test_a_full_tensor_that_the_base_lacks_is_refused(world: World) -> None:
    error = world.refuse(Q, full("score.weight", 2, H), modules_to_save=["score"])
    assert error.code == "missing-base-tensor"
    assert "found a full tensor, expected a tensor that score.weight in memory means" in str(error)
    assert "merge the live model with save_pretrained_merged" in error.hint


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"]
)
def test_an_adapter_that_was_saved_wrapped_is_refused_by_the_wrappers_name(
    wrapper: str, world: World
) -> None:
    error = world.refuse(Q, lora(Q_PROJ.replace(".self_attn", f".{wrapper}.self_attn"), 8, H))
    assert error.code == "missing-base-tensor"
    assert f"{wrapper} is a wrapper's name: save the adapter from the model without it." in error.hint
    assert "wrapper" not in world.refuse(Q, lora("model.layers.7.self_attn.q_proj", 8, H)).hint


def test_an_experts_gate_and_up_in_one_lora_is_what_ms_swift_exports_from_megatron(world: World) -> None:
    fused = {f"{EXPERTS}.gate_up_proj": values(E, H, 2 * I), f"{EXPERTS}.down_proj": values(E, I, H)}
    held = lora(f"{EXPERTS}.1.gate_up_proj", 2 * I, H)
    error = world.refuse(fused, held, {"model_type": "gpt_oss"}, target_modules=["gate_up_proj"])
    assert error.code == "missing-base-tensor"
    assert "found a LoRA for model.layers.0.mlp.experts.1.gate_up_proj.weight" in str(error)
    assert "--merge_lora true" in error.hint


@pytest.mark.parametrize("shape", [(V, H + 1), (V,), (V, H, 1)])
def test_a_full_tensor_of_another_width_is_refused(shape: tuple[int, ...], world: World) -> None:
    error = world.refuse(UNTIED, full("lm_head.weight", *shape), modules_to_save=["lm_head"])
    assert error.code == "shape-mismatch"
    assert "a shape that fits lm_head.weight [9, 6] F32 in model.safetensors" in str(error)


def test_a_full_tensor_of_another_height_is_refused_unless_it_is_a_vocabulary(world: World) -> None:
    base = {**Q, "model.layers.0.mlp.gate.weight": values(E, H)}
    held = full("model.layers.0.mlp.gate.weight", E + 1, H)
    assert world.refuse(base, held, modules_to_save=["gate"]).code == "shape-mismatch"


# --- token rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[V], [0, V + 5], [-1], [-1, V - 1]])
def test_an_index_outside_the_vocabulary_is_refused(indices: list[int], world: World) -> None:
    error = world.refuse(TIED, {ROWS: values(len(indices), H)}, trainable_token_indices=indices)
    assert error.code == "shape-mismatch"
    bad = next(index for index in indices if not 0 <= index < V)
    assert f"found token index {bad}, expected indices under 9, the rows of {EMBED}.weight" in str(error)


def test_token_rows_of_another_width_are_refused(world: World) -> None:
    error = world.refuse(TIED, {ROWS: values(1, H + 1)}, trainable_token_indices=[0])
    assert f"found [1, 7], expected a shape that fits {EMBED}.weight [9, 6]" in str(error)


def test_token_rows_for_an_embedding_that_the_base_lacks_are_refused(world: World) -> None:
    error = world.refuse(Q, {ROWS: values(1, H)}, trainable_token_indices=[0])
    assert error.code == "missing-base-tensor"
    assert "found trained token rows, expected a tensor that" in str(error)


# --- DoRA and biases -----------------------------------------------------------------------------


def test_a_magnitude_is_planned_with_its_term(world: World) -> None:
    held = lora(Q_PROJ, 8, H) | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": values(8)}
    found = outputs(world.plan(Q, held, use_dora=True))[f"{Q_PROJ}.weight"]
    assert found.dora is not None
    assert (found.dora.name, len(found.terms)) == (f"{PREFIX}{Q_PROJ}.lora_magnitude_vector", 1)


def test_a_lora_bias_is_added_to_the_bases_bias(world: World) -> None:
    held = lora(Q_PROJ, 8, H) | {f"{PREFIX}{Q_PROJ}.lora_B.bias": values(8)}
    base = {**Q, f"{Q_PROJ}.bias": values(8)}
    found = outputs(world.plan(base, held, lora_bias=True))[f"{Q_PROJ}.bias"]
    assert found.bias is not None
    assert (found.bias[1], found.touched, found.terms) == (2.0, True, ())


@pytest.mark.parametrize(
    ("base", "code", "hint"),
    [
        (Q, "missing-base-tensor", "The base's module has no bias, which could hold it"),
        ({**Q, f"{Q_PROJ}.bias": values(7)}, "shape-mismatch", "Is this the base"),
    ],
)
def test_a_lora_bias_needs_a_bias_in_the_base(base: Tensors, code: str, hint: str, world: World) -> None:
    held = lora(Q_PROJ, 8, H) | {f"{PREFIX}{Q_PROJ}.lora_B.bias": values(8)}
    error = world.refuse(base, held, lora_bias=True)
    assert error.code == code
    assert "lora_B.bias" in error.where
    assert error.hint.startswith(hint)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("bias", (torch.float64, torch.int32, torch.uint16)),
        ("full", (torch.int32, torch.uint16, torch.bool)),
        ("rows", (torch.int32, torch.uint16, torch.bool)),
    ],
)
def test_what_was_trained_needs_a_base_tensor_that_holds_it(
    name: str, dtypes: Sequence[torch.dtype], world: World
) -> None:
    changed: dict[str, tuple[str, tuple[int, ...], Tensors, dict[str, Any]]] = {
        "bias": (f"{Q_PROJ}.bias", (8,), {f"{PREFIX}{Q_PROJ}.lora_B.bias": values(8)}, {"lora_bias": True}),
        "full": (
            "score.weight",
            (3, H),
            {f"{PREFIX}score.weight": values(3, H)},
            {"modules_to_save": ["score"]},
        ),
        "rows": (f"{EMBED}.weight", (V, H), {ROWS: values(1, H)}, {"trainable_token_indices": [0]}),
    }
    key, shape, held, config = changed[name]
    for dtype in dtypes:
        base = {**Q, key: torch.ones(shape).to(dtype)}
        error = world.refuse(base, {**lora(Q_PROJ, 8, H), **held}, **config)
        assert error.code == "unsupported-base"
        assert re.search(rf"{key} .*: found a weight of dtype \w+, expected one of BF16,", str(error))


@pytest.mark.parametrize("shape", [(0, H), (8, 0)])
def test_a_lora_for_no_numbers_is_refused(shape: tuple[int, int], world: World) -> None:
    error = world.refuse({f"{Q_PROJ}.weight": values(*shape)}, lora(Q_PROJ, *shape))
    assert error.code == "unsupported-base"
    assert f"found a weight of shape {list(shape)}" in str(error)


@pytest.mark.parametrize(
    ("model", "edits"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "float16"}),
        ({"dtype": "float32"}, {"dtype": "float16"}),
        ({}, {"torch_dtype": "float16"}),
        (
            {
                "dtype": "float32",
                "text_config": {"dtype": "float32", "torch_dtype": None},
                "vision_config": {"x": 1, "inner": {"torch_dtype": "float32"}},
                "a.b": {"dtype": "float32"},
            },
            {
                "dtype": "float16",
                "text_config.dtype": "float16",
                "vision_config.inner.torch_dtype": "float16",
            },
        ),
    ],
)
def test_another_dtype_edits_the_config_where_it_says_the_dtype(
    model: dict[str, Any], edits: dict[str, str], world: World
) -> None:
    assert world.plan(Q, lora(Q_PROJ, 8, H), model, dtype="float16").config_edits == edits


def test_another_dtype_is_for_floats_only(world: World) -> None:
    base = {**Q, "steps": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)}
    plan = world.plan(base, lora(Q_PROJ, 8, H), dtype="bfloat16")
    assert {key: (o.dtype, o.nbytes) for key, o in outputs(plan).items()} == {
        f"{Q_PROJ}.weight": ("BF16", 2 * 8 * H), "steps": ("I64", 24), "mask": ("BOOL", 2),
    }  # fmt: skip


def test_keep_edits_nothing(world: World) -> None:
    assert world.plan(Q, lora(Q_PROJ, 8, H), {"torch_dtype": "float32"}, dtype="keep").config_edits == {}


def test_a_head_of_its_own_has_the_dtype_of_the_option(world: World) -> None:
    plan = world.plan(TIED, lora("lm_head", V, H), TIE, dtype="bfloat16")
    assert outputs(plan)["lm_head.weight"].dtype == "BF16"


# --- values of the plan --------------------------------------------------------------------------


def test_a_tensor_that_only_changes_its_dtype_is_not_touched() -> None:
    plain = OutputTensor("a", "f", entry("a", (2, 3)), "BF16", (2, 3))
    assert (plain.touched, plain.nbytes) == (False, 12)
    assert replace(plain, dtype="F32").nbytes == 24


def test_a_dtype_without_numbers_is_copied_by_its_bytes() -> None:
    assert OutputTensor("a", "f", entry("a", (2, 3), "F8_E4M3"), "F8_E4M3", (2, 3)).nbytes == 6


def test_the_report_of_a_plan_is_planned_and_is_json(world: World) -> None:
    plan = world.plan(UNTIED, lora(Q_PROJ, 8, H))
    report = planned_report(plan)
    assert report.status == "planned"
    assert json.loads(json.dumps(report.to_json()))["counts"]["dense"] == {"attempted": 1, "applied": 0}
    assert plan.side_files == plan.base.side_files
