"""How many threads compute where nobody says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from loudmerge.system.threads import MOST, cores, one_blas_thread, one_torch_thread


@pytest.mark.parametrize(("allowed", "used"), [(1, 1), (3, 3), (96, MOST)])
def test_as_many_as_the_cores_that_are_allowed_but_not_the_memory_of_a_hundred(
    allowed: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    assert cores() == used
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cores() == MOST


# --- numpy's threads -----------------------------------------------------------------------------


def of_numpy() -> list[int]:
    return [found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"]


@pytest.mark.skipif(not of_numpy(), reason="threadpoolctl does not know the BLAS of this numpy")
def test_numpy_has_its_threads_back_once_all_that_overlap_have_left() -> None:
    with threadpool_limits(3, "blas"):
        first, second = one_blas_thread(), one_blas_thread()
        for entered in (first, second):
            entered.__enter__()
            assert set(of_numpy()) == {1}
        first.__exit__(None, None, None)
        assert set(of_numpy()) == {1}
        second.__exit__(KeyError, KeyError(), None)
        assert set(of_numpy()) == {3}
        with one_blas_thread():
            assert set(of_numpy()) == {1}
        assert set(of_numpy()) == {3}


# --- torch's threads -----------------------------------------------------------------------------


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("two_torch_threads")
@pytest.mark.parametrize("first_leaves", [0, 1])
def test_torch_has_its_threads_back_once_all_that_overlap_have_left(first_leaves: int) -> None:
    """Whoever leaves first: the other, and the threads that it begins, keep the one thread until then."""
    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:
        pools = [a, b]
        inside = [one_torch_thread(), one_torch_thread()]
        for pool, entered in zip(pools, inside, strict=True):
            pool.submit(entered.__enter__).result()
            assert pool.submit(torch.get_num_threads).result() == 1
        for which, others in ((first_leaves, 1), (1 - first_leaves, 2)):
            pools[which].submit(inside[which].__exit__, None, None, None).result()
            assert pools[which].submit(torch.get_num_threads).result() == 2
            assert pools[1 - which].submit(torch.get_num_threads).result() == others
            assert of_a_new_thread() == others
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_torch_threads")
def test_torch_keeps_the_one_thread_until_the_outermost_of_one_thread_has_left() -> None:
    with one_torch_thread():
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == of_a_new_thread() == 1
    assert torch.get_num_threads() == of_a_new_thread() == 2
