"""What init_lora_weights says of the base that an adapter was trained on, and what to do where it is another.

Source: peft/tuners/lora/layer.py, `LoraLayer.update_layer`, and peft_model.py, `save_pretrained`, 0.21.2.
"""

from __future__ import annotations

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights alone."""

CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "lora-ga")
"""How the names begin of those that change the base's weights, and not what the adapter computes. lora-ga: as
ms-swift and the method's authors write it."""

CONVERTED = (
    "Give the adapter that was converted to an ordinary LoRA: pissa_converted of LLaMA-Factory,"
    " converted/default of ms-swift, what PEFT's save_pretrained writes with"
    " path_initial_model_for_weight_conversion, which takes the adapter as it began."
)

_ALIKE = (
    " Without that one, PEFT's merge_and_unload on this base is right: it computes the same beginning again."
)
_OTHERWISE = (
    " Without that one, only the live model can be merged, with save_pretrained_merged: PEFT does not find"
    " the same beginning again, and does not always say so."
)
_QUANTISED = (
    "It was trained on weights that were quantised for it: merge the live model with save_pretrained_merged,"
    " or give the weights that were saved with it as BASE, and set this field to true."
)


def is_harmless(init: object) -> bool:
    """Whether an initialisation leaves the base's weights alone. PEFT saves "Gaussian" as it was given."""
    known = init.lower() if isinstance(init, str) else init
    return isinstance(known, bool | str) and known in HARMLESS_INITS


def what_helps(init: object) -> str:
    """For an adapter that began otherwise."""
    name = str(init).lower()
    if name.startswith("loftq"):
        return _QUANTISED
    # pissa_niter_N draws at random; CorDA and LoRA-GA begin from texts, which PEFT no longer has.
    return CONVERTED + (_ALIKE if name in ("pissa", "olora") else _OTHERWISE)
