"""Kinds of adapter on Linears, Conv1Ds, routers, norms and experts; trained biases."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tests.support import tiny
from tests.support.kinds import PEFT, TRANSFORMERS_4, UNTIED, Kind, Options

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _routers(model: PreTrainedModel) -> list[str]:
    """Router weights whose module is no Linear."""
    return [
        name
        for name, _ in model.named_parameters()
        if name.endswith("mlp.gate.weight")
        and type(model.get_submodule(name[: -len(".weight")])) is not nn.Linear
    ]


def _moe(model: PreTrainedModel) -> dict[str, Any]:
    """All experts, routers, shared experts and attention.

    PEFT >= 0.19 redirects `target_modules` that are named like an expert's projection to the experts, so that
    Linears of such names are targeted as parameters.
    """
    linears = tiny.text_linears(model)
    redirected = (
        []
        if TRANSFORMERS_4
        else [name for name in linears if re.search(r"\.(gate_proj|up_proj|down_proj|gate)$", name)]
    )
    return {
        "target_modules": [name for name in linears if name not in redirected],
        "target_parameters": [
            *tiny.expert_parameters(model),
            *_routers(model),
            *(f"{name}.weight" for name in redirected),
        ],
    }


def _moe_patterns(model: PreTrainedModel) -> dict[str, Any]:
    """Full names of experts' parameters, expressions for one layer, leaf names."""
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": 3,
        r"layers\.1\.mlp\.experts\.down_proj": 5,
    }
    apart = {r"layers\.0\.mlp\.experts\.\d+\.gate_proj": 3, r"layers\.1\.mlp\.experts\.2\.down_proj": 5}
    return {
        **_moe(model),
        "rank_pattern": {
            **(fused if tiny.expert_parameters(model) else apart),
            "q_proj": 2,
            r".*1\.self_attn\.v_proj": 6,
        },
        "alpha_pattern": {
            **dict.fromkeys(fused if tiny.expert_parameters(model) else apart, 7),
            r"layers\.0\.self_attn\..*": 3,
            r".*1\.self_attn\.o_proj": 5,
        },
    }


ONE_LAYER: Options = {
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
}
BIASED: Options = {**UNTIED, "attention_bias": True, "mlp_bias": True}

_LORA = r"lora_A\.weight$"
_FUSED = (
    r"experts(\.base_layer)?\.lora_A\.weight$"
    if not TRANSFORMERS_4
    else r"experts\.\d\.up_proj\.lora_A\.weight$"
)

# PEFT < 0.21 looks for q_proj.bias, where a wrapped module has q_proj.base_layer.bias, and saves no bias.
_BIASES_LOST: Options = (
    {}
    if PEFT >= (0, 21)
    else {
        "refused": "missing-adapter-tensor",
        "keys": (_LORA,),
    }
)

LINEAR: tuple[Kind, ...] = (
    Kind(
        "experts, router, shared expert and attention",
        "qwen2_moe",
        _moe,
        (
            _FUSED,
            r"mlp\.gate\.lora_A",
            r"shared_expert\.down_proj\.lora_A",
            r"shared_expert_gate\.lora_A",
            r"q_proj\.lora_A",
        ),
    ),
    Kind(
        "rslora", "qwen2_moe", lambda model: {**_moe(model), "use_rslora": True}, (_FUSED, r"q_proj\.lora_A")
    ),
    Kind("patterns", "qwen3_moe", _moe_patterns, (_FUSED, r"q_proj\.lora_A")),
    Kind(
        "patterns under rslora",
        "qwen3_moe",
        lambda model: {**_moe_patterns(model), "use_rslora": True},
        (_FUSED, r"q_proj\.lora_A"),
    ),
    Kind(
        "gates targeted where experts have none",
        "nemotron_h",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        (_FUSED,),
        in_memory="fused",
    ),
    Kind(
        "one expert",
        "mixtral",
        lambda model: {"target_parameters": tiny.expert_parameters(model)},
        (_FUSED,),
        experts=1,
        in_memory="fused",
        config={"num_experts_per_tok": 1},
    ),
    Kind(
        "Conv1D, fan_in_fan_out",
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        (r"c_attn\.lora_A", r"c_fc\.lora_A"),
    ),
    Kind(
        "DoRA on Conv1D",
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
        (r"c_attn\.lora_magnitude_vector",),
    ),
    Kind(
        "LoRA biases",
        "llama",
        {"target_modules": [*ATTENTION, "up_proj"], "lora_bias": True},
        (r"q_proj\.lora_B\.bias",),
        config=BIASED,
    ),
    Kind(
        "LoRA biases on Conv1D",
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
        (r"c_attn\.lora_B\.bias",),
    ),
    Kind(
        "DoRA",
        "qwen3_moe",
        {"target_modules": list(ATTENTION), "use_dora": True},
        (r"q_proj\.lora_magnitude_vector",),
    ),
    Kind(
        "DoRA under rslora with LoRA biases",
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
        (r"down_proj\.lora_magnitude_vector",),
        config=UNTIED,
    ),
    Kind(
        "modules_to_save: router",
        "qwen2_moe",
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate", "shared_expert_gate"]},
        (r"mlp\.gate\.weight", r"shared_expert_gate\.weight"),
    ),
    Kind(
        "MiCA",
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "mica"},
        (r"q_proj\.lora_A",),
        needs_peft=(0, 21),
    ),
    Kind(
        "VeLoRA",
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "velora_config": {"num_groups": 4}},
        (r"q_proj\.lora_A", r"q_proj\.lora_velora_embed$"),
        needs_peft=(0, 20),
    ),
    Kind(
        "bias lora_only",
        "qwen2_moe",
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
        **{"keys": (r"q_proj(\.base_layer)?\.bias",), **_BIASES_LOST},
    ),
    Kind(
        "bias all",
        "qwen2_moe",
        {"target_modules": ["q_proj"], "bias": "all"},
        (r"q_proj(\.base_layer)?\.bias", r"v_proj\.bias"),
    ),
    Kind(
        "bias all on Conv1D",
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        (r"c_attn(\.base_layer)?\.bias", r"c_fc\.bias", r"ln_1\.bias"),
    ),
    Kind(
        "bias all of experts",
        "gpt_oss",
        {"target_modules": ["q_proj"], "bias": "all"},
        (r"router\.bias$",),
    ),
    Kind(
        "LoRA on fused experts",
        "gpt_oss",
        lambda model: {"target_modules": ["q_proj"], "target_parameters": tiny.expert_parameters(model)},
        (r"experts(\.base_layer)?\.lora_A",),
    ),
    Kind(
        "patterns on fused experts",
        "gpt_oss",
        lambda model: {
            "target_modules": ["q_proj"],
            "target_parameters": tiny.expert_parameters(model),
            "rank_pattern": {"model.layers.0.mlp.experts.gate_up_proj": 3, r".*\.1\..*down_proj": 5},
            "alpha_pattern": {
                r"1\.mlp\.experts\.(gate_up|down)_proj": 7,
                "model.layers.0.mlp.experts.down_proj": 3,
            },
        },
        (r"experts(\.base_layer)?\.lora_A",),
    ),
    Kind(
        "patterns that overlap, which saving sorts",
        "gpt_oss",
        lambda model: {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": tiny.expert_parameters(model),
            "rank_pattern": {"down_proj": 3, "self_attn.o_proj": 6, "experts.down_proj": 2, "o_proj": 5},
            "alpha_pattern": {"self_attn.o_proj": 7, "o_proj": 3},
        },
        (r"experts(\.base_layer)?\.lora_A", r"o_proj\.lora_A"),
    ),
    Kind(
        "LoRA on a square Conv1D and the head",
        "gpt2",
        {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True},
        (r"attn\.c_proj\.lora_A", r"lm_head\.lora_A"),
        config=UNTIED,
    ),
    Kind(
        "DoRA on experts",
        "qwen3_moe",
        {"target_modules": ["gate_proj", "down_proj"], "use_dora": True},
        (r"experts\.2\.down_proj\.lora_magnitude_vector",),
        in_memory="apart",
    ),
    Kind(
        "all-linear",
        "qwen2",
        {"target_modules": "all-linear"},
        (r"down_proj\.lora_A", r"k_proj\.lora_A"),
        config=UNTIED,
    ),
    Kind(
        "expression",
        "llama",
        {"target_modules": r".*layers\.(0|1)\.self_attn\.(q|o)_proj|.*\.1\.mlp\.up_proj"},
        (r"layers\.1\.mlp\.up_proj\.lora_A",),
        config=UNTIED,
    ),
    Kind(
        "excluded modules",
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.mlp.up_proj"]},
        (r"layers\.1\.mlp\.up_proj\.lora_A",),
        config=UNTIED,
    ),
    Kind(
        "layers_to_transform",
        "qwen3_moe",
        ONE_LAYER,
        (r"layers\.1\.self_attn\.q_proj\.lora_A",),
    ),
    Kind(
        "square Linears",
        "llama",
        {"target_modules": list(ATTENTION)},
        (r"q_proj\.lora_A",),
        config={**UNTIED, "num_key_value_heads": 2},
    ),
)
