"""Tiny adapters and checkpoints, by hand: headers without files, and files of a few bytes.

reference.py makes whole synthetic cases with an independent reference; these are for tests of one module,
where one tensor or one field matters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loudmerge.errors import MergeRefused
from loudmerge.evidence.hypotheses import FusedModule, FusedParameter
from loudmerge.layout import Orientation
from loudmerge.planning.options import Options
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.planning.planner import make_plan
from loudmerge.reading.adapter import Adapter, LoraPair, read_adapter
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.checkpoint import Checkpoint, open_checkpoint
from loudmerge.system.tensorfile import TensorEntry
from loudmerge.system.tensors import DTYPES

Tensors = Mapping[str, torch.Tensor]

PREFIX = "base_model.model."
EXPERTS = "model.layers.0.mlp.experts"
Q_PROJ = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
FILE = Path("adapter_model.safetensors")


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers of a shape; equal for equal arguments."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def entry(name: str, shape: Sequence[int], dtype: str = "F32", file: Path = FILE) -> TensorEntry:
    """A header's entry of a tensor that is in no file."""
    nbytes = torch.Size(shape).numel() * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
    return TensorEntry(name, dtype, tuple(shape), file, 0, nbytes)


def pair(module: str, a: Sequence[int], b: Sequence[int], depth: int = 0, **more: Any) -> LoraPair:
    """A pair that is in no file, with its key as PEFT would write it."""
    place = PREFIX + module + ".base_layer" * depth
    return LoraPair(
        module, depth, entry(f"{place}.lora_A.weight", a), entry(f"{place}.lora_B.weight", b), **more
    )


def fused(
    parameters: Mapping[str, tuple[int, int]],
    shapes: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    experts: int = 4,
    rank: int = 2,
    name: str = EXPERTS,
    orientations: frozenset[Orientation] = frozenset(Orientation),
) -> FusedModule:
    """An experts module with parameters (d1, d2) in memory, and pairs (A, B), outermost first."""
    pairs = tuple(pair(name, a, b, depth) for depth, (a, b) in enumerate(shapes))
    targeted = tuple(
        FusedParameter(leaf, f"{name}.{leaf}", d1, d2, rank) for leaf, (d1, d2) in parameters.items()
    )
    return FusedModule(name, experts, pairs, targeted, orientations)


def made(
    parameters: Mapping[str, tuple[int, int]],
    outermost_first: Sequence[str],
    orientation: Orientation = Orientation.STANDARD,
    *,
    experts: int = 4,
    rank: int = 2,
    name: str = EXPERTS,
    orientations: frozenset[Orientation] = frozenset(Orientation),
) -> FusedModule:
    """A module as PEFT would save it: one pair for each parameter."""
    rows = experts * rank
    shapes = []
    for leaf in outermost_first:
        d1, d2 = parameters[leaf]
        b, a = (d1, d2) if orientation is Orientation.STANDARD else (d2, d1)
        shapes.append(((rows, a), (b, rows)))
    return fused(parameters, shapes, experts=experts, rank=rank, name=name, orientations=orientations)


def gated(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}


def ungated(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {"up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}


def square(name: str = EXPERTS, **more: Any) -> FusedModule:
    return made({"down_proj": (6, 6)}, ("down_proj",), name=name, **more)


def raw_config(**fields: Any) -> dict[str, Any]:
    """The fields of adapter_config.json that every adapter has, and `fields`."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}


def config(**fields: Any) -> AdapterConfig:
    """A parsed config, without a file."""
    raw = raw_config(**fields)
    return AdapterConfig(
        raw=raw,
        peft_version=raw.get("peft_version"),
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=raw.get("use_rslora", False),
        use_dora=raw.get("use_dora", False),
        lora_bias=raw.get("lora_bias", False),
        fan_in_fan_out=raw.get("fan_in_fan_out", False),
        target_parameters=frozenset(raw.get("target_parameters") or ()),
        modules_to_save=frozenset(raw.get("modules_to_save") or ()),
    )


def lora(module: str, out: int, into: int, *, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """The two tensors of a dense LoRA, named as PEFT names them."""
    return {
        f"{PREFIX}{module}.lora_A.weight": values(rank, into, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": values(out, rank, seed=seed + 1),
    }


def fused_lora(
    module: str, sizes: Sequence[tuple[int, int]], *, experts: int, rank: int = 2, swapped: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a nested fused LoRA on parameters (d1, d2), outermost first."""
    held: dict[str, torch.Tensor] = {}
    for depth, (d1, d2) in enumerate(sizes):
        b, a = (d2, d1) if swapped else (d1, d2)
        held |= lora(module + ".base_layer" * depth, b, a, rank=rank * experts, seed=depth)
    return held


def write_adapter(path: Path, tensors: Tensors, **fields: Any) -> Path:
    """Writes an adapter directory. A field of None is left out of the config's defaults too."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(raw_config(**fields)))
    save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def write_base(path: Path, tensors: Tensors, *, shards: Sequence[Sequence[str]] = (), **fields: Any) -> Path:
    """Writes a checkpoint directory: one file, or the given keys in each shard and an index."""
    path.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "qwen3_moe", "tie_word_embeddings": False, **fields}
    (path / "config.json").write_text(json.dumps(settings))
    if not shards:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        save_file({key: tensors[key] for key in keys}, path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def expert_tensors(
    experts: int, hidden: int, intermediate: int, *, layers: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The experts of a checkpoint that stores them apart: gate_proj, up_proj, down_proj."""
    held = {}
    for layer in range(layers):
        for expert in range(experts):
            for number, (leaf, shape) in enumerate(
                {
                    "gate_proj": (intermediate, hidden),
                    "up_proj": (intermediate, hidden),
                    "down_proj": (hidden, intermediate),
                }.items()
            ):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"
                held[key] = values(*shape, seed=100 * layer + 10 * expert + number, dtype=dtype)
    return held


def plan_of(base: Path, adapter: Path, **options: str) -> MergePlan:
    """The plan for two directories."""
    return make_plan(open_checkpoint(base), read_adapter(adapter), Options(**options))


def opened(base: Path, adapter: Path) -> tuple[Checkpoint, Adapter]:
    """Both directories, read."""
    return open_checkpoint(base), read_adapter(adapter)


def full(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {PREFIX + name: values(*shape, seed=20)}


def outputs(plan: MergePlan) -> dict[str, OutputTensor]:
    return {output.key: output for output in plan.outputs}


class World:
    """A directory with a base and an adapter; options and config fields by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def plan(
        self, base: Tensors, adapter: Tensors, model: dict[str, Any] | None = None, **fields: Any
    ) -> MergePlan:
        options = {name: fields.pop(name) for name in ("dtype", "rounding", "orientation") if name in fields}
        write_base(self.path / "base", base, **(model or {}))
        write_adapter(self.path / "adapter", adapter, **fields)
        return plan_of(self.path / "base", self.path / "adapter", **options)

    def refuse(self, *args: Any, **fields: Any) -> MergeRefused:
        with pytest.raises(MergeRefused) as caught:
            self.plan(*args, **fields)
        return caught.value
