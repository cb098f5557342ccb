"""One random corruption of a sound BASE and ADAPTER, each of which must be refused.

A corruption is a function of a `Damage`; it edits the files and returns the refusal codes it may get,
or None where it does not apply to the case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.unit.reference import Built
from tests.unit.strategies import hypotheses
from tests.unit.synthetic import Case, adapter_config, effective, parameter_name

Codes = frozenset[str]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Damage:
    """What a corruption works on."""

    case: Case
    built: Built
    rng: np.random.Generator

    @property
    def weights(self) -> Path:
        return self.built.adapter / "adapter_model.safetensors"

    def pick(self, items: list[str]) -> str:
        return sorted(items)[int(self.rng.integers(len(items)))]

    def edit_adapter(self, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        held = load_file(self.weights)
        edit(held)
        held = {key: value.contiguous() for key, value in held.items()}
        save_file(held, self.weights, metadata={"format": "pt"})

    def edit_json(self, file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads(file.read_text())
        edit(value)
        file.write_text(json.dumps(value))

    def edit_base(self, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Edits the tensors of every shard, and the index with them."""
        for shard in sorted(set(self.built.shard_of.values())):
            held = load_file(self.built.base / shard)
            before = set(held)
            edit(held)
            held = {key: value.contiguous() for key, value in held.items()}
            save_file(held, self.built.base / shard, metadata={"format": "pt"})
            index = self.built.base / INDEX
            if index.exists() and before != set(held):
                gone, new = before - set(held), set(held) - before
                value = json.loads(index.read_text())
                kept = {key: name for key, name in value["weight_map"].items() if key not in gone}
                value["weight_map"] = kept | dict.fromkeys(new, shard)
                index.write_text(json.dumps(value))

    def lora_keys(self) -> list[str]:
        with safe_open(self.weights, framework="pt") as file:
            return [key for key in file.keys() if ".lora_" in key]  # noqa: SIM118

    def changed_keys(self) -> list[str]:
        """The base's tensors that the adapter changes."""
        return [key for key, expected in self.built.expected.items() if expected.delta is not None]


def codes(*names: str) -> Codes:
    return frozenset(names)


def longer(tensor: torch.Tensor, axis: int, by: int = 1) -> torch.Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, by)], axis)


SHAPES = codes(
    "shape-mismatch", "rank-mismatch", "num-experts-mismatch", "unknown-layout", "ambiguous-layout",
    "unsupported-adapter",
)  # fmt: skip


def shape_changed(d: Damage) -> Codes | None:
    """One axis of one LoRA tensor is longer by one."""
    key = d.pick(d.lora_keys())
    axis = int(d.rng.integers(2))
    d.edit_adapter(lambda held: held.update({key: longer(held[key], axis)}))
    return SHAPES


def half_missing(d: Damage) -> Codes | None:
    """One half of a pair is missing."""
    key = d.pick(d.lora_keys())
    d.edit_adapter(lambda held: held.pop(key))
    return codes("missing-adapter-tensor")


def extra_tensor(d: Damage) -> Codes | None:
    """A tensor that belongs to nothing."""
    module = "model.layers.0.mlp"
    name = d.pick([f"{module}.experts.lora_C.weight", f"{module}.shared_expert.up_proj.weight", "scale"])
    d.edit_adapter(lambda held: held.update({f"base_model.model.{name}": torch.zeros(2, 2)}))
    return codes("unconsumed-adapter-tensor")


def extra_pair(d: Damage) -> Codes | None:
    """A whole pair for a module that the base lacks."""
    prefix = "base_model.model.model.layers.97.self_attn.q_proj"
    pair = {f"{prefix}.lora_A.weight": torch.zeros(2, 2), f"{prefix}.lora_B.weight": torch.zeros(2, 2)}
    d.edit_adapter(lambda held: held.update(pair))
    return codes("missing-base-tensor", "unconsumed-adapter-tensor")


def wrong_num_experts(d: Damage) -> Codes | None:
    """The adapter was made for one expert more."""
    if not d.case.fused:
        return None
    keys = [key for key in d.lora_keys() if ".experts." in key or "_linear." in key]
    part = d.pick(keys).rpartition(".lora_")[0]

    def grow(held: dict[str, torch.Tensor]) -> None:
        rank = held[f"{part}.lora_A.weight"].shape[0] // d.case.num_experts
        for name, axis in ((f"{part}.lora_A.weight", 0), (f"{part}.lora_B.weight", 1)):
            held[name] = longer(held[name], axis, rank)

    d.edit_adapter(grow)
    return SHAPES


def declared_num_experts(d: Damage) -> Codes | None:
    """config.json declares one expert more than there are."""
    if not d.case.fused and not d.case.per_expert:
        return None

    def edit(config: dict[str, Any]) -> None:
        inner = config.get("text_config", config)
        inner[d.case.family.experts_key] += 1

    d.edit_json(d.built.base / "config.json", edit)
    return codes("experts-incomplete", "num-experts-mismatch")


def not_finite(d: Damage) -> Codes | None:
    """One element of the adapter is NaN or infinite."""
    key = d.pick(d.lora_keys())
    value = float(d.rng.choice([np.nan, np.inf, -np.inf]))

    def poison(held: dict[str, torch.Tensor]) -> None:
        held[key].view(-1)[int(d.rng.integers(held[key].numel()))] = value

    d.edit_adapter(poison)
    return codes("non-finite")


def overflow(d: Damage) -> Codes | None:
    """The merged weight is too large for float16."""
    if d.case.base_dtype != "float16" or d.case.adapter_dtype == "float16":
        return None
    key = d.pick(d.lora_keys())
    d.edit_adapter(lambda held: held[key].mul_(1e15))
    return codes("non-finite")


def layer_missing(d: Damage) -> Codes | None:
    """A layer that the adapter changes is missing in the base."""
    layers = [key for key in d.changed_keys() if ".layers." in key]
    if not layers:
        return None
    prefix = ".".join(d.pick(layers).split(".layers.")[1].split(".")[:1])

    def drop(held: dict[str, torch.Tensor]) -> None:
        for key in [key for key in held if f".layers.{prefix}." in key]:
            del held[key]

    d.edit_base(drop)
    # A shard that is left empty falls out of the index.
    return codes("missing-base-tensor", "experts-incomplete", "corrupt-file")


def base_tensor_missing(d: Damage) -> Codes | None:
    """One tensor that the adapter changes is missing in the base."""
    key = d.pick(d.changed_keys())
    d.edit_base(lambda held: held.pop(key, None))
    emptied = fills_a_shard(d, key)
    lost = codes("corrupt-file") if emptied else codes("missing-base-tensor", "experts-incomplete")
    return lost | codes("num-experts-mismatch") if ".experts." in key else lost


def fills_a_shard(d: Damage, key: str) -> bool:
    """Whether its shard held nothing else: without it there is a shard less than the names say."""
    return list(d.built.shard_of.values()).count(d.built.shard_of[key]) == 1


def base_shape_changed(d: Damage) -> Codes | None:
    """One tensor that the adapter changes has a row more in the base."""
    key = d.pick(d.changed_keys())
    axis = -1 - int(d.rng.integers(2))

    def grow(held: dict[str, torch.Tensor]) -> None:
        if key in held:
            held[key] = longer(held[key], axis)

    d.edit_base(grow)
    return SHAPES


def unknown_field(d: Damage) -> Codes | None:
    """adapter_config.json has a field with a value that nobody knows."""
    value = [3, "yes", {"a": 1}, True, 0.5][int(d.rng.integers(5))]
    d.edit_json(d.built.adapter / "adapter_config.json", lambda config: config.update({"frobnicate": value}))
    return codes("unsupported-adapter")


def wrong_rank(d: Damage) -> Codes | None:
    """adapter_config.json has another rank than the tensors, for at least one pair."""
    if d.case.rank_pattern or not (d.case.fused or d.case.per_expert or d.case.dense):
        return None
    d.edit_json(d.built.adapter / "adapter_config.json", lambda config: config.update({"r": d.case.rank + 1}))
    return codes("rank-mismatch", "num-experts-mismatch", "shape-mismatch")


def truncated_shard(d: Damage) -> Codes | None:
    """A shard is cut short."""
    file = d.built.base / d.pick(list(set(d.built.shard_of.values())))
    data = file.read_bytes()
    file.write_bytes(data[: int(d.rng.integers(len(data)))])
    return codes("corrupt-file")


def truncated_adapter(d: Damage) -> Codes | None:
    """The adapter's file is cut short."""
    data = d.weights.read_bytes()
    d.weights.write_bytes(data[: int(d.rng.integers(len(data)))])
    return codes("corrupt-file")


def shard_missing(d: Damage) -> Codes | None:
    """The index names a shard that is not there."""
    if d.case.shards == 1:
        return None
    (d.built.base / d.pick(list(set(d.built.shard_of.values())))).unlink()
    return codes("corrupt-file")


def same_key_twice(d: Damage) -> Codes | None:
    """Two shards hold the same key."""
    if d.case.shards == 1:
        return None
    key = d.pick(list(d.built.shard_of))
    other = d.pick([name for name in set(d.built.shard_of.values()) if name != d.built.shard_of[key]])
    held = load_file(d.built.base / other)
    value = load_file(d.built.base / d.built.shard_of[key])[key]
    save_file({**held, key: value}, d.built.base / other, metadata={"format": "pt"})
    return codes("corrupt-file")


def index_lies(d: Damage) -> Codes | None:
    """The index names a tensor that no shard holds, or does not name one of a shard that it names."""
    names = list(d.built.shard_of.values())
    shared = [key for key, name in d.built.shard_of.items() if names.count(name) > 1]
    if d.case.shards == 1 or not shared:
        return None
    key = d.pick(shared)
    file = d.built.base / INDEX
    if d.rng.integers(2):
        d.edit_json(file, lambda v: v["weight_map"].update({"no.such.weight": d.built.shard_of[key]}))
    else:
        d.edit_json(file, lambda v: v["weight_map"].pop(key))
    return codes("corrupt-file")


def expert_missing(d: Damage) -> Codes | None:
    """One projection of one expert is missing, where experts lie apart.

    A single expert without one that the adapter leaves alone is a model without that projection.
    """
    present = d.changed_keys() if d.case.num_experts == 1 else d.built.expected
    keys = [key for key in present if ".experts." in key and d.case.family.disk == "per_expert"]
    if not keys or not (d.case.fused or d.case.per_expert):
        return None
    layers = {key.split(".layers.")[1].split(".")[0] for key in d.changed_keys() if ".experts." in key}
    key = d.pick([key for key in keys if key.split(".layers.")[1].split(".")[0] in layers])
    d.edit_base(lambda held: held.pop(key, None))
    if fills_a_shard(d, key):
        return codes("corrupt-file")
    return codes("experts-incomplete", "num-experts-mismatch", "missing-base-tensor")


def site_rank(case: Case, layer: int, parameter: str) -> int:
    return effective(case, parameter_name(case, layer, parameter))[0]


def unknown_marker(d: Damage) -> Codes | None:
    """The marker names a packing that does not exist, and the packing matters."""
    ranks = [site_rank(d.case, layer, p) for layer in d.case.fused_layers for p in d.case.fused]
    if not d.case.fused or d.case.marker == "nested" or d.case.num_experts == 1 or max(ranks) == 1:
        return None
    field = {"lora_B_layout": "diagonal"}
    d.edit_json(d.built.adapter / "adapter_config.json", lambda config: config.update(field))
    return codes("unknown-layout")


def contradicted_version(d: Damage) -> Codes | None:
    """peft_version says the other orientation than the shapes prove."""
    never = d.case.family.transposed == "never"
    if not d.case.fused or not never or d.case.num_experts == 1 or len(hypotheses(d.case)) != 1:
        return None
    # With the field set of that version, or else it would say nothing.
    other = "0.18.1" if d.case.orientation == "standard" else "0.19.1"
    config = adapter_config(replace(d.case, peft=other))
    (d.built.adapter / "adapter_config.json").write_text(json.dumps(config))
    return codes("ambiguous-layout")


CORRUPTIONS: Mapping[str, Callable[[Damage], Codes | None]] = {
    function.__name__: function
    for function in (
        shape_changed, half_missing, extra_tensor, extra_pair, wrong_num_experts, declared_num_experts,
        not_finite, overflow, layer_missing, base_tensor_missing, base_shape_changed, unknown_field,
        wrong_rank, truncated_shard, truncated_adapter, shard_missing, same_key_twice, index_lies,
        expert_missing, unknown_marker, contradicted_version,
    )
}  # fmt: skip
