"""What PEFT's wrappers in a live model compute with: the ranks, the scalings, and the adapter that is active.

The config that PEFT saves says how the wrappers were made, not what they were set to since.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loudmerge.errors import Problem
from loudmerge.planning.forwards import more_than_weight
from loudmerge.reading.adapter import LEVELS, PREFIX
from loudmerge.reading.adapter_config import CONFIG, AdapterConfig, read_config
from loudmerge.reading.patterns import alphas

_HOLDERS = ("_adapters", "scaling", "trainable_tokens_delta")
"""What has the names of a wrapper's adapters: of modules and token rows to save, of LoRA, of token rows."""

_PLAIN = (nn.Linear.forward, nn.Embedding.forward)

_AS_PLAIN = frozenset({"FalconLinear", "IdeficsDecoupledLinear", "IdeficsDecoupledEmbedding"})
"""Classes of transformers with a forward of their own, to which PEFT adds what their weight would."""


@dataclass(frozen=True)
class Wrapper:
    """One of PEFT's wrappers. name: of what it wraps, in memory. held: the adapters that it has.

    ranks, scalings: by adapter; empty where it is no LoRA. own_forward: the class of a module whose output is
    more than weight times input, else "".
    """

    name: str
    held: frozenset[str]
    active: tuple[str, ...]
    disabled: bool
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    own_forward: str

    def is_set(self, adapter: str) -> bool:
        """Whether it computes with this adapter where it has it, and else with none."""
        if adapter in self.held:
            return self.active == (adapter,) and not self.disabled
        return self.disabled or not self.held.intersection(self.active)


def wrappers(model: Any) -> Iterator[Wrapper]:
    """Every wrapper of a PeftModel; one that several modules share, under each name."""
    for key, module in model.named_modules(remove_duplicate=False):
        if plain_attribute(module, "_active_adapter") is None:
            continue
        held: Any = (plain_attribute(module, field) for field in _HOLDERS)
        yield Wrapper(
            ".".join([plain_name(key), *_parameter(module)]),
            frozenset(next((names for names in held if names is not None), ())),
            tuple(module.active_adapters),
            bool(plain_attribute(module, "_disable_adapters")),
            {adapter: int(value) for adapter, value in _by_adapter(module, "r")},
            {adapter: float(value) for adapter, value in _by_adapter(module, "scaling")},
            _own_forward(module),
        )


def other_adapters(found: Collection[Wrapper], adapter: str) -> Iterator[Problem]:
    """The wrappers that compute with something else than this adapter, which the model says is active."""
    for wrapper in found:
        if not wrapper.is_set(adapter):
            state = "its adapters disabled" if wrapper.disabled else f"{list(wrapper.active)} active"
            yield Problem(
                "unsupported-adapter",
                f"{wrapper.name} of the live model",
                state,
                f"{adapter!r} active, as in the model" if adapter in wrapper.held else "none of them active",
                f"Call set_adapter({adapter!r}) and enable_adapter_layers on the model first.",
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without PEFT's wrappers: other modules, of the same classes, that hold the very same tensors.

    The model itself is not touched. A module of no submodules is not copied; one that has several names has
    them here, too.
    """
    return _unwrapped(model, {})


def own_forwards(found: Collection[Wrapper], adapter: str) -> Iterator[Problem]:
    """The modules that do more than multiply by their weight: no weight holds what was trained there."""
    for wrapper in found:
        if wrapper.own_forward and adapter in wrapper.held:
            does = f"is a {wrapper.own_forward} with a forward of its own"
            yield more_than_weight(f"{wrapper.name} of the live model", wrapper.name, does)


def settle_scalings(directory: Path, found: Collection[Wrapper], adapter: str) -> None:
    """Has a saved adapter's config say the ranks and scalings that the live model computes with.

    They differ after set_scale, scale_layer, rescale_adapter_scale or a change of the config, and where
    several keys of a pattern match one name, as PEFT saves them in another order.
    Raises MergeRefused for a config that has other problems.
    """
    config = read_config(directory)
    live = [one for one in found if adapter in one.scalings]
    if all(
        _says(config, wrapper.name, wrapper.ranks[adapter], wrapper.scalings[adapter]) for wrapper in live
    ):
        return
    root: Callable[[float], float] = math.sqrt if config.use_rslora else float
    ranks = {one.name: one.ranks[adapter] for one in live}
    alphas = {one.name: one.scalings[adapter] * root(ranks[one.name]) for one in live}
    told = {**config.raw, **_told("r", "rank_pattern", ranks), **_told("lora_alpha", "alpha_pattern", alphas)}
    (directory / CONFIG).write_text(json.dumps(told, indent=2), "utf-8")


def plain_name(key: str) -> str:
    """What a wrapped module, or tensor, is called in memory without PEFT."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in LEVELS)


def plain_attribute(owner: object, name: str) -> object:
    """An attribute that is simply there, a submodule or a parameter; properties are not run."""
    own: Mapping[str, Any] = getattr(owner, "__dict__", {})
    for place in (own, own.get("_modules"), own.get("_parameters")):
        if place and name in place:
            return place[name]
    value = inspect.getattr_static(type(owner), name, None)
    return None if hasattr(type(value), "__get__") else value


def _unwrapped(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """made: by the id of a module, what stands for it."""
    if plain_attribute(module, "_active_adapter") is not None:
        for inner in (plain_attribute(module, level) for level in sorted(LEVELS)):
            if isinstance(inner, nn.Module):
                return _unwrapped(inner, made)
    children = vars(module).get("_modules")
    if not children:
        return module
    if id(module) not in made:
        # Not copy.copy: a class may say what that does.
        made[id(module)] = bare = object.__new__(type(module))
        bare.__dict__.update(vars(module))
        bare.__dict__["_modules"] = {
            name: None if child is None else _unwrapped(child, made) for name, child in children.items()
        }
    return made[id(module)]


def _own_forward(module: object) -> str:
    """The class of a wrapped Linear or Embedding whose output is more than weight times input, else "".

    The wrappers of target_parameters change the weight itself, whatever the module does with it. An
    embedding's own scale PEFT applies to what it adds since 0.18 (huggingface/peft#2825).
    """
    layer = plain_attribute(module, "base_layer")
    if not isinstance(layer, nn.Linear | nn.Embedding) or _parameter(module):
        return ""
    known = type(layer).forward in _PLAIN or type(layer).__name__ in _AS_PLAIN
    scale = getattr(layer, "embed_scale", None)
    follows = scale is not None and (hasattr(type(module), "_get_embed_scale") or float(scale) == 1)
    return "" if known or (follows and not hasattr(layer, "eoi_embedding")) else type(layer).__name__


def _parameter(module: object) -> list[str]:
    """The parameter that a wrapper of target_parameters is for; a module's own has none."""
    name = plain_attribute(module, "parameter_name")
    return [name] if isinstance(name, str) else []


def _by_adapter(module: object, name: str) -> Iterable[tuple[str, Any]]:
    """Nothing where the attribute is another than LoRA's: attention has a `scaling`, too."""
    found = plain_attribute(module, name)
    return found.items() if isinstance(found, dict) else ()


def _says(config: AdapterConfig, name: str, rank: int, scaling: float) -> bool:
    if config.rank_for(name) != rank or len(alphas(config.raw, name, rank)) > 1:
        return False
    return math.isclose(config.scaling_for(name, rank), scaling, rel_tol=1e-12)


def _told(field: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The most frequent value in `field`; the names of each other one in a key of `pattern`."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    names: dict[float, list[str]] = defaultdict(list)
    for name, value in values.items():
        if value != usual:
            names[value].append(re.escape(name))
    # PEFT lets a key match the end of a name: "^" has it match the whole.
    return {field: usual, pattern: {f"^(?:{'|'.join(same)})": value for value, same in names.items()}}
