"""The arithmetic of a merge, in float32: one expert's factors, and W' = round(W + s * L @ R).

Pure tensor functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loudmerge.arithmetic.balance import USUAL, Bands
from loudmerge.arithmetic.compiled import Drawn, Kernel, Sums, as_drawn, kernel_for
from loudmerge.arithmetic.rounding import DROPPED, Dither, Draws, stochastic_
from loudmerge.layout import Axes, LoraBLayout, Span
from loudmerge.planning.plan import Site, Term
from loudmerge.system.memory import contiguous

BLOCK_ELEMENTS = 3 << 17
"""Elements that are worked on at a time: a block's few float32 buffers then stay in a core's cache."""

BALANCED_FROM = 1 << 15
"""Elements from which on the compiled kernel is worth being loaded, half a second once, to balance them."""


@dataclass(frozen=True)
class Factors:
    """One site's factors, ready to slice: left (experts, out, rank), right (experts, rank, in).

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
    a = contiguous(lora_a, torch.float32).view(experts, site.rank, -1)
    b = unpack_lora_b(contiguous(lora_b, torch.float32), experts, site.rank, site.lora_b_layout)
    if site.reads_input:
        return Factors(b, a, site.scaling, site.peft_rounds_delta)
    return Factors(a.transpose(1, 2), b.transpose(1, 2), site.scaling, site.peft_rounds_delta)


def unpack_lora_b(lora_b: Tensor, experts: int, rank: int, layout: LoraBLayout | None) -> Tensor:
    """(b, rank * experts) -> (experts, b, rank)."""
    if layout is LoraBLayout.GROUPED_BY_EXPERT:
        return lora_b.view(-1, experts, rank).permute(1, 0, 2)
    # Copied: every number of an expert lies in another cache line, so that each expert's would read them all.
    return contiguous(lora_b.view(-1, experts).T, lora_b.dtype).view(experts, -1, rank)


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
            self._held = [torch.empty(count, dtype=torch.float32, device=self._device) for _ in range(4)]
            self._blocks = {}
        if shape not in self._blocks:
            self._blocks[shape] = [held[:count].view(shape) for held in self._held]
        return self._blocks[shape]


@dataclass(frozen=True)
class Update:
    """What one term adds to its matrix: scaling * rows @ columns, along the axes that the disk has.

    rows: (rows, rank), columns: (rank, columns), of the part of the matrix that the term is for.
    is_usual: whether float32 holds the squares, as far as the largest factors tell.
    """

    term: Term
    rows: Tensor
    columns: Tensor
    scaling: float
    peft_rounds_delta: bool
    is_usual: bool = True

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
        most = _largest(left) * _largest(right) * abs(scaling)
        usual = most == 0.0 or USUAL[0] <= most <= USUAL[1]
        return cls(term, *factors, scaling, found.peft_rounds_delta, usual)

    def apply(
        self,
        matrix: Tensor,
        first_row: int,
        rounding: str,
        space: Workspace,
        out: Tensor,
        dither: Dither | None = None,
        *,
        compiled: bool = False,
    ) -> Kept:
        """Updates the part of `matrix` that the term is for, rounding into `out`.

        matrix, out: rows first_row, first_row + 1, … of a matrix on disk, (rows, d2); the base's, and OUT's.
        Both may be the same tensor.
        rounding: "nearest" rounds W + dW once, "peft" rounds dW first where PEFT's merge does, "stochastic"
        and "balanced" draw from `dither`, for which the rows are the matrix's. For "balanced" no band of
        outputs (loudmerge.arithmetic.balance) may be cut.
        compiled: "nearest", too, is left to the compiled kernel. The bytes are the same, and the sums but for
        their last digits.
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
        draws = bands = None
        if rounding in {"stochastic", "balanced"} and out.dtype in DROPPED:
            if dither is None:
                raise ValueError(f"{rounding} rounding needs a dither")
            draws = dither.of(*places)
            bands = Bands(places[axis], axis) if rounding == "balanced" else None
        faster = source.numel() >= BALANCED_FROM if bands is not None else compiled and rounding == "nearest"
        kernel = kernel_for(source, target) if faster and self.is_usual else None
        twice = rounding == "peft" and self.peft_rounds_delta
        rounds = _Rounding(twice, draws, bands, kernel, as_drawn(draws) if kernel and draws else None)
        return _add_blocks(source, target, rows, self.columns, self.scaling, space, rounds)


def _largest(factor: Tensor) -> float:
    return factor.abs().max().item() if factor.numel() else 0.0


@dataclass(frozen=True)
class _Rounding:
    """How a part of a matrix is rounded.

    twice: dW first. draws: by chance, each element for itself or, with bands, balanced in these. kernel: what
    computes it instead of tensor functions, with the draws as it takes them.
    """

    twice: bool
    draws: Draws | None
    bands: Bands | None
    kernel: Kernel | None
    drawn: Drawn | None

    def parts(self, source: Tensor) -> Iterator[slice]:
        """The rows that are worked on at a time. No band of them is cut."""
        rows, columns = source.shape
        step = max(1, BLOCK_ELEMENTS // columns)
        if self.bands is None or self.bands.axis == 1:
            yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
            return
        start = 0
        for band in self.bands.parts():
            if band.stop - start > step and band.start > start:
                yield slice(start, band.start)
                start = band.start
        yield slice(start, rows)

    def add(self, part: slice, source: Tensor, delta: Tensor, target: Tensor, space: Workspace) -> Kept:
        """Writes source + delta to `target`, all of these rows."""
        bands = self.bands and self.bands.of(part)
        sums = self._by_kernel(part.start, source, delta, target, bands)
        if sums is None:
            sums = self._by_tensors(part.start, source, delta, target, bands, space)
        return Kept(*sums)

    def _by_kernel(
        self, first: int, source: Tensor, delta: Tensor, target: Tensor, bands: Bands | None
    ) -> Sums | None:
        if self.kernel is None:
            return None
        if self.drawn is None or bands is None:
            return self.kernel.nearest(source, delta, target)
        return self.kernel.balanced(source, delta, target, self.drawn, first, bands)

    def _by_tensors(
        self, first: int, source: Tensor, delta: Tensor, target: Tensor, bands: Bands | None, space: Workspace
    ) -> Sums:
        _, weight, result, scratch = space.blocks(*source.shape)
        weight.copy_(source)
        torch.add(weight, delta.to(source.dtype) if self.twice else delta, out=result)
        if self.draws is not None:
            drawn = self.draws.fill(first, scratch.view(torch.int32))
            if bands is None:
                stochastic_(result, drawn, target.dtype)
            else:
                bands.round_(result, weight, delta, drawn, target.dtype)
        target.copy_(result)
        result.copy_(target)
        result.sub_(weight)
        return _sums(result.view(-1), delta.view(-1))


def _sums(change: Tensor, delta: Tensor) -> Sums:
    along, total = torch.dot(change, delta).item(), torch.dot(delta, delta).item()
    if math.isfinite(along + total) and total:
        return along, total
    # Squares of what float32 can hold that it cannot.
    change, delta = change.double(), delta.double()
    return torch.dot(change, delta).item(), torch.dot(delta, delta).item()


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
    rounds: _Rounding,
) -> Kept:
    kept = Kept()
    for part in rounds.parts(source):
        block = source[part]
        delta = space.blocks(*block.shape)[0]
        torch.mm(rows[part], columns, out=delta)
        if scaling != 1.0:
            delta.mul_(scaling)
        kept.add(rounds.add(part, block, delta, target[part], space))
    return kept


def dora_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m * (W + dW) / ||W + dW||, the norm over the in axis; all in float32.

    weight, delta: (out, in), magnitude: (out,).
    Source: peft/tuners/lora/variants.py, `DoraLinearVariant.merge_safe`.
    """
    summed = weight + delta
    norm: Tensor = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
    return magnitude[:, None] / norm * summed
