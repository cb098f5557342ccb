"""Base checkpoints of a Qwen3-MoE at any size: random from a config, or the first layers of a given one.

Written shard by shard, so that a model of 61 GB needs the memory of one layer.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loudmerge.demo.training import Recipe
from loudmerge.reading.checkpoint import INDEX, open_checkpoint
from loudmerge.reading.sidefiles import CONFIG

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

EMBEDDING, HEAD, ROUTER = "model.embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"
ROUTER_GAIN = 4.0
"""A trained router is sure of its experts. A random one of the usual size weighs the eighth and the ninth
of 128 nearly alike, and which of them runs is left to rounding: bfloat16 arithmetic alone was then up to 3e-4
nats a token off, in models of 4 layers 128 and 256 wide, and 2e-5 to 5e-5 with this gain."""
BYTES = 2
"""Of a number in bfloat16."""
FLOAT32_BYTES = 4
"""Of one in float32, as LoRA factors are trained."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def shards(config: Mapping[str, Any]) -> Iterator[Shapes]:
    """The tensors of each shard, as the Hub's checkpoints of this architecture name them, experts apart."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    yield {EMBEDDING: (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        yield {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
    yield {"model.norm.weight": (hidden,), HEAD: (vocabulary, hidden)}


def _layer(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate.weight": (config["num_experts"], hidden),
    }
    for expert in range(config["num_experts"]):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    return shapes


def nbytes(config: Mapping[str, Any]) -> int:
    """Bytes of all weights in bfloat16."""
    return sum(BYTES * math.prod(shape) for shapes in shards(config) for shape in shapes.values())


def lora_nbytes(config: Mapping[str, Any], rank: int) -> int:
    """Bytes of an adapter in float32 on all projections, at most: a fused gate and up share their lora_A."""
    linears = (sum(shape) for shapes in shards(config) for name, shape in shapes.items() if "_proj." in name)
    return FLOAT32_BYTES * rank * sum(linears)


def write_random(directory: Path, config: Mapping[str, Any], recipe: Recipe) -> None:
    """A checkpoint of `config` in bfloat16, its weights drawn on `recipe.device`; without a tokenizer.

    Initialised as transformers does (norms 1, the rest normal with `initializer_range`), times the gains.
    """
    directory.mkdir(parents=True)
    _write(directory, config, [partial(_random, *each, config, recipe) for each in enumerate(shards(config))])


def _random(number: int, shapes: Shapes, config: Mapping[str, Any], recipe: Recipe) -> Tensors:
    generator = torch.Generator(recipe.device).manual_seed(recipe.seed * 1000 + number)
    gains = {EMBEDDING: recipe.embedding_gain, HEAD: recipe.head_gain}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=recipe.device)
        gain = ROUTER_GAIN if name.endswith(ROUTER) else gains.get(name, 1.0)
        deviation = gain * config["initializer_range"]
        is_norm = name.endswith("norm.weight")
        tensors[name] = tensor.fill_(1.0) if is_norm else tensor.normal_(0.0, deviation, generator=generator)
    return tensors


def first_layers(source: Path, directory: Path, layers: int) -> None:
    """A checkpoint of the first `layers` layers of `source`, with its other files.

    Raises ValueError where it has fewer; MergeRefused as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source)
    there = checkpoint.config["num_hidden_layers"]
    if not 0 < layers <= there:
        raise ValueError(f"{source}: found {there} layers, expected at least {layers}, of which 1 or more")
    kept: dict[Path, list[str]] = defaultdict(list)
    for name, entry in checkpoint.entries.items():
        found = _LAYER.match(name)
        if found is None or int(found[1]) < layers:
            kept[entry.file].append(name)
    directory.mkdir(parents=True)
    for name in checkpoint.side_files:
        place = directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, place)
    config = {**checkpoint.config, "num_hidden_layers": layers}
    _write(directory, config, [partial(_read, file, names) for file, names in kept.items()])


def _read(file: Path, names: Sequence[str]) -> Tensors:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def _write(directory: Path, config: Mapping[str, Any], parts: Sequence[Callable[[], Tensors]]) -> None:
    """A checkpoint with a shard of each part's tensors: one is in memory at a time."""
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        tensors, file = part(), f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / CONFIG, config)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
