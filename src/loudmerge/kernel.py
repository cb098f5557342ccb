"""Balanced rounding to bfloat16, compiled: the bits of `loudmerge.balance`, in a fifth of its time.

Needs numba (the extra `fast`), so only loudmerge.balance imports this, and only when it has much to round.
A tile, one band of outputs by INPUTS inputs, goes through all steps while it is in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32, float64, int32

from loudmerge.balance import BAND, OCTAVES, PARTS

INPUTS, LEVELS = 64, OCTAVES * PARTS

# A name of the module is a constant to numba. Each has its type: int32 and a Python int make an int64.
SIGN, SIZE, EXPONENT = int32(-0x80000000), int32(0x7FFFFFFF), int32(0x7F800000)
LOW, HIGH = int32(0xFFFF), int32(-0x10000)
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

_BLOCK = types.float32[:, ::1]
_NUMBERS = types.int32[:, ::1]
_CELLS = types.float64[::1]


@compiled(types.boolean(_BLOCK))
@no_type_check
def is_usual(numbers: Any) -> bool:
    """As balance.is_usual."""
    low, high = MOST, LEAST
    for row in numbers:
        for one in range(len(row)):
            size = int32(bits_of(row[one]) & SIZE)
            low, high = min(low, size), max(high, size)
    return bool(low >= LEAST and high <= MOST)


@compiled()
@no_type_check
def near_of(value: Any, update: Any) -> Any:
    """All ones on the way to zero, else 0; and the neighbour that the update comes from. All are bits."""
    back = int32(int32(value ^ update) >> int32(31))
    return back, int32(int32(int32(back & LOW) + value) & HIGH)


@compiled()
@no_type_check
def share_of(value: Any, base: Any, change: Any) -> Any:
    """An element's share s, and its gain u |dW|, 0 where the share is."""
    update = bits_of(change)
    back, near = near_of(bits_of(value), update)
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


@compiled(types.void(types.float64[:, ::1], _CELLS, types.int32[::1]))
@no_type_check
def find_borders(mass: Any, wanted: Any, border: Any) -> None:
    """65536 (k - p) of each cell, from its gains by level and the sum that is wanted of them."""
    reached, above, within = np.zeros(INPUTS), np.zeros(INPUTS), np.zeros(INPUTS)
    for step in range(LEVELS):
        level = int32(LEVELS - 1 - step)
        here = mass[level]
        for one in range(INPUTS):
            short = (reached[one] < wanted[one]) | (step == 0)
            reached[one] += here[one]
            above[one] = reached[one] - here[one] if short else above[one]
            within[one] = here[one] if short else within[one]
            border[one] = level if short else border[one]
    for one in range(INPUTS):
        chance = (wanted[one] - above[one]) / within[one]
        chance = 0.0 if np.isnan(chance) else min(np.ceil(chance * 65536.0), 65536.0)
        border[one] = int32(border[one] * int32(65536) - int32(chance))


@compiled(types.boolean(types.int64[::1], types.int64))
@no_type_check
def are_bands(limits: Any, outputs: int) -> bool:
    """Whether the limits are those of bands of so many outputs: nothing else keeps other memory from harm."""
    if len(limits) == 0 or limits[0] != 0 or limits[-1] != outputs:
        return False
    widths = np.diff(limits)
    return bool(((widths >= 0) & (widths <= BAND)).all())


@compiled(types.void(_BLOCK, _BLOCK, _BLOCK, _NUMBERS, types.UniTuple(types.int64, 4)))
@no_type_check
def round_tile(values: Any, weight: Any, delta: Any, drawn: Any, where: Any) -> None:
    """Rounds in place one band of outputs, INPUTS inputs at most. where: the first and the end of both."""
    first, last, start, stop = where
    level, border = np.empty((BAND, INPUTS), int32), np.empty(INPUTS, int32)
    share, gain = np.empty(INPUTS, float32), np.empty(INPUTS, float32)
    mass, wanted = np.zeros((LEVELS, INPUTS)), np.zeros(INPUTS)
    for output in range(first, last):
        value, base, change = (
            values[output, start:stop],
            weight[output, start:stop],
            delta[output, start:stop],
        )
        levels = level[output - first]
        # Apart, so that all but the last are done for several inputs at a time.
        for one in range(stop - start):
            share[one], gain[one] = share_of(value[one], base[one], change[one])
            levels[one] = level_of(share[one])
        for one in range(stop - start):
            wanted[one] += float64(float32(share[one] * gain[one]))
        for one in range(stop - start):
            if levels[one] >= 0:
                mass[levels[one], one] += float64(gain[one])
    find_borders(mass, wanted, border)
    for output in range(first, last):
        value, change, numbers = (
            values[output, start:stop],
            delta[output, start:stop],
            drawn[output, start:stop],
        )
        levels = level[output - first]
        for one in range(stop - start):
            back, near = near_of(bits_of(value[one]), bits_of(change[one]))
            moves = border[one] < int32(int32(levels[one] * int32(65536)) - numbers[one])
            step = int32(int32(back | int32(1)) << int32(16))
            step = step if (levels[one] >= int32(0)) & moves else int32(0)
            value[one] = number_of(int32(near + step))


@compiled()
@no_type_check
def turn(given: Any, turned: Any, first: int, last: int, start: int, stop: int) -> None:
    """turned[:last - first, :stop - start] becomes given[start:stop, first:last].T."""
    for one in range(stop - start):
        row = given[start + one, first:last]
        for output in range(last - first):
            turned[output, one] = row[output]


@compiled(types.boolean(_BLOCK, _BLOCK, _BLOCK, _NUMBERS, types.int64[::1], types.int64))
@no_type_check
def balanced(values: Any, weight: Any, delta: Any, drawn: Any, limits: Any, axis: int) -> bool:
    """Rounds as balance.balanced_, in place; False, and nothing is changed, where something is not usual.

    values = weight + delta, float32; drawn: int32. All are contiguous. axis: where the outputs lie, 0 or 1.
    limits: int64, the first output of each band, and after the last one the count of all.
    """
    outputs, inputs = values.shape[axis], values.shape[1 - axis]
    if not (values.shape == weight.shape == delta.shape == drawn.shape and are_bands(limits, outputs)):
        raise ValueError("the limits are not those of the bands, or the blocks differ in shape")
    if not (is_usual(values) and is_usual(delta)):
        return False
    value, base = np.empty((BAND, INPUTS), float32), np.empty((BAND, INPUTS), float32)
    change, numbers = np.empty((BAND, INPUTS), float32), np.empty((BAND, INPUTS), int32)
    for band in range(len(limits) - 1):
        first, last = limits[band], limits[band + 1]
        for start in range(0, inputs, INPUTS):
            stop = min(start + INPUTS, inputs)
            if axis == 0:
                round_tile(values, weight, delta, drawn, (first, last, start, stop))
                continue
            turn(values, value, first, last, start, stop)
            turn(weight, base, first, last, start, stop)
            turn(delta, change, first, last, start, stop)
            turn(drawn, numbers, first, last, start, stop)
            round_tile(value, base, change, numbers, (0, last - first, 0, stop - start))
            turn(value, values[start:stop, first:last], 0, stop - start, 0, last - first)
    return True
