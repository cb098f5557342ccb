from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loudmerge.canary.probing.forks import Done, Forks, shared

SCRIPT = """
import json, os, signal, sys, time

STATE = []

def prepare(settings):
    STATE.append(settings)
    if settings == "broken":
        raise ImportError(settings)

def job():
    order = json.load(sys.stdin)
    STATE.append(order["add"])
    print(json.dumps({"state": STATE, "pid": os.getpid(), "home": os.environ["HOME"]}))
    sys.stderr.write("complaint")
    if order.get("kill"):
        sys.stdout.flush()
        os.kill(os.getpid(), order["kill"])
    if "file" in order:
        open(order["file"], "w").write(str(os.getpid()))
    time.sleep(order.get("sleep", 0))
    return order.get("status", 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture
def forks(script: Path) -> Iterator[Forks]:
    process = Forks((sys.executable, "-I", "-S"), script, "made", apart=True)
    yield process
    process.close()


def run(forks: Forks, seconds: float = 30, **order: object) -> Done:
    return forks.run(json.dumps({"add": 1, **order}).encode(), seconds)


def state(done: Done) -> dict[str, object]:
    said = json.loads(done.said)
    assert isinstance(said, dict)
    return said


def test_a_job_is_a_fork_that_says_how_it_ended(forks: Forks) -> None:
    done = run(forks, status=3)
    assert (done.status, done.complained) == (3, b"complaint")
    assert state(done)["state"] == ["made", 1]
    assert run(forks, kill=int(signal.SIGTERM)).status == -signal.SIGTERM


def test_no_job_sees_what_another_did_nor_our_environment(forks: Forks) -> None:
    first, second = state(run(forks)), state(run(forks, add=2))
    assert (first["state"], second["state"]) == (["made", 1], ["made", 2])
    assert first["pid"] != second["pid"]
    assert first["home"] == "/"


def test_a_job_that_takes_too_long_is_killed(forks: Forks, tmp_path: Path) -> None:
    run(forks)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        run(forks, seconds=2, sleep=60, file=str(tmp_path / "pid"))
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):  # noqa: PT012
        while time.monotonic() - start < 20:
            os.kill(pid, 0)
    assert run(forks).status == 0


def test_jobs_run_at_the_same_time(forks: Forks) -> None:
    run(forks)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: run(forks, add=number, sleep=2), range(4)))
    assert [state(done)["state"] for done in found] == [["made", number] for number in range(4)]
    assert time.monotonic() - start < 7


def test_a_process_that_is_lost_is_replaced(script: Path) -> None:
    python = (sys.executable, "-I", "-S")
    first = shared(python, script, "a")
    assert shared(python, script, "a") is first
    first.close()
    assert run(shared(python, script, "a")).status == 0
    assert shared(python, script, "b") is not shared(python, script, "a")


def test_an_import_that_fails_starts_no_job(script: Path) -> None:
    broken = Forks((sys.executable, "-I", "-S"), script, "broken", apart=True)
    assert run(broken) == Done(None)
    broken.close()
