"""Each LoRA pair is placed on the weight it updates, or refused with the names of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.errors import Problem
from loudmerge.layout import Axes, Span
from loudmerge.planning.sites import Placement, place
from loudmerge.reading.experts import Experts
from loudmerge.reading.families import family_of
from loudmerge.reading.names import Names
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    expert_tensors,
    fused_lora,
    lora,
    opened,
    values,
    write_adapter,
    write_base,
)

E, H, I = 3, 6, 4  # noqa: E741
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NESTED = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E)
Q = {f"{Q_PROJ}.weight": values(8, H)}
Config = Mapping[str, Any]


def placed(
    path: Path, base: Tensors, adapter: Tensors, model: Config | None = None, **fields: Any
) -> tuple[Placement, list[Problem]]:
    settings = {"model_type": "qwen3_moe", **(model or {})}
    checkpoint, read = opened(
        write_base(path / "base", base, **settings), write_adapter(path / "adapter", adapter, **fields)
    )
    family = family_of(settings["model_type"])
    names = Names(checkpoint, family)
    return place(read, names, Experts(checkpoint, names, family), family, checkpoint.config)


def sound(
    path: Path, base: Tensors, adapter: Tensors, model: Config | None = None, **fields: Any
) -> Placement:
    placement, problems = placed(path, base, adapter, model, **fields)
    assert not problems, problems
    return placement


def problem(
    path: Path, base: Tensors, adapter: Tensors, model: Config | None = None, **fields: Any
) -> Problem:
    _, (found,) = placed(path, base, adapter, model, **fields)
    return found


# --- dense pairs ---------------------------------------------------------------------------------


def test_a_dense_pair_updates_the_whole_weight(tmp_path: Path) -> None:
    (found,) = sound(tmp_path, Q, lora(Q_PROJ, 8, H)).dense
    assert (found.parameter, found.rank, found.scaling, found.expert) == (f"{Q_PROJ}.weight", 2, 2.0, False)
    assert (found.slot.entry.name, found.slot.index, found.slot.axes) == (f"{Q_PROJ}.weight", -1, Axes.OUT_IN)
    assert found.slot.out == Span(0, 8)


def test_names_in_memory_and_on_disk_meet_under_other_prefixes(tmp_path: Path) -> None:
    module = "model.language_model." + Q_PROJ.removeprefix("model.")
    (found,) = sound(tmp_path, Q, lora(module, 8, H)).dense
    assert found.slot.entry.name == f"{Q_PROJ}.weight"


@pytest.mark.parametrize("model_type", ["gpt2", "nobody_knows"])
def test_a_transposed_weight_is_read_the_other_way(model_type: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores (in, out) and says fan_in_fan_out."""
    base, model = {f"{Q_PROJ}.weight": values(H, 8)}, {"model_type": model_type}
    (found,) = sound(tmp_path, base, lora(Q_PROJ, 8, H), model, fan_in_fan_out=True).dense
    assert (found.slot.axes, found.slot.out) == (Axes.IN_OUT, Span(0, 8))


def test_a_saved_embedding_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    """Beside its LoRA PEFT saves the whole weight, whose shape the LoRA has to fit."""
    base = {"lm_head.weight": values(9, H)}
    held = {**lora("lm_head", 9, H), f"{PREFIX}lm_head.base_layer.weight": torch.ones(())}
    refused = problem(tmp_path, base, held)
    assert refused.code == "unsupported-adapter"
    assert "lm_head.base_layer.weight [] F32 in adapter_model.safetensors, which has 0 axes" in refused.found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
@pytest.mark.parametrize("out", [8, H])
def test_a_linear_is_not_transposed_whatever_the_config_says(
    model_type: str, out: int, tmp_path: Path
) -> None:
    """bitsandbytes' Linears leave fan_in_fan_out as it was given; PEFT sets it to false on a Linear."""
    base, model = {f"{Q_PROJ}.weight": values(out, H)}, {"model_type": model_type}
    (found,) = sound(tmp_path, base, lora(Q_PROJ, out, H), model, fan_in_fan_out=True).dense
    assert (found.slot.axes, found.slot.out) == (Axes.OUT_IN, Span(0, out))


def test_a_square_weight_of_an_unknown_model_is_a_linears_only_where_the_config_agrees(
    tmp_path: Path,
) -> None:
    base, held, model = {f"{Q_PROJ}.weight": values(H, H)}, lora(Q_PROJ, H, H), {"model_type": "nobody_knows"}
    (found,) = sound(tmp_path / "false", base, held, model).dense
    assert found.slot.axes is Axes.OUT_IN
    refused = problem(tmp_path / "true", base, held, model, fan_in_fan_out=True)
    assert refused.code == "ambiguous-layout"
    assert refused.found.endswith("with fan_in_fan_out true, and a model_type that families.py lacks")
    assert "to false if this weight is a Linear's" in refused.hint
    (found,) = sound(tmp_path / "oblong", Q, lora(Q_PROJ, 8, H), model, fan_in_fan_out=True).dense
    assert found.slot.axes is Axes.OUT_IN


def square(module: str) -> Tensors:
    return {f"{module}.weight": values(H, H)}


IN_PARTS: Config = {
    "model_type": "vision-encoder-decoder",
    "encoder": {"model_type": "vit"},
    "decoder": {"model_type": "gpt2"},
}
CUSTOM: Config = {"auto_map": {"AutoModel": "modeling.Model"}}
C_PROJ = "decoder.transformer.h.0.attn.c_proj"


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    ("model", "module", "axes"),
    [
        (IN_PARTS, C_PROJ, Axes.IN_OUT),
        (IN_PARTS, "decoder.lm_head", Axes.OUT_IN),
        (IN_PARTS, "encoder.layers.0.attention.q_proj", Axes.OUT_IN),
        (IN_PARTS, "enc_to_dec_proj", Axes.OUT_IN),
        ({**IN_PARTS, "encoder": {"model_type": "nobody_knows"}}, C_PROJ, Axes.IN_OUT),
        ({**IN_PARTS, "decoder": {"model_type": "gpt_bigcode"}}, C_PROJ, Axes.OUT_IN),
        ({**IN_PARTS, "encoder": {"model_type": "gpt_bigcode"}}, C_PROJ, Axes.IN_OUT),
        (
            {"model_type": "clvp", "decoder_config": {"model_type": "clvp_decoder"}},
            "speech_decoder_model.model.decoder.layers.0.attn.q_proj",
            Axes.OUT_IN,
        ),
        (
            {"model_type": "clvp", "decoder_config": {"model_type": "clvp_decoder"}},
            "speech_decoder_model.model.decoder.layers.0.mlp.c_fc",
            Axes.IN_OUT,
        ),
        ({"model_type": "gpt2"}, "transformer.h.0.attn.c_proj", Axes.IN_OUT),
        ({"model_type": "gpt2"}, "lm_head", Axes.OUT_IN),
    ],
)
def test_a_square_weight_is_a_conv1ds_by_its_name_and_its_model_whatever_the_config_says(
    model: Config, module: str, axes: Axes, flag: bool, tmp_path: Path
) -> None:
    """The fan_in_fan_out that PEFT saves is that of the module it wrapped last."""
    (found,) = sound(tmp_path, square(module), lora(module, H, H), model, fan_in_fan_out=flag).dense
    assert found.slot.axes is axes


def test_an_oblong_conv1d_of_a_part_is_told_by_its_shape(tmp_path: Path) -> None:
    module = "decoder.transformer.h.0.attn.c_attn"
    (found,) = sound(tmp_path, {f"{module}.weight": values(H, 8)}, lora(module, 8, H), IN_PARTS).dense
    assert found.slot.axes is Axes.IN_OUT


@pytest.mark.parametrize(
    ("model", "module", "flag"),
    [
        ({"model_type": "gpt2", **CUSTOM}, "h.0.attn.c_proj", False),
        ({"model_type": "gpt2", **CUSTOM}, "h.0.attn.q_proj", True),
        ({"model_type": "nobody_knows", "decoder": {"model_type": "gpt2"}}, "h.0.attn.c_proj", False),
        ({**IN_PARTS, "encoder": {"model_type": "gpt_bigcode"}}, "h.0.attn.c_proj", True),
        ({**IN_PARTS, "encoder": {"model_type": "gpt_bigcode"}}, "h.0.attn.c_proj", False),
    ],
)
def test_a_square_weight_of_code_that_nobody_knows_or_of_no_certain_part_is_refused(
    model: Config, module: str, flag: bool, tmp_path: Path
) -> None:
    refused = problem(tmp_path, square(module), lora(module, H, H), model, fan_in_fan_out=flag)
    assert refused.code == "ambiguous-layout"


def test_custom_code_is_taken_at_its_word_where_name_and_config_agree(tmp_path: Path) -> None:
    for module, flag in (("h.0.attn.c_proj", True), ("h.0.attn.q_proj", False)):
        model = {"model_type": "gpt2", **CUSTOM}
        held = lora(module, H, H)
        (found,) = sound(tmp_path / module, square(module), held, model, fan_in_fan_out=flag).dense
        assert found.slot.axes is (Axes.IN_OUT if flag else Axes.OUT_IN)


def test_a_conv1ds_weight_that_is_wrapped_as_a_parameter_is_not_transposed(tmp_path: Path) -> None:
    """PEFT's ParamWrapper adds B A to the parameter as it lies, whatever module it is in."""
    module, fields = "h.0.attn.c_proj", {"target_parameters": ["attn.c_proj.weight"]}
    (found,) = sound(tmp_path, square(module), lora(module, H, H), {"model_type": "gpt2"}, **fields).dense
    assert (found.wrapped, found.slot.axes) == (True, Axes.OUT_IN)


def test_an_embedding_is_never_transposed(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, 9),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(H, 2),
    }
    for transposed in (False, True):
        base = {f"{EMBED}.weight": values(9, H)}
        (found,) = sound(tmp_path / str(transposed), base, held, fan_in_fan_out=transposed).dense
        assert (found.pair.embedding, found.slot.axes, found.slot.out) == (True, Axes.OUT_IN, Span(0, 9))


def test_a_router_parameter_has_the_rank_of_its_full_name(tmp_path: Path) -> None:
    gate = "model.layers.0.mlp.gate"
    base = {f"{gate}.weight": values(E, H)}
    patterns: Config = {"rank_pattern": {"gate.weight": 3}, "alpha_pattern": {"gate": 99}}
    fields: dict[str, Any] = {"target_parameters": ["mlp.gate.weight"], **patterns}
    (found,) = sound(tmp_path, base, lora(gate, E, H, rank=3), **fields).dense
    assert (found.parameter, found.rank, found.scaling) == (f"{gate}.weight", 3, 4 / 3)


def test_short_parameter_targets_leave_linears_alone(tmp_path: Path) -> None:
    """PEFT matches `down_proj` against parameters that exist; a Linear has none of that name."""
    base, held = Q | expert_tensors(E, H, I), lora(Q_PROJ, 8, H) | NESTED
    found = sound(
        tmp_path, base, held, target_parameters=["gate_up_proj", "down_proj"], target_modules=["q_proj"]
    )
    assert len(found.dense) == 1
    assert len(found.modules) == 1


@pytest.mark.parametrize(
    ("tensors", "fields", "code", "says"),
    [
        (lora(Q_PROJ, 8, H), {"r": 3}, "rank-mismatch", "found rank 2, expected rank 3, as adapter_config"),
        (lora(Q_PROJ, 8, H + 1), {}, "shape-mismatch", "found a LoRA from 7 to 8, expected from 6 to 8, as "),
        (lora(Q_PROJ, 9, H), {}, "shape-mismatch", "found a LoRA from 6 to 9, expected from 6 to 8, as "),
        (lora(Q_PROJ, H, 8), {}, "shape-mismatch", "found a LoRA from 8 to 6, expected from 6 to 8, as "),
        (
            {**lora(Q_PROJ, 8, H), f"{PREFIX}{Q_PROJ}.lora_B.weight": values(8, 3)}, {},
            "shape-mismatch", "found ranks 2 and 3, expected one rank for both halves.",
        ),
        (
            {**lora(Q_PROJ, 8, H), f"{PREFIX}{Q_PROJ}.lora_B.bias": values(7)}, {"lora_bias": True},
            "shape-mismatch", "lora_B.bias [7] F32 in adapter_model.safetensors: found [7], expected [8].",
        ),
        (
            {**lora(Q_PROJ, 8, H), f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": values(6)}, {"use_dora": True},
            "shape-mismatch", "lora_magnitude_vector [6] F32 in adapter_model.safetensors: found [6],",
        ),
    ],
)  # fmt: skip
def test_a_dense_pair_that_does_not_fit_is_refused(
    tensors: dict[str, torch.Tensor], fields: dict[str, Any], code: str, says: str, tmp_path: Path
) -> None:
    found = problem(tmp_path, Q, tensors, **fields)
    assert found.code == code
    assert says in str(found)


def test_a_lora_for_a_module_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, Q, lora("model.layers.9.self_attn.q_proj", 8, H))
    assert found.code == "missing-base-tensor"
    assert "found a LoRA for model.layers.9.self_attn.q_proj.weight, expected a tensor that" in str(found)


def test_a_lora_on_a_vector_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, {f"{Q_PROJ}.weight": values(8)}, lora(Q_PROJ, 8, H))
    assert found.code == "unsupported-adapter"
    assert f"found a LoRA on {Q_PROJ}.weight [8] F32 in model.safetensors, which has 1 axis" in str(found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_a_lora_on_a_weight_that_is_no_float_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Such a weight is packed or quantised: adding to its bytes would be nonsense."""
    found = problem(tmp_path, {f"{Q_PROJ}.weight": torch.zeros(8, H, dtype=dtype)}, lora(Q_PROJ, 8, H))
    assert found.code == "unsupported-base"
    assert Q_PROJ in found.where


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, 9),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(H, 2),
        f"{PREFIX}{EMBED}.lora_magnitude_vector": values(9),
    }
    found = problem(tmp_path, {f"{EMBED}.weight": values(9, H)}, held, use_dora=True)
    assert "found DoRA on an embedding, expected plain LoRA." in str(found)


def test_a_lora_on_the_head_of_a_tied_model_is_set_aside(tmp_path: Path) -> None:
    placement = sound(tmp_path, Q, lora("lm_head", 9, H))
    assert [pair.module for pair in placement.untied_head] == ["lm_head"]


def test_nested_pairs_on_a_linear_are_refused(tmp_path: Path) -> None:
    inner = lora(f"{Q_PROJ}.base_layer", 8, H)
    for held in (lora(Q_PROJ, 8, H) | inner, inner):
        found = problem(tmp_path, Q, held)
        assert found.code == "unsupported-adapter"
        assert "found nested LoRA (base_layer) on a module whose parameters are not fused experts" in str(
            found
        )


# --- one Linear for each expert ------------------------------------------------------------------


def test_a_lora_of_one_experts_linear_updates_that_expert(tmp_path: Path) -> None:
    placement = sound(tmp_path, expert_tensors(E, H, I), lora(f"{EXPERTS}.1.down_proj", H, I))
    (found,) = placement.dense
    assert (found.expert, placement.num_experts) == (True, E)
    assert found.slot.entry.name == f"{EXPERTS}.1.down_proj.weight"


def test_a_lora_of_one_experts_linear_reaches_into_a_fused_tensor(tmp_path: Path) -> None:
    base = {f"{EXPERTS}.gate_up_proj": values(E, 2 * I, H), f"{EXPERTS}.down_proj": values(E, H, I)}
    (found,) = sound(tmp_path, base, lora(f"{EXPERTS}.1.up_proj", I, H)).dense
    assert (found.slot.entry.name, found.slot.index) == (f"{EXPERTS}.gate_up_proj", 1)
    assert found.slot.out == Span(I, I)


def test_a_lora_for_an_expert_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, expert_tensors(E, H, I), lora(f"{EXPERTS}.7.down_proj", H, I))
    assert found.code == "missing-base-tensor"
    assert "found a LoRA for down of expert 7, expected experts 0 to 2 with down, gate, up." in str(found)


def test_dora_on_one_experts_linear_needs_that_expert_apart(tmp_path: Path) -> None:
    module = f"{EXPERTS}.1.down_proj"
    held = lora(module, H, I) | {f"{PREFIX}{module}.lora_magnitude_vector": values(H)}
    assert (
        sound(tmp_path / "apart", expert_tensors(E, H, I), held, use_dora=True).dense[0].pair.magnitude
        is not None
    )
    base = {f"{EXPERTS}.gate_up_proj": values(E, 2 * I, H), f"{EXPERTS}.down_proj": values(E, H, I)}
    assert "found DoRA or a LoRA bias on fused experts" in str(
        problem(tmp_path / "fused", base, held, use_dora=True)
    )


# --- fused pairs ---------------------------------------------------------------------------------


def test_a_fused_module_knows_its_parameters_in_memory(tmp_path: Path) -> None:
    placement = sound(tmp_path, expert_tensors(E, H, I), NESTED, target_parameters=BOTH)
    (module,) = placement.modules
    assert (module.name, module.num_experts, placement.num_experts) == (EXPERTS, E, E)
    assert [pair.depth for pair in module.pairs] == [0, 1]
    assert {p.leaf: (p.name, p.d1, p.d2, p.rank) for p in module.parameters} == {
        "gate_up_proj": (f"{EXPERTS}.gate_up_proj", 2 * I, H, 2),
        "down_proj": (f"{EXPERTS}.down_proj", H, I, 2),
    }


def test_gate_up_in_memory_is_gate_and_up_of_each_expert_on_disk(tmp_path: Path) -> None:
    placement = sound(tmp_path, expert_tensors(E, H, I), NESTED, target_parameters=BOTH)
    target = placement.targets[EXPERTS, "gate_up_proj"]
    assert target.axes is Axes.OUT_IN
    found = [(expert, rows, slot.entry.name.split(".")[-2]) for expert, rows, slot in target.parts]
    assert found == [(e, Span(0, I), "gate_proj") for e in range(E)] + [
        (e, Span(I, I), "up_proj") for e in range(E)
    ]


@pytest.mark.parametrize(("model_type", "count"), [("qwen3_moe", 1), ("qwen3_vl_moe", 2)])
def test_one_expert_has_the_orientations_that_a_linears_path_writes(
    model_type: str, count: int, tmp_path: Path
) -> None:
    """B @ A in the axes of memory: standard, but qwen3_vl_moe's axes changed in transformers 5."""
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=1)
    model = {"model_type": model_type}
    placement = sound(tmp_path, expert_tensors(1, H, I), held, model, target_parameters=BOTH)
    assert len(placement.modules[0].orientations) == count


def test_gate_and_up_alternate_in_the_memory_of_gpt_oss(tmp_path: Path) -> None:
    base = {f"{EXPERTS}.gate_up_proj": values(E, H, 2 * I), f"{EXPERTS}.down_proj": values(E, I, H)}
    held = fused_lora(EXPERTS, [(I, H), (H, 2 * I)], experts=E)
    placement = sound(tmp_path, base, held, {"model_type": "gpt_oss"}, target_parameters=BOTH)
    target = placement.targets[EXPERTS, "gate_up_proj"]
    assert {rows for _, rows, _ in target.parts} == {Span(0, I, 2), Span(1, I, 2)}
    assert [(p.d1, p.d2) for p in placement.modules[0].parameters] == [(I, H), (H, 2 * I)]


def test_an_unknown_family_with_fused_experts_is_placed_as_it_is_on_disk(tmp_path: Path) -> None:
    base = {f"{EXPERTS}.gate_up_proj": values(E, 2 * I, H), f"{EXPERTS}.down_proj": values(E, H, I)}
    placement = sound(tmp_path, base, NESTED, {"model_type": "nobody_knows"}, target_parameters=BOTH)
    target = placement.targets[EXPERTS, "gate_up_proj"]
    assert [(e, rows, slot.index) for e, rows, slot in target.parts] == [
        (e, Span(0, 2 * I), e) for e in range(E)
    ]
    assert placement.num_experts == E


def test_an_unknown_family_with_experts_apart_is_refused(tmp_path: Path) -> None:
    found = problem(
        tmp_path, expert_tensors(E, H, I), NESTED, {"model_type": "nobody_knows"}, target_parameters=BOTH
    )
    assert found.code == "unsupported-base"
    assert "the order of gate and up in memory decides" in str(found)
    assert "CONTRIBUTING" in found.hint


def test_an_experts_module_that_the_base_lacks_is_missing(tmp_path: Path) -> None:
    found = problem(tmp_path, Q, NESTED, target_parameters=BOTH)
    assert found.code == "missing-base-tensor"


@pytest.mark.parametrize(
    ("tensors", "code", "says"),
    [
        (
            lora(EXPERTS, H, I, rank=2 * E), "missing-adapter-tensor",
            "one for each of its targeted parameters: down_proj, gate_up_proj.",
        ),
        (
            fused_lora(EXPERTS, [(H, I), (2 * I, H), (H, I)], experts=E), "unconsumed-adapter-tensor",
            "one for each of its targeted parameters: down_proj, gate_up_proj.",
        ),
    ],
)  # fmt: skip
def test_the_nesting_is_as_deep_as_the_targets(
    tensors: dict[str, torch.Tensor], code: str, says: str, tmp_path: Path
) -> None:
    found = problem(tmp_path, expert_tensors(E, H, I), tensors, target_parameters=BOTH)
    assert found.code == code
    assert says in str(found)


@pytest.mark.parametrize("depths", [(0, 2), (1, 2)])
def test_a_nesting_with_a_gap_is_refused(depths: tuple[int, int], tmp_path: Path) -> None:
    """PEFT wraps one level for each parameter: a missing level is a missing pair."""
    held = lora(EXPERTS + ".base_layer" * depths[0], H, I, rank=2 * E)
    held |= lora(EXPERTS + ".base_layer" * depths[1], 2 * I, H, rank=2 * E)
    found = problem(tmp_path, expert_tensors(E, H, I), held, target_parameters=BOTH)
    assert found.code == "missing-adapter-tensor"
    assert f"inside {depths[0]}, {depths[1]} base_layer levels, expected levels 0 to 1, one for each" in str(
        found
    )


def test_an_inner_pair_alone_is_refused(tmp_path: Path) -> None:
    held = lora(f"{EXPERTS}.base_layer", H, I, rank=2 * E)
    found = problem(tmp_path, expert_tensors(E, H, I), held, target_parameters=["experts.down_proj"])
    assert found.code == "missing-adapter-tensor"
    assert "inside 1 base_layer levels, expected levels 0 to 0" in str(found)


@pytest.mark.parametrize("extra", ["lora_B.bias", "lora_magnitude_vector"])
def test_dora_and_a_bias_on_fused_experts_are_refused(extra: str, tmp_path: Path) -> None:
    held = lora(EXPERTS, H, I, rank=2 * E) | {f"{PREFIX}{EXPERTS}.{extra}": values(H)}
    fields: dict[str, Any] = {"lora_bias": extra == "lora_B.bias", "use_dora": extra != "lora_B.bias"}
    found = problem(
        tmp_path, expert_tensors(E, H, I), held, target_parameters=["experts.down_proj"], **fields
    )
    assert found.code == "unsupported-adapter"
    assert f"{extra} [6] F32 in adapter_model.safetensors: found DoRA or a LoRA bias on fused experts" in str(
        found
    )


def test_experts_that_target_parameters_does_not_name_are_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, expert_tensors(E, H, I), lora(EXPERTS, H, I, rank=2 * E))
    assert found.code == "unsupported-adapter"
    assert "a LoRA on an experts module that target_parameters does not name" in str(found)


def test_a_fused_parameter_beside_another_on_one_module_is_refused(tmp_path: Path) -> None:
    base = expert_tensors(E, H, I) | {f"{EXPERTS}.scale": values(E, H)}
    targets = ["experts.down_proj", "experts.scale"]
    found = problem(tmp_path, base, NESTED, target_parameters=targets)
    assert found.code == "unsupported-adapter"
    assert "one module with fused and other parameters targeted together: down_proj, scale" in str(found)


def test_a_projection_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base = {key: value for key, value in expert_tensors(E, H, I).items() if "gate_proj" not in key}
    held = lora(EXPERTS, 2 * I, H, rank=2 * E)
    found = problem(tmp_path, base, held, target_parameters=["experts.gate_up_proj"])
    assert found.code == "missing-base-tensor"
    assert f"{EXPERTS}.gate_up_proj: found a LoRA for gate, expected one of down, up" in str(found)


def test_gate_and_up_of_different_sizes_are_refused(tmp_path: Path) -> None:
    base = {
        key: values(I + 1, H) if "gate_proj" in key else value
        for key, value in expert_tensors(E, H, I).items()
    }
    found = problem(
        tmp_path, base, lora(EXPERTS, 2 * I, H, rank=2 * E), target_parameters=["experts.gate_up_proj"]
    )
    assert found.code == "shape-mismatch"
    assert "the gate projections of layers.0.mlp.experts: found [5, 6] (out, in), expected [4, 6]" in str(
        found
    )


def test_parameters_of_one_module_with_different_counts_are_refused(tmp_path: Path) -> None:
    base = {f"{EXPERTS}.alpha": values(2, H, I), f"{EXPERTS}.beta": values(3, H, I)}
    held = fused_lora(EXPERTS, [(H, I), (H, I)], experts=2)
    found = problem(tmp_path, base, held, target_parameters=["experts.alpha", "experts.beta"])
    assert found.code == "num-experts-mismatch"
    assert f"{EXPERTS}: found expert counts [2, 3], expected one count in a module." in str(found)


def test_all_problems_of_placing_are_collected(tmp_path: Path) -> None:
    base = expert_tensors(E, H, I)
    del base[f"{EXPERTS}.1.up_proj.weight"]
    _, problems = placed(tmp_path, base, NESTED | lora("a", 8, H), target_parameters=BOTH)
    assert {p.code for p in problems} == {"experts-incomplete", "missing-base-tensor"}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": r".*\.k_proj"},
        {"target_modules": []},
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_a_lora_that_the_config_does_not_target_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT drops it when it loads the adapter, without a word."""
    found = problem(tmp_path, Q, lora(Q_PROJ, 8, H), **fields)
    assert found.code == "unconsumed-adapter-tensor"
    assert f"found a LoRA on {Q_PROJ}, which the adapter's config does not target" in str(found)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": None},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": [Q_PROJ], "layers_to_transform": [1]},
    ],
)
def test_what_a_config_may_target_is_merged(fields: dict[str, Any], tmp_path: Path) -> None:
    found, problems = placed(tmp_path, Q, lora(Q_PROJ, 8, H), **fields)
    assert (len(found.dense), problems) == (1, [])
