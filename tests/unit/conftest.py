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

# What imports loudmerge is imported by the fixtures: before the tests begin its annotations are not checked.
if TYPE_CHECKING:
    from tests.support.hub_state import HubServer
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


@pytest.fixture
def place(tmp_path: Path) -> Place:
    from tests.unit.places import make_place

    return make_place(tmp_path)


@pytest.fixture
def old(place: Place) -> dict[str, bytes]:
    """The files of an OUT that is there already."""
    from tests.unit.places import make_old

    return make_old(place)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a merge, of such a place, that nothing disturbed."""
    from tests.unit.places import make_place, undisturbed

    return undisturbed(make_place(tmp_path_factory.mktemp("reference")))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, empty, which this process asks."""
    from tests.support.hub_server import connected_hub

    with connected_hub(monkeypatch, tmp_path / "cache") as running:
        # huggingface_hub waits up to 8 s between its own retries.
        monkeypatch.setattr("time.sleep", lambda _seconds: None)
        yield running
