"""Layers that the adapter should have: those that its config targets and the base has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from loudmerge.errors import Problem
from loudmerge.planning.sites import Placement
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.experts import split_expert_name
from loudmerge.reading.families import Family
from loudmerge.reading.names import Names, template, with_indices

_TEXT_LAYER = re.compile(r"layers\.(\d{1,9})\.(self_attn\.[kv]_(?:proj|norm)\b)?")


def missing_siblings(
    base: Checkpoint, adapter: Adapter, placement: Placement, names: Names, family: Family
) -> list[Problem]:
    """Modules that are targeted and in the base like a trained one, but not trained.

    They differ from it only in indices. A module is known by its canonical name; an experts module by that
    of its group, whatever its parameters are called in memory. One that the adapter has, but that could not
    be placed, has a problem of its own.
    """
    present = {pair.module for pair in adapter.pairs}
    trained = set(_trained(placement, family))
    examples: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, leaf, module in sorted(trained):
        if not any(leaf == other for other, _ in examples[template(name)]):
            examples[template(name)].append((leaf, module))
    known = {(name, leaf) for name, leaf, _ in trained}
    missing: dict[str, str] = {}
    for name in _base_modules(names, {example.count(".") for example in examples}):
        for leaf, module in examples.get(template(name), ()):
            sibling = with_indices(module, name)
            if (name, leaf) in known or is_extra_layer(base, name):
                continue
            if sibling not in present and _targets(adapter.config, sibling, leaf):
                missing[sibling] = module
    return [_missing_sibling(sibling, module) for sibling, module in missing.items()]


def _trained(placement: Placement, family: Family) -> Iterable[tuple[str, str, str]]:
    """(canonical name, parameter or "", name in memory) of every trained module."""
    for module in placement.modules:
        for parameter in module.parameters:
            parts = split_expert_name(family.canonical(parameter.name))
            yield (parts[0] if parts else family.canonical(module.name)), parameter.leaf, module.name
    for placed in placement.dense:
        yield family.canonical(placed.parameter).rpartition(".")[0], "", placed.pair.module


def _base_modules(names: Names, dots: set[int]) -> Iterable[str]:
    """Canonical names of the base's modules that have as many dots as one of the trained ones."""
    seen = set()
    for key in (*names.canonical.values(), *names.parts):
        parts = key.split(".")
        for count in dots:
            name = ".".join(parts[: count + 1])
            if len(parts) > count and name not in seen:
                seen.add(name)
                yield name


def _targets(config: AdapterConfig, module: str, leaf: str) -> bool:
    if leaf:
        return leaf in config.targeted_parameters(module)
    return config.targets_module(module) or "weight" in config.targeted_parameters(module)


def is_extra_layer(base: Checkpoint, name: str) -> bool:
    """Whether this is on disk only, so that no model trains it.

    So are layers past num_hidden_layers (multi-token prediction), and the keys and values of layers that use
    those of another one (num_kv_shared_layers of gemma3n and gemma4).
    """
    text = base.text_config
    count, layer = text.get("num_hidden_layers"), _TEXT_LAYER.match(name)
    if not isinstance(count, int) or layer is None:
        return False
    shared = text.get("num_kv_shared_layers")
    # Neither a string nor a list is a number of layers to transformers either: it counts as none.
    return int(layer[1]) >= (count - shared if layer[2] and isinstance(shared, int) else count)


def _missing_sibling(sibling: str, module: str) -> Problem:
    return Problem(
        "missing-adapter-tensor",
        sibling,
        f"no LoRA, though the config targets it as it targets {module}",
        "a LoRA for every layer that the config targets and the base has",
        "The adapter file is not complete, or the base has more layers than the one it was trained on.",
    )
