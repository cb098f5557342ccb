"""By which rules a merge may have rounded a matrix, as its plan, its rounding and what it keeps say."""

from __future__ import annotations

import math

from loudmerge.arithmetic.auto import CLOSING_KEEPS, NEAREST_KEEPS
from loudmerge.planning.plan import OutputTensor
from loudmerge.verifying.recompute import Matrix

DOUBT = 1e-3
"""How far what the merge found to be kept, in float32, may lie from the exact share."""


def rules_of(matrix: Matrix, rounding: str) -> tuple[str, ...]:
    """The rules that a matrix may have been rounded by under this rounding, the likelier first."""
    output = matrix.output
    plain = output.bias is not None or output.dora is not None or output.dtype not in {"BF16", "F16"}
    plain |= rounding == "auto" and output.head
    if rounding in {"auto", "stochastic", "balanced"} and plain:
        return ("nearest",)
    if rounding == "balanced":
        return (output.balanced,)
    if rounding == "peft" and all(term.expert < 0 for term in matrix.terms):
        # PEFT adds a Linear's float32 dW in place, which rounds once, and rounds it first only where the
        # adapter is held in half precision. A bias is always added in place (lora/layer.py, Linear.merge).
        return ("nearest",) if matrix.output.bias is not None else ("peft", "nearest")
    return (rounding,)


def rules_of_auto(output: OutputTensor, kept: float) -> tuple[str, ...]:
    """What `auto` takes: one rule, or those on both sides of a limit. kept: as `Judge.sampled` gives it."""
    limit = CLOSING_KEEPS if output.closing else NEAREST_KEEPS
    spans = (
        ("nearest", NEAREST_KEEPS, math.inf),
        *([("stochastic", limit, NEAREST_KEEPS)] if output.closing else []),
        (output.balanced, -math.inf, limit),
    )
    found = [rule for rule, low, high in spans if low - DOUBT <= kept <= high + DOUBT]
    return tuple(dict.fromkeys(found or [rule for rule, _, _ in spans]))
