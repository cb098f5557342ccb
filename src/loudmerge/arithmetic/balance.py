"""Balanced rounding: what is kept of each input's update is kept where a step costs least. Pure.

An element of W + dW lies a share s of a unit u beyond its neighbour on W's side, on the way that dW points.
By chance it takes the step with probability s: the expectation is exact, but u is as often coarse as fine. In
each cell, the outputs of one band of BAND rows that one input feeds, balanced rounding takes the steps with
the largest shares and leaves the small ones, so that the expected sum of u |dW| over the steps stays what
chance would make it, the sum of s u |dW|. Then <W' - W, dW> is right, with the least squared error.

The shares are compared by their level, PARTS to an octave. In a cell

    level(s) > k   takes the step          k: the highest level with which the sum is reached
    level(s) = k   with the probability p that makes the sum exact: where 65536 p > u(row, column)
    level(s) < k   does not

so an outcome depends on its own cell only, and `verify` finds k and p by itself
(loudmerge.verifying.rebalance).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor

from loudmerge.arithmetic.rounding import DROPPED, held_at_the_ends
from loudmerge.arithmetic.sizes import BAND, OCTAVES, PARTS, USUAL
from loudmerge.layout import Span

INPUTS = 2048
"""Inputs that are worked on at a time. With fewer there are more steps, and threads wait between them."""

_LOW, _EXPONENT = 0xFFFF, 0x7F800000
"""Of a float32's bits: those that bfloat16 has not, and its exponent's."""

_INVERSE = (254 + 7) << 23
"""Less the bits of 2**e: those of 2**(7 - e), which is one over a unit of bfloat16."""

_LEAST_NORMAL = (127 - 14) << 23
"""float16's, as bits of a float32."""


class Bands(NamedTuple):
    """The bands of a term's part of a matrix. outputs: their numbers on disk. axis: along which they lie."""

    outputs: Span
    axis: int

    def parts(self) -> Iterator[slice]:
        """Each band's places along the axis."""
        return bands(self.outputs)

    def of(self, rows: slice) -> Bands:
        """Those of some of its rows, from where one begins."""
        if self.axis == 1:
            return self
        start, step = self.outputs.start + rows.start * self.outputs.step, self.outputs.step
        return Bands(Span(start, rows.stop - rows.start, step), 0)

    def round_(
        self, values: Tensor, weight: Tensor, delta: Tensor, drawn: Tensor, dtype: torch.dtype
    ) -> None:
        """As `balanced_`, all of the bands."""
        if self.axis == 0:
            for band, start in product(self.parts(), range(0, values.shape[1], INPUTS)):
                some = band, slice(start, start + INPUTS)
                balanced_(values[some], weight[some], delta[some], drawn[some], dtype, 0)
            return
        for columns in self._alike():
            # Bands of as many columns are worked on together: (inputs, bands, columns).
            there = slice(columns[0].start, columns[-1].stop)
            shape = len(values), len(columns), -1
            value, base, change, numbers = (
                each[:, there].view(shape) for each in (values, weight, delta, drawn)
            )
            step = max(1, INPUTS // len(columns))
            for start in range(0, len(values), step):
                part = slice(start, start + step)
                balanced_(value[part], base[part], change[part], numbers[part], dtype, 2)

    def _alike(self) -> Iterator[list[slice]]:
        """The bands in runs of the same width."""
        return (list(run) for _, run in groupby(self.parts(), lambda part: part.stop - part.start))


def bands(span: Span) -> Iterator[slice]:
    """The places 0 … span.count - 1 of a span, in parts of one band each."""
    start = 0
    while start < span.count:
        band = (span.start + start * span.step) // BAND
        stop = min(span.count, -(-((band + 1) * BAND - span.start) // span.step))
        yield slice(start, stop)
        start = stop


def balanced_(
    values: Tensor, weight: Tensor, delta: Tensor, drawn: Tensor, dtype: torch.dtype, axis: int
) -> Tensor:
    """Rounds one band of `values` = weight + delta, all float32, in place to numbers of `dtype`.

    drawn: int32 in 0 … 65535, in their shape. axis: along which the outputs lie; several bands may lie along
    another one. What is not finite stays, and what lies past the largest number by less than a unit becomes
    the largest.
    """
    if dtype is torch.bfloat16 and is_usual(values) and is_usual(delta):
        return usual_(values, weight, delta, drawn, axis)
    return any_(values, weight, delta, drawn, dtype, axis)


def is_usual(values: Tensor) -> bool:
    """Whether none is zero, infinite or NaN, nor so large or small that a product of two might be."""
    low, high = torch.aminmax(values.abs())
    return USUAL[0] <= low.item() and high.item() <= USUAL[1]


def usual_(values: Tensor, weight: Tensor, delta: Tensor, drawn: Tensor, axis: int) -> Tensor:
    """The outcome of `any_` for bfloat16, bit for bit, for what `is_usual`: in half of its time or less.

    Integers in place of comparisons, of which torch does four in the time of one: a mask is all bits or none.
    """
    bits = values.view(torch.int32)
    # All ones on the way to zero: there, a number of the dtype lies at the upper end of its unit.
    back = (bits ^ delta.view(torch.int32)) >> 31
    near = (back & _LOW).add_(bits).bitwise_and_(~_LOW)
    # The power of two at which the unit begins, 2**7 units.
    power = (back << 16).add_(near).bitwise_and_(_EXPONENT)
    share = (weight - near.view(torch.float32)).add_(delta)
    # clamp_ keeps -0, which is no share and must not look like one.
    share.mul_(torch.copysign((_INVERSE - power).view(torch.float32), delta)).clamp_(0.0, 1.0).abs_()
    some = share.view(torch.int32).neg() >> 31
    gain = power.view(torch.float32).mul(delta.abs())
    gain.view(torch.int32).bitwise_and_(some)
    level = levels(share)
    least, chance = _solved(gain, share, level, axis)
    # One number for both comparisons: level > least, or level = least and drawn < chance.
    border = (least << 16).sub_(chance.ceil_().clamp_(max=65536.0).long()).to(torch.int32)
    moved = (border - (level << 16).sub_(drawn)).bitwise_right_shift_(31).bitwise_and_(some)
    step = back.bitwise_or_(1).bitwise_left_shift_(16)
    torch.add(near, step.bitwise_and_(moved), out=bits)
    return values


def any_(
    values: Tensor, weight: Tensor, delta: Tensor, drawn: Tensor, dtype: torch.dtype, axis: int
) -> Tensor:
    """As `balanced_`."""
    near, unit = steps(values, delta, dtype)
    # W - near is exact, and 0 where dW is under a unit: a share is as exact as dW itself.
    share = ((weight - near) + delta).div_(unit).clamp_(0.0, 1.0)
    ends = ~(near.abs().maximum((near + unit).abs()) <= torch.finfo(dtype).max)
    plain = ends.logical_or_(delta == 0).logical_or_(values == 0)
    none = share.masked_fill_(plain, 0.0) == 0
    gain = _in_cells(unit, none, axis).mul_(_in_cells(delta, none, axis))
    level = levels(share)
    least, chance = _solved(gain, share, level, axis)
    moved = ((level > least) | ((level == least) & (drawn < chance))).masked_fill_(none, value=False)
    stayed = torch.where(plain, _nearest(values, dtype), near)
    return torch.where(moved, near + unit, stayed, out=values)


def _in_cells(numbers: Tensor, none: Tensor, axis: int) -> Tensor:
    """Their sizes, 0 where `none`, by a power of two of each cell's own: the largest is 1 … 4.

    float32 has the product of such: of a weight of 0 and its update, 1e-20 each, it has not.
    """
    size = numbers.abs().masked_fill_(none, 0.0)
    power = size.amax(axis, keepdim=True).view(torch.int32).bitwise_and_(_EXPONENT)
    return size.mul_(((254 << 23) - power).clamp_(min=1 << 23).view(torch.float32))


def _solved(gain: Tensor, share: Tensor, level: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The level k of each cell, and 65536 p. gain: u |dW|, in any unit."""
    wanted, count = (gain * share).sum(axis, True, dtype=torch.float64), OCTAVES * PARTS
    # (cells, levels), the highest first: torch is four times as fast along the last axis.
    cells = torch.arange(wanted.numel(), dtype=torch.int32).view(wanted.shape)
    place = (cells.mul_(count).add_(count - 1) - level).reshape(-1)
    mass = wanted.new_zeros(wanted.numel() * count).index_add_(0, place, gain.double().reshape(-1))
    mass = mass.view(-1, count)
    reached, sums = mass.cumsum(1), wanted.reshape(-1, 1)
    first = torch.searchsorted(reached, sums).clamp_(max=count - 1)
    within = mass.gather(1, first)
    above = reached.gather(1, first) - within
    chance = ((sums - above) / within).nan_to_num_(0.0).mul_(65536.0)
    return (count - 1 - first).view(wanted.shape), chance.view(wanted.shape)


def levels(share: Tensor) -> Tensor:
    """0 … OCTAVES * PARTS - 1, int32, of shares in 0 … 1."""
    # The exponent and the two highest bits of the significand, as one number.
    raw = share.clamp(2.0**-OCTAVES, 1.0 - 2.0**-24).view(torch.int32) >> 21
    return raw.sub_((127 - OCTAVES) * PARTS)


def steps(values: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The neighbour of each float32 that dW comes from, and the step to the one it points to, with its sign.

    A number of the dtype is itself the first. The step may lead to an infinity.
    """
    dropped = DROPPED[dtype]
    bits = values.view(torch.int32)
    # All ones on the way to zero: there, a number of the dtype lies at the upper end of its unit.
    back = (bits ^ delta.view(torch.int32)) >> 31
    size = (bits & 0x7FFFFFFF) + back
    low = size & -(1 << dropped)
    sign, step = bits & -0x80000000, back & (1 << dropped)
    near = ((low + step) | sign).view(torch.float32)
    far = ((low + (1 << dropped) - step) | sign).view(torch.float32)
    if dtype is torch.float16:
        near, far = _with_subnormal(values, size, back, near, far)
    return near, far - near


def _with_subnormal(
    values: Tensor, size: Tensor, back: Tensor, near: Tensor, far: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for float16, whose unit is 2**-24 under its least normal number, 2**-14.

    size: of the numbers, as bits, one less on the way to zero: so the least normal one belongs here then.
    """
    low = (size.view(torch.float32) * 2.0**24).floor_()
    step = back.to(torch.float32)
    inner = ((low - step) * 2.0**-24).copysign_(values)
    outer = ((low + 1.0 + step) * 2.0**-24).copysign_(values)
    small = size < _LEAST_NORMAL
    return torch.where(small, inner, near), torch.where(small, outer, far)


def _nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of the dtype, or the largest where `values` are past it by less than a unit."""
    largest = torch.finfo(dtype).max
    low, high = torch.aminmax(values)
    if not (-largest <= low.item() and high.item() <= largest):  # also where one is a NaN
        values = held_at_the_ends(values, dtype)
    return values.to(dtype).to(torch.float32)
