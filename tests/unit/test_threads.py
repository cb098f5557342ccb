"""How many threads compute where nobody says."""

from __future__ import annotations

import os

import pytest

from loudmerge.threads import MOST, cores


@pytest.mark.parametrize(("allowed", "used"), [(1, 1), (3, 3), (96, MOST)])
def test_as_many_as_the_cores_that_are_allowed_but_not_the_memory_of_a_hundred(
    allowed: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    assert cores() == used
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cores() == MOST
