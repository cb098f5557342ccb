"""What every test run shares: one thread, how hard the property tests try, and who tells a long story."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# Read when torch is first imported. The tensors are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: machines are slow now and then. Each run of CI is to look somewhere else.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def _no_disk_is_waited_for() -> Iterator[None]:
    """A merge syncs a dozen files, 4 ms each: as long as the rest of it takes, with an idle processor.

    What no test sees without a power cut. That files are synced, and in which order, is tested by the calls;
    commands that tests start, and the journeys of the matrix, wait for the disk.
    """
    with pytest.MonkeyPatch.context() as patched:
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):  # macOS has one of them
                patched.setattr(os, name, os.fstat)  # which fails, too, where the file is closed
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Each test by itself, but for those that share a model, or a run of it, that takes long to make.

    xdist's own groups are without effect under pytest 9.2 (pytest-xdist#1386).
    """
    from xdist.scheduler import LoadScopeScheduling  # the cells run without it

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            story = re.search(r"test_smollm2\.py::.*\[(qwen2_moe|mixtral)\b", nodeid)
            family = re.search(r"test_families\.py::.*\[([\w-]+?)(-gate_up|-down)?\]", nodeid)
            run = re.search(r"e2e/test_(journey|demo)\.py", nodeid)
            shared = story or family or run
            return f"{shared[0].partition('::')[0]} {shared[1]}" if shared else nodeid

    return Scheduling(config, log)
