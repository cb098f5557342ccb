r"""rank_pattern and alpha_pattern: which key means a module, by the rules of PEFT's releases. Pure.

| PEFT | a key means a name | which key counts |
|---|---|---|
| to 0.13 | `.*\.KEY$`, else the whole name | one for rank and alpha, a rank's before an alpha's |
| 0.14 | the same | one of each pattern |
| from 0.15 | `(.*\.)?(KEY)$` | one of each pattern |

The first key counts, but PEFT writes a config's keys sorted: where several match, the file does not say which
was first in training. The rank of a LoRA's tensors may tell. Keys in another order no PEFT has written, but
Unsloth where it converts LoRA-GA (unsloth/models/_utils.py, 2026.10.9): there the order is meant, and read.

Sources: peft/tuners/lora/model.py, `_create_and_replace`; peft/utils/other.py, `get_pattern_key` (from 0.14).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_ALWAYS = frozenset({"auto_mapping", "inference_mode", "layers_pattern"})
"""Fields of every config that PEFT has written. One that a person wrote means what it says."""

_SINCE_0_15 = ("corda_config", "peft_version", "target_parameters", "trainable_token_indices")
_SINCE_0_14 = ("eva_config", "exclude_modules", "lora_bias")
"""Fields that configs have from a release on, as PEFT writes all that it knows, or later."""

Pattern = Mapping[Any, Any]


def ranks(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ranks that a LoRA of this name may have been trained with, what PEFT reads first."""
    pattern = config.get("rank_pattern") or {}
    keys = _matching(pattern, name)
    if not _is_sorted(config, pattern):
        del keys[1:]
    return tuple(dict.fromkeys(pattern[key] for key in keys)) or (config["r"],)


def alphas(config: Mapping[str, Any], name: str, rank: int) -> tuple[float, ...]:
    """The values of alpha that a LoRA of this name and rank may have been trained with, each once.

    config: adapter_config.json. Today's PEFT reads one of them.
    """
    by_rank, pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not pattern:
        return (float(config["lora_alpha"]),)  # of each of some ten thousand experts it is asked
    keys = _told_by_rank(_matching(pattern, name), _matching(by_rank, name), by_rank, rank) or [None]
    if not _is_sorted(config, pattern):
        del keys[1:]
    if config.keys() >= _ALWAYS and config.keys().isdisjoint(_SINCE_0_15):
        keys += _before_0_15(by_rank, pattern, name, rank)
        if config.keys().isdisjoint(_SINCE_0_14):
            keys += _before_0_14(by_rank, pattern, name, rank, config["r"])
    return tuple(dict.fromkeys(float(pattern.get(key, config["lora_alpha"])) for key in keys))


def _is_sorted(config: Mapping[str, Any], pattern: Pattern) -> bool:
    """Whether PEFT saved the pattern, with its keys in another order, maybe, than training had."""
    return config.keys() >= _ALWAYS and [*pattern] == sorted(pattern)


def _matching(pattern: Iterable[str], name: str) -> list[str | None]:
    return [key for key in pattern if re.match(rf"(.*\.)?({key})$", name)]


def _matched(pattern: Iterable[str], name: str) -> list[str | None]:
    """As releases before 0.15 did it."""
    return [key for key in pattern if re.match(rf".*\.{key}$", name)]


def _told_by_rank(
    keys: list[str | None], same: list[str | None], ranks: Pattern, rank: int
) -> list[str | None]:
    """Without those that the rank speaks against, where both patterns have the same keys, so in one order."""
    return [key for key in keys if {*same} != {*keys} or ranks[key] == rank] or keys


def _before_0_15(ranks: Pattern, pattern: Pattern, name: str, rank: int) -> list[str | None]:
    return _told_by_rank(_matched(pattern, name), _matched(ranks, name), ranks, rank) or [name]


def _before_0_14(ranks: Pattern, pattern: Pattern, name: str, rank: int, usual: int) -> list[str | None]:
    keys = _matched(ranks, name) or _matched(pattern, name) or [name]
    return [key for key in keys if ranks.get(key, usual) == rank]
