"""Each expert's factors, of the pair of a site as it lies in the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loudmerge.arithmetic.sizes import USUAL
from loudmerge.layout import Axes, LoraBLayout
from loudmerge.planning.plan import Site, Term
from loudmerge.system.arrays import Floats, floats
from loudmerge.system.memory import Array, turned


@dataclass(frozen=True)
class Factors:
    """One site's factors, ready to slice: left (experts, out, rank), right (experts, rank, in).

    A dense pair has one expert.
    """

    left: Floats
    right: Floats
    scaling: float
    peft_rounds_delta: bool = True

    def of(self, term: Term) -> Product:
        """One term's, to be made once for all pieces and looks at the matrix."""
        expert, scaling = max(term.expert, 0), self.scaling
        left = np.ascontiguousarray(self.left[expert][term.rows.places])
        right = np.ascontiguousarray(self.right[expert])
        if math.frexp(scaling)[0] == 0.5:
            # A power of two moves the exponent only, wherever it is applied, and the factor is the smallest.
            with np.errstate(over="ignore"):
                left, scaling = left * np.float32(scaling), 1.0
        most = _largest(left) * _largest(right) * abs(scaling)
        usual = most == 0.0 or USUAL[0] <= most <= USUAL[1]
        rows, columns = (left, right) if term.axes is Axes.OUT_IN else (right.T, left.T)
        return Product(rows, columns, scaling, usual)


class Product(NamedTuple):
    """scaling * rows @ columns, along the axes that the disk has: (rows, rank) and (rank, columns).

    is_usual: whether float32 holds the squares, as far as the largest factors tell.
    """

    rows: Floats
    columns: Floats
    scaling: float
    is_usual: bool


def _largest(factor: Floats) -> float:
    return float(np.abs(factor).max(initial=0.0))


def multiply(left: Floats, right: Floats, scaling: float, out: Floats) -> None:
    """Writes scaling * left @ right to `out`. What float32 cannot hold becomes an infinity or a NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(left, right, out=out)
        if scaling != 1.0:
            np.multiply(out, np.float32(scaling), out=out)


def factors(site: Site, lora_a: Array, lora_b: Array) -> Factors:
    """Unpacks a pair into one factor pair for each expert.

    lora_a: (rank * experts, a), lora_b: (b, rank * experts). See loudmerge.layout for the packing.
    """
    experts = max(site.num_experts, 1)
    a = floats(lora_a).reshape(experts, site.rank, -1)
    b = unpack_lora_b(floats(lora_b), experts, site.rank, site.lora_b_layout)
    if site.reads_input:
        return Factors(b, a, site.scaling, site.peft_rounds_delta)
    return Factors(a.transpose(0, 2, 1), b.transpose(0, 2, 1), site.scaling, site.peft_rounds_delta)


def unpack_lora_b(lora_b: Array, experts: int, rank: int, layout: LoraBLayout | None) -> Array:
    """(b, rank * experts) -> (experts, b, rank)."""
    if layout is LoraBLayout.GROUPED_BY_EXPERT:
        each: Array = lora_b.reshape(-1, experts, rank).transpose(1, 0, 2)
        return each
    # Copied: every number of an expert lies in another cache line, so that each expert's would read them all.
    return turned(lora_b.reshape(-1, experts)).reshape(experts, -1, rank)
