"""Whether a weight is that of transformers' Conv1D, (in, out) on disk, or a Linear's, (out, in).

PEFT goes by the module's class. The fan_in_fan_out that it saves does not tell: it is set for the whole
config at each Conv1D and each Linear that is wrapped, and the last one stands; bitsandbytes' Linears leave
it as given. Names and model_types tell.

Sources: `Conv1D(` and `c_proj` in transformers 5.24.0, models/*/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loudmerge.reading.checkpoint import config_parts
from loudmerge.reading.families import family_of

LEAVES = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
"""What transformers names its Conv1Ds: in families with `conv1d` these are Conv1Ds, and nothing else is."""

LINEAR_LEAVES = frozenset({"gpt_bigcode", "gpt_neo", "idefics", "starcoder2"})
"""model_types that have Linears of these names."""


def has_conv1d(config: Mapping[str, Any], name: str) -> bool | None:
    """Whether the part of the model with this tensor has Conv1Ds; None when nobody knows."""
    found = [family_of(model_type).conv1d for model_type in _model_types(config, name)]
    return True if True in found else None if None in found else False


def is_conv1d(config: Mapping[str, Any], name: str, module: str, *, flagged: bool) -> bool | None:
    """Whether a tensor, whose shape does not tell, is a Conv1D's; None when nothing tells.

    name: on disk. module: in memory. flagged: fan_in_fan_out, which counts only where code is not known.
    """
    conv1d, leaf = has_conv1d(config, name), module.rpartition(".")[2] in LEAVES
    if conv1d is not True:
        return False if conv1d is False or not flagged else None
    types = _model_types(config, name)
    if leaf and not LINEAR_LEAVES.isdisjoint(types):
        return None
    known = not any("auto_map" in part for _, part in config_parts(config))
    if known and all(family_of(model_type).conv1d is not None for model_type in types):
        return leaf
    return leaf if leaf is flagged else None


def _model_types(config: Mapping[str, Any], name: str) -> list[str]:
    """That of the part that the name is in; those of the whole config where no part is told by it."""
    inner = {key.removesuffix("_config"): part for key, part in config.items() if _is_part(part)}
    words = name.split(".")
    for place, word in enumerate(words):
        part = inner.get(word.removesuffix("_model"))
        if part is not None:
            return _model_types(part, ".".join(words[place + 1 :]))
    parts = config_parts(config)
    return [str(part.get("model_type", "")) for place, part in parts if not place or _is_part(part)]


def _is_part(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value
