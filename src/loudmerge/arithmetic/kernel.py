"""W + dW in bfloat16, compiled: the bits of `delta.py` and `balance.py`, in less of their time.

Needs numba (the extra `fast`), so only `compiled.py` imports this, and only when there is much to do. A
block is read and written once, where tensor functions would each go over all of it. To balance, a tile of one
band of outputs by INPUTS inputs goes through all steps while it is in a core's cache.

One file: numba compiles anew what it kept when the file it is in changed, not when one that it imports did.

The weights are the int16 that hold the bits, flat, with the distance from row to row; a block of dW tells how
many rows and columns there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32, float64, int16, int32

from loudmerge.arithmetic.sizes import BAND, OCTAVES, PARTS, SEGMENT, TABLE_BITS

INPUTS, LEVELS, LANES = 128, OCTAVES * PARTS, 512

# A name of the module is a constant to numba. Each has its type: int32 and a Python int make an int64.
SIGN, SIZE, EXPONENT = int32(-0x80000000), int32(0x7FFFFFFF), int32(0x7F800000)
LOW, HIGH, HALF = int32(0xFFFF), int32(-0x10000), int32(0x7FFF)
INVERSE = int32(((254 + 7) << 23) - (1 << 32))
LEAST, MOST = int32((127 - 50) << 23), int32((127 + 50) << 23)
LOWEST, HIGHEST = float32(2.0**-OCTAVES), float32(1.0 - 2.0**-24)
BELOW = int32((127 - OCTAVES) * PARTS)
ZERO, ONE = float32(0.0), float32(1.0)

Function = Callable[..., Any]


# Never with `fastmath`: each sum and product is rounded as torch rounds it.
_njit: Function = partial(numba.njit, nogil=True, error_model="numpy")


def compiled(signature: Any = None) -> Callable[[Function], Function]:
    """As numba.njit, without Python's lock. Kept for the next process where a folder can be written to.

    Below it stands no_type_check: numba reads the function itself, around which no check may be wrapped.
    """

    def decorate(function: Function) -> Function:
        try:
            made: Function = _njit(signature, cache=True)(function)
        except RuntimeError:  # "no locator available": numba found no such folder
            made = _njit(signature)(function)
        return made

    return decorate


def _as(wanted: types.Type, given: types.Type, llvm: ir.Type) -> Any:
    """The same bits as another type."""

    def typed(_context: Any, _value: Any) -> Any:
        return wanted(given), lambda _c, builder, _s, values: builder.bitcast(values[0], llvm)

    return intrinsic(typed)


bits_of: Function = _as(types.int32, types.float32, ir.IntType(32))
number_of: Function = _as(types.float32, types.int32, ir.FloatType())

_HALVES, _BLOCK = types.int16[::1], types.float32[:, ::1]
_NUMBERS, _PLACES, _COUNTS = types.int32[::1], types.int64[:, ::1], types.int64[::1]
_SUMS: Any = types.Tuple((types.float64, types.float64))  # type: ignore[no-untyped-call]
_BASE = (_HALVES, types.int64, _BLOCK, _HALVES, types.int64)


@compiled()
@no_type_check
def wide(half: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return number_of(int32(int32(half) << int32(16)))


@compiled()
@no_type_check
def narrow(number: Any) -> Any:
    """The bits of the nearest bfloat16, of two the even one."""
    bits = bits_of(number)
    odd = int32(int32(bits >> int32(16)) & int32(1))
    return int16(int32(int32(bits + HALF) + odd) >> int32(16))


@compiled()
@no_type_check
def check_sizes(weight: Any, stride: int, delta: Any, out: Any, out_stride: int) -> None:
    """Nothing else keeps other memory from harm."""
    rows, columns = delta.shape
    first, second = (rows - 1) * stride + columns, (rows - 1) * out_stride + columns
    if min(stride, out_stride) < 0 or len(weight) < first or len(out) < second:
        raise ValueError("the blocks differ in shape")


@compiled()
@no_type_check
def added(sums: Any, along: Any, total: Any) -> Any:
    """The sums with those of each lane."""
    first, second = sums
    for one in range(len(along)):
        first += float64(along[one])
        second += float64(total[one])
    return first, second


@compiled(_SUMS(*_BASE))
@no_type_check
def nearest(weight: Any, stride: int, delta: Any, out: Any, out_stride: int) -> Any:
    """Writes round(W + dW) to `out`, which may be `weight`; gives <W' - W, dW> and <dW, dW>.

    Where the sum is a NaN so are these, whatever is written.
    """
    check_sizes(weight, stride, delta, out, out_stride)
    rows, columns = delta.shape
    along, total = np.empty(LANES, float32), np.empty(LANES, float32)
    # Apart: where what is written may be what is read, numbers are not done several at a time.
    rounded = np.empty(LANES, int16)
    sums = 0.0, 0.0
    for start in range(0, columns, LANES):
        count = min(columns - start, LANES)
        along[:], total[:] = ZERO, ZERO
        for row in range(rows):
            base = weight[row * stride + start : row * stride + start + count]
            result = out[row * out_stride + start : row * out_stride + start + count]
            change = delta[row, start : start + count]
            for one in range(count):
                before = wide(base[one])
                rounded[one] = narrow(before + change[one])
                along[one] += (wide(rounded[one]) - before) * change[one]
                total[one] += change[one] * change[one]
            for one in range(count):
                result[one] = rounded[one]
        sums = added(sums, along, total)
    return sums


@compiled()
@no_type_check
def is_usual(weight: Any, stride: int, delta: Any) -> bool:
    """As balance.is_usual, for the sum and for dW."""
    rows, columns = delta.shape
    low, high = MOST, LEAST
    for row in range(rows):
        base, change = weight[row * stride : row * stride + columns], delta[row]
        for one in range(columns):
            size = int32(bits_of(change[one]) & SIZE)
            other = int32(bits_of(wide(base[one]) + change[one]) & SIZE)
            low, high = min(low, size, other), max(high, size, other)
    return low >= LEAST and high <= MOST


@compiled()
@no_type_check
def near_of(value: Any, update: Any) -> Any:
    """All ones on the way to zero, else 0; and the neighbour that the update comes from. All are bits."""
    back = int32(int32(value ^ update) >> int32(31))
    return back, int32(int32(int32(back & LOW) + value) & HIGH)


@compiled()
@no_type_check
def share_of(base: Any, change: Any) -> Any:
    """An element's share s, and its gain u |dW|, 0 where the share is."""
    update = bits_of(change)
    back, near = near_of(bits_of(base + change), update)
    power = int32(int32(int32(back << int32(16)) + near) & EXPONENT)
    inverse = number_of(int32(int32(INVERSE - power) | int32(update & SIGN)))
    share = float32(float32(float32(base - number_of(near)) + change) * inverse)
    share = min(max(share, ZERO), ONE)
    gain = float32(number_of(power) * number_of(int32(update & SIZE)))
    return share, (gain if share > ZERO else ZERO)


@compiled()
@no_type_check
def level_of(share: Any) -> Any:
    """As balance.levels, and -1 for no share."""
    level = int32(int32(bits_of(min(max(share, LOWEST), HIGHEST)) >> int32(21)) - BELOW)
    return level if share > ZERO else int32(-1)


@compiled()
@no_type_check
def stepped(base: Any, change: Any, level: Any, border: Any, number: Any) -> Any:
    """The bits of an element's outcome, as a float32's."""
    back, near = near_of(bits_of(base + change), bits_of(change))
    moves = border < int32(int32(level * int32(65536)) - number)
    step = int32(int32(back | int32(1)) << int32(16))
    return int32(near + (step if (level >= int32(0)) & moves else int32(0)))


class Tile(NamedTuple):
    """What is known of a band's outputs for some inputs. The first three lie as the weights do."""

    level: Any
    gain: Any
    wanted_gain: Any
    mass: Any
    wanted: Any
    border: Any
    along: Any
    total: Any


@compiled()
@no_type_check
def new_tile() -> Any:
    """Its content is undefined."""
    # No band is wider than INPUTS. Rows of a power of two would turn each other out of a cache, read across.
    shape = INPUTS, INPUTS + 8
    return Tile(
        np.zeros(shape, int32),
        np.empty(shape, float32),
        np.empty(shape, float32),
        np.empty((LEVELS, INPUTS)),
        np.empty(INPUTS),
        np.empty(INPUTS, int32),
        np.empty(INPUTS, float32),
        np.empty(INPUTS, float32),
    )


@compiled()
@no_type_check
def weigh(tile: Any, weight: Any, stride: int, delta: Any, where: Any) -> Any:
    """Fills the first three; gives the highest level there is."""
    top, left, right = where[0], where[2], where[3]
    highest = int32(0)
    for row in range(top, where[1]):
        base, change = weight[row * stride + left : row * stride + right], delta[row, left:right]
        levels, gains, wanted = tile.level[row - top], tile.gain[row - top], tile.wanted_gain[row - top]
        for one in range(right - left):
            share, gain = share_of(wide(base[one]), change[one])
            levels[one], gains[one], wanted[one] = level_of(share), gain, float32(share * gain)
            highest = max(highest, levels[one])
    return highest


@compiled()
@no_type_check
def add_up(tile: Any, levels: Any, gains: Any, wanted_gains: Any, outputs: int, inputs: int) -> None:
    """Each cell's gains by level, and the sum that is wanted of them. Of (outputs, inputs)."""
    for output in range(outputs):
        level, gain, wanted = levels[output], gains[output], wanted_gains[output]
        # Apart: the first is done for several inputs at a time.
        for one in range(inputs):
            tile.wanted[one] += float64(wanted[one])
        for one in range(inputs):
            # Unsigned: a signed index is looked at whether it counts from the end. No share has no gain.
            tile.mass[np.uint64(np.uint32(max(level[one], int32(0)))), one] += float64(gain[one])


@compiled()
@no_type_check
def find_borders(tile: Any, highest: Any, inputs: int) -> None:
    """65536 (k - p) of each cell where something is wanted."""
    reached, above, within = np.zeros(INPUTS), np.zeros(INPUTS), np.zeros(INPUTS)
    wanted, border = tile.wanted, tile.border
    for step in range(highest + 1):
        level = int32(highest - step)
        here = tile.mass[level]
        is_short = int32(0)
        for one in range(inputs):
            short = reached[one] < wanted[one]
            above[one] = reached[one] if short else above[one]
            reached[one] += here[one]
            within[one] = here[one] if short else within[one]
            border[one] = level if short else border[one]
            is_short |= int32(reached[one] < wanted[one])
        if is_short == 0:
            break
    for one in range(inputs):
        chance = (wanted[one] - above[one]) / within[one]
        chance = 0.0 if np.isnan(chance) else min(np.ceil(chance * 65536.0), 65536.0)
        border[one] = int32(border[one] * int32(65536) - int32(chance))


class Drawn(NamedTuple):
    """The numbers u, as rounding.Draws has them.

    offsets: (segments, rows), the block's from the row `top` on. edges: the first column of each segment, and
    the count of all. first: the place of each in its segment.
    """

    table: Any
    offsets: Any
    edges: Any
    first: Any
    step: Any
    top: Any


@compiled()
@no_type_check
def write(tile: Any, block: Any, drawn: Any, segment: int, where: Any, axis: int) -> None:
    """Rounds the tile by its cells' borders."""
    weight, stride, delta, out, out_stride = block
    top, left, right = where[0], where[2], where[3]
    tile.along[:], tile.total[:] = ZERO, ZERO
    buffer, limits = np.empty(INPUTS, int32), np.empty(INPUTS, int32)
    rounded = np.empty(INPUTS, int16)
    for row in range(top, where[1]):
        base, change = weight[row * stride + left : row * stride + right], delta[row, left:right]
        result = out[row * out_stride + left : row * out_stride + right]
        levels = tile.level[row - top]
        start = drawn.offsets[segment, drawn.top + row] + drawn.first[segment]
        start += (left - drawn.edges[segment]) * drawn.step
        numbers = drawn.table[start : start + right - left]
        if drawn.step != 1:
            numbers = buffer
            for one in range(right - left):
                numbers[one] = drawn.table[start + one * drawn.step]
        borders = tile.border
        if axis == 1:
            borders = limits
            borders[:] = tile.border[row - top]
        for one in range(right - left):
            before = wide(base[one])
            after = stepped(before, change[one], levels[one], borders[one], numbers[one])
            rounded[one] = int16(after >> int32(16))
            tile.along[one] += (number_of(after) - before) * change[one]
            tile.total[one] += change[one] * change[one]
        for one in range(right - left):
            result[one] = rounded[one]


@compiled()
@no_type_check
def check_bands(limits: Any, outputs: int) -> None:
    """As check_sizes."""
    fits = len(limits) > 0 and limits[0] == 0 and limits[-1] == outputs
    for band in range(len(limits) - 1):
        fits = fits and 0 <= limits[band + 1] - limits[band] <= BAND
    if not fits:
        raise ValueError("the limits are not those of the bands")


@compiled()
@no_type_check
def check_drawn(drawn: Any, rows: int, columns: int, limits: Any, axis: int) -> None:
    """As check_sizes. No band lies in two segments."""
    edges, segments = drawn.edges, len(drawn.first)
    fits = drawn.offsets.shape[0] == segments and len(edges) == segments + 1
    fits = fits and 0 <= drawn.top <= drawn.offsets.shape[1] - rows
    fits = fits and edges[0] == 0 and edges[-1] == columns and drawn.step > 0
    fits = fits and len(drawn.table) >= (1 << TABLE_BITS) + SEGMENT - 1
    for segment in range(segments if fits else 0):
        count, first = edges[segment + 1] - edges[segment], drawn.first[segment]
        fits = fits and count > 0 and first >= 0 and first + (count - 1) * drawn.step < SEGMENT
        for row in range(rows):
            fits = fits and 0 <= drawn.offsets[segment, drawn.top + row] < (1 << TABLE_BITS)
    if fits and axis == 1:
        band = 0
        for edge in edges[1:]:
            while limits[band] < edge:
                band += 1
            fits = fits and limits[band] == edge
    if not fits:
        raise ValueError("the numbers drawn are not those of the block")


_DONE: Any = types.Tuple((types.boolean, _SUMS))  # type: ignore[no-untyped-call]
_ALL = (*_BASE, _NUMBERS, _PLACES, _COUNTS, _COUNTS, types.int64, types.int64, _COUNTS, types.int64)


@compiled(_DONE(*_ALL))
@no_type_check
def balanced(
    weight: Any,
    stride: int,
    delta: Any,
    out: Any,
    out_stride: int,
    table: Any,
    offsets: Any,
    edges: Any,
    first: Any,
    step: int,
    top: int,
    limits: Any,
    axis: int,
) -> Any:
    """As nearest, but rounds as balance.balanced_; False, and nothing is written, for what is not usual.

    table … top: as Drawn has them. axis: where the outputs lie, 0 or 1. limits: the first output of each
    band, and after the last one the count of all.
    """
    rows, columns = delta.shape
    drawn = Drawn(table, offsets, edges, first, step, top)
    check_sizes(weight, stride, delta, out, out_stride)
    check_bands(limits, delta.shape[axis])
    check_drawn(drawn, rows, columns, limits, axis)
    if not is_usual(weight, stride, delta):
        return False, (0.0, 0.0)
    sums, tile, block = (0.0, 0.0), new_tile(), (weight, stride, delta, out, out_stride)
    for segment in range(len(first)):
        left, right = edges[segment], edges[segment + 1]
        for band in range(len(limits) - 1):
            start, stop = limits[band], limits[band + 1]
            if axis == 1 and not left <= start < right:
                continue
            # The first and the last input, in this segment.
            begin, end = (left, right) if axis == 0 else (0, rows)
            for one in range(begin, end, INPUTS):
                inputs = min(INPUTS, end - one)
                across = (one, one + inputs, start, stop)
                where = (start, stop, one, one + inputs) if axis == 0 else across
                highest = weigh(tile, weight, stride, delta, where)
                tile.mass[: highest + 1], tile.wanted[:] = 0.0, 0.0
                if axis == 0:
                    add_up(tile, tile.level, tile.gain, tile.wanted_gain, stop - start, inputs)
                else:
                    add_up(tile, tile.level.T, tile.gain.T, tile.wanted_gain.T, stop - start, inputs)
                find_borders(tile, highest, inputs)
                write(tile, block, drawn, segment, where, axis)
                sums = added(sums, tile.along[: where[3] - where[2]], tile.total[: where[3] - where[2]])
    return True, sums
