"""What balanced rounding must have written, found a second time and in float64: for `verify`. Pure.

The rule is a file's, and is stated in loudmerge.balance; nothing of its arithmetic is used here. float32 may
see a share on the other side of a level, or a chance on the other side of a number drawn. So

- an element whose own outcome depends on that may have either of its two neighbours, and
- so may the elements at the level k of a cell, and at the next ones, where what lies at k depends on it.

Both are rare: the errors are some 1e-6 of what they are compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loudmerge import bounds
from loudmerge.layout import Span

BAND = 64
LEVELS, PARTS, FIRST_OCTAVE = 64, 4, -16

_EXACT = 2.0**-20
"""Room for sums and quotients in float64, and for the float32 that a share is held in."""

_LEAST = 2.0**-1000
"""So that an empty level divides nothing by 0."""


class Cells(NamedTuple):
    """Elements of some bands: (outputs, inputs), float64. error: how far the float32 delta may be off.

    drawn: 0 … 65535.
    """

    weight: Tensor
    delta: Tensor
    value: Tensor
    written: Tensor
    error: Tensor
    drawn: Tensor


class _Places(NamedTuple):
    near: Tensor
    far: Tensor
    share: Tensor
    doubt: Tensor


def wrong(cells: Cells, dtype: torch.dtype, outputs: Span) -> Tensor:
    """Which elements took the neighbour that they should not have, or none: bool (outputs, inputs).

    outputs: their numbers in the matrix on disk, which say where a band ends.
    """
    bad = torch.zeros(cells.written.shape, dtype=torch.bool)
    number = torch.arange(outputs.count) * outputs.step + outputs.start
    for band in torch.unique(number // BAND):
        inside = (number // BAND == band).nonzero().view(-1)
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        bad[part] = _wrong(Cells(*(each[part] for each in cells)), dtype)
    return bad


def _wrong(cells: Cells, dtype: torch.dtype) -> Tensor:
    places = _places(cells, dtype)
    moves, stays = _allowed(cells, places)
    written = cells.written
    slack = bounds.sum_error(cells.value, cells.error)
    fine = (written == places.far) & moves | (written == places.near) & stays
    # At a number of the dtype either unit beside it may have been seen.
    fine |= (written - cells.value).abs() <= slack
    untouched = bounds.is_nearest(written.to(dtype), cells.value, torch.zeros_like(slack))
    return ~torch.where(cells.delta == 0, untouched, fine)


def _places(cells: Cells, dtype: torch.dtype) -> _Places:
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
    share = torch.where(none, 0.0, (value - near).abs() / unit)
    held = bounds.UNIT * 4 * (cells.delta.abs() + (cells.weight - near).abs())
    return _Places(near, far, share, (cells.error + held) / unit)


def _allowed(cells: Cells, places: _Places) -> tuple[Tensor, Tensor]:
    """Which elements may have stepped to the far neighbour, and which may have stayed."""
    share, doubt = places.share, places.doubt
    gain = (places.far - places.near).abs() * cells.delta.abs()
    gain = torch.where(share > 0, gain, 0.0)
    level, edge = _index(share), _index(share - doubt) != _index(share + doubt)
    wanted = (gain * share).sum(0)
    slack = ((gain * doubt).sum(0) + _EXACT * wanted) + (gain * share * _relative(cells)).sum(0)
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


def _relative(cells: Cells) -> Tensor:
    """How far |dW| may be off, as a part of it."""
    return torch.where(cells.delta != 0, cells.error / cells.delta.abs(), 0.0)


def _index(share: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(share.clamp(2.0**FIRST_OCTAVE, 1.0 - 2.0**-24))
    part = torch.floor((mantissa * 2.0 - 1.0) * PARTS).to(torch.int64)
    return (exponent.to(torch.int64) - 1 - FIRST_OCTAVE) * PARTS + part
