"""Trains adapters under both packings, and writes what their weights show: one line of JSON for each.

    python -m benchmarks.packing.study --out FILE.jsonl [--part tiny odd qwen3_moe smollm2 fakes] [--quick]

`benchmarks.packing.calibrate` reads them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.packing.fakes import Fake, fakes
from benchmarks.packing.qwen3_moe import train as train_qwen3_moe
from benchmarks.packing.smollm2 import SmolLM2
from benchmarks.packing.train import Pair, Recipe, trajectory
from loudmerge.evidence.clustering import sampled_rows, site_traces
from loudmerge.layout import LoraBLayout
from loudmerge.system.arrays import Floats

EXPERTS = (4, 8, 16, 32, 64, 128)
RANKS = (2, 4, 8, 16, 32, 64)
STEPS = (1, 5, 20, 100)
ODD_EXPERTS, ODD_RANKS = (3, 6, 10, 12, 60), (3, 5, 6, 12, 24)
OPTIMIZERS = (
    ("adamw", 1e-4),
    ("adamw", 1e-3),
    ("adamw-wd", 5e-4),
    ("adam8", 5e-4),
    ("sgd", 1e-3),
    ("sgd", 1e-2),
)
DRAWS, OTHER_DRAWS = 4, 3
"""Trainings of each (experts, rank) of the tiny models, and of the other parts. Even ones calibrate, odd ones
are held out."""

Line = dict[str, Any]


def conditions(experts: int, rank: int, draw: int) -> tuple[Recipe, LoraBLayout]:
    """The other settings of one training, drawn by its number."""
    pick = random.Random(f"{experts} {rank} {draw}")  # noqa: S311 - a study's conditions are no secret
    optimizer, lr = pick.choice(OPTIMIZERS)
    recipe = Recipe(
        experts,
        rank,
        max(STEPS),
        optimizer,
        lr,
        seed=draw,
        hidden=pick.choice((48, 64, 96)),
        intermediate=pick.choice((32, 48)),
        layers=pick.choice((2, 3)),
        top_k=pick.choice((1, 2, 4)),
        idle=pick.choice((0.0, 0.0, 0.5, 0.9)),
        tilt=pick.choice((0.0, 1.0)),
        base=pick.choice(("random", "upcycled")),
        orientation=pick.choice(("standard", "swapped")),
        dtype=pick.choice(("float32", "bfloat16")),
    )
    return recipe, pick.choice(tuple(LoraBLayout))


def observed(pairs: Iterable[Pair], experts: int, rank: int) -> list[Line]:
    """What each pair shows, as loudmerge reads it."""
    lines = []
    for pair in pairs:
        total = len(pair.b)
        rows = np.concatenate([np.arange(run.start, run.stop) for run in sampled_rows(total)])
        a = pair.a.float().view(experts, rank, -1)

        def rows_of(some: Sequence[int], a: Tensor = a) -> Floats:
            return a[list(some)].flatten(0, 1).numpy()

        found = site_traces(rows_of, pair.b.float().numpy()[rows], rows >= (total + 1) // 2, experts, rank)
        lines.append({"layer": pair.layer, "leaf": pair.leaf, **asdict(found)})
    return lines


def tiny(draws: int, experts: Iterable[int], ranks: Iterable[int], part: str) -> Iterator[Line]:
    """Tiny models, each adapter after STEPS of its training."""
    for draw in range(draws):
        for e in experts:
            for r in ranks:
                recipe, packing = conditions(e, r, draw)
                for steps, pairs in trajectory(recipe, packing, STEPS):
                    yield line(part, replace(recipe, steps=steps), packing, pairs)


def smollm2(draws: int) -> Iterator[Line]:
    """The first layers of SmolLM2, upcycled."""
    model = SmolLM2()
    for draw in range(draws):
        for e, r, steps, optimizer, lr, layers in (
            (4, 16, 5, "adamw", 2e-4, 6),
            (8, 8, 1, "adamw", 2e-4, 6),
            (8, 8, 5, "adamw", 2e-4, 6),
            (8, 32, 5, "sgd", 1e-3, 4),
            (16, 8, 20, "adamw", 1e-3, 3),
            (32, 16, 5, "adam8", 5e-4, 4),
            (64, 8, 5, "adamw", 1e-4, 4),
            (128, 16, 5, "adamw", 2e-4, 3),
        ):
            recipe = Recipe(e, r, steps, optimizer, lr, seed=draw, layers=layers)
            packing = tuple(LoraBLayout)[(draw + e + r) % 2]
            yield line("smollm2", recipe, packing, model.train(recipe, packing))


def qwen3_moe(draws: int) -> Iterator[Line]:
    """transformers' Qwen3-MoE and PEFT."""
    for draw in range(draws):
        for e, r, steps in ((4, 8, 5), (8, 8, 5), (8, 8, 20), (16, 4, 20), (16, 16, 5), (32, 8, 1)):
            for packing in LoraBLayout:
                recipe = Recipe(e, r, steps, "adamw", 1e-3, seed=draw)
                yield line("qwen3_moe", recipe, packing, train_qwen3_moe(recipe, packing))


def made_up(draws: int) -> Iterator[Line]:
    """Adapters that nobody trained, or whose columns are alike for another reason."""
    for draw in range(draws):
        for e, r in ((4, 16), (8, 8), (16, 16), (32, 8), (8, 32), (64, 4), (6, 12), (128, 8)):
            for fake in fakes(e, r, draw):
                for packing in LoraBLayout:
                    yield fake_line(fake, e, draw, packing)


def fake_line(fake: Fake, experts: int, draw: int, packing: LoraBLayout) -> Line:
    """One made-up adapter, as a packing's tool would have saved it."""
    pairs = [
        Pair(number, "gate_up_proj", *fake.packed(pair, packing)) for number, pair in enumerate(fake.pairs)
    ]
    recipe = Recipe(experts, fake.rank, 0, "none", 0.0, draw)
    return {**line("fakes", recipe, packing, pairs), "kind": fake.kind}


def line(part: str, recipe: Recipe, packing: LoraBLayout, pairs: list[Pair]) -> Line:
    """What one adapter shows."""
    sites = observed(pairs, recipe.experts, recipe.rank)
    return {"part": part, "recipe": asdict(recipe), "packing": packing.value, "sites": sites}


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    names = ["tiny", "odd", "fakes", "qwen3_moe", "smollm2"]
    parser.add_argument("--part", nargs="+", default=names, choices=names)
    parser.add_argument("--quick", action="store_true", help="Two trainings of few shapes: two minutes.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    draws, other = (2, 1) if given.quick else (DRAWS, OTHER_DRAWS)
    experts, ranks = ((4, 16), (4, 16)) if given.quick else (EXPERTS, RANKS)
    few = 1 if given.quick else None
    parts = {
        "tiny": lambda: tiny(draws, experts, ranks, "tiny"),
        "odd": lambda: tiny(other, ODD_EXPERTS[:few], ODD_RANKS[:few], "odd"),
        "fakes": lambda: made_up(other),
        "qwen3_moe": lambda: qwen3_moe(other),
        "smollm2": lambda: smollm2(other),
    }
    for part in given.part:
        count = 0
        for found in parts[part]():
            with given.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            count += 1
        print(part, count, flush=True)


if __name__ == "__main__":
    main()
