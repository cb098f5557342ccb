"""Where a tensor's memory comes from, and that it goes back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from loudmerge.system.memory import LARGE_BYTES, contiguous, empty

STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("nbytes", [0, 4, LARGE_BYTES - 4, LARGE_BYTES, LARGE_BYTES + 4])
def test_a_tensor_has_its_shape_and_dtype_whatever_its_size(nbytes: int) -> None:
    made = empty([2, nbytes // 4], torch.bfloat16)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((2, nbytes // 4), torch.bfloat16, True)
    assert made.fill_(1).sum(dtype=torch.float64) == nbytes // 2


def test_a_large_tensor_starts_on_a_page() -> None:
    """A direct write needs that of its memory."""
    assert not any(empty([LARGE_BYTES], torch.uint8).data_ptr() % mmap.PAGESIZE for _ in range(8))


@pytest.mark.skipif(not STATM.exists(), reason="only Linux says in /proc how much memory is resident")
def test_what_was_freed_is_no_longer_resident() -> None:
    nbytes = 24 << 20
    # malloc's own threshold for mapping grows to what was freed last: the next of this size is kept.
    torch.ones(nbytes, dtype=torch.uint8)
    before = resident()
    made = empty([nbytes], torch.uint8).fill_(1)
    assert resident() - before > nbytes * 0.9
    del made
    assert resident() - before < nbytes * 0.1


def test_contiguous_copies_only_what_is_not_so() -> None:
    plain = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert contiguous(plain, torch.float32) is plain
    for copy, wanted in (
        (contiguous(plain.T, torch.float32), [[0, 3], [1, 4], [2, 5]]),
        (contiguous(plain, torch.float64), plain.tolist()),
    ):
        assert copy.is_contiguous()
        assert copy.tolist() == wanted


def resident() -> int:
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE
