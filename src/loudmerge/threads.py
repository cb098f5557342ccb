"""How many threads compute; and torch's own, out of the way of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 8
"""Threads that compute by default, at most: each needs 20 MB, and so many are faster than a disk."""


def cores(most: int = MOST) -> int:
    """The cores that this process may run on, `most` at most."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, most)


def check_threads(threads: object) -> None:
    """Raises ValueError for what is no number of threads; None is the default."""
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}, expected a whole number from 1 on, or None")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: for callers with threads of their own, or small matrices."""
    import torch  # noqa: PLC0415 - the demo's command line is read before torch is needed

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
