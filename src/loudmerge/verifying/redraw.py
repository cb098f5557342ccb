r"""The numbers that stochastic rounding draws, a second time and in numpy: for `verify`. Pure.

What is drawn is a rule that files keep (`arithmetic.rounding`): for row o, column c of matrix m of tensor k

    u = shuffle((offset + c % 4096) % 2**20) >> 4
    offset = hash(hash(o ^ s0) ^ s1) >> 12,    s0, s1 = first words of SHA-256(k \0 m \0 c // 4096)
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Words = npt.NDArray[np.uint32]

_SEGMENT = 4096


class Redraw:
    """The numbers of one matrix: `matrix` along the first axis of the tensor `key`, else 0."""

    def __init__(self, key: str, matrix: int, table: npt.NDArray[np.int32]) -> None:
        self._key = f"{key}\0{matrix}\0"
        self._table = table

    def block(self, first: int, rows: int, columns: int) -> Tensor:
        """int32 (rows, columns), those of the rows from the `first` on."""
        number = np.arange(first, first + rows, dtype=np.uint32)
        parts = []
        for start in range(0, columns, _SEGMENT):
            column = np.arange(min(_SEGMENT, columns - start), dtype=np.uint32)
            place = self._offsets(number, start // _SEGMENT)[:, None] + column[None, :]
            parts.append(self._table[place & 0xFFFFF])
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def elements(self, rows: Tensor, columns: Tensor) -> Tensor:
        """int32 (elements,), those at (row, column), both int64."""
        row, column = rows.numpy().astype(np.uint32), columns.numpy().astype(np.uint32)
        place = np.zeros_like(row)
        for segment in np.unique(column // _SEGMENT):
            here = column // _SEGMENT == segment
            place[here] = self._offsets(row[here], int(segment)) + column[here] % _SEGMENT
        return torch.from_numpy(self._table[place & 0xFFFFF])

    def _offsets(self, rows: _Words, segment: int) -> _Words:
        digest = hashlib.sha256(f"{self._key}{segment}".encode()).digest()
        first, second = np.frombuffer(digest, dtype="<u4", count=2)
        return np.asarray(_hash(_hash(rows ^ first) ^ second) >> np.uint32(12), dtype=np.uint32)


def _hash(words: _Words) -> _Words:
    """`lowbias32`: multiplications wrap around at 2**32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray(words ^ (words >> np.uint32(16)), dtype=np.uint32)


@cache
def make_table() -> npt.NDArray[np.int32]:
    """What every `Redraw` reads: int32 (2**20,)."""
    place: npt.NDArray[np.uint64] = np.arange(1 << 20, dtype=np.uint64)
    for factor in (0x7FEB352D, 0x846CA68B, 0x9E3779B1, 0x85EBCA77):
        place = (place * np.uint64(factor) + np.uint64(0x5851F)) & np.uint64(0xFFFFF)
        place ^= place >> np.uint64(10)
    return np.asarray(place >> np.uint64(4), dtype=np.int32)
