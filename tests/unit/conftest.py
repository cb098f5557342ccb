"""What the unit tests share: imports that nobody looks for garbage in, and the process that kills merges."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.unit.places import Place

Killed = Callable[..., dict[str, Any]]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: each look for garbage in it takes time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def killed() -> Iterator[Killed]:
    """Runs a merge for each moment, which is killed then; what is found afterwards."""
    command = [sys.executable, str(Path(__file__).with_name("killed_merge.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        orders, answers = process.stdin, process.stdout
        assert orders is not None
        assert answers is not None

        def run(place: Place, moments: list[str], *, overwrite: bool = False) -> dict[str, Any]:
            order = {"root": str(place.root), "moments": moments, "overwrite": overwrite}
            orders.write(json.dumps(order) + "\n")
            orders.flush()
            found: dict[str, Any] = json.loads(answers.readline())
            return found

        yield run
