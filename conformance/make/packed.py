"""The adapters made under Unsloth: data only."""

from __future__ import annotations

from conformance.make.recipes import Packed

NOW, BEFORE = "2026.10.9", "2026.9.5"
GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"

PACKED: tuple[Packed, ...] = (
    Packed(
        "qwen3_moe-unsloth-rank_major",
        "qwen3_moe",
        NOW,
        RANK_MAJOR,
        "Unsloth's marker says rank_major, as PEFT packs.",
    ),
    Packed(
        "qwen3_moe-unsloth-grouped",
        "qwen3_moe",
        NOW,
        GROUPED,
        "Unsloth's marker says grouped_by_expert: the same shapes, and another update.",
    ),
    Packed("mixtral-unsloth-grouped", "mixtral", NOW, GROUPED, "Grouped by expert, another family."),
    Packed(
        "qwen3_moe-fused-unsloth-grouped",
        "qwen3_moe-fused",
        NOW,
        GROUPED,
        "Grouped by expert, onto a fused checkpoint.",
    ),
    Packed(
        "qwen3_moe-2I-is-H-unsloth-grouped",
        "qwen3_moe-2I-is-H",
        NOW,
        GROUPED,
        "Grouped by expert and square: the marker tells the packing, peft_version the orientation.",
        parameters=("experts.gate_up_proj",),
    ),
    Packed(
        "qwen3_moe-unsloth-unmarked",
        "qwen3_moe",
        BEFORE,
        GROUPED,
        "unsloth_zoo up to 2026.9.5: no marker, and an adapter of either packing looks like this.",
        expect="refuse",
        refusal="ambiguous-layout",
    ),
)
