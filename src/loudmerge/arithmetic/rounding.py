"""Stochastic rounding of float32 to bfloat16 and float16, the same on every device. Pure tensor functions.

Each element goes to one of its two neighbours, with the probability that makes the expectation exact. What is
drawn depends on the tensor's key and on the element's row and column only, never on a generator's state:

    u(row, column) = table[offset(key, row, column // SEGMENT) + column % SEGMENT],   16 bits

The table holds every 16-bit number 16 times in a fixed, shuffled order, and is read around its end. The
offset is a hash over all of its places, so each u is uniform exactly, and the u of one row are independent
but for 1e-6. Reading a table costs a fifth of hashing every position.

A float32 is rounded by adding u to the bits that its dtype drops, as an integer, and clearing these: the
carry steps to the neighbour away from zero with just the probability wanted, at every exponent, and a number
of the dtype never carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from loudmerge.arithmetic.compiled import Drawn
from loudmerge.arithmetic.sizes import SEGMENT, TABLE_BITS
from loudmerge.layout import Span

DROPPED: Mapping[torch.dtype, int] = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that the dtype has not; a subnormal float16 has fewer still."""

_WORD = (1 << 32) - 1


@cache
def dither_table(device: torch.device) -> Tensor:
    """The table: int32, (2**TABLE_BITS + SEGMENT - 1,), its start repeated at its end. Only to be read."""
    size = 1 << TABLE_BITS
    places = torch.arange(size + SEGMENT - 1, device=device) % size
    return (_shuffled(places) >> (TABLE_BITS - 16)).to(torch.int32)


@dataclass(frozen=True)
class Dither:
    """The numbers u of one matrix: `matrix` along the first axis of `key`. table: of `dither_table`."""

    table: Tensor
    key: str
    matrix: int = 0

    def of(self, rows: Span, columns: Span) -> Draws:
        """Those of some rows and columns of the matrix."""
        return Draws(self.table, f"{self.key}\0{self.matrix}", rows, columns)


class Draws:
    """The numbers u of some rows and columns of the matrix `key`.

    segments: (first, count) of each that the columns meet: its first place that is a column, and how many
    are. step: from one such place to the next. offsets: of each, int64 (rows,).
    """

    def __init__(self, table: Tensor, key: str, rows: Span, columns: Span) -> None:
        index = torch.arange(rows.count, device=table.device) * rows.step + rows.start
        met = list(_segments(columns))
        self.table, self.step = table, columns.step
        self.segments = [(first, count) for _, first, count in met]
        self.offsets = [_offsets(key, index, segment) for segment, _, _ in met]

    def arrays(self) -> Drawn:
        """As the compiled kernel takes them; to be made once for all blocks. On the CPU."""
        firsts, counts = np.array(self.segments).T
        edges = np.concatenate([[0], counts.cumsum()])
        offsets = torch.stack(self.offsets).numpy()
        return self.table.numpy(), offsets, edges, np.ascontiguousarray(firsts), self.step

    def fill(self, first: int, out: Tensor) -> Tensor:
        """Fills `out`, int32 (some, columns.count), with the u of the rows from the `first` on."""
        done = 0
        for (start, count), offsets in zip(self.segments, self.offsets, strict=True):
            # A view of the table that has at (o, c) what lies c steps after the place o.
            windows = self.table.as_strided((1 << TABLE_BITS, count), (1, self.step), start)
            mine = offsets[first : first + out.shape[0]]
            if count == out.shape[1]:
                torch.index_select(windows, 0, mine, out=out)
            else:
                out[:, done : done + count] = windows[mine]
            done += count
        return out


def _segments(columns: Span) -> Iterator[tuple[int, int, int]]:
    """(segment, the first column in it, how many of the columns) for each segment that `columns` meets."""
    done = 0
    while done < columns.count:
        segment, first = divmod(columns.start + done * columns.step, SEGMENT)
        count = min(columns.count - done, -(-(SEGMENT - first) // columns.step))
        yield segment, first, count
        done += count


def _offsets(key: str, rows: Tensor, segment: int) -> Tensor:
    """Places in the table, int64 (rows,), for a segment of these rows (int64) of the tensor `key`."""
    digest = hashlib.sha256(f"{key}\0{segment}".encode()).digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    # Row numbers above 2**32 would need a tensor of more elements than memory has bytes.
    return _mixed(_mixed(rows ^ low) ^ high) >> (32 - TABLE_BITS)


def _mixed(words: Tensor) -> Tensor:
    """A bijection of 32-bit words, held as int64: `lowbias32` of github.com/skeeto/hash-prospector."""
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _WORD
    return words ^ (words >> 16)


def _shuffled(places: Tensor) -> Tensor:
    """A bijection of 0 … 2**TABLE_BITS - 1, int64, that looks random: multiplied and folded, in place."""
    mask = (1 << TABLE_BITS) - 1
    for factor in (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x85EBCA77):
        places.mul_(factor).add_(0x5851F).bitwise_and_(mask)
        places.bitwise_xor_(places >> (TABLE_BITS // 2))
    return places


def stochastic_(values: Tensor, drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds `values`, float32, in place to numbers of `dtype`, and returns them, still as float32.

    drawn: int32 in 0 … 65535, in the shape of `values`; changed too. What lies between the largest number
    and where the next would be becomes the largest; beyond, an infinity. An infinity and a NaN stay.
    float16 below its least normal 2**-14: the probability is exact to 2**-17.
    """
    return _to_float16(values, drawn) if dtype is torch.float16 else _drop(values, drawn, dtype)


def _drop(values: Tensor, drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds by the bits that the dtype drops. drawn: that many random ones."""
    largest = torch.finfo(dtype).max
    low, high = torch.aminmax(values)
    if not (-largest <= low.item() and high.item() <= largest):  # also where one is a NaN
        _guard_the_ends(values, drawn, dtype)
    bits = values.view(torch.int32)
    bits += drawn
    bits &= -(1 << DROPPED[dtype])
    return values


def _guard_the_ends(values: Tensor, drawn: Tensor, dtype: torch.dtype) -> None:
    """Keeps a carry away from the infinity, and from the bits of what is not finite."""
    values.copy_(held_at_the_ends(values, dtype))
    values.masked_fill_(values.isnan(), torch.nan)
    drawn.masked_fill_(~values.isfinite(), 0)


def held_at_the_ends(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values, those that lie past the largest number by less than a unit moved to it."""
    largest = torch.finfo(dtype).max
    size = values.abs()
    # In double: the place after bfloat16's largest is no float32.
    after = 2.0 ** (torch.tensor(largest, dtype=torch.float64).log2().ceil().item())
    past = (size > largest) & (size.double() < after)
    return torch.where(past, torch.full_like(values, largest).copysign(values), values)


def _to_float16(values: Tensor, drawn: Tensor) -> Tensor:
    small = (values.abs() < 2.0**-14).nonzero(as_tuple=True)
    # In units of 2**-40, a 65536th of the distance 2**-24 of two subnormal numbers.
    fixed = (values[small] * 2.0**40).round().abs().to(torch.int32)
    steps = (fixed + drawn[small]) >> 16
    rounded = (steps.to(torch.float32) * 2.0**-24).copysign(values[small])
    drawn >>= 3
    _drop(values, drawn, torch.float16)
    values[small] = rounded
    return values
