"""How a case is made from another: functions that change a copy of its adapter, or of its base where
named so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"
DETAIL, FLAT = "unsloth_fused_expert_lora", "lora_B_layout"
Tensors = dict[str, Tensor]


def _layer(name: str) -> str:
    return f"base_model.model.model.layers.0.{name}"


def _json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values, indent=2, sort_keys=True))


def _tensors(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: _json(folder / CONFIG, lambda values: values.update(fields))


def _adapter(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda folder: _tensors(folder / WEIGHTS, change)


def _base(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda folder: _tensors(folder / "model.safetensors", change)


def _truncate(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return change


def _value(name: str, value: float) -> Callable[[Path], None]:
    return _adapter(lambda held: held[_layer(name)].view(-1)[3].fill_(value))


def _two_experts(held: Tensors) -> None:
    """Rank 2: four rows of lora_A and four columns of lora_B, where three experts have six."""
    for key in [key for key in held if ".experts." in key]:
        held[key] = held[key][:4] if "lora_A" in key else held[key][:, :4]


def _wider(held: Tensors) -> None:
    for name in ("mlp.experts.base_layer.lora_A.weight", "self_attn.q_proj.lora_A.weight"):
        key = _layer(name)
        held[key] = torch.cat([held[key], held[key][:, :2]], dim=1)


def _layer_beyond(held: Tensors) -> None:
    for half in "AB":
        key = _layer(f"self_attn.q_proj.lora_{half}.weight")
        held[key.replace("layers.0", "layers.1")] = held[key].clone()


def _outer_pair_only(held: Tensors) -> None:
    for half in "AB":
        del held[_layer(f"mlp.experts.base_layer.lora_{half}.weight")]


def _expert_pair_missing(held: Tensors) -> None:
    for half in "AB":
        del held[_layer(f"mlp.experts.1.down_proj.lora_{half}.weight")]


def _overflow(held: Tensors) -> None:
    for key in held:
        if "lora_B" in key:
            held[key] *= 1e6


def _second_marker(folder: Path) -> None:
    _json(folder / CONFIG, lambda values: values["auto_mapping"].update({FLAT: "rank_major", DETAIL: None}))


def _unknown_marker(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        del values[DETAIL]
        values["auto_mapping"].pop(DETAIL)
        values[FLAT] = "diagonal"

    _json(folder / CONFIG, change)


def _flat_marker(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        del values[DETAIL]
        values["auto_mapping"].pop(DETAIL)

    _json(folder / CONFIG, change)


def _nested_marker(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        del values[FLAT]
        values["auto_mapping"].pop(DETAIL)
        del values[DETAIL][FLAT]

    _json(folder / CONFIG, change)


def _without_version(folder: Path) -> None:
    _json(folder / CONFIG, lambda values: values.pop("peft_version"))


def _bfloat16(held: Tensors) -> None:
    held |= {key: value.bfloat16() for key, value in held.items()}


def _shard_missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _shard_elsewhere(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        names = index["weight_map"]
        moved = {key for key, file in names.items() if file.startswith("model-00002")}
        names.update(dict.fromkeys(moved, "../adapter/model-00002-of-00003.safetensors"))

    _json(folder / INDEX, change)


OF_ADAPTER: Mapping[str, Callable[[Path], None]] = {
    "without_version": _without_version,
    "second_marker": _second_marker,
    "unknown_marker": _unknown_marker,
    "flat_marker": _flat_marker,
    "nested_marker": _nested_marker,
    "bfloat16_adapter": _adapter(_bfloat16),
    "unknown_tensor": _adapter(
        lambda held: held.update({_layer("mlp.experts.lora_C.weight"): torch.ones(2, 3)})
    ),
    "layer_beyond": _adapter(_layer_beyond),
    "half_a_pair": _adapter(lambda held: held.pop(_layer("self_attn.q_proj.lora_B.weight"))),
    "outer_pair_only": _adapter(_outer_pair_only),
    "expert_pair_missing": _adapter(_expert_pair_missing),
    "nan": _value("mlp.experts.lora_B.weight", float("nan")),
    "infinity": _value("mlp.experts.2.up_proj.lora_A.weight", float("inf")),
    "overflow": _adapter(_overflow),
    "two_experts": _adapter(_two_experts),
    "other_rank": _config(r=3),
    "wider": _adapter(_wider),
    "cut_short": _truncate(WEIGHTS, 0.7),
    "dora_without_magnitudes": _config(use_dora=True),
}
OF_BASE: Mapping[str, Callable[[Path], None]] = {
    "unknown_base_tensor": _base(
        lambda held: held.update({"mtp.layers.0.weight": torch.linspace(-1, 1, 24).view(4, 6)})
    ),
    "base_without_expert": _base(lambda held: held.pop("model.layers.0.mlp.experts.1.up_proj.weight")),
    "base_without_target": _base(lambda held: held.pop("model.layers.0.self_attn.q_proj.weight")),
    "base_shard_missing": _shard_missing,
    "base_cut_short": _truncate("model.safetensors", 0.9),
    "base_shard_elsewhere": _shard_elsewhere,
}
