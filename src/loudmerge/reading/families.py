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
from loudmerge.reading import renames
from loudmerge.reading.renames import Block, Rename


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

    def has(self, parameter: str) -> bool:
        """Whether this generation may have a parameter of this full name."""
        return not self.parameter or re.search(self.parameter, parameter) is not None

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
    blocks: Linears of which several are one tensor on disk.
    eras: oldest first; the last one's axes are those in which `orientation` is stated.
    interleaved: gate and up alternate in memory (gate_0, up_0, gate_1, …) instead of gate before up.
    refused: why models of this family cannot be merged into, "" when they can.
    known: whether the row describes experts.
    conv1d: whether the model has transformers' Conv1D, whose weight is (in, out); None when nobody knows.
    shared: pattern of the modules that several layers share; PEFT trains a LoRA for each of these layers.
    root: what precedes a part's names on disk, `vision_model.`, where it was trained alone; "" for the whole.
    """

    renames: tuple[Rename, ...] = ()
    blocks: tuple[Block, ...] = ()
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

_ARIA_ERAS = (
    Era("< 5.18", _TRANSPOSED, False, r"\.experts\.fc[12]\.weight$"),
    Era(">= 5.18", _TRANSPOSED, True, r"\.experts\.(gate_up|down)_proj$"),
)
_GRANITE_ERAS = (
    Era("< 5.13", _PLAIN, False, r"\.(input|output)_linear\.weight$"),
    Era(">= 5.13", _PLAIN, False, r"\.experts\.(gate_up|down)_proj$"),
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
    **_rows(Family(renames=renames.MIXTRAL), "mixtral", "minimax", "minimax_m2"),
    "minimax_m3_vl": Family(
        renames=(
            (r"\.block_sparse_moe\.e_score_correction_bias$", f".mlp{renames.SCORE_BIAS}"),
            *renames.MIXTRAL,
        )
    ),
    "phimoe": Family(renames=((r"\.block_sparse_moe\.gate\.", ".mlp.router."), *renames.MIXTRAL)),
    "kimi_linear": Family(renames=(*renames.MIXTRAL, *renames.FORGET_GATE)),
    "kimi_k25": Family(renames=((r"^blocks\.", "layers."),)),
    **_rows(
        Family(renames=renames.GRANITE, eras=_GRANITE_ERAS),
        *("granitemoe", "granitemoehybrid", "granitemoeshared"),
    ),
    "nemotron_h": Family(renames=((r"^embedding\.", "embeddings."),)),
    "axk1": Family(renames=((r"^(layers\.\d+)\.post_mlp_layernorm\.", r"\1.mlp.post_mlp_layernorm."),)),
    "axk2": Family(
        renames=((r"\.W_down\.", ".mlp.fc1."), (r"\.W_up\.", ".mlp.fc2."), (r"\.q_b_proj\.", ".q_gate_proj."))
    ),
    "bailing_hybrid": Family(renames=renames.BAILING),
    "sarvam_moe": Family(renames=renames.BAILING, blocks=renames.SARVAM_BLOCKS),
    "deepseek_v4": Family(renames=renames.DEEPSEEK_V4),
    "ernie4_5_moe": Family(renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),)),
    "exaone_moe": Family(renames=((r"\.mlp\.e_score_correction_bias$", f".mlp{renames.SCORE_BIAS}"),)),
    "flint": Family(renames=((r"\.softmax_offset$", ".sinks"),)),
    **_rows(Family(renames=(*renames.HYPER, *renames.FORGET_GATE)), "glm5_next", "glm5_next_text"),
    "hy_v3": Family(
        renames=(
            (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
            (r"\.mlp\.router\.", ".mlp."),
            (r"\.shared_mlp\.", ".shared_experts."),
        )
    ),
    **_rows(Family(renames=renames.HY_V4), "hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    **_rows(
        Family(renames=renames.INKLING_2), "inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"
    ),
    "inkling_mm_model": Family(renames=renames.INKLING_1),
    "kolibri1": Family(
        renames=(
            (r"\.moe\.router\.expert_bias$", f".mlp{renames.SCORE_BIAS}"),
            (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
            (r"\.post_ffn_norm\.", ".post_mlp_layernorm."),
        )
    ),
    "laguna": Family(
        renames=(
            (r"\.experts\.e_score_correction_bias$", renames.SCORE_BIAS),
            (r"\.shared_expert\.", ".shared_experts."),
        )
    ),
    "lara_mini": Family(renames=((r"\.out_norm\.", ".norm."),)),
    "mimo_v2_flash": Family(renames=((r"\.attention_sink_bias$", ".sinks"),)),
    **_rows(Family(renames=renames.MISTRAL_LARGE4), "mistral_large4", "mistral_large4_text"),
    "step3p7": Family(renames=renames.STEP3P7),
    "gpt_oss": Family(eras=_GPT_OSS_ERAS, interleaved=True),
    "openai_privacy_filter": Family(eras=(Era("all", _TRANSPOSED, True),)),
    **_rows(Family(eras=(Era("all", _TRANSPOSED, False),)), "llama4", "llama4_text"),
    **_rows(Family(eras=_QWEN3_VL_ERAS), "qwen3_vl_moe", "qwen3_vl_moe_text"),
    **_rows(Family(renames=renames.ARIA, eras=_ARIA_ERAS), "aria", "aria_text"),
    **_rows(
        Family(known=False, conv1d=True),
        *("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp", "clvp_decoder"),
    ),
    "gpt_neox": Family(known=False, renames=((r"^embed_out\.", "lm_head."),)),  # in memory since 5
    **_rows(Family(known=False, shared=r"\.shared_transf(ormer)?\."), "zamba", "zamba2"),
    "neomme": Family(known=False, shared=r"\b(un)?embedding_projection\."),
    "udop": Family(known=False, shared=r"\b(relative_attention_bias|relative_bias)\."),
    **_rows(
        Family(known=False, renames=renames.VIT),
        *("audio-spectrogram-transformer", "beit", "deit", "ijepa", "vit", "vit_mae", "vivit"),
    ),
    **_rows(Family(known=False, renames=renames.DINOV2), "dinov2", "dinov2_with_registers"),
    "swin": Family(known=False, renames=renames.SWIN),
    "segformer": Family(known=False, renames=renames.SEGFORMER),
    "exaone": Family(known=False, renames=renames.EXAONE),
    "cosmos3_omni": Family(known=False, renames=renames.COSMOS3),
    "cosmos3_edge": Family(known=False, renames=renames.COSMOS3_EDGE),
    "gte": Family(known=False, renames=renames.GTE, blocks=renames.GTE_BLOCKS),
    "nomic_bert": Family(known=False, renames=renames.NOMIC, blocks=renames.WQKV),
    "jina_embeddings_v3": Family(known=False, renames=renames.JINA_V3, blocks=renames.WQKV),
    "qianfan_ocr": Family(known=False, renames=renames.QIANFAN, blocks=renames.QIANFAN_BLOCKS),
    "hrm_text": Family(known=False, renames=renames.HRM, blocks=renames.HRM_BLOCKS),
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
