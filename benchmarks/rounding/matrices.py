"""KL of merges in which one matrix is rounded and all others are W + dW in float32: where KL comes from.

python -m benchmarks.rounding.matrices --dir DIR --adapter dense-g-25 [--match down_proj] [--seeds 2]

DIR holds the adapters of `train`. Prints a line for each matrix (or fused experts) whose name has `match` in
it: the KL of balanced and of stochastic rounding, each the mean of the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch

from benchmarks.rounding.study import Subject, apply, divergence

ROUNDINGS = ("BALANCED", "STOCHASTIC")


def main() -> None:
    """Rounds one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--match", default="")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    sites = torch.load(given.dir / f"{given.adapter}.pt", weights_only=True)["sites"]
    chosen = [site for site in sites if given.match in site["parameter"]]
    if not chosen:
        parser.error(f"found no matrix with {given.match!r} in its name, such as {sites[0]['parameter']}")
    subject = Subject(given.adapter.split("-")[0], given.dir)
    apply(subject, sites, "exact", 0)
    trained = subject.log_probs()
    for site in chosen:
        found = []
        for rounding in ROUNDINGS:
            draws = []
            for seed in range(given.seeds):
                apply(subject, [site], rounding, seed)
                draws.append(divergence(trained, subject.log_probs()))
            found.append(f"{rounding.lower()} {mean(draws):.2e}")
        apply(subject, [site], "exact", 0)
        print(site["parameter"], *found, flush=True)


if __name__ == "__main__":
    main()
