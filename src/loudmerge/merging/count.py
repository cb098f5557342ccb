"""How many experts a live module says it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loudmerge.errors import MergeRefused, Problem
from loudmerge.merging.wrappers import plain_attribute, plain_name
from loudmerge.reading.families import EXPERT_COUNT_FIELDS, FUSED_LEAVES

if TYPE_CHECKING:
    from torch import nn

MAX_HOPS = 16
"""How many `base_layer` links are followed; PEFT nests one for each targeted parameter of a module."""


def num_experts_of(module: object, name: str = "") -> int:
    """The number of experts of a live experts module, wrapped or not. name: what a refusal calls it.

    Follows `base_layer` at most MAX_HOPS times, survives cycles, and runs no property of a foreign class.
    Raises MergeRefused `num-experts-mismatch` when the count is not there, or two places disagree.
    """
    counts = set(_counts(module))
    if len(counts) == 1:
        return counts.pop()
    raise MergeRefused(
        Problem(
            "num-experts-mismatch",
            name or type(module).__name__,
            f"the expert counts {sorted(counts)}" if counts else "no expert count",
            f"one, on the module or within {MAX_HOPS} base_layer links",
            "Have the module's number, its weights and the model's config agree.",
        )
    )


def other_counts(model: nn.Module) -> Iterator[Problem]:
    """The experts under a LoRA whose module says another number than its weights have.

    The live forward goes by the one, what loads OUT by the other.
    """
    # Of PEFT's ParamWrappers, which say 1 of the router's weight; the last under a name is the innermost.
    found = {
        plain_name(key): module
        for key, module in model.named_modules()
        if plain_attribute(module, "parameter_name") is not None and any(map(_held, _chain(module)))
    }
    for name, module in found.items():
        try:
            num_experts_of(module, f"{name} of the live model")
        except MergeRefused as refusal:
            yield from refusal.problems


def _counts(module: object) -> Iterator[int]:
    for layer in _chain(module):
        for name in EXPERT_COUNT_FIELDS:
            value = plain_attribute(layer, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield value
        yield from _held(layer)


def _held(layer: object) -> list[int]:
    """The counts that its fused weights have."""
    shapes: list[Sequence[int]] = [
        getattr(plain_attribute(layer, leaf), "shape", ()) for leaf in FUSED_LEAVES
    ]
    return [int(shape[0]) for shape in shapes if len(shape) == 3]


def _chain(module: object) -> Iterator[object]:
    seen: set[int] = set()
    for _ in range(MAX_HOPS + 1):
        if module is None or id(module) in seen:
            return
        seen.add(id(module))
        yield module
        module = plain_attribute(module, "base_layer")
