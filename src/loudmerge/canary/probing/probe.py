"""Runs upstream's own functions on our inputs, in a process with limits, and compares the answers."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loudmerge.canary.code.syntax import RuleError
from loudmerge.canary.probing.doubts import NOTHING, Known
from loudmerge.canary.probing.extract import Extract, extract
from loudmerge.canary.probing.forks import Forks, shared

SANDBOX = Path(__file__).with_name("sandbox.py")
CPU_S = 10
MEMORY_BYTES = 512 * 2**20
LIBRARY_MEMORY_BYTES = 8 * 2**30
"""Address space, not use: a real library reserves far more than it touches."""
FILE_BYTES = 2**20
IDLE_S = 5
"""Seconds without use of the CPU, on top of the limit."""
START_S = 30
"""Seconds a library may take to be imported, on top of the limit."""


@dataclass(frozen=True)
class Probe:
    """What to define, what to prepare, what to call.

    prelude: code of ours run before upstream's. setup: run before each case.
    libraries: imported for real; all else that upstream imports is a stand-in.
    known: stand-ins that do upstream's code nothing.
    """

    extract: tuple[str, ...]
    cases: tuple[Mapping[str, Any], ...]
    prelude: str = ""
    setup: str = ""
    libraries: tuple[str, ...] = ()
    cpu_s: int = CPU_S
    memory_bytes: int = 0
    known: Known = NOTHING


@dataclass(frozen=True)
class Answer:
    """What one case gave: a value, or the name of what it raised."""

    value: Any = None
    raised: str = ""

    def __str__(self) -> str:
        return f"{self.raised} was raised" if self.raised else repr(self.value)


def probe(text: str, path: str, job: Probe) -> tuple[tuple[Answer, ...], str]:
    """(one answer for each case, "") or ((), why the run was ended). RuleError where a library is absent."""
    for name in job.libraries:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise RuleError(f"the probe needs {name}, which is not installed here")
    code = extract(text, path, job.extract, job.libraries, prelude=job.prelude, known=job.known)
    reply = _run(code, job)
    if "ended" in reply:
        return (), str(reply["ended"])
    found = tuple(Answer(one.get("value"), one.get("raised", "")) for one in reply["answers"])
    return (found, "") if len(found) == len(job.cases) else ((), "it did not answer every case")


def _run(code: Extract, job: Probe) -> Mapping[str, Any]:
    memory = job.memory_bytes or (LIBRARY_MEMORY_BYTES if job.libraries else MEMORY_BYTES)
    with tempfile.TemporaryDirectory(prefix="loudmerge-probe-") as scratch:
        order = {
            "scratch": scratch,
            "code": code.code,
            "stubs": code.stubs,
            "extract": job.extract,
            "prelude": job.prelude,
            "setup": job.setup,
            "cases": [str(case["call"]) for case in job.cases],
            "libraries": job.libraries,
            "limits": {"cpu_s": job.cpu_s, "memory_bytes": memory, "file_bytes": FILE_BYTES},
        }
        return _answer(json.dumps(order).encode(), job)


def _answer(order: bytes, job: Probe) -> Mapping[str, Any]:
    seconds = job.cpu_s + (START_S if job.libraries else IDLE_S)
    try:
        done = _forks(job.libraries).run(order, seconds)
    except TimeoutError:
        return {"ended": f"it was still running after {seconds} s"}
    if done.status is None:
        wanted = f" Can {', '.join(job.libraries)} be imported?" if job.libraries else ""
        return {"ended": f"its process was gone before it began.{wanted}"}
    if done.status < 0:
        name = signal.Signals(-done.status).name
        limit = f", its limit of {job.cpu_s} s of CPU time" if name in {"SIGXCPU", "SIGKILL"} else ""
        return {"ended": f"it was ended by {name}{limit}"}
    return _parsed(done.said)


def _forks(libraries: tuple[str, ...]) -> Forks:
    """The process that has imported these libraries, and nothing else that upstream's code could see."""
    paths = [entry for entry in sys.path if entry] if libraries else []
    settings = json.dumps({"libraries": libraries, "paths": paths})
    return shared((sys.executable, "-I", "-S", "-B"), SANDBOX, settings, apart=True)


def _parsed(out: bytes) -> Mapping[str, Any]:
    try:
        reply = json.loads(out)
    except ValueError:
        return {"ended": f"it gave no answer ({len(out)} bytes)"}
    return (
        reply
        if isinstance(reply, dict) and reply.keys() & {"answers", "ended"}
        else {"ended": "it gave no answer"}
    )


def mismatches(cases: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> list[str]:
    """One line for each answer that is not the one its case expects."""
    found = []
    for case, answer in zip(cases, answers, strict=True):
        wanted = Answer(case.get("equals"), str(case.get("raises", "")))
        if not _same(wanted, answer):
            found.append(f"{case['call']} gave {answer}, expected {wanted}")
    return found


def _same(wanted: Answer, answer: Answer) -> bool:
    if wanted.raised or answer.raised:
        return wanted.raised == answer.raised
    return type(wanted.value) is type(answer.value) and bool(wanted.value == answer.value)
