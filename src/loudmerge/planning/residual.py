"""Whether a LoRA holds a part of the base's own weight: it was trained on a base that has it no more.

PiSSA, OLoRA and CorDA begin by moving a projection of each weight into the LoRA: W = W_res + c * B0 A0, where
Q_B' W Q_A = c * Q_B' B0 A0 Q_A for orthonormal Q_B, Q_A of B0's columns and A0's rows. c is the scaling, but
for OLoRA, where it is 1 (peft/tuners/lora/layer.py, `pissa_init`, `corda_init`, `olora_init`). Added to W the
part counts twice.

PEFT has the name in init_lora_weights, but for its conversion they are saved with `true` there, as are
LLaMA-Factory's pissa_init and pissa_backup, and ms-swift's initial_model. Training moves a LoRA away from W:
CorDA's, which may be the smallest, soonest. LoRA-GA and LoftQ move no projection. So this tells of the first
two, and of the others init_lora_weights alone does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from loudmerge.errors import Problem
from loudmerge.layout import Axes
from loudmerge.planning.sites import Placed
from loudmerge.reading.initialisations import CONVERTED
from loudmerge.system.arrays import Floats, floats, read_array
from loudmerge.system.memory import Array
from loudmerge.system.tensorfile import FileReader

MOST_SITES = 16
"""So many weights are read at most."""

ENOUGH = 1024
"""Numbers that are compared, where so many weights have them: of rank 16 those of four weights."""

LARGEST = 1 << 26
"""Elements of the largest weight that is read: 256 MiB as float32."""

FEWEST = 48
"""Numbers that have to agree: a few do by chance."""

SMALL = 1e-3
"""Of the largest singular value: an update with smaller ones alone in a direction says nothing of it."""

APART = 0.7
"""Relative distance of projection and update: 0 as training begins. It was 0.5 at most after four steps at a
hundred times a usual learning rate, and 0.95 to 12 for what began beside the weight."""


def parts_of_weights(placed: Iterable[Placed]) -> Iterator[Problem]:
    """A problem where the LoRAs, taken together, hold the weights that they are for in their subspaces."""
    chosen = _sample([item for item in placed if _is_whole(item)])
    apart, size = np.zeros(2), np.zeros(2)
    numbers = 0
    # numpy warns of what is not finite; it is looked for below.
    with FileReader() as reader, np.errstate(over="ignore", invalid="ignore"):
        for item in chosen:
            weight, a, b = (
                floats(read_array(reader, entry)) for entry in (item.slot.entry, item.pair.a, item.pair.b)
            )
            held, update = projections(weight if item.slot.axes is Axes.OUT_IN else weight.T, a, b)
            if not np.isfinite(update).all():
                continue  # refused once it is read whole
            parts = np.linalg.svd(update, compute_uv=False)
            numbers += int((parts > SMALL * parts.max()).sum()) ** 2
            for way, scaling in enumerate((item.scaling, 1.0)):
                apart[way] += np.square(held - scaling * update).sum()
                size[way] += np.square(scaling * update).sum()
    if numbers >= FEWEST and bool((apart < APART**2 * size).any()):
        yield _held(chosen[0])


def projections(weight: Floats, a: Floats, b: Floats) -> tuple[Array, Array]:
    """The weight, and b @ a, in orthonormal bases of b's columns and a's rows.

    weight: (out, in), a: (rank, in), b: (out, rank), in float32. Returns two (min(out, rank), min(rank, in)),
    in float64.
    """
    left, coefficients_b = np.linalg.qr(b)
    right, coefficients_a = np.linalg.qr(a.T)
    held, update = left.T @ weight @ right, coefficients_b @ coefficients_a.T
    return held.astype(np.float64), update.astype(np.float64)


def _sample(whole: Sequence[Placed]) -> Sequence[Placed]:
    """Some of them, spread evenly."""
    if not whole:
        return whole
    most = min(MOST_SITES, max(2, ENOUGH // whole[0].rank ** 2))
    return whole[:: -(-len(whole) // most)]


def _is_whole(item: Placed) -> bool:
    """Whether the LoRA is a Linear's, whose weight lies on disk by itself."""
    entry, slot = item.slot.entry, item.slot
    if item.pair.embedding or slot.index >= 0 or len(entry.shape) != 2:
        return False
    out = entry.shape[0 if slot.axes is Axes.OUT_IN else 1]
    # A LoRA of full rank has no subspace: it may be anything.
    low = item.rank < min(entry.shape)
    return low and slot.out.count == out and entry.shape[0] * entry.shape[1] <= LARGEST


def _held(item: Placed) -> Problem:
    return Problem(
        "unsupported-adapter",
        f"{item.pair.a} for {item.slot.entry}",
        "a LoRA that holds a part of the weight itself: it began as PiSSA, OLoRA or CorDA, on a base without"
        " that part, whatever init_lora_weights says",
        "a LoRA beside the whole weight",
        f"{CONVERTED} Or give as BASE the model without these parts, if it was saved.",
    )
