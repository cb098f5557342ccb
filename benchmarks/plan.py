"""CPU time of `loudmerge.plan` on all 18,867 tensors of Qwen3-30B-A3B, and of `loudmerge --help`.

    python -m benchmarks.plan [--dir DIR]

The checkpoint and the adapter have the real names, shapes, shards and headers, and no data: the files are
sparse. The plan is made twice, the second time with random numbers in the fused lora_B: they are weighed, and
settle nothing, so more layers of them are looked at than of a trained adapter. Prints the CPU seconds of the
plans (the process's own, without imports) and of the command.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import loudmerge
from benchmarks.merge import EXPERTS, HIDDEN, INTER, RANK, attention, base_shapes, model_config
from loudmerge.system.tensorfile import read_header

LAYERS, SHARDS = 48, 16


def sparse(path: Path, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str, itemsize: int) -> None:
    """A safetensors file with this header and a hole for its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes:
        size = itemsize
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def build(root: Path) -> tuple[Path, Path]:
    """The base, its tensors dealt out to shards in runs, and an adapter of rank 32."""
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = list(base_shapes(LAYERS))
    length = -(-len(shapes) // SHARDS)
    names = [f"model-{number + 1:05}-of-{SHARDS:05}.safetensors" for number in range(SHARDS)]
    weight_map = {}
    for number, name in enumerate(names):
        run = shapes[number * length : (number + 1) * length]
        sparse(base / name, run, "BF16", 2)
        weight_map.update({key: name for key, _ in run})
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(model_config(LAYERS)))
    pairs: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        rows = RANK * EXPERTS
        pairs.append((f"{prefix}.mlp.experts.base_layer.lora_A.weight", (rows, HIDDEN)))
        pairs.append((f"{prefix}.mlp.experts.base_layer.lora_B.weight", (2 * INTER, rows)))
        pairs.append((f"{prefix}.mlp.experts.lora_A.weight", (rows, INTER)))
        pairs.append((f"{prefix}.mlp.experts.lora_B.weight", (HIDDEN, rows)))
        for name, (out, into) in attention().items():
            pairs.append((f"{prefix}.self_attn.{name}_proj.lora_A.weight", (RANK, into)))
            pairs.append((f"{prefix}.self_attn.{name}_proj.lora_B.weight", (out, RANK)))
    sparse(adapter / "adapter_model.safetensors", pairs, "F32", 4)
    config = {
        "peft_type": "LORA",
        "peft_version": "0.19.1",
        "r": RANK,
        "lora_alpha": 64,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def fill(path: Path) -> None:
    """Random float32 into the fused lora_B of the adapter, a block of whole rows repeated."""
    entries, _ = read_header(path)
    fused = [entry for name, entry in entries.items() if "experts" in name and "lora_B" in name]
    block = torch.randn(64, RANK * EXPERTS, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    with path.open("r+b") as stream:
        for entry in fused:
            stream.seek(entry.start)
            for _ in range(entry.nbytes // len(block)):
                stream.write(block)


def main() -> None:
    """Builds, plans and prints."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dir", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loudmerge-plan-", dir=arguments.dir) as scratch:
        base, adapter = build(Path(scratch))
        for what in ("lora_B of zeros", "lora_B random"):
            started, cpu = time.monotonic(), time.process_time()
            made = loudmerge.plan(base, adapter)
            print(
                f"plan, {what}: {len(made.outputs)} tensors, {made.counts.expert} expert projections,"
                f" {time.process_time() - cpu:.2f} s of CPU, {time.monotonic() - started:.2f} s"
            )
            fill(adapter / "adapter_model.safetensors")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "loudmerge", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"loudmerge --help: {used:.2f} s of CPU")


if __name__ == "__main__":
    main()
