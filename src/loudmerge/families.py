"""How each model family names its weights in memory and stores its experts on disk: data, no code per model.

A family is a row. Adapters use names of some transformers version's memory, checkpoints use names of
some version's disk; both are brought to one canonical name by the same ordered renames, so that a row
only says where names differ. Layouts themselves (apart or fused, plain or transposed, in which shard) are
never taken from here when keys and shapes can tell them.

Sources: transformers/conversion_mapping.py (5.24.0) and the models' experts classes (4.57.6 to 5.24.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from loudmerge.layout import Axes, Orientation

Rename = tuple[str, str]


@dataclass(frozen=True)
class Era:
    """One generation of a family's experts class in transformers.

    transformers: the versions that have it, "all", "< X.Y" or ">= X.Y".
    axes: the order of an expert matrix's axes in memory. is_transposed: the class attribute that PEFT reads.
    parameter: a pattern of the full parameter names that only this generation has, "" when names do not tell.
    """

    transformers: str
    axes: Axes
    is_transposed: bool
    parameter: str = ""

    def covers(self, transformers: tuple[int, int]) -> bool:
        """Whether this version of transformers, (major, minor), has this generation."""
        if self.transformers == "all":
            return True
        relation, bound = self.transformers.split()
        older = transformers < major_minor(bound)
        return older if relation == "<" else not older


@dataclass(frozen=True)
class Family:
    """One model family.

    renames: (pattern, replacement), applied in order to names in memory and on disk.
    eras: oldest first; the last one's axes are those in which `orientation` is stated.
    interleaved: gate and up alternate in memory (gate_0, up_0, gate_1, …) instead of gate before up.
    refused: why models of this family cannot be merged into, "" when they can.
    known: whether the row describes experts.
    conv1d: whether the model has transformers' Conv1D, whose weight is (in, out); None when nobody knows.
    shared: pattern of the modules that several layers share; PEFT trains a LoRA for each of these layers.
    root: what precedes a part's names on disk, `vision_model.`, where it was trained alone; "" for the whole.
    """

    renames: tuple[Rename, ...] = ()
    eras: tuple[Era, ...] = (Era("all", Axes.OUT_IN, False),)
    interleaved: bool = False
    refused: str = ""
    known: bool = True
    conv1d: bool | None = False
    shared: str | None = None
    root: str = ""

    @property
    def axes(self) -> Axes:
        return self.eras[-1].axes

    def under(self, transformers: str | None) -> Family:
        """The family as this version of transformers has it; as it is where that is None."""
        if transformers is None:
            return self
        version = major_minor(transformers)
        return replace(self, eras=tuple(era for era in self.eras if era.covers(version)))

    def single_expert_orientations(self) -> frozenset[Orientation]:
        """What PEFT's plain path, which a module with one expert takes, writes in each generation's axes."""
        return frozenset(
            Orientation.STANDARD if era.axes is self.axes else Orientation.SWAPPED for era in self.eras
        )

    def canonical(self, name: str) -> str:
        """The canonical name of a tensor or module, from its name in memory or on disk.

        Under a root it is the name in memory, and the checkpoint's other parts keep their whole names.
        """
        name = name.removeprefix(self.root) if self.root else _PREFIX.sub("", name)
        name = _TOWER.sub(r"\1", name)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (5, 24) of "5.24.0", (5, 0) of "5"."""
    match = re.match(r"(\d{1,9})(?:\.(\d{1,9}))?(?=\.|$)", version)
    if match is None:
        raise ValueError(f"{version!r} is no version of transformers, such as 5.24")
    return int(match[1]), int(match[2] or 0)


# What a class or a version puts in front of the same names: text-only classes drop `language_model.`,
# bare models drop `model.`, and transformers 5.5 wrote it three times.
_PREFIX = re.compile(r"^(?:(?:model|language_model|text_model|thinker|llm|backbone)\.)+")
# The vision models of CLIP and SigLIP have no `vision_model.` in transformers 5; as a tower of another model
# they have it in older files (PrefixChange of conversion_mapping.py).
_TOWER = re.compile(r"\b((?:vision|image|video)_(?:tower|model|encoder)\.)vision_model\.")

GATE, UP, DOWN = "gate", "up", "down"

PROJECTION_LEAVES: Mapping[str, str] = {
    "gate_proj": GATE,
    "up_proj": UP,
    "down_proj": DOWN,
    "w1": GATE,
    "w3": UP,
    "w2": DOWN,
}
"""The names of one expert's Linears."""

FUSED_LEAVES: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": (GATE, UP),
    "w13_weight": (GATE, UP),
    "down_proj": (DOWN,),
    "w2_weight": (DOWN,),
    "gate_proj": (GATE,),
    "up_proj": (UP,),
}
"""The names of parameters that hold one matrix for each expert, and the projections in each matrix."""

INTERLEAVED_LEAVES = frozenset({"w13_weight"})
"""Fused names whose rows alternate gate and up on disk, whatever the family does in memory (inkling)."""

REGISTRATION_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The order in which experts modules register their parameters; PEFT wraps the first innermost."""

EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where config.json holds the number of experts; transformers 4 and 5 write different ones."""

_TRANSPOSED = Axes.IN_OUT
_PLAIN = Axes.OUT_IN

_MIXTRAL: tuple[Rename, ...] = ((r"\.block_sparse_moe\.", ".mlp."),)
_W132: tuple[Rename, ...] = ((r"\.w1\.", ".gate_proj."), (r"\.w3\.", ".up_proj."), (r"\.w2\.", ".down_proj."))
_FORGET_GATE: tuple[Rename, ...] = (
    (r"\.self_attn\.(A_log|dt_bias|f_a_proj\.weight|f_b_proj\.weight)$", r".self_attn.forget_gate.\1"),
)
_HYPER: tuple[Rename, ...] = ((r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),)
_SCORE_BIAS = ".gate.e_score_correction_bias"

_GRANITE: tuple[Rename, ...] = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.router\.layer\.", ".router."),
)
_ARIA: tuple[Rename, ...] = (
    (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
)
_BAILING: tuple[Rename, ...] = (
    (
        r"\.attention\.(A_log|dt_bias|f_a_proj\.weight|f_b_proj\.weight|f_proj.*)$",
        r".self_attn.forget_gate.\1",
    ),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.", ".self_attn."),
    (r"\.gate\.expert_bias$", _SCORE_BIAS),
    (r"^word_embeddings\.", "embed_tokens."),
)
_DEEPSEEK_V4: tuple[Rename, ...] = (
    (r"^head\.", "lm_head."),
    (r"^embed\.", "embed_tokens."),
    (r"\.attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"\.compressor\.ape$", ".compressor.position_bias"),
    (r"\.compressor\.norm\.", ".compressor.kv_norm."),
    (r"\.self_attn\.norm\.", ".self_attn.kv_norm."),
    (r"\.self_attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.w([qo])_([ab])\.", r".\1_\2_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.ffn\.", ".mlp."),
    *_W132,
    *_HYPER,
)
_HY_V4: tuple[Rename, ...] = (
    (r"\.hc_pre\.hc_attn_layer\.hc_", ".attn_hc."),
    (r"\.hc_pre\.hc_mlp_layer\.hc_", ".ffn_hc."),
    (r"^hc_pre\.hc_head\.hc_head_", "hc_head.hc_"),
    (r"\.hc_pre\.hc_head_", ".hc_"),
    (r"\.linear_gate\.", ".gate_proj."),
    (r"\.learnable_sink_param$", ".sinks"),
)
_INKLING: tuple[Rename, ...] = (
    (r"^unembed\.", "lm_head."),
    (r"^embed\.", "embed_tokens."),
    (r"^embed_norm\.", "embed_tokens.embed_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.experts\.w2_weight$", ".experts.down_proj"),
    (r"\.mlp\.gate\.bias$", f".mlp{_SCORE_BIAS}"),
)
_INKLING_1: tuple[Rename, ...] = (
    *_INKLING,
    (r"\.wq_du\.", ".q_proj."),
    (r"\.wk_dv\.", ".k_proj."),
    (r"\.wv_dv\.", ".v_proj."),
    (r"\.wo_ud\.", ".o_proj."),
    (r"\.wr_du\.", ".r_proj."),
    (r"\.([kv]|attn|mlp)_sconv\.(?!conv1d)", r".\1_sconv.conv1d."),
    (r"\.shared_w2_weight$", ".down_proj"),
)
_INKLING_2: tuple[Rename, ...] = (
    *_INKLING,
    (r"^attn_res\.output_query", "final_input.query"),
    (r"\.wq_du\.", ".q_proj.linear."),
    (r"\.wk_dv\.", ".k_proj.linear."),
    (r"\.wv_dv\.", ".v_proj.linear."),
    (r"\.wo_ud\.", ".o_proj.linear."),
    (r"\.wr_du\.", ".relative_position_bias.linear."),
    (r"\.self_attn\.([kv])_sconv\.", r".self_attn.\1_proj.sconv.conv1d."),
    (r"\.q_l2_clip\.", ".q_proj.norm."),
    (r"\.rel_l2_clip\.", ".relative_position_bias.norm."),
    (r"\.rel_logits_proj\.", ".relative_position_bias."),
    (r"\.gate_attn\.", ".o_proj.gate_proj."),
    (r"\.attn_sink_proj\.", ".sink_proj."),
    (r"\.attn_sconv\.", ".post_attention_convolution.conv1d."),
    (r"\.mlp_sconv\.", ".post_mlp_convolution.conv1d."),
)
_MISTRAL_LARGE4: tuple[Rename, ...] = (
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^lerope\.", "rotary_emb."),
    (r"^(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(layers\.\d+)\.feed_forward\.", r"\1.mlp."),
    (r"^(layers\.\d+)\.(experts|shared_experts|gate)\.", r"\1.mlp.\2."),
    # Of the text model alone: transformers permutes the rows of the vision model's.
    (r"^(layers\.\d+\.self_attn)\.wq\.", r"\1.q_proj."),
    (r"\.wo\.", ".o_proj."),
    (r"\.wkv_b\.", ".kv_b_proj."),
    (r"\.wkv_a_with_mqa\.", ".kv_a_proj_with_mqa."),
    (r"\.kv_a_norm\.", ".kv_a_layernorm."),
    (r"\.ssmax_scaling\.s$", ".softmax_scaling.scale"),
    (r"\.ssmax_scaling\.b$", ".softmax_scaling.bias"),
    *_W132,
)
_STEP3P7: tuple[Rename, ...] = (
    (r"\.moe\.(gate|up|down)_proj\.weight$", r".mlp.experts.\1_proj"),
    (r"\.moe\.router_bias$", f".mlp{_SCORE_BIAS}"),
    (r"\.moe\.", ".mlp."),
    (r"\.share_expert\.", ".mlp.shared_experts."),
)

_QKV: tuple[Rename, ...] = tuple(
    (rf"\battention\.(attention|self)\.{name}\b", f"attention.{name[0]}_proj")
    for name in ("query", "key", "value")
)
_DINOV2: tuple[Rename, ...] = (*_QKV, (r"\battention\.output\.dense\b", "attention.o_proj"))
_SWIN: tuple[Rename, ...] = (
    *_DINOV2,
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_VIT: tuple[Rename, ...] = ((r"encoder\.layer\b", "layers"), *_SWIN)
_SEGFORMER: tuple[Rename, ...] = (
    *_DINOV2,
    (r"\bencoder\.block\.(\d+)\b", r"stages.\1.blocks"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
)

_ARIA_ERAS = (
    Era("< 5.20", _TRANSPOSED, False, r"\.experts\.fc[12]\.weight$"),
    Era(">= 5.20", _TRANSPOSED, True, r"\.experts\.(gate_up|down)_proj$"),
)
_GPT_OSS_ERAS = (Era("< 5.0", _TRANSPOSED, False), Era(">= 5.0", _TRANSPOSED, True))
_QWEN3_VL_ERAS = (Era("< 5.0", _TRANSPOSED, False), Era(">= 5.0", _PLAIN, False))

_ORDINARY = Family()


def _rows(family: Family, *model_types: str) -> dict[str, Family]:
    return dict.fromkeys(model_types, family)


FAMILIES: Mapping[str, Family] = {
    **_rows(
        _ORDINARY,
        *(
            "afmoe",
            "beam",
            "cohere2_moe",
            "dbrx",
            "deepseek_ocr2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
        ),
        *("doge", "dots1", "dots3_note", "dots3_note_text", "flex_olmo", "gemma4", "gemma4_text", "glm4_moe"),
        *("glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "granitemoe_swa", "hunyuan_v1_moe"),
        *("inkling_text", "jamba", "jetmoe", "lfm2_moe", "longcat_flash", "mellum", "minimax_m3_vl_text"),
        *("mistral4", "muse_spark", "muse_spark_text", "nllb-moe", "olmoe", "qwen2_moe", "qwen3_5_moe"),
        *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        *("qwen4_exp", "qwen4_exp_text", "sarvam_mla", "solar_open", "switch_transformers", "unlimited_ocr"),
        *("zaya",),
    ),
    **_rows(Family(renames=_MIXTRAL), "mixtral", "minimax", "minimax_m2"),
    "minimax_m3_vl": Family(
        renames=((r"\.block_sparse_moe\.e_score_correction_bias$", f".mlp{_SCORE_BIAS}"), *_MIXTRAL)
    ),
    "phimoe": Family(renames=((r"\.block_sparse_moe\.gate\.", ".mlp.router."), *_MIXTRAL)),
    "kimi_linear": Family(renames=(*_MIXTRAL, *_FORGET_GATE)),
    "kimi_k25": Family(renames=((r"^blocks\.", "layers."),)),
    **_rows(Family(renames=_GRANITE), "granitemoe", "granitemoehybrid", "granitemoeshared"),
    "nemotron_h": Family(renames=((r"^embedding\.", "embeddings."),)),
    "axk1": Family(renames=((r"^(layers\.\d+)\.post_mlp_layernorm\.", r"\1.mlp.post_mlp_layernorm."),)),
    "axk2": Family(
        renames=((r"\.W_down\.", ".mlp.fc1."), (r"\.W_up\.", ".mlp.fc2."), (r"\.q_b_proj\.", ".q_gate_proj."))
    ),
    **_rows(Family(renames=_BAILING), "bailing_hybrid", "sarvam_moe"),
    "deepseek_v4": Family(renames=_DEEPSEEK_V4),
    "ernie4_5_moe": Family(renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),)),
    "exaone_moe": Family(renames=((r"\.mlp\.e_score_correction_bias$", f".mlp{_SCORE_BIAS}"),)),
    "flint": Family(renames=((r"\.softmax_offset$", ".sinks"),)),
    **_rows(Family(renames=(*_HYPER, *_FORGET_GATE)), "glm5_next", "glm5_next_text"),
    "hy_v3": Family(
        renames=(
            (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
            (r"\.mlp\.router\.", ".mlp."),
            (r"\.shared_mlp\.", ".shared_experts."),
        )
    ),
    **_rows(Family(renames=_HY_V4), "hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    **_rows(Family(renames=_INKLING_2), "inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
    "inkling_mm_model": Family(renames=_INKLING_1),
    "kolibri1": Family(
        renames=(
            (r"\.moe\.router\.expert_bias$", f".mlp{_SCORE_BIAS}"),
            (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
            (r"\.post_ffn_norm\.", ".post_mlp_layernorm."),
        )
    ),
    "laguna": Family(
        renames=(
            (r"\.experts\.e_score_correction_bias$", _SCORE_BIAS),
            (r"\.shared_expert\.", ".shared_experts."),
        )
    ),
    "lara_mini": Family(renames=((r"\.out_norm\.", ".norm."),)),
    "mimo_v2_flash": Family(renames=((r"\.attention_sink_bias$", ".sinks"),)),
    **_rows(Family(renames=_MISTRAL_LARGE4), "mistral_large4", "mistral_large4_text"),
    "step3p7": Family(renames=_STEP3P7),
    "gpt_oss": Family(eras=_GPT_OSS_ERAS, interleaved=True),
    "openai_privacy_filter": Family(eras=(Era("all", _TRANSPOSED, True),)),
    **_rows(Family(eras=(Era("all", _TRANSPOSED, False),)), "llama4", "llama4_text"),
    **_rows(Family(eras=_QWEN3_VL_ERAS), "qwen3_vl_moe", "qwen3_vl_moe_text"),
    **_rows(Family(renames=_ARIA, eras=_ARIA_ERAS), "aria", "aria_text"),
    **_rows(
        Family(known=False, conv1d=True),
        *("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp", "clvp_decoder"),
    ),
    "gpt_neox": Family(known=False, renames=((r"^embed_out\.", "lm_head."),)),  # in memory since 5
    **_rows(Family(known=False, shared=r"\.shared_transf(ormer)?\."), "zamba", "zamba2"),
    "neomme": Family(known=False, shared=r"\b(un)?embedding_projection\."),
    "udop": Family(known=False, shared=r"\b(relative_attention_bias|relative_bias)\."),
    **_rows(
        Family(known=False, renames=_VIT),
        *("audio-spectrogram-transformer", "beit", "deit", "ijepa", "vit", "vit_mae", "vivit"),
    ),
    **_rows(Family(known=False, renames=_DINOV2), "dinov2", "dinov2_with_registers"),
    "swin": Family(known=False, renames=_SWIN),
    "segformer": Family(known=False, renames=_SEGFORMER),
    # No experts: here only because their Linears are known to be Linears.
    **_rows(
        Family(known=False),
        *("cohere", "cohere2", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "granite", "llama"),
        *("mistral", "mistral3", "olmo2", "phi", "phi3", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3"),
        *("qwen3_5", "qwen3_vl", "smollm3", "starcoder2", "gpt_bigcode", "gpt_neo", "idefics"),
        *("clvp_encoder", "encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"),
        "vision-text-dual-encoder",
    ),
    "ernie4_5_vl_moe": Family(
        refused="text and vision experts under one numbering, and routers stored transposed"
    ),
    "diffusion_gemma": Family(
        refused="encoder and decoder share one copy of their weights, but an adapter trains two LoRAs for it"
    ),
}
"""model_type -> its row."""

UNKNOWN = Family(known=False, conv1d=None)


def family_of(model_type: str) -> Family:
    """The row of a model_type; UNKNOWN when there is none."""
    return FAMILIES.get(model_type, UNKNOWN)
