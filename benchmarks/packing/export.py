"""Writes the adapters that test_weighing.py reads: small, trained under both packings, bfloat16.

python -m benchmarks.packing.export DIR
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.packing import qwen3_moe
from benchmarks.packing.train import Pair, Recipe, train
from loudmerge.layout import LoraBLayout

MAJOR, GROUPED = LoraBLayout

TINY = {
    "8x8 AdamW, 5 steps": (Recipe(8, 8, 5, "adamw", 1e-3, hidden=48, intermediate=32), MAJOR),
    "8x8 SGD, 20 steps": (Recipe(8, 8, 20, "sgd", 1e-3, 1, hidden=48, intermediate=32), GROUPED),
    "16x16 8-bit, 5 steps": (Recipe(16, 16, 5, "adam8", 5e-4, 2, hidden=48, intermediate=32), GROUPED),
    "32x8 decay, 1 step": (Recipe(32, 8, 1, "adamw-wd", 5e-4, 3, hidden=48, intermediate=32), MAJOR),
    "8x16 idle experts, 20 steps": (
        Recipe(8, 16, 20, "adamw", 1e-4, 4, hidden=48, intermediate=32, idle=0.5),
        GROUPED,
    ),
    "6x12 upcycled, 5 steps": (
        Recipe(6, 12, 5, "adamw", 1e-3, 5, hidden=48, intermediate=32, base="upcycled"),
        MAJOR,
    ),
    "16x4 swapped, 100 steps": (
        Recipe(16, 4, 100, "adamw", 1e-3, 6, hidden=48, intermediate=32, orientation="swapped"),
        GROUPED,
    ),
}

PEFTS = {
    "8x8 PEFT, 5 steps": (Recipe(8, 8, 5, "adamw", 1e-3, 7, hidden=48, intermediate=32), MAJOR),
    "8x8 PEFT read as Unsloth, 5 steps": (
        Recipe(8, 8, 5, "adamw", 1e-3, 7, hidden=48, intermediate=32),
        GROUPED,
    ),
}


def write(directory: Path, name: str, recipe: Recipe, packing: LoraBLayout, pairs: list[Pair]) -> None:
    """One file, with the names that PEFT gives the tensors, and the recipe as its metadata."""
    tensors = {}
    for pair in pairs:
        inner = ".base_layer" if pair.leaf == "gate_up_proj" else ""
        place = f"base_model.model.model.layers.{pair.layer}.mlp.experts{inner}"
        tensors[f"{place}.lora_A.weight"] = pair.a.to(torch.bfloat16).contiguous()
        tensors[f"{place}.lora_B.weight"] = pair.b.to(torch.bfloat16).contiguous()
    metadata = {"recipe": json.dumps(asdict(recipe)), "packing": packing.value}
    save_file(tensors, directory / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors", metadata)


def main() -> None:
    """Trains and writes all of them: a few seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, (recipe, packing) in TINY.items():
        write(directory, name, recipe, packing, train(recipe, packing))
    for name, (recipe, packing) in PEFTS.items():
        write(directory, name, recipe, packing, qwen3_moe.train(recipe, packing))


if __name__ == "__main__":
    main()
