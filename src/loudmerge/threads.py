"""torch's own threads, out of the way of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
