"""The arithmetic of a merge, in float32: one expert's factors, and W' = round(W + s * L @ R).

Pure tensor functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loudmerge.balance import Bands
from loudmerge.layout import Axes, LoraBLayout, Span
from loudmerge.plan import Site, Term
from loudmerge.rounding import DROPPED, Dither, Draws, stochastic_

BLOCK_ELEMENTS = 3 << 17
"""Elements that are worked on at a time: a block's few float32 buffers then stay in a core's cache."""


@dataclass(frozen=True)
class Factors:
    """One site's factors, ready to slice: left (experts, out, rank), right (experts, rank, in).

    Views of the pair: a copy of all experts would cost more memory and time than the slices that are used.
    A dense pair has one expert.
    """

    left: Tensor
    right: Tensor
    scaling: float
    peft_rounds_delta: bool = True

    @property
    def nbytes(self) -> int:
        return self.left.untyped_storage().nbytes() + self.right.untyped_storage().nbytes()


def factors(site: Site, lora_a: Tensor, lora_b: Tensor) -> Factors:
    """Unpacks a pair into one factor pair for each expert.

    lora_a: (rank * experts, a), lora_b: (b, rank * experts). See loudmerge.layout for the packing.
    """
    experts = max(site.num_experts, 1)
    a = lora_a.to(torch.float32).view(experts, site.rank, -1)
    b = unpack_lora_b(lora_b.to(torch.float32), experts, site.rank, site.lora_b_layout)
    if site.reads_input:
        return Factors(b, a, site.scaling, site.peft_rounds_delta)
    return Factors(a.transpose(1, 2), b.transpose(1, 2), site.scaling, site.peft_rounds_delta)


def unpack_lora_b(lora_b: Tensor, experts: int, rank: int, layout: LoraBLayout | None) -> Tensor:
    """(b, rank * experts) -> (experts, b, rank), a view."""
    if layout is LoraBLayout.GROUPED_BY_EXPERT:
        return lora_b.view(-1, experts, rank).permute(1, 0, 2)
    return lora_b.view(-1, rank, experts).permute(2, 0, 1)


@dataclass
class Kept:
    """Sums for delta_kept: <W' - W, dW> and <dW, dW> over what was merged."""

    along: float = 0.0
    total: float = 0.0

    def add(self, other: Kept) -> None:
        self.along += other.along
        self.total += other.total

    @property
    def ratio(self) -> float:
        """1 where the file holds the whole update, 0 where rounding swallowed it; 1 for no update at all."""
        return self.along / self.total if self.total else 1.0


class Workspace:
    """Float32 buffers of one thread, reused from block to block."""

    def __init__(self, device: torch.device) -> None:
        self._held: list[Tensor] = []
        self._blocks: dict[tuple[int, int], list[Tensor]] = {}
        self._device = device

    def blocks(self, rows: int, columns: int) -> list[Tensor]:
        """Four buffers (rows, columns) whose content is undefined."""
        shape, count = (rows, columns), rows * columns
        if not self._held or self._held[0].numel() < count:
            self._held = [torch.empty(count, device=self._device) for _ in range(4)]
            self._blocks = {}
        if shape not in self._blocks:
            self._blocks[shape] = [held[:count].view(shape) for held in self._held]
        return self._blocks[shape]


@dataclass(frozen=True)
class Update:
    """What one term adds to its matrix: scaling * rows @ columns, along the axes that the disk has.

    rows: (rows, rank), columns: (rank, columns), of the part of the matrix that the term is for.
    """

    term: Term
    rows: Tensor
    columns: Tensor
    scaling: float
    peft_rounds_delta: bool

    @classmethod
    def of(cls, term: Term, found: Factors) -> Update:
        """Sliced once, for all pieces and looks at the matrix."""
        expert, scaling = max(term.expert, 0), found.scaling
        left = found.left[expert][term.rows.places].contiguous()
        right = found.right[expert].contiguous()
        if math.frexp(scaling)[0] == 0.5:
            # A power of two moves the exponent only, wherever it is applied, and the factor is the smallest.
            left, scaling = left * scaling, 1.0
        factors = (left, right) if term.axes is Axes.OUT_IN else (right.T, left.T)
        return cls(term, *factors, scaling, found.peft_rounds_delta)

    def apply(
        self,
        matrix: Tensor,
        first_row: int,
        rounding: str,
        space: Workspace,
        out: Tensor,
        dither: Dither | None = None,
    ) -> Kept:
        """Updates the part of `matrix` that the term is for, rounding into `out`.

        matrix, out: rows first_row, first_row + 1, … of a matrix on disk, (rows, d2); the base's, and OUT's.
        Both may be the same tensor.
        rounding: "nearest" rounds W + dW once, "peft" rounds dW first where PEFT's merge does, "stochastic"
        and "balanced" draw from `dither`, for which the rows are the matrix's. For "balanced" no band of
        outputs (loudmerge.balance) may be cut.
        """
        place = self.term.out
        if self.term.axes is Axes.OUT_IN:
            inside = _inside(place, first_row, matrix.shape[0])
            if inside.count <= 0:
                return Kept()
            local = Span(inside.start - first_row, inside.count, place.step)
            first = (inside.start - place.start) // place.step
            source, target = matrix[local.places], out[local.places]
            rows = self.rows[first : first + inside.count]
            places, axis = (inside, Span(0, matrix.shape[1])), 0
        else:
            source, target = matrix[:, place.places], out[:, place.places]
            rows = self.rows[first_row : first_row + matrix.shape[0]]
            places, axis = (Span(first_row, matrix.shape[0]), place), 1
        drawn = None
        if rounding in {"stochastic", "balanced"} and out.dtype in DROPPED:
            if dither is None:
                raise ValueError(f"{rounding} rounding needs a dither")
            bands = Bands(places[axis], axis) if rounding == "balanced" else None
            drawn = _Drawn(dither.of(*places), bands)
        twice = rounding == "peft" and self.peft_rounds_delta
        return _add_blocks(source, target, rows, self.columns, self.scaling, space, twice=twice, drawn=drawn)


@dataclass(frozen=True)
class _Drawn:
    """How a part of a matrix is rounded by chance: each element for itself, or balanced in bands."""

    draws: Draws
    bands: Bands | None

    def round_(
        self, first: int, values: Tensor, weight: Tensor, delta: Tensor, scratch: Tensor, dtype: torch.dtype
    ) -> None:
        """Rounds `values`, from the row `first` on, in place; changes `scratch`."""
        drawn = self.draws.fill(first, scratch.view(torch.int32))
        if self.bands is None:
            stochastic_(values, drawn, dtype)
        else:
            self.bands.round_(values, weight, delta, drawn, dtype)


def _inside(span: Span, first: int, count: int) -> Span:
    """The part of a span that lies in first, …, first + count - 1."""
    skip = max(0, -(-(first - span.start) // span.step))
    end = min(span.count, -(-(first + count - span.start) // span.step))
    return Span(span.start + skip * span.step, end - skip, span.step)


def _add_blocks(
    source: Tensor,
    target: Tensor,
    rows: Tensor,
    columns: Tensor,
    scaling: float,
    space: Workspace,
    *,
    twice: bool,
    drawn: _Drawn | None,
) -> Kept:
    kept = Kept()
    for part in _parts(source, drawn.bands if drawn is not None else None):
        block = source[part]
        delta, weight, result, scratch = space.blocks(*block.shape)
        torch.mm(rows[part], columns, out=delta)
        if scaling != 1.0:
            delta.mul_(scaling)
        weight.copy_(block)
        added = delta.to(source.dtype) if twice else delta
        torch.add(weight, added, out=result)
        if drawn is not None:
            drawn.round_(part.start, result, weight, delta, scratch, target.dtype)
        rounded = target[part]
        rounded.copy_(result)
        result.copy_(rounded)
        result.sub_(weight)
        kept.along += torch.dot(result.view(-1), delta.view(-1)).item()
        kept.total += torch.dot(delta.view(-1), delta.view(-1)).item()
    return kept


def _parts(source: Tensor, bands: Bands | None) -> Iterator[slice]:
    """The rows that are worked on at a time: blocks, or the bands that lie across them."""
    if bands is not None and bands.axis == 0:
        yield from bands.parts()
        return
    step = max(1, BLOCK_ELEMENTS // source.shape[1])
    for start in range(0, source.shape[0], step):
        yield slice(start, start + step)


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m * (W + dW) / ||W + dW||, the norm over the in axis; all in float32.

    weight, delta: (out, in), magnitude: (out,).
    Source: peft/tuners/lora/variants.py, `DoraLinearVariant.merge_safe`.
    """
    summed = weight + delta
    norm: Tensor = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
    return magnitude[:, None] / norm * summed
