"""What balanced rounding must have written, found a second time and in float64: for `verify`. Pure.

The rule is a file's, and is stated in `arithmetic.balance`; nothing of its arithmetic is used here. float32
may see a share on the other side of a level, or a chance on the other side of a number drawn. So

- an element whose own outcome depends on that may have either of its two neighbours, and
- so may the elements at the level k of a cell, and at the next ones, where what lies at k depends on it.

Both are rare: the errors are some 1e-6 of what they are compared with. So all is first compared with what
float64 alone makes of the rule, which is always allowed, and only inputs with another outcome are looked at
again, with the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loudmerge.layout import Span
from loudmerge.verifying import bounds

BAND = 64
LEVELS, PARTS, FIRST_OCTAVE = 64, 4, -16

_EXACT = 2.0**-20
"""Room for sums and quotients in float64, and for the float32 that a share is held in."""

_LEAST = 2.0**-1000
"""So that an empty level divides nothing by 0."""

_SIGN, _EXPONENT, _DIGITS = -1 << 63, 0x7FF << 52, 52
"""Of a float64's bits."""

_PLAIN = {torch.bfloat16: (7, 2.0**-100, 2.0**100), torch.float16: (10, 2.0**-13, 2.0**15)}
"""Bits of the significand after the first, and the sizes whose neighbours are normal and finite."""


class Cells(NamedTuple):
    """Elements of some bands: (outputs, inputs), float64. drawn: 0 … 65535."""

    weight: Tensor
    delta: Tensor
    value: Tensor
    written: Tensor
    drawn: Tensor


class _Places(NamedTuple):
    near: Tensor
    far: Tensor
    share: Tensor
    doubt: Tensor


def turned(parts: Sequence[Tensor], columns: Span) -> tuple[list[Tensor], Span]:
    """(inputs, outputs) as (outputs, inputs), and the outputs' numbers. columns: these numbers here.

    Where all bands are whole they become one, with each band's inputs beside the others': large steps are
    faster, and cells know nothing of each other.
    """
    if columns.step == 1 and columns.start % BAND == 0 and columns.count % BAND == 0:
        return [part.reshape(-1, BAND).T for part in parts], Span(0, BAND)
    return [part.T for part in parts], columns


def doubtful(cells: Cells, dtype: torch.dtype, outputs: Span) -> Iterator[tuple[slice, Tensor]]:
    """The outputs of each band, and its inputs that need a second look: int64, one or more.

    outputs: their numbers in the matrix on disk, which say where a band ends.
    """
    number = torch.arange(outputs.count) * outputs.step + outputs.start
    for band in torch.unique(number // BAND):
        inside = (number // BAND == band).nonzero().view(-1)
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        inputs = _surprising(Cells(*(each[part] for each in cells)), dtype).nonzero().view(-1)
        if len(inputs):
            yield part, inputs


def _surprising(cells: Cells, dtype: torch.dtype) -> Tensor:
    """Inputs with an element that is not plain, or not what float64 makes of the rule: bool (inputs,).

    Works on the bits of float64: a mask is all ones or none, and a unit is a power of two.
    """
    gain = cells.delta.abs()
    smallest = gain.amin(dim=0)
    if not (smallest.any() or gain.any()):
        return ~_untouched(cells, dtype).all(0)
    digits, least, largest = _PLAIN[dtype]
    unit = 1 << (_DIGITS - digits)
    bits, size = cells.value.view(torch.int64), cells.value.abs()
    low, high = size.aminmax(dim=0)
    plain = (low >= least) & (high <= largest) & (smallest > 0)
    # On the way to zero a number of the dtype lies at the upper end of its unit.
    back = (bits ^ cells.delta.view(torch.int64)) >> 63
    inner = size.view(torch.int64) + back
    near = (inner & -unit).add_(back & unit)
    power = inner.bitwise_and_(_EXPONENT)
    share = size.sub_(near.view(torch.float64)).abs_()
    share.mul_((((2046 + digits) << _DIGITS) - power).view(torch.float64))
    gain.mul_(power.view(torch.float64)).masked_fill_(share == 0, 0.0)
    wanted = (gain * share).sum(0)
    level = share.clamp_(2.0**FIRST_OCTAVE, 1.0 - 2.0**-24).view(torch.int64) >> (_DIGITS - 2)
    level.sub_((1023 + FIRST_OCTAVE) * PARTS).clamp_(0, LEVELS - 1)
    count = len(wanted)
    place = torch.arange(LEVELS - 1, count * LEVELS, LEVELS) - level
    mass = torch.zeros(count * LEVELS, dtype=torch.float64).index_add_(0, place.reshape(-1), gain.reshape(-1))
    # (inputs, levels), the highest level first.
    mass = mass.view(count, LEVELS)
    reached = mass.cumsum(1)
    first = torch.searchsorted(reached, wanted[:, None]).clamp_(max=LEVELS - 1)
    within = mass.gather(1, first)
    chance = (wanted[:, None] - reached.gather(1, first) + within) / within
    chance = chance.nan_to_num_(0.0, 0.0, 0.0)
    border = (LEVELS - 1 - first << 16) - (chance * 65536.0).ceil().to(torch.int64)
    # A larger level than the border's, or the same and a number drawn that is under 65536 chance.
    moved = (border.view(-1) - (level << 16).sub_(cells.drawn)) >> 63
    moved.masked_fill_(gain == 0, 0)
    step = back.bitwise_or_(1).mul_(unit)
    expected = near.add_(step.bitwise_and_(moved)).bitwise_or_(bits & _SIGN)
    return ~plain | (expected != cells.written.view(torch.int64)).any(0)


def wrong(cells: Cells, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Which elements took the neighbour that they should not have, or none: bool (outputs, inputs).

    cells: the outputs of a band, for inputs of any number of bands. error: how far the float32 delta may be
    off, in their shape.
    """
    places = _places(cells, error, dtype)
    moves, stays = _allowed(cells, error, places)
    written = cells.written
    fine = (written == places.far) & moves | (written == places.near) & stays
    # At a number of the dtype either unit beside it may have been seen.
    fine |= (written - cells.value).abs() <= bounds.sum_error(cells.value, error)
    return ~torch.where(cells.delta == 0, _untouched(cells, dtype), fine)


def _untouched(cells: Cells, dtype: torch.dtype) -> Tensor:
    return bounds.is_nearest(cells.written.to(dtype), cells.value, torch.zeros_like(cells.value))


def _places(cells: Cells, error: Tensor, dtype: torch.dtype) -> _Places:
    """The two neighbours, the share of the way between them, and how far that may be off."""
    value, forth = cells.value, cells.delta.sign()
    outward = forth == value.sign()
    size = value.abs()
    inside = torch.where(outward, size, torch.nextafter(size, torch.zeros_like(size)))
    unit = bounds.unit_in_last_place(inside, dtype)
    low = torch.floor(inside / unit) * unit
    near = torch.where(outward, low, low + unit).copysign(value)
    far = torch.where(outward, low + unit, low).copysign(value)
    last = torch.finfo(dtype).max
    none = (near.abs().maximum(far.abs()) > last) | (size == 0)
    near = torch.where(none, value.clamp(-last, last), near)
    far = torch.where(none, near, far)
    # The value may not hold the delta: 0.02 + 1e-20 is 0.02.
    beyond = cells.weight - near
    share = torch.where(none, 0.0, (beyond + cells.delta).abs() / unit)
    held = bounds.UNIT * 4 * (cells.delta.abs() + beyond.abs())
    return _Places(near, far, share, (error + held) / unit)


def _allowed(cells: Cells, error: Tensor, places: _Places) -> tuple[Tensor, Tensor]:
    """Which elements may have stepped to the far neighbour, and which may have stayed."""
    share, doubt = places.share, places.doubt
    gain = (places.far - places.near).abs() * cells.delta.abs()
    gain = torch.where(share > 0, gain, 0.0)
    level, edge = _index(share), _index(share - doubt) != _index(share + doubt)
    wanted = (gain * share).sum(0)
    slack = ((gain * doubt).sum(0) + _EXACT * wanted) + (gain * share * _relative(cells.delta, error)).sum(0)
    # What is reached with the levels from each one on.
    mass = torch.zeros(LEVELS, share.shape[1], dtype=torch.float64).scatter_add_(0, level, gain)
    reached = mass.flip(0).cumsum(0).flip(0)
    least = (reached >= wanted).sum(0) - 1
    within = mass.gather(0, least[None])[0]
    above = reached.gather(0, least[None])[0] - within
    chance = torch.where(within > 0, (wanted - above) / within, 0.0)
    off = torch.where(within > 0, slack / within, 0.0) + 2.0 * _EXACT
    drawn = cells.drawn.double() / 65536.0
    # Where the chance may be 0 or 1, the next level may be the one at which elements are drawn.
    bare = (chance <= off) | (chance >= 1 - off)
    rest = torch.where(bare, slack / mass.gather(0, level).clamp(min=_LEAST) + 2.0**-16, 0.0)
    surely = (level > least) & (drawn <= 1 - rest) | (level == least) & (drawn < chance - off)
    perhaps = (level > least) | (level == least) & (drawn < chance + off) | (drawn < rest)
    close = abs(level - least) <= 1
    either = close & (edge & close).any(0)
    some = gain > 0
    return some & (perhaps | either), ~(some & surely & ~either)


def _relative(delta: Tensor, error: Tensor) -> Tensor:
    """How far |dW| may be off, as a part of it."""
    return torch.where(delta != 0, error / delta.abs(), 0.0)


def _index(share: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(share.clamp(2.0**FIRST_OCTAVE, 1.0 - 2.0**-24))
    part = torch.floor((mantissa * 2.0 - 1.0) * PARTS).to(torch.int64)
    return (exponent.to(torch.int64) - 1 - FIRST_OCTAVE) * PARTS + part
