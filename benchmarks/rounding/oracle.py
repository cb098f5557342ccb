"""How much of balanced's KL knowledge of the inputs would save: a bound, for no merge has that knowledge.

    python -m benchmarks.rounding.oracle --dir DIR --adapter dense-a-1 [--rows 24]

DIR holds the adapters of `train`; the dense models only. Each weight's inputs x are gathered from `rows`
sequences of the text that is trained on, through the trained model: C is the mean of x xT. E is what balanced
rounding leaves, W' - W - dW. Needs numba.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import numba
import torch
from torch import Tensor

from benchmarks.rounding.study import Subject, apply, divergence, merged_by
from benchmarks.rounding.thresholds import steps
from benchmarks.rounding.train import base_model, sequences
from loudmerge.planning.closing import closing

Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(W, dW, balanced's W', C, mean x) to another W'; the last of them is not held to the two neighbours."""


class Inputs:
    """C and the mean of x for each parameter that a module multiplies by."""

    def __init__(self, model: Any, names: set[str], rows: Tensor) -> None:
        self.second: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        modules = {f"{name}.weight": module for name, module in model.named_modules()}
        hooks = [modules[name].register_forward_pre_hook(self._hook(name, rows.numel())) for name in names]
        with torch.no_grad():
            for row in rows:
                model(input_ids=row[None])
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str, tokens: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def gather(_module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2)
            self.second[name] = self.second.get(name, torch.zeros(())) + x.T @ x / tokens
            self.mean[name] = self.mean.get(name, torch.zeros(())) + x.sum(0) / tokens

        return gather


def without(directions: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """W' with no error along some orthonormal directions, (inputs, count), of C and the mean."""

    def change(weight: Tensor, delta: Tensor, found: Tensor, second: Tensor, mean: Tensor) -> Tensor:
        error, some = found - weight - delta, directions(second, mean)
        return found - (error @ some) @ some.T

    return change


def along_mean(_second: Tensor, mean: Tensor) -> Tensor:
    """The mean input."""
    return (mean / mean.norm())[:, None]


def largest_inputs(second: Tensor, _mean: Tensor) -> Tensor:
    """The 8 inputs with the largest squares."""
    return torch.eye(len(second))[:, second.diag().topk(8).indices]


def main_directions(second: Tensor, _mean: Tensor) -> Tensor:
    """The 16 first eigenvectors of C."""
    return torch.linalg.eigh(second)[1][:, -16:]


@numba.njit(parallel=True, fastmath=True)  # type: ignore[untyped-decorator]
@no_type_check
def descend(error: Any, flip: Any, second: Any, product: Any, sweeps: int) -> None:
    """Takes the other neighbour wherever that makes E C ET less. flip: what it adds to E; product: E C."""
    for row in numba.prange(error.shape[0]):
        for _ in range(sweeps):
            for one in range(error.shape[1]):
                step = flip[row, one]
                if 2 * step * product[row, one] + step * step * second[one, one] < 0:
                    error[row, one] += step
                    flip[row, one] = -step
                    product[row] += step * second[one]


def least_output_error(weight: Tensor, delta: Tensor, found: Tensor, second: Tensor, _mean: Tensor) -> Tensor:
    """A least tr(E C ET) from balanced on, each element one of its two neighbours."""
    near, unit, _ = steps(weight, delta)
    error, flip = found - weight - delta, torch.where(found == near, unit, -unit)
    product = error @ second
    descend(error.numpy(), flip.numpy(), second.numpy(), product.numpy(), 8)
    return torch.where(flip * unit < 0, near + unit, near)


CHANGES: dict[str, Change] = {
    "balanced": lambda _weight, _delta, found, _second, _mean: found,
    "no error along the mean input": without(along_mean),
    "no error in the 8 largest inputs": without(largest_inputs),
    "no error along 16 eigenvectors of C": without(main_directions),
    "two neighbours, least tr(E C ET)": least_output_error,
}


def main() -> None:
    """Prints a line for each of CHANGES."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", type=int, default=24)
    given = parser.parse_args()
    kind = given.adapter.split("-")[0]
    sites = torch.load(given.dir / f"{given.adapter}.pt", weights_only=True)["sites"]
    text = sequences(base_model(kind, given.dir)[1])[: given.rows]
    subject = Subject(kind, given.dir)
    base, last = subject.log_probs(), closing(subject.weights)
    apply(subject, sites, "exact", 0)
    trained = subject.log_probs()
    inputs = Inputs(subject.model, {site["parameter"] for site in sites}, text)
    for label, change in CHANGES.items():
        draw = torch.Generator().manual_seed(0)
        for site in sites:
            name, a, b, scaling = site["parameter"], site["a"], site["b"], site["scaling"]
            weight = subject.weights[name]
            found = merged_by("BALANCED", weight, b, a, scaling, draw, is_closing=name in last)
            second, mean = inputs.second[name], inputs.mean[name]
            subject.put(name, change(weight, scaling * (b @ a), found, second, mean))
        merged = subject.log_probs()
        ratio = divergence(base, merged) / divergence(base, trained)
        print(f"{label:36s} kl {divergence(trained, merged):.2e} base||merged {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
