"""Fields of adapter_config.json that no merge here can follow: what is expected of them, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

_WITH_PEFT = "Use base and adapter with PEFT, without a merge."

_KNOWN: Mapping[str, tuple[str, str]] = {
    # The update depends on the text: peft/tuners/lora/variants.py, 0.21.2.
    "alora_invocation_tokens": (
        "null: it has the LoRA act from these tokens on, which no weight computes",
        _WITH_PEFT,
    ),
    "arrow_config": ("null: it chooses among adapters for each token, which no weight computes", _WITH_PEFT),
    # axolotl 0.19.0, integrations/kernels/merge_aware_callback.py
    "nvfp4_merge_aware": (
        "null: it was trained for what axolotl's merge rounds to NVFP4",
        "Merge it with axolotl's merge-lora, into the NVFP4 base that it was trained on.",
    ),
    # ms-swift 4.6.0, tuners/base.py, `SwiftModel.save_pretrained`
    "swift_type": (
        "null: it is ms-swift's own LoRA, not PEFT's",
        "Save it as PEFT's first: `swift export --to_peft_format true`.",
    ),
}

_UNKNOWN = (
    "null: this field is not understood, and may change the function",
    "Merge with PEFT's merge_and_unload, where that can.",
)


def what_of(field: str) -> tuple[str, str]:
    """What is expected of a field that is not read, and what helps where it is something else."""
    return _KNOWN.get(field, _UNKNOWN)
