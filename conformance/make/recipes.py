"""What the suite's files are made of: data only. `python -m conformance.make` turns it into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]

OLD, MIDDLE, NEW = "4.57.6", "5.5.0", "5.24.0"
"""The releases of transformers: experts as Linears of their own, and two with fused experts."""


@dataclass(frozen=True)
class Base:
    """A tiny random model of a real class, saved by a real transformers.

    layout: how its experts lie on disk (`LAYOUTS`). sizes: beyond `SIZES`, as `tests.support.tiny` takes
    them.
    config: fields set in its config. save: options of save_pretrained. of: another base, loaded and saved
    again.
    """

    name: str
    model_type: str
    transformers: str
    layout: str
    sizes: Options = field(default_factory=dict)
    config: Options = field(default_factory=dict)
    dtype: str = "float32"
    save: Options = field(default_factory=dict)
    of: str = ""

    @property
    def form(self) -> Options:
        """The options of save_pretrained that keep the experts as this base has them."""
        return {key: value for key, value in self.save.items() if key == "save_original_format"}


@dataclass(frozen=True)
class Made:
    """An adapter made, and merged, by a real PEFT.

    lora: LoraConfig's options. save: options of PeftModel.save_pretrained. parted: training parts two
    weights that the base
    ties, which merge_and_unload forgets. of: an adapter that PEFT loads and saves again, instead of making
    one.
    method: the adapter's class where it is not LoRA. expect, refusal, options, config: see
    `loudmerge.conformance.cases`.
    """

    id: str
    base: str
    transformers: str
    peft: str
    topic: str
    why: str
    lora: Options = field(default_factory=dict)
    save: Options = field(default_factory=dict)
    parted: bool = False
    of: str = ""
    method: str = "LORA"
    expect: str = "merge"
    refusal: str = ""
    options: Options = field(default_factory=dict)
    config: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Edited:
    """A case whose adapter or base is another's, changed by a function of `edits`.

    of: the case it is made from. edit: the function's name, "" where only options or the base differ.
    expect: merge has the tensors of the case it is made from.
    """

    id: str
    of: str
    topic: str
    why: str
    edit: str = ""
    base: str = ""
    expect: str = "refuse"
    refusal: str = ""
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """An adapter of fused experts, made under Unsloth, whose experts read lora_B in the packing that is
    named.

    zoo: the release of unsloth_zoo. Those before 2026.9.6 read it grouped by expert, and write no marker.
    """

    id: str
    base: str
    zoo: str
    packing: str
    why: str
    parameters: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj")
    expect: str = "merge"
    refusal: str = ""


LAYOUTS: Mapping[str, str] = {
    "per-expert gud": "experts.N.{gate,up,down}_proj.weight",
    "per-expert w132": "experts.N.{w1,w3,w2}.weight",
    "per-expert ud": "experts.N.{up,down}_proj.weight, no gate",
    "fused (out, in)": "experts.gate_up_proj (E, 2I, H), experts.down_proj (E, H, I)",
    "fused (in, out)": "experts.gate_up_proj (E, H, 2I), experts.down_proj (E, I, H), or fc1 and fc2",
    "fused (in, out) interleaved": "as fused (in, out); gate and up alternate in the last axis",
    "input/output_linear": "input_linear.weight (E, 2I, H), output_linear.weight (E, H, I)",
    "3D per projection": "moe.{gate,up,down}_proj.weight (E, out, in)",
    "fused, rows interleaved": "experts.w13_weight (E, 2I, H), rows alternate gate and up; experts.w2_weight",
}
"""Every disk layout of the suite, and its keys."""

SIZES: Options = {
    "experts": 3,
    "hidden_size": 16,
    "moe_intermediate_size": 10,
    "intermediate_size": 14,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "shared_expert_intermediate_size": 6,
    "moe_shared_expert_intermediate_size": 6,
    "q_lora_rank": 6,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "downsample_hidden_size": 4,
    "vocab_size": 24,
    "vocab_size_per_layer_input": 24,
    "unpadded_vocab_size": 24,
}
"""Three experts, H = 16, I = 10 (14 where a family has one size for all), one layer: no two sizes of a
matrix agree.
"""

TWO: Options = {"num_hidden_layers": 2}

BASES: tuple[Base, ...] = (
    Base("qwen3_moe", "qwen3_moe", OLD, "per-expert gud"),
    Base("qwen3_moe-12-experts", "qwen3_moe", OLD, "per-expert gud", sizes={"experts": 12}),
    Base("qwen3_moe-2-layers", "qwen3_moe", OLD, "per-expert gud", sizes=TWO),
    Base(
        "qwen3_moe-sharded",
        "qwen3_moe",
        OLD,
        "per-expert gud",
        of="qwen3_moe",
        save={"max_shard_size": "5KB"},
    ),
    Base(
        "qwen3_moe-fused",
        "qwen3_moe",
        NEW,
        "fused (out, in)",
        of="qwen3_moe",
        save={"save_original_format": False},
    ),
    Base("qwen3_moe-tied", "qwen3_moe", OLD, "per-expert gud", config={"tie_word_embeddings": True}),
    Base("qwen3_moe-bf16", "qwen3_moe", OLD, "per-expert gud", dtype="bfloat16"),
    Base("qwen3_moe-fp16", "qwen3_moe", OLD, "per-expert gud", dtype="float16"),
    Base("qwen3_moe-2I-is-H", "qwen3_moe", OLD, "per-expert gud", sizes={"moe_intermediate_size": 8}),
    Base("qwen3_moe-I-is-H", "qwen3_moe", OLD, "per-expert gud", sizes={"moe_intermediate_size": 16}),
    Base("qwen2_moe", "qwen2_moe", OLD, "per-expert gud"),
    Base("deepseek_v3", "deepseek_v3", OLD, "per-expert gud", sizes=TWO),
    Base("glm4_moe", "glm4_moe", OLD, "per-expert gud", sizes=TWO),
    Base("olmoe", "olmoe", OLD, "per-expert gud"),
    Base("mixtral", "mixtral", OLD, "per-expert w132"),
    Base(
        "mixtral-bf16-sharded",
        "mixtral",
        OLD,
        "per-expert w132",
        dtype="bfloat16",
        save={"max_shard_size": "3KB"},
    ),
    Base(
        "mixtral-1-expert",
        "mixtral",
        OLD,
        "per-expert w132",
        sizes={"experts": 1},
        config={"num_experts_per_tok": 1},
    ),
    Base("phimoe", "phimoe", OLD, "per-expert w132"),
    Base("minimax_m2", "minimax_m2", NEW, "per-expert w132"),
    Base("nemotron_h-5.5", "nemotron_h", MIDDLE, "per-expert ud", sizes=TWO),
    Base("nemotron_h-5.24", "nemotron_h", NEW, "per-expert ud", sizes=TWO),
    Base("gemma4_text", "gemma4_text", NEW, "fused (out, in)", sizes=TWO),
    Base("qwen3_vl_moe-5", "qwen3_vl_moe", NEW, "fused (out, in)"),
    Base("qwen3_vl_moe-4", "qwen3_vl_moe", OLD, "fused (in, out)"),
    Base("llama4_text", "llama4_text", OLD, "fused (in, out)"),
    Base("aria_text", "aria_text", OLD, "fused (in, out)"),
    Base("gpt_oss", "gpt_oss", OLD, "fused (in, out) interleaved"),
    Base("gpt_oss-I-is-H", "gpt_oss", OLD, "fused (in, out) interleaved", sizes={"intermediate_size": 16}),
    Base("granitemoe", "granitemoe", OLD, "input/output_linear"),
    Base("jetmoe", "jetmoe", OLD, "input/output_linear"),
    Base("step3p7", "step3p7", NEW, "3D per projection", sizes=TWO),
    Base("inkling2_text", "inkling2_text", NEW, "fused, rows interleaved"),
)
