"""Where the memory of a tensor's bytes comes from, and that it goes back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from loudmerge.system import memory
from loudmerge.system.memory import LARGE_BYTES, array, buffer, turned
from loudmerge.system.tensors import empty

STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("nbytes", [0, 4, LARGE_BYTES - 4, LARGE_BYTES, LARGE_BYTES + 4])
def test_it_has_its_shape_and_dtype_whatever_its_size(nbytes: int) -> None:
    made = empty([2, nbytes // 4], torch.bfloat16)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((2, nbytes // 4), torch.bfloat16, True)
    assert made.fill_(1).sum(dtype=torch.float64) == nbytes // 2
    other = array([2, nbytes // 4], np.int16)
    assert (other.shape, other.dtype.name, other.flags.c_contiguous) == ((2, nbytes // 4), "int16", True)
    other[...] = 1
    assert other.sum() == nbytes // 2


def test_a_large_buffer_starts_on_a_page() -> None:
    """A direct write needs that of its memory."""
    assert not any(buffer(LARGE_BYTES).ctypes.data % mmap.PAGESIZE for _ in range(8))


@pytest.mark.skipif(not STATM.exists(), reason="only Linux says in /proc how much memory is resident")
def test_what_was_freed_is_no_longer_resident() -> None:
    nbytes = 24 << 20
    # malloc's own threshold for mapping grows to what was freed last: the next of this size is kept.
    np.ones(nbytes, np.uint8)
    before = resident()
    made = buffer(nbytes)
    made[:] = 1
    assert resident() - before > nbytes * 0.9
    del made
    assert resident() - before < nbytes * 0.1


@pytest.mark.parametrize("tile", [1, 7, 1 << 20])
def test_a_matrix_is_turned_in_parts(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_TILE", tile)
    for shape in ((5, 3), (0, 3), (5, 0)):
        matrix = np.arange(shape[0] * shape[1], dtype=np.int16).reshape(shape)
        made = turned(matrix)
        assert made.flags.c_contiguous
        assert np.array_equal(made, matrix.T)


def resident() -> int:
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE
