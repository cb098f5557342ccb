"""What a caller may ask for: the words of each option, and to be told how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Called with a stage, and the bytes done and to do in it."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "orientation": ("auto", "standard", "swapped"),
    "lora_b_layout": ("auto", "rank_major", "grouped_by_expert"),
    "dtype": ("keep", "bfloat16", "float16", "float32"),
    "rounding": ("auto", "nearest", "balanced", "stochastic", "peft"),
}
"""The words that each option takes, its default first."""


@dataclass(frozen=True)
class Options:
    """How to merge; the same names as the command's options."""

    orientation: str = "auto"
    lora_b_layout: str = "auto"
    dtype: str = "keep"
    rounding: str = "auto"


def check_options(options: Options) -> None:
    """Raises ValueError for an option's value that does not exist."""
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
