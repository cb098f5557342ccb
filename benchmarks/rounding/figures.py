"""The tables and the figure of docs/rounding.md, from what `study` and `tiny` wrote.

python -m benchmarks.rounding.figures summarise FILE.jsonl… --out benchmarks/rounding/results.csv
python -m benchmarks.rounding.figures report benchmarks/rounding/results.csv [--figure FILE.svg]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

STYLE = """<style>
.back{fill:#ffffff;stroke:#d0d7de}
text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}
.title{font-weight:bold;font-size:13px}
.axis{stroke:#57606a}.grid{stroke:#8b949e;stroke-dasharray:3 3}
.stochastic{fill:none;stroke:#c05a1c;stroke-width:1.6}.auto{fill:#2a7ab0;stroke:none}
@media (prefers-color-scheme: dark){
.back{fill:#0d1117;stroke:#30363d}text{fill:#e6edf3}.axis{stroke:#8b949e}
.stochastic{stroke:#e8935a}.auto{fill:#58a6d8}
}
</style>"""

FIELDS = (
    "adapter",
    "rounding",
    "seed",
    "kept",
    "kl",
    "base_trained",
    "base_merged",
    "loss_more",
    "same_samples",
)


class Subject(NamedTuple):
    """One trained adapter. kl, merged: medians over the seeds, by rounding.

    merged: base‖merged over base‖trained.
    """

    name: str
    trained: float
    kept: float
    kl: Mapping[str, float]
    merged: Mapping[str, float]
    seeds: int

    @property
    def gain(self) -> float:
        """How many times less KL auto has than nearest."""
        return self.kl["nearest"] / self.kl["auto"]

    @property
    def regret(self) -> float:
        """By what part auto has more KL than the better of nearest and stochastic; negative is less."""
        return self.kl["auto"] / min(self.kl["nearest"], self.kl["stochastic"]) - 1


def summarise(files: Sequence[Path], out: Path) -> None:
    """One line for each (adapter, rounding, seed)."""
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(FIELDS)
        for file in files:
            for line in file.read_text("utf-8").splitlines():
                row = json.loads(line)
                numbers = (row["kept"], row["kl"], row["base_trained"], row["base_merged"])
                more = row["loss"] - row["loss_trained"]
                writer.writerow(
                    [row["adapter"], row["rounding"].lower(), row["seed"]]
                    + [f"{number:.4g}" for number in (*numbers, more)]
                    + [row.get("same_samples", "")]
                )


def read(file: Path) -> list[Subject]:
    """The adapters of results.csv."""
    by_adapter: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            by_adapter[row["adapter"]][row["rounding"]].append(row)
    found = []
    for name, rows in by_adapter.items():
        if not {"nearest", "stochastic", "balanced", "auto"} <= set(rows):
            continue
        first = rows["nearest"][0]
        trained = float(first["base_trained"])
        kl = {how: median(float(row["kl"]) for row in same) for how, same in rows.items()}
        merged = {
            how: median(float(row["base_merged"]) for row in same) / trained for how, same in rows.items()
        }
        found.append(Subject(name, trained, float(first["kept"]), kl, merged, len(rows["auto"])))
    return sorted(found, key=lambda one: one.kept)


def report(subjects: Sequence[Subject]) -> Iterator[str]:
    """Lines of Markdown: KL(trained ‖ merged), and KL(base ‖ merged) over KL(base ‖ trained)."""
    ways = "nearest | stochastic | balanced | `auto`"
    merged = "base‖merged, nearest | stochastic | `auto`"
    yield f"| adapter | KL base‖trained | kept by nearest | {ways} | times less | {merged} |"
    yield "|" + "---|" * 11
    for one in subjects:
        kl = " | ".join(f"{one.kl[how]:.2e}" for how in ("nearest", "stochastic", "balanced", "auto"))
        merged = " | ".join(f"{one.merged[how]:.3f}" for how in ("nearest", "stochastic", "auto"))
        yield f"| {one.name} | {one.trained:.2e} | {one.kept:.3f} | {kl} | {one.gain:.1f} | {merged} |"
    worst = max(subjects, key=lambda one: one.regret)
    yield f"\nauto against the better of nearest and stochastic: at most {worst.regret:+.1%} ({worst.name})"


def figure(subjects: Sequence[Subject]) -> str:
    """KL over nearest's, by how much nearest keeps."""
    left, top, width, height = 70, 50, 440, 260
    low, high = -2.0, 0.5

    def spot(kept: float, ratio: float) -> tuple[float, float]:
        clipped = min(max(math.log10(ratio), low), high)
        return left + kept * width, top + (high - clipped) / (high - low) * height

    parts = [
        '<text class="title" x="16" y="24">KL trained‖merged over that of rounding to the nearest</text>'
    ]
    for ratio in (0.01, 0.05, 0.1, 0.5, 1.0, 3.0):
        y = spot(0, ratio)[1]
        kind = "axis" if ratio == 1.0 else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{ratio:g}</text>')
    for kept in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = spot(kept, 1)[0]
        parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{kept:g}</text>')
    for one in subjects:
        for how in ("stochastic", "auto"):
            x, y = spot(one.kept, one.kl[how] / one.kl["nearest"])
            parts.append(f'<circle class="{how}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    for number, how in enumerate(("stochastic", "auto")):
        y = top + 14 + 20 * number
        parts.append(f'<circle class="{how}" cx="{left + width + 22}" cy="{y - 4}" r="4"/>')
        parts.append(f'<text x="{left + width + 34}" y="{y}">{how}</text>')
    middle = left + width // 2
    label = "share of the update that nearest keeps"
    parts.append(f'<text x="{middle}" y="{top + height + 40}" text-anchor="middle">{label}</text>')
    total, tall = left + width + 120, top + height + 56
    size = f'width="{total}" height="{tall}" viewBox="0 0 {total} {tall}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    back = f'<rect class="back" x="0.5" y="0.5" width="{total - 1}" height="{tall - 1}" rx="6"/>'
    return "\n".join([head, STYLE, back, *parts, "</svg>"]) + "\n"


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
    two.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.command == "summarise":
        summarise(given.files, given.out)
        return
    subjects = read(given.file)
    print("\n".join(report(subjects)))
    if given.figure is not None:
        given.figure.write_text(figure(subjects), "utf-8")


if __name__ == "__main__":
    main()
