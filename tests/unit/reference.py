"""An independent float64 reference for merges of MoE LoRA adapters. Imports nothing from loudmerge.

`build` writes a `Case` to disk, the adapter as PEFT would name and pack it, and returns what every
tensor of the merged checkpoint must be. The maths is numpy in float64, written from the formula
alone; test_synthetic_suite.py checks it against PEFT's own merge where PEFT is installed.

Axis names: E experts, r rank, H hidden, I expert intermediate; matrices of projections are (out, in).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from tests.unit.synthetic import (
    SIDE_FILES,
    VOCABULARY,
    Case,
    adapter_config,
    dense_names,
    effective,
    fused_key,
    memory_size,
    model_config,
    parameter_name,
    router_parameter,
)

Array = npt.NDArray[np.float64]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# significand bits with the implicit one, exponent of the smallest normal number, largest finite number
FORMATS = {
    "float32": (24, -126, float(torch.finfo(torch.float32).max)),
    "bfloat16": (8, -126, float(torch.finfo(torch.bfloat16).max)),
    "float16": (11, -14, 65504.0),
}


@dataclass(frozen=True)
class Site:
    """One LoRA pair: `key` in the adapter file, `name` for the patterns. a: (rows, in), b: (out, columns)."""

    key: str
    name: str
    a: Array
    b: Array


@dataclass(frozen=True)
class Expected:
    """One tensor of the merged checkpoint: `base` + `delta`, and `size` = s * |B| |A|, which bounds errors.

    `delta` is None for a tensor that stays as it is, byte for byte. parameter: the LoRA is one of
    `target_parameters`, whose update PEFT rounds to the weight's dtype; that of a Linear it does not.
    """

    base: Array
    dtype: str
    delta: Array | None = None
    size: Array | None = None
    parameter: bool = False


@dataclass(frozen=True)
class Built:
    """What `build` wrote. counts: expert, dense, replaced, copied; adapter_tensors in the file."""

    base: Path
    adapter: Path
    expected: Mapping[str, Expected]
    shard_of: Mapping[str, str]
    counts: Mapping[str, int]
    adapter_tensors: int


# --- numbers -------------------------------------------------------------------------------------


def rounded(x: Array, dtype: str) -> Array:
    """x rounded once, to nearest even. (torch's own float64 to bfloat16 rounds twice, by way of float32.)"""
    digits, lowest, largest = FORMATS[dtype]
    exponent = np.maximum(np.frexp(x)[1], lowest + 1)
    y: Array = np.ldexp(np.rint(np.ldexp(x, digits - exponent)), exponent - digits)
    y[np.abs(y) > largest] *= np.inf
    return y


def ulp(x: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of a dtype at x."""
    digits, lowest, _ = FORMATS[dtype]
    distance: Array = np.ldexp(np.ones_like(x), np.maximum(np.frexp(x)[1], lowest + 1) - digits)
    return distance


def tensor(x: Array, dtype: str) -> torch.Tensor:
    """x, which must be made of the dtype's numbers, as a torch tensor."""
    result = torch.from_numpy(np.array(x, dtype=np.float64)).to(DTYPES[dtype])
    assert np.array_equal(result.double().numpy(), x, equal_nan=True)
    return result


def fused_delta(a: Array, b: Array, num_experts: int, orientation: str, packing: str) -> Array:
    """(E, d1, d2), unscaled. a: (r*E, .), b: (., r*E).

    With one expert PEFT takes a Linear's path, B @ A, in whatever orientation.
    """
    rank = a.shape[0] // num_experts
    out = []
    for e in range(num_experts):
        a_e = a[e * rank : (e + 1) * rank]
        b_e = b[:, e::num_experts] if packing == "rank_major" else b[:, e * rank : (e + 1) * rank]
        out.append(b_e @ a_e if orientation == "standard" or num_experts == 1 else (b_e @ a_e).T)
    return np.stack(out)


def from_memory(case: Case, parameter: str, value: Array) -> dict[str, Array]:
    """A fused parameter in memory (E, d1, d2) -> its projections, each (E, out, in)."""
    if case.family.memory_axes == "io":
        value = value.transpose(0, 2, 1)
    if parameter != "gate_up":
        return {parameter: value}
    if case.family.interleaved:
        return {"gate": value[:, 0::2], "up": value[:, 1::2]}
    half = value.shape[1] // 2
    return {"gate": value[:, :half], "up": value[:, half:]}


def to_disk(case: Case, layer: int, experts: Mapping[str, Array]) -> dict[str, Array]:
    """Projections (E, out, in) of one layer -> the checkpoint's tensors."""
    family = case.family
    prefix = f"{family.disk_layers}.{layer}.{family.disk_moe}."
    if family.disk == "per_expert":
        return {
            prefix + name.format(e=e): experts[projection][e]
            for projection, name in zip(case.projections, family.disk_names, strict=True)
            for e in range(case.num_experts)
        }
    gate, up = experts["gate"], experts["up"]
    stacked = np.concatenate([gate, up], axis=1)
    if family.interleaved:
        stacked[:, 0::2], stacked[:, 1::2] = gate, up
    fused = {family.disk_names[0]: stacked, family.disk_names[1]: experts["down"]}
    if family.disk == "fused_io":
        fused = {name: value.transpose(0, 2, 1) for name, value in fused.items()}
    return {prefix + name: value for name, value in fused.items()}


# --- the adapter ---------------------------------------------------------------------------------


def sites(case: Case, rng: np.random.Generator) -> Iterator[tuple[str, Site]]:
    """Every LoRA pair by what it is: "fused.layer.parameter", "expert.layer.projection.e", "dense.target"."""

    def pair(what: str, key: str, name: str, rows: int, a: int, b: int) -> tuple[str, Site]:
        scale = case.delta_scale / math.sqrt(max(a, 1))
        site = Site(
            key,
            name,
            rounded(rng.standard_normal((rows, a)) * scale, case.adapter_dtype),
            rounded(rng.standard_normal((b, rows)) * 0.3, case.adapter_dtype),
        )
        return what, site

    for layer in case.fused_layers if case.fused else ():
        for parameter in case.fused:
            d1, d2 = memory_size(case, parameter)
            a, b = (d2, d1) if case.orientation == "standard" else (d1, d2)
            name = parameter_name(case, layer, parameter)
            rows = effective(case, name)[0] * case.num_experts
            yield pair(f"fused.{layer}.{parameter}", fused_key(case, layer, parameter), name, rows, a, b)
    for layer in range(case.layers) if case.per_expert else ():
        for projection in case.per_expert:
            template = case.family.old_names[case.projections.index(projection)].removesuffix(".weight")
            for e in range(case.num_experts):
                prefix = f"{case.family.memory_layers}.{layer}.{case.family.old_moe}."
                name = prefix + template.format(e=e)
                out, inn = case.size(projection)
                yield pair(f"expert.{layer}.{projection}.{e}", name, name, effective(case, name)[0], inn, out)
    for target, (_, memory, (out, inn)) in dense_names(case).items():
        if target.partition(".")[0] in case.dense:
            name = f"{memory}.weight" if router_parameter(case) and target.startswith("router") else memory
            yield pair(f"dense.{target}", memory, name, effective(case, name)[0], inn, out)


# --- the checkpoint ------------------------------------------------------------------------------


def ordinary(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """All tensors but the experts' matrices."""
    family = case.family
    found = {f"{disk}.weight": rng.standard_normal(shape) for disk, _, shape in dense_names(case).values()}
    top = family.disk_layers.removesuffix(".layers")
    embedding = "embeddings" if family.name == "nemotron_h" else "embed_tokens"
    found[f"{top}.{embedding}.weight"] = rng.standard_normal((VOCABULARY, case.hidden))
    found[f"{top}.norm.weight"] = rng.standard_normal(case.hidden)
    for layer in range(case.layers):
        prefix = f"{family.disk_layers}.{layer}."
        found[f"{prefix}input_layernorm.weight"] = rng.standard_normal(case.hidden)
        if family.name == "gpt_oss":
            experts = f"{prefix}mlp.experts."
            e, i = case.num_experts, case.intermediate
            found[f"{experts}gate_up_proj_bias"] = rng.standard_normal((e, 2 * i))
            found[f"{experts}down_proj_bias"] = rng.standard_normal((e, case.hidden))
            found[f"{prefix}mlp.router.bias"] = rng.standard_normal(e)
    return found


def write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shards: int, seed: int) -> dict[str, str]:
    """Writes tensors over random shards with an index, or into a single file; the file of each key."""
    rng = np.random.default_rng(seed)
    order = [list(tensors)[i] for i in rng.permutation(len(tensors))]
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    shard_of = {key: names[i if i < shards else int(rng.integers(shards))] for i, key in enumerate(order)}
    for name in names:
        held = {key: tensors[key].contiguous() for key in tensors if shard_of[key] == name}
        save_file(held, path / name, metadata={"format": "pt"})
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return shard_of


# --- the whole -----------------------------------------------------------------------------------


def expected_tensors(
    case: Case, rng: np.random.Generator, pairs: Mapping[str, Site]
) -> tuple[dict[str, Expected], dict[str, int]]:
    """What every tensor of the merged checkpoint must be, and the counts of the report."""
    delta, size, merged = _updates(case, pairs)
    found: dict[str, Expected] = {}
    for layer in range(case.layers):
        shapes = {p: (case.num_experts, *case.size(p)) for p in case.projections}
        base = {p: rounded(rng.standard_normal(shape), case.base_dtype) for p, shape in shapes.items()}
        disk = [
            to_disk(case, layer, {p: source.get(f"{layer}.{p}", np.zeros(shapes[p])) for p in shapes})
            for source in (delta, size)
        ]
        for key, value in to_disk(case, layer, base).items():
            changed = bool(disk[1][key].any())
            steps = (disk[0][key], disk[1][key], bool(case.fused))
            found[key] = Expected(value, case.base_dtype, *(steps if changed else ()))
    targets = {f"{disk}.weight": t for t, (disk, _, _) in dense_names(case).items()}
    for key, value in ordinary(case, rng).items():
        dtype = "float32" if "norm" in key else case.base_dtype
        target = targets.get(key, "")
        parameter = target.startswith("router") and router_parameter(case)
        found[key] = Expected(rounded(value, dtype), dtype, delta.get(target), size.get(target), parameter)
    dense = sum(what.startswith("dense") for what in pairs)
    return found, {"expert": merged, "dense": dense, "replaced": int(case.replaced)}


def _updates(case: Case, pairs: Mapping[str, Site]) -> tuple[dict[str, Array], dict[str, Array], int]:
    """s B A and s |B| |A|, by "layer.projection" (E, out, in) or dense target; how many experts' matrices."""
    delta: dict[str, Array] = {}
    size: dict[str, Array] = {}
    count = 0
    for what, site in pairs.items():
        kind, _, where = what.partition(".")
        scale = effective(case, site.name)[1]
        a, b = site.a, site.b
        for target, x, y in ((delta, a, b), (size, np.abs(a), np.abs(b))):
            if kind == "fused":
                layer, parameter = where.split(".")
                value = fused_delta(x, y, case.num_experts, case.orientation, case.packing) * scale
                parts = from_memory(case, parameter, value)
                target.update({f"{layer}.{name}": part for name, part in parts.items()})
                count += len(parts) * case.num_experts if target is delta else 0
            elif kind == "expert":
                key, _, e = where.rpartition(".")
                zero = np.zeros((case.num_experts, *case.size(key.split(".")[1])))
                target.setdefault(key, zero)[int(e)] += y @ x * scale
                count += 1 if target is delta else 0
            else:
                target[where] = y @ x * scale
    return delta, size, count


def build(case: Case, root: Path) -> Built:
    """Writes BASE and ADAPTER under `root` and returns what the merge of the two must be."""
    rng = np.random.default_rng(case.seed)
    base, adapter = root / "base", root / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    pairs = dict(sites(case, rng))
    expected, counts = expected_tensors(case, rng, pairs)
    on_disk = {key: tensor(e.base, e.dtype) for key, e in expected.items()}
    shard_of = write_shards(base, on_disk, case.shards, case.seed)
    (base / "config.json").write_text(json.dumps(model_config(case), indent=2))
    for name, text in SIDE_FILES.items():
        (base / name).write_text(text)
    held = {}
    for site in pairs.values():
        held[f"base_model.model.{site.key}.lora_A.weight"] = tensor(site.a, case.adapter_dtype)
        held[f"base_model.model.{site.key}.lora_B.weight"] = tensor(site.b, case.adapter_dtype)
    if case.replaced:
        value = rounded(rng.standard_normal((VOCABULARY, case.hidden)), case.base_dtype)
        held["base_model.model.lm_head.weight"] = tensor(value, case.base_dtype)
        expected["lm_head.weight"] = replace(expected["lm_head.weight"], base=value)
    save_file(held, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config(case), indent=2, sort_keys=True))
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    changed = sum(e.delta is not None for e in expected.values())
    counts["copied"] = len(expected) - changed - counts["replaced"]
    return Built(base, adapter, expected, shard_of, counts, len(held))
