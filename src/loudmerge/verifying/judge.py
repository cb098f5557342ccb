"""Compares one matrix of OUT with its recomputed float64 values, element by element.

Works in blocks of rows that stay in the processor's cache. An element equal to the rounded float64 value is
right. The few that are not (those near a tie of the rounding) are judged by `bounds`, with the error that the
merge's float32 arithmetic may have made there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loudmerge.arithmetic.auto import sampled
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import Term
from loudmerge.verifying import bounds, rebalance
from loudmerge.verifying.recompute import (
    TORCH_DTYPES,
    Buffers,
    FactorCache,
    Matrix,
    RawFiles,
    bias_patch,
    delta_block,
    read_tensor,
)
from loudmerge.verifying.redraw import Redraw, make_table
from loudmerge.verifying.rules import rules_of, rules_of_auto

BLOCK = 1 << 17
"""Elements worked on at a time: 1 MiB of float64."""

_JUDGED_AT_ONCE = 1 << 15

_FEW = 4096
"""Of fewer elements the merge may have found any share to be kept: one near a tie counts for much."""


@dataclass
class MatrixResult:
    """What was found in one matrix.

    wrong: elements. worst: the largest error in units in the last place. first: (row, column), found and
    expected value of the first wrong element. kept: the sums of (W' - W) d and of d d. rounding: the rule.
    settled: whether the merge can have taken no other.
    """

    wrong: int = 0
    worst: float = 0.0
    first: tuple[int, int] | None = None
    found: float = 0.0
    expected: float = 0.0
    kept: tuple[float, float] = (0.0, 0.0)
    rounding: str = "nearest"
    settled: bool = True

    @property
    def ok(self) -> bool:
        return not self.wrong


class _Block(NamedTuple):
    """Rows of the matrix from `first` on: weight, delta, value (float64) and written, all (rows, columns)."""

    first: int
    weight: Tensor
    delta: Tensor
    value: Tensor
    written: Tensor


def check_matrix(
    matrix: Matrix, rounding: str, files: RawFiles, factors: FactorCache, out: Path, space: Buffers
) -> MatrixResult:
    """Compares every element. rounding: the plan's; where it leaves several, one holds throughout."""

    def judge(rule: str) -> Judge:
        return Judge(matrix, rule, files, factors, out, space)

    rules = rules_of(matrix, rounding)
    if rounding == "auto" and rules != ("nearest",):
        rules = rules_of_auto(matrix.output, judge("nearest").sampled())
    *others, last = rules
    for rule in others:
        result = judge(rule).run(to_the_end=False)
        if result.ok:
            return replace(result, settled=False)
    result = judge(last).run()
    if result.ok or not others:
        return replace(result, settled=not others)
    ends = [*(judge(rule).run() for rule in others), result]
    return min(ends, key=lambda result: result.wrong)


class _Elements(NamedTuple):
    """Single elements of a matrix, all (elements,): where they are, and their part of a block."""

    rows: Tensor
    columns: Tensor
    weight: Tensor
    delta: Tensor
    value: Tensor
    written: Tensor


class _Scale(NamedTuple):
    """DoRA's m / norm along the rows (axis 0: (rows, 1)) or the columns (axis 1: (1, columns)).

    relative: how far the norm in float32 may lie from the exact one, relative to it.
    """

    ratio: Tensor
    relative: Tensor
    axis: int

    def rows(self, first: int, last: int) -> Tensor:
        return self.ratio[first:last] if self.axis == 0 else self.ratio

    def error(self, found: _Elements, error: Tensor) -> Tensor:
        """How far the float32 ratio * (W + d) may lie from the exact one. error: that of d."""
        at = found.rows if self.axis == 0 else found.columns
        ratio, relative = self.ratio.view(-1)[at], self.relative.view(-1)[at]
        inner = bounds.sum_error(found.weight + found.delta, error)
        # m, the quotient and the product are rounded once each; 1 % covers the products of these errors.
        return 1.01 * (ratio.abs() * inner + found.value.abs() * (relative + 3 * bounds.UNIT))


class Judge:
    """One matrix under one rule of rounding: nearest, stochastic, balanced or peft. `run` once."""

    def __init__(
        self,
        matrix: Matrix,
        rounding: str,
        files: RawFiles,
        factors: FactorCache,
        out: Path,
        space: Buffers,
    ) -> None:
        output = matrix.output
        self._matrix, self._rounding, self._files, self._factors = matrix, rounding, files, factors
        self._space = space
        self._written = (out / output.shard, output.key, TORCH_DTYPES[output.dtype])
        self._source = (output.source.file, output.source.name, TORCH_DTYPES[output.source.dtype])
        self._patches = [factors.patch(term) for term in matrix.terms]
        if output.bias is not None:
            self._patches.append(
                bias_patch(read_tensor(output.bias[0].file, output.bias[0].name), output.bias[1])
            )
        self._tokens: dict[int, Tensor] = {}
        if output.token_rows is not None:
            rows = read_tensor(output.token_rows[1].file, output.token_rows[1].name).to(torch.float64)
            self._tokens = dict(zip(output.token_rows[0], rows, strict=True))
        self._scale = self._dora_scale() if output.dora is not None else None
        self._redraw = None
        if rounding in {"stochastic", "balanced"}:
            self._redraw = Redraw(output.key, max(matrix.index, 0), make_table())
        self._pending: list[_Elements] = []
        self._doubts: list[list[Tensor]] = []
        self._waiting = 0
        self._result = MatrixResult(rounding=rounding)

    def run(self, *, to_the_end: bool = True) -> MatrixResult:
        """Reads and compares the whole matrix; else only up to a block where something is wrong."""
        for first, last in self._spans():
            self._compare(self._block(first, last))
            if not to_the_end:
                self._settle()
                if self._result.wrong:
                    return self._result
        self._settle()
        return self._result

    def sampled(self) -> float:
        """The share that the nearest keeps of the update of the rows that `auto` looks at; nan for a few."""
        dtype, count, along, total = self._written[2], 0, 0.0, 0.0
        for first, last in sampled(self._matrix.rows):
            weight, delta, value = self._sum(first, last)
            change = bounds.rounded(value, dtype).double().sub_(weight)
            along += float(torch.dot(change.view(-1), delta.view(-1)))
            total += float(torch.dot(delta.view(-1), delta.view(-1)))
            count += delta.numel()
        if count < _FEW:
            return math.nan
        return along / total if total else 1.0

    def _untouched(self, found: _Elements) -> Tensor:
        """What no term updates is rounded to the nearest, if at all."""
        exact = torch.zeros_like(found.value)
        return (found.delta == 0) & bounds.is_nearest(found.written, found.value, exact)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The first and the last + 1 row of every block."""
        step = max(1, BLOCK // self._matrix.columns)
        if self._rounding == "balanced":
            step = max(rebalance.BAND, step // rebalance.BAND * rebalance.BAND)
        for first in range(0, self._matrix.rows, step):
            yield first, min(first + step, self._matrix.rows)

    def _take(self, name: str, first: int, last: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self._space.take(name, dtype, last - first, self._matrix.columns)

    def _read(self, where: tuple[Path, str, torch.dtype], first: int, last: int, into: str) -> Tensor:
        file, name, dtype = where
        buffer = self._take(into, first, last, dtype)
        row = max(self._matrix.index, 0) * self._matrix.rows + first
        start = row * self._matrix.columns * dtype.itemsize
        self._files.read_into(file, name, start, buffer.view(-1).view(torch.uint8).numpy().data)
        return buffer

    def _sum(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, delta and their sum."""
        weight = self._take("weight", first, last).copy_(self._read(self._source, first, last, "source"))
        delta = delta_block(self._patches, first, last, self._take("delta", first, last))
        return weight, delta, torch.add(weight, delta, out=self._take("value", first, last))

    def _block(self, first: int, last: int) -> _Block:
        weight, delta, value = self._sum(first, last)
        if self._scale is not None:
            value *= self._scale.rows(first, last)
            torch.sub(value, weight, out=delta)
        for row, tokens in self._tokens.items():
            if first <= row < last:
                weight[row - first] = value[row - first] = tokens
                delta[row - first] = 0.0
        return _Block(first, weight, delta, value, self._read(self._written, first, last, "written"))

    def _compare(self, block: _Block) -> None:
        change = self._space.take("change", torch.float64, *block.written.shape)
        change = change.copy_(block.written).sub_(block.weight).view(-1)
        delta = block.delta.view(-1)
        along = float(torch.dot(change, delta))
        suspects = self._unequal(block)
        if not math.isfinite(along):
            mask = ~block.written.isfinite().view(-1)
            mask[suspects] = True
            suspects, along = mask.nonzero().view(-1), 0.0
        kept = self._result.kept
        self._result.kept = (kept[0] + along, kept[1] + float(torch.dot(delta, delta)))
        self._suspect(block, suspects)

    def _unequal(self, block: _Block) -> Tensor:
        """Flat indices of the elements that are not the plain rounding of the exact value."""
        if self._redraw is not None and self._rounding == "balanced":
            return self._unbalanced(block, self._redraw)
        if self._redraw is not None:
            rows, columns = block.written.shape
            drawn = self._redraw.block(block.first, rows, columns)
            expected = bounds.carried(block.value, drawn, block.written.dtype).to(block.written.dtype)
            return bounds.unequal(expected.view(-1), block.written.view(-1))
        if self._rounding == "peft" and self._scale is None:
            expected = bounds.peft_sum(block.weight, block.delta, self._source[2], block.written.dtype)
        else:
            shape, dtype = block.written.shape, block.written.dtype
            # As bounds.rounded, into buffers.
            through = self._space.take("through", torch.promote_types(dtype, torch.float32), *shape)
            expected = self._space.take("expected", dtype, *shape).copy_(through.copy_(block.value))
        return bounds.unequal(expected.view(-1), block.written.view(-1))

    def _unbalanced(self, block: _Block, redraw: Redraw) -> Tensor:
        """Flat indices of what no term updates and is not the nearest; inputs in doubt are set aside."""
        count, columns = block.written.shape
        last, dtype = block.first + count, block.written.dtype
        row = torch.arange(block.first, last)[:, None].expand(count, columns)
        column = torch.arange(columns).expand(count, columns)
        drawn = redraw.block(block.first, count, columns)
        every = block.weight, block.delta, block.value, block.written.double(), drawn, row, column
        for term, patch in zip(self._matrix.terms, self._patches, strict=True):
            mine, there = patch.part(block.first, last)
            parts = [part[there, patch.cols.places] for part in every]
            outputs = Span(block.first + (there.start or 0), mine.stop - mine.start, patch.rows.step)
            if term.axes is not Axes.OUT_IN:
                parts, outputs = rebalance.turned(parts, patch.cols)
            for band, inputs in rebalance.doubtful(rebalance.Cells(*parts[:5]), dtype, outputs):
                self._doubts.append([part[band, inputs] for part in parts])
                self._waiting += self._doubts[-1][0].numel()
        return self._outside(block)

    def _outside(self, block: _Block) -> Tensor:
        """Flat indices of what no term updates and is not rounded to the nearest."""
        last = block.first + block.written.shape[0]
        if any(patch.covers(block.first, last, self._matrix.columns) for patch in self._patches):
            return torch.empty(0, dtype=torch.int64)
        bad = ~bounds.is_nearest(block.written, block.value, torch.zeros_like(block.value))
        for patch in self._patches:
            bad[patch.part(block.first, last)[1], patch.cols.places] = False
        return bad.view(-1).nonzero().view(-1)

    def _suspect(self, block: _Block, flat: Tensor) -> None:
        if flat.numel():
            columns = self._matrix.columns
            self._pending.append(
                _Elements(
                    torch.div(flat, columns, rounding_mode="floor") + block.first,
                    flat % columns,
                    *(part.view(-1)[flat] for part in block[1:]),
                )
            )
            self._waiting += flat.numel()
        if self._waiting > _JUDGED_AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        """Judges the elements that were set aside."""
        self._look_again()
        if not self._pending:
            return
        found = _Elements(*(torch.cat(parts) for parts in zip(*self._pending, strict=True)))
        self._pending, self._waiting = [], 0
        fine = self._acceptable(found, self._error(found))
        fine &= found.written.isfinite() | ~found.weight.isfinite()
        if not bool(fine.all()):
            self._record(_Elements(*(part[~fine] for part in found)))

    def _look_again(self) -> None:
        """At the inputs that were set aside, those of bands of as many outputs at once."""
        alike: dict[int, list[list[Tensor]]] = defaultdict(list)
        for doubts in self._doubts:
            alike[len(doubts[0])].append(doubts)
        self._doubts, dtype = [], self._written[2]
        for several in alike.values():
            *parts, rows, columns = (torch.cat(each, dim=1) for each in zip(*several, strict=True))
            cells = rebalance.Cells(*parts)
            parts = [rows, columns, cells.weight, cells.delta, cells.value, cells.written.to(dtype)]
            found = _Elements(*(part.flatten() for part in parts))
            bad = rebalance.wrong(cells, self._error(found).view_as(rows), dtype).flatten()
            self._pending.append(_Elements(*(part[bad] for part in found)))

    def _error(self, found: _Elements) -> Tensor:
        """How far the merge's float32 delta may lie from the exact one."""
        error = torch.zeros_like(found.value)
        for patch in self._patches:
            error += bounds.delta_error(patch.magnitude(found.rows, found.columns), patch.roundings)
        if self._source[2] is torch.float64:
            # The merge rounds such a weight to float32 before it adds to it.
            error = torch.where(error > 0, error + bounds.UNIT * found.weight.abs(), error)
        if self._tokens:
            error[torch.isin(found.rows, torch.tensor(sorted(self._tokens)))] = 0.0
        return error

    def _acceptable(self, found: _Elements, error: Tensor) -> Tensor:
        if self._scale is not None:
            error = self._scale.error(found, error)
        elif self._rounding == "peft":
            dtype = self._source[2]
            return bounds.is_peft(found.written, found.weight, found.delta, error, dtype)
        else:
            error = bounds.sum_error(found.value, error)
        if self._rounding == "balanced":
            return torch.zeros_like(found.rows, dtype=torch.bool)
        if self._redraw is not None:
            drawn = self._redraw.elements(found.rows, found.columns)
            return bounds.is_drawn(found.written, found.value, error, drawn) | self._untouched(found)
        return bounds.is_nearest(found.written, found.value, error)

    def _record(self, wrong: _Elements) -> None:
        unit = bounds.unit_in_last_place(wrong.value, wrong.written.dtype)
        written = wrong.written.to(torch.float64)
        error = torch.nan_to_num((written - wrong.value).abs() / unit, nan=math.inf, posinf=math.inf)
        result, first = self._result, int((wrong.rows * self._matrix.columns + wrong.columns).argmin())
        if result.first is None:
            result.first = (int(wrong.rows[first]), int(wrong.columns[first]))
            result.found, result.expected = float(written[first]), float(wrong.value[first])
        result.wrong += error.numel()
        result.worst = max(result.worst, float(error.max()))

    def _dora_scale(self) -> _Scale:
        """The ratio m / ||W + d|| of PEFT's DoRA (lora/dora.py): the norm runs over lora_A's second axis."""
        output = self._matrix.output
        if output.dora is None or len(self._patches) != 1:
            raise ValueError(f"{output.key}: DoRA needs a magnitude and exactly one term")
        patch, axis = self._patches[0], self._magnitude_axis(output.terms[0])
        squares: list[Tensor] = []
        doubts: list[Tensor] = []
        for first, last in self._spans():
            _, _, value = self._sum(first, last)
            magnitude = delta_block([patch.absolute()], first, last, self._take("change", first, last))
            error = bounds.sum_error(value, bounds.delta_error(magnitude, patch.roundings))
            squares.append(value.square().sum(dim=1 - axis))
            doubts.append(error.square().sum(dim=1 - axis))
        if axis == 0:
            norm, doubt = torch.cat(squares).sqrt(), torch.cat(doubts).sqrt()
        else:
            norm, doubt = torch.stack(squares).sum(dim=0).sqrt(), torch.stack(doubts).sum(dim=0).sqrt()
        terms = self._matrix.columns if axis == 0 else self._matrix.rows
        ratio = read_tensor(output.dora.file, output.dora.name).to(torch.float64).view(-1) / norm
        relative = doubt / norm + bounds.gamma(terms) / 2
        return _Scale(ratio.unsqueeze(1 - axis), relative.unsqueeze(1 - axis), axis)

    def _magnitude_axis(self, term: Term) -> int:
        """Which axis on disk the magnitude runs along: that of lora_B's first axis."""
        reads_input = self._factors.site(term).reads_input
        return 0 if reads_input == (term.axes is Axes.OUT_IN) else 1
