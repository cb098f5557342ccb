"""Runs a merge command on every case, in directories of their own.

A command is a line with placeholders, split as a shell does, run without a shell:

    {base} {adapter} {out}           the directories; OUT is not there yet
    {options}                        the case's options as loudmerge takes them, nothing for most cases
    {orientation} {lora_b_layout}    one option's value, or auto

A command that starts slowly can serve instead: see `loudmerge.conformance.server`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from loudmerge.conformance.cases import Case, Suite
from loudmerge.conformance.judge import (
    CRASHED,
    MOOT,
    REFUSED,
    TIMED_OUT,
    WRONG,
    WROTE,
    Ended,
    Verdict,
    judge,
)

TIME_LIMIT = 300.0
"""Seconds a command may take for one case: the models have a few thousand weights."""
SAID = 2000
"""Characters kept of the end of what a command printed."""

OPTIONS = ("orientation", "lora_b_layout")


@runtime_checkable
class Tool(Protocol):
    """What merges. told: whether it is given the case's options."""

    @property
    def told(self) -> bool: ...

    def merge(self, case: Case, base: Path, adapter: Path, out: Path) -> Ended: ...


@dataclass(frozen=True)
class Command:
    """A command line with placeholders. limit: seconds."""

    line: str
    limit: float = TIME_LIMIT

    def __post_init__(self) -> None:
        missing = [name for name in ("{base}", "{adapter}", "{out}") if name not in self.line]
        if missing:
            raise ValueError(
                f"found no {missing[0]} in {self.line!r}, expected {{base}}, {{adapter}} and {{out}}"
            )
        program = shlex.split(self.line)[0]
        if shutil.which(program) is None:
            raise ValueError(f"found no program {program!r} to run")

    @property
    def told(self) -> bool:
        return any(f"{{{name}}}" in self.line for name in ("options", *OPTIONS))

    def words(self, case: Case, base: Path, adapter: Path, out: Path) -> list[str]:
        """The line's words for a case."""
        values = {"{base}": str(base), "{adapter}": str(adapter), "{out}": str(out)}
        values |= {f"{{{name}}}": case.options.get(name, "auto") for name in OPTIONS}
        words: list[str] = []
        for word in shlex.split(self.line):
            if word == "{options}":
                words += flags(case)
                continue
            for name, value in values.items():
                word = word.replace(name, value)  # noqa: PLW2901 - every placeholder in turn
            words.append(word)
        return words

    def merge(self, case: Case, base: Path, adapter: Path, out: Path) -> Ended:
        """Runs it; ends it, and all that it started, when its time is over."""
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                self.words(case, base, adapter, out),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
            return Ended(code, tail(output))


def flags(case: Case) -> list[str]:
    """The case's options as loudmerge takes them."""
    return [word for name, value in case.options.items() for word in (f"--{name.replace('_', '-')}", value)]


def tail(output: IO[bytes]) -> str:
    """The end of what a command printed: of gigabytes no more than that is read."""
    output.seek(max(output.seek(0, os.SEEK_END) - 4 * SAID, 0))
    return output.read().decode(errors="replace")[-SAID:]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended
    finally:
        process.wait()


def run(case: Case, tool: Tool) -> Verdict:
    """One case, on copies of its files: the verdict. A tool that changes its inputs is wrong, whatever it
    writes.
    """
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        shutil.copytree(case.base, base)
        shutil.copytree(case.adapter, adapter)
        before = _hashes(base, adapter)
        ended = tool.merge(case, base, adapter, out)
        verdict = judge(case, ended, out, told=tool.told)
        after = _hashes(base, adapter)
    changed = sorted(name for name in before.keys() | after.keys() if after.get(name) != before.get(name))
    if changed:
        did = "changed" if changed[0] in before else "wrote into"
        return replace(verdict, verdict=WRONG, detail=f"it {did} its input {changed[0]}")
    return replace(
        verdict, said=verdict.said.replace(folder, "…"), detail=verdict.detail.replace(folder, "…")
    )


def _hashes(*folders: Path) -> dict[str, str]:
    return {
        f"{folder.name}/{file.relative_to(folder)}": hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file()
    }


def run_all(
    cases: Sequence[Case],
    tool: Tool,
    suite: Suite,
    *,
    jobs: int = 1,
    progress: Callable[[Verdict], None] | None = None,
) -> tuple[Verdict, ...]:
    """Every case, in order. jobs: how many at a time.

    Where a tool fails on the control, too, its failure is no refusal, and moot.
    """
    verdicts = tuple(_run_all(cases, tool, jobs, progress))
    controls = Controls(suite, tool, {verdict.case: verdict for verdict in verdicts})
    return tuple(controls.judged(case, verdict) for case, verdict in zip(cases, verdicts, strict=True))


@dataclass(frozen=True)
class Controls:
    """What shows that a tool which refuses does so because of the case: one like it, that it has to merge.

    known: the verdicts that there are, by the case's name. Controls that are not among them are run.
    """

    suite: Suite
    tool: Tool
    known: dict[str, Verdict] = field(default_factory=dict)

    def judged(self, case: Case, verdict: Verdict) -> Verdict:
        """The verdict; moot for a refusal by a tool that fails on the control."""
        control = self.suite.control(case)
        if verdict.verdict != REFUSED or control is None:
            return verdict
        if control.id not in self.known:
            self.known[control.id] = run(control, self.tool)
        if self.known[control.id].verdict not in {CRASHED, WROTE, TIMED_OUT}:
            return verdict
        return replace(verdict, verdict=MOOT, detail=f"it fails on {control.id}, too, which it has to merge")


def _run_all(
    cases: Sequence[Case], tool: Tool, jobs: int, progress: Callable[[Verdict], None] | None
) -> Iterator[Verdict]:
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(lambda case: run(case, tool), cases):
            if progress is not None:
                progress(verdict)
            yield verdict
