"""How many threads compute; and those of numpy's products and torch's own, out of the way of ours."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import threadpool_limits

MOST = 8
"""Threads that compute by default, at most: each needs 20 MB, and so many are faster than a disk."""

_LOCK = threading.Lock()
_BLAS: list[Any] = []
"""What the first inside `one_blas_thread` has changed, and a None for each inside."""

_BEFORE: dict[int, int] = {}
"""torch's number of threads before, by Python thread inside `one_torch_thread`; global, as torch's own is."""


def cores(most: int = MOST) -> int:
    """The cores that this process may run on, `most` at most."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, most)


def check_threads(threads: object) -> None:
    """Raises ValueError for what is no number of threads; None is the default."""
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}, expected a whole number from 1 on, or None")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, numpy computes each product with one thread, in all threads of the process.

    For callers with threads of their own, or small matrices. Several may be inside at once: the last that
    leaves gives back what the first has found.
    """
    with _LOCK:
        if not _BLAS:
            _BLAS.append(threadpool_limits(1, "blas"))
        _BLAS.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _BLAS.pop()
            if len(_BLAS) == 1:
                _BLAS.pop().restore_original_limits()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: for callers with threads of their own, or small matrices.

    Several Python threads may be inside at once: each has its number back when it leaves, and threads that
    begin later have theirs when the last one has left.
    """
    me = threading.get_ident()
    if me in _BEFORE:
        yield
        return
    try:
        _enter(me)
        yield
    finally:
        _leave(me)


def _enter(me: int) -> None:
    import torch  # noqa: PLC0415 - the demo's command line is read before torch is needed

    with _LOCK:
        before = torch.get_num_threads()
        if before == 1:
            # A thread that began while others were inside has its 1 from them.
            before = next(iter(_BEFORE.values()), before)
        _BEFORE[me] = before
        torch.set_num_threads(1)


def _leave(me: int) -> None:
    import torch  # noqa: PLC0415

    with _LOCK:
        torch.set_num_threads(_BEFORE.pop(me, torch.get_num_threads()))
        if _BEFORE:
            # torch gives a new thread the number that was set last, in any: those still inside need a 1.
            setting = threading.Thread(target=torch.set_num_threads, args=(1,))
            setting.start()
            setting.join()
