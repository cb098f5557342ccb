"""Reads what `study` wrote: what loudmerge answers, how often it is right, and how sure it may say to be.

    python -m benchmarks.packing.calibrate summarise FILE.jsonl… --out results.csv
    python -m benchmarks.packing.calibrate report results.csv [--figures DIR]

Adapters of even seeds calibrate, the others are held out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.packing.figures import Dot, coverage_map, reliability, witnesses
from loudmerge.evidence.clustering import CONFIDENT, SiteTraces, Traces, confidence, verdict
from loudmerge.layout import LoraBLayout

FAKES = "fakes"


@dataclass(frozen=True)
class Row:
    """One adapter. columns, pairs: over 0 for what it was trained as. answer: right, wrong or none."""

    part: str
    kind: str
    experts: int
    rank: int
    steps: int
    optimizer: str
    lr: float
    seed: int
    layers: int
    idle: float
    packing: str
    columns: float
    pairs: float
    answer: str

    @property
    def held_out(self) -> bool:
        return self.seed % 2 == 1

    @property
    def weaker(self) -> float:
        """What the weaker witness shows, where both say the same; else 0."""
        return min(abs(self.columns), abs(self.pairs)) if self.columns * self.pairs > 0 else 0.0

    @property
    def aimed(self) -> bool:
        """Whether the aim of 95 % counts it."""
        return self.part != FAKES and self.experts >= 8 and self.rank >= 8 and self.steps >= 5


def summarise(lines: Iterable[str]) -> Iterator[Row]:
    """A row for each line of the study."""
    for line in lines:
        found = json.loads(line)
        recipe = found["recipe"]
        said = verdict([_traces(site) for site in found["sites"]])
        sign = 1 if found["packing"] == LoraBLayout.RANK_MAJOR.value else -1
        answer = "none" if said.says is None else "right" if said.says.value == found["packing"] else "wrong"
        names = ("experts", "rank", "steps", "optimizer", "lr", "seed", "layers", "idle")
        yield Row(
            part=found["part"],
            kind=found.get("kind", ""),
            packing=found["packing"],
            columns=round(sign * said.columns, 3),
            pairs=round(sign * said.pairs, 3),
            answer=answer,
            **{name: recipe[name] for name in names},
        )


def _traces(site: dict[str, Any]) -> SiteTraces:
    major, grouped = (Traces(**site[packing.value]) for packing in LoraBLayout)
    return SiteTraces(major, grouped, LoraBLayout(site["blocks"]) if site["blocks"] else None)


def sharpness(rows: Sequence[Row]) -> float:
    """The likeliest SHARPNESS of loudmerge.evidence.clustering, by golden-section search."""

    def cost(value: float) -> float:
        return sum(
            _surprise(value * min(row.weaker, 6.0) ** 2 * math.copysign(1, row.columns)) for row in rows
        )

    low, high, golden = 0.0, 5.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    return (low + high) / 2


def _surprise(log_odds: float) -> float:
    """-log of the probability, without overflow."""
    return max(-log_odds, 0.0) + math.log1p(math.exp(-abs(log_odds)))


def leaning(rows: Iterable[Row]) -> list[Row]:
    """Those whose two witnesses lean to one side, however little; zeros that prove a packing are left out."""
    return [row for row in rows if row.weaker > 0 and row.kind != "gate and up fused"]


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    calibrating = leaning(row for row in rows if not row.held_out)
    yield f"fitted sharpness {sharpness(calibrating):.3f} on {len(calibrating)} adapters"
    held = [row for row in rows if row.held_out]
    yield from _table("held out", held, lambda row: row.part)
    yield from _table("held out, E >= 8, r >= 8, steps >= 5", [r for r in held if r.aimed], lambda r: r.part)
    yield from _table(
        "held out, by steps", [r for r in held if r.part != FAKES], lambda r: f"{r.steps:3} steps"
    )
    yield from _table("held out, by optimiser", [r for r in held if r.part != FAKES], lambda r: r.optimizer)
    yield from _table("fakes, all", [r for r in rows if r.part == FAKES], lambda r: r.kind)
    yield "calibration, held out: said | adapters | right"
    for low, high, found in bins(leaning(held)):
        right = sum(row.columns > 0 for row in found) / len(found)
        said = sum(confidence(row.weaker) for row in found) / len(found)
        yield f"weaker {low:g} to {high:g}: {said:.3f} | {len(found)} | {right:.3f}"


def bins(rows: Sequence[Row]) -> Iterator[tuple[float, float, list[Row]]]:
    """Rows by what the weaker witness shows."""
    edges = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, CONFIDENT, math.inf)
    for low, high in pairwise(edges):
        found = [row for row in rows if low < row.weaker <= high]
        if found:
            yield low, high, found


def _table(title: str, rows: Iterable[Row], key: Callable[[Row], str]) -> Iterator[str]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    yield f"\n{title}\n| | adapters | answered | right | wrong |\n|---|---|---|---|---|"
    everything = [row for found in groups.values() for row in found]
    for name, found in [*sorted(groups.items()), ("all", everything)]:
        counts = [sum(row.answer == answer for row in found) for answer in ("right", "wrong")]
        share = f"{sum(counts)} ({sum(counts) / len(found):.1%})" if found else "0"
        yield f"| {name} | {len(found)} | {share} | {counts[0]} | {counts[1]} |"


def draw(rows: Sequence[Row], directory: Path) -> None:
    """The figures of docs/packing.md."""
    directory.mkdir(parents=True, exist_ok=True)
    held = [row for row in rows if row.held_out]
    dots = [Dot(row.columns, row.pairs, row.part == FAKES) for row in held]
    (directory / "packing-witnesses.svg").write_text(witnesses(dots), "utf-8")
    points = [
        (
            sum(row.weaker for row in found) / len(found),
            sum(row.columns > 0 for row in found) / len(found),
            len(found),
        )
        for _, _, found in bins(leaning(held))
    ]
    (directory / "packing-calibration.svg").write_text(reliability(points, confidence), "utf-8")
    cells: dict[tuple[int, int, bool], list[bool]] = defaultdict(list)
    for row in rows:
        if row.part == "tiny":
            cells[row.experts, row.rank, row.steps >= 5].append(row.answer == "right")
    (directory / "packing-coverage.svg").write_text(coverage_map(cells), "utf-8")


def main() -> None:
    """Does what the first argument says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("summarise")
    one.add_argument("files", type=Path, nargs="+")
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("report")
    two.add_argument("file", type=Path)
    two.add_argument("--figures", type=Path)
    given = parser.parse_args()
    if given.command == "summarise":
        found = [row for file in given.files for row in summarise(file.read_text("utf-8").splitlines())]
        with given.out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, found))
        return
    rows = list(read(given.file))
    print("\n".join(report(rows)))
    if given.figures is not None:
        draw(rows, given.figures)


def read(file: Path) -> Iterator[Row]:
    """The rows of results.csv."""
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    with file.open(encoding="utf-8", newline="") as stream:
        for found in csv.DictReader(stream):
            yield Row(**{field.name: kinds[str(field.type)](found[field.name]) for field in fields(Row)})


if __name__ == "__main__":
    main()
