"""Balanced rounding: nearest rounding of W + g dW between the neighbours of W + dW, with steered gains g.

What steps is what steps at the least cost, where W is small and its unit fine, instead of a random choice.
Each input column has a gain, so that it keeps <W' - W, dW> = <dW, dW>. One gain for the whole matrix would
not do: columns where x is large have a large dW in them too, and would get too much. The gains are steered a
block of rows at a time, by what the rows before it have kept. Where the nearest keeps most of the update,
half of the distance of two neighbours is left to chance: a gain favours the larger elements of a column.

It is not loudmerge's: `verify` could not tell a neighbour from the other one. See README.md here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loudmerge.arithmetic.rounding import DROPPED, Dither, Draws, dither_table
from loudmerge.layout import Span

BALANCE_ROWS = range(8, 64)
"""Bounds of the rows after which the gains are steered: a 16th of them all."""

SAMPLE_ROWS = 64
"""Rows, or up to twice as many, on which the gains are solved for at first."""

NEAREST_KEEPS = 0.99
"""What rounding to the nearest has to keep of an update, at least, to be chosen."""

DITHERED_KEEPS = 0.6
"""Where the nearest keeps more, but too little, a balanced rounding is dithered."""

FLOOR = 0.1
"""The part of the columns' mean update that is added to both sides of a ratio, for the small columns."""

_WHOLE, _WHOLE_BITS = float(1 << 23), 0x4B000000
"""The float32 from which on the lowest bits count ones, and its bits."""


class Balance:
    """The gains of one matrix's balanced rounding, steered from its first rows to its last.

    Takes blocks of rows in order, (rows, in): the outputs lie along the first axis.
    nearest_keeps: <W' - W, dW> / <dW, dW> of the nearest, in a sample. dithered: whether a part is random.
    """

    def __init__(
        self, dtype: torch.dtype, weight: Tensor, delta: Tensor, scratch: Tensor, drawn: Tensor
    ) -> None:
        """A sample of the rows, as for `round_`; all of one shape."""
        self._drop = DROPPED[dtype]
        self._reciprocal = torch.tensor(0x7F000000, dtype=torch.int32, device=weight.device)
        self._base = torch.ones(weight.shape[1], device=weight.device)
        self._gain = self._base.clone()
        self._missing = torch.zeros_like(self._gain)
        self._set(dithered=False)
        some = slice(None, None, max(1, len(weight) // 16))
        sample = [part[some].contiguous() for part in (weight, delta, scratch, drawn)]
        total = float(torch.dot(sample[1].view(-1), sample[1].view(-1)))
        self.nearest_keeps = float(self._kept(*sample).sum()) / total if total > 0 else 1.0
        if self.needed:
            self._set(dithered=self.nearest_keeps >= DITHERED_KEEPS)
            self._solve(sample, total)
            self._refine(weight, delta, scratch, drawn)

    @property
    def needed(self) -> bool:
        """Whether the nearest keeps too little. Not where the update is not finite: that is refused."""
        return self.nearest_keeps < NEAREST_KEEPS

    @staticmethod
    def rows_at_once(rows: int) -> int:
        """How many rows of a matrix of so many make a block."""
        return min(max(rows // 16, BALANCE_ROWS.start), BALANCE_ROWS.stop)

    def round_(self, values: Tensor, delta: Tensor, scratch: Tensor, drawn: Tensor) -> Tensor:
        """Rounds `values` = W + dW, float32 (rows, in), in place, and returns them.

        scratch, drawn: changed; drawn, int32 in 0 … 65535, is read by a dithered rounding only.
        """
        bits, whole = values.view(torch.int32), scratch.view(torch.int32)
        # The sign and 2**-e: as bits, a reciprocal of a power of two is a difference.
        torch.bitwise_and(bits, -(1 << 23), out=whole)
        torch.sub(self._reciprocal, whole, out=whole)
        scratch.mul_(delta)
        # What the gain adds, (g - 1) dW, in units of the last bit of a float32, 2**(e - 23).
        torch.addcmul(self._middle, scratch, (self._gain - 1.0) * 2.0**23, out=scratch)
        scratch.clamp_(_WHOLE, self._most)
        whole.sub_(_WHOLE_BITS)
        bits += whole
        if self.dithered:
            bits += drawn.bitwise_right_shift_(17 - self._drop)
        bits &= -(1 << self._drop)
        return values

    def learn(self, wanted: Tensor, kept: Tensor) -> None:
        """Steers the gains. wanted, kept: sums of dW * dW and (W' - W) * dW over the block's rows, (in,)."""
        self._missing += wanted - kept
        floor = wanted.mean() * FLOOR
        due = (wanted + self._missing + floor) / (wanted + floor)
        torch.mul(self._base, due.clamp_(0.05, 4.0).sqrt_(), out=self._gain)

    def _set(self, *, dithered: bool) -> None:
        """What is added without a gain: a half of the distance of two neighbours, or, with what is drawn up
        to a half more, a quarter. All sums then lie in 0 … 2**drop - 1.
        """
        self.dithered = dithered
        half = 1 << (self._drop - 1)
        self._middle = torch.tensor(_WHOLE + (half // 2 if dithered else half), device=self._gain.device)
        self._most = _WHOLE + (half if dithered else 2 * half - 1)

    def _solve(self, sample: list[Tensor], total: float) -> None:
        """One gain for all columns, by bisection of its logarithm."""
        low, high = 0.0, 20.0
        for _ in range(8):
            middle = (low + high) / 2
            self._gain.fill_(2.0**middle)
            low, high = (low, middle) if float(self._kept(*sample).sum()) >= total else (middle, high)
        self._gain.fill_(2.0 ** ((low + high) / 2))

    def _refine(self, weight: Tensor, delta: Tensor, scratch: Tensor, drawn: Tensor) -> None:
        """Each column's gain."""
        wanted = (delta * delta).sum(0)
        floor = wanted.mean() * FLOOR
        for _ in range(3):
            kept = self._kept(weight, delta, scratch, drawn).clamp_(min=0)
            self._gain *= ((wanted + floor) / (kept + floor)).clamp_(0.5, 2.0).sqrt_()
        self._base.copy_(self._gain)

    def _kept(self, weight: Tensor, delta: Tensor, scratch: Tensor, drawn: Tensor) -> Tensor:
        return self.round_(weight + delta, delta, scratch, drawn.clone()).sub_(weight).mul_(delta).sum(0)


def balanced(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:  # noqa: ARG001
    """W' in float32. weight, delta: (out, in), weight with bfloat16's values."""
    rows, columns = weight.shape
    key = f"{int(torch.randint(1 << 31, (1,), generator=draw))}"
    draws: Draws = Dither(dither_table(weight.device), key).of(Span(0, rows), Span(0, columns))

    def drawn(first: int, count: int) -> Tensor:
        return draws.fill(first, torch.empty(count, columns, dtype=torch.int32))

    some = slice(None, None, max(1, rows // SAMPLE_ROWS))
    sample = weight[some].contiguous()
    balance = Balance(
        torch.bfloat16, sample, delta[some].contiguous(), torch.empty_like(sample), drawn(0, len(sample))
    )
    if not balance.needed:
        return (weight + delta).to(torch.bfloat16).to(torch.float32)
    result, step = torch.empty_like(weight), Balance.rows_at_once(rows)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        w, d = weight[block], delta[block].contiguous()
        done = balance.round_(w + d, d, torch.empty_like(d), drawn(first, len(d)))
        result[block] = done
        balance.learn((d * d).sum(0), ((done - w) * d).sum(0))
    return result
