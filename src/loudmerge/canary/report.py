"""What a canary run says to those who did not watch it: markdown, annotations on GitHub, JSON read back.

Details hold words of upstream's. In markdown they stand in code spans and fences only, where they notify
nobody, refer to no pull request and close no block; in annotations they are escaped.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from loudmerge.canary.guards import Guard
from loudmerge.canary.run import (
    MISSING,
    PENDING,
    PRESENT,
    UNREACHABLE,
    VERDICTS,
    CanaryReport,
    Verdict,
    tally,
)
from loudmerge.errors import plural

STEP_SUMMARY_BYTES = 900_000
"""GitHub drops a step's summary over 1 MiB, whole."""

DETAIL_CHARACTERS = 4_000


@dataclass(frozen=True)
class Reports:
    """Where a run is reported.

    markdown: a file. annotations: whether lines for GitHub's runner are wanted. summary: GitHub's file for
    the summary of the step, which is appended to.
    """

    markdown: Path | None = None
    annotations: bool = False
    summary: Path | None = None

    @classmethod
    def from_environment(cls, markdown: Path | None, *, annotations: bool) -> Reports:
        """GITHUB_ACTIONS asks for annotations, GITHUB_STEP_SUMMARY names the summary."""
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        wanted = annotations or bool(os.environ.get("GITHUB_ACTIONS"))
        return cls(markdown, wanted, Path(summary) if summary else None)

    def write(self, report: CanaryReport, guards: Sequence[Guard]) -> tuple[str, ...]:
        """Writes the files; the annotations, for the caller to print. Raises OSError."""
        if self.markdown:
            self.markdown.parent.mkdir(parents=True, exist_ok=True)
            self.markdown.write_text(markdown(report, guards), encoding="utf-8")
        if self.summary:
            with self.summary.open("a", encoding="utf-8") as file:
                file.write(markdown(report, guards, limit=STEP_SUMMARY_BYTES))
        root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
        return workflow_commands(report, guards, root) if self.annotations else ()


def headline(report: CanaryReport) -> str:
    """What matters most, in a line."""
    counted = Counter(_state(verdict) for verdict in report.verdicts)
    for names in ((MISSING, "stale"), (UNREACHABLE,)):
        told = [f"{counted[name]} {name}" for name in names if counted[name]]
        if told:
            return f"Canary: {', '.join(told)}"
    return (
        "Canary: not all guards were run" if report.not_run else "Canary: every guard is present or pending"
    )


def _state(verdict: Verdict) -> str:
    return "stale" if verdict.stale else verdict.verdict


def markdown(report: CanaryReport, guards: Sequence[Guard] = (), *, limit: int | None = None) -> str:
    """The report for people. guards: for why each matters. limit: bytes, whole blocks are left out above."""
    blocks = list(_blocks(report, {guard.id: guard for guard in guards}))
    if limit is None:
        return "\n\n".join(blocks) + "\n"
    kept: list[str] = []
    for number, block in enumerate(blocks):
        left = plural(len(blocks) - number, "more part does", "more parts do")
        note = f"_{left} not fit here; `loudmerge canary --markdown` has them._"
        if len("\n\n".join([*kept, block, note]).encode()) > limit:
            kept.append(note)
            break
        kept.append(block)
    return "\n\n".join(kept) + "\n"


def _blocks(report: CanaryReport, guards: Mapping[str, Guard]) -> Iterator[str]:
    by_state: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        by_state.setdefault(_state(verdict), []).append(verdict)
    yield f"## {headline(report)}"
    yield tally(report.verdicts)
    for name, about in ((MISSING, ""), ("stale", ": not read for 48 hours")):
        if name in by_state:
            yield f"### {name.capitalize()}{about}"
            yield from (_entry(verdict, guards.get(verdict.guard)) for verdict in by_state[name])
    for name, about in (
        (PENDING, "the change that brings the guard is not in what was read"),
        (UNREACHABLE, "no verdict, and no pass"),
    ):
        if name in by_state:
            yield f"### {name.capitalize()}: {about}"
            yield "\n".join(_line(verdict) for verdict in by_state[name])
    if report.not_run:
        yield "### Not run"
        yield "\n".join(f"- {_code(name)}" for name in report.not_run)
    yield from _read(report.verdicts)
    present = by_state.get(PRESENT, [])
    if present:
        lines = "\n".join(_line(verdict) for verdict in present)
        yield f"<details><summary>{len(present)} present</summary>\n\n{lines}\n\n</details>"


def _entry(verdict: Verdict, guard: Guard | None) -> str:
    """One guard in full."""
    version = f", {_code(verdict.version)}" if verdict.version else ""
    lines = [
        f"#### {_code(verdict.guard)}",
        "",
        f"- read: {_code(f'{verdict.upstream}@{verdict.ref}')}{version}, {_code(verdict.place)}",
    ]
    if guard:
        lines.append(f"- why: {_code(guard.why)}")
        lines.append(f"- guard: {_code(f'{guard.file.as_posix()}:{guard.line}')}, since {_code(guard.since)}")
    return "\n".join([*lines, "", _fence(verdict.detail)])


def _line(verdict: Verdict) -> str:
    read = f"{verdict.upstream}@{verdict.ref}" + (f" ({verdict.version})" if verdict.version else "")
    first = verdict.detail.partition("\n")[0]
    return f"- {_code(verdict.guard)} {_code(read)} {_code(verdict.place)}: {_code(first)}"


def _read(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The exact versions and commits, and how many guards were evaluated on each."""
    counted = Counter((one.upstream, one.ref, one.version) for one in verdicts if one.version)
    evaluated = Counter((one.upstream, one.ref, one.version) for one in verdicts if one.evaluated)
    if counted:
        yield "### Read"
        head = "| upstream | ref | commit or version | guards evaluated |\n|---|---|---|---|\n"
        yield head + "\n".join(
            f"| {' | '.join(_cell(part) for part in place)} | {evaluated[place]} of {count} |"
            for place, count in counted.items()
        )


def _code(text: str) -> str:
    """A code span: one line, with more backticks around it than are in it."""
    shown = " ".join(text.split())
    if not shown:
        return ""
    ticks = "`" * (_longest_ticks(shown) + 1)
    padding = " " if len(ticks) > 1 else ""
    return f"{ticks}{padding}{_short(shown)}{padding}{ticks}"


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _fence(text: str) -> str:
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    language = "diff" if re.search(r"(?m)^@@ ", text) else "text"
    return f"{ticks}{language}\n{_short(text.strip())}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _short(text: str) -> str:
    more = len(text) - DETAIL_CHARACTERS
    return f"{text[:DETAIL_CHARACTERS]} … {more} more characters" if more > 0 else text


def workflow_commands(report: CanaryReport, guards: Sequence[Guard], root: Path) -> tuple[str, ...]:
    """A workflow command for each guard that is not present, on the guard's line in its file below `root`.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    known = {guard.id: guard for guard in guards}
    return tuple(
        _annotation(verdict, known.get(verdict.guard), root, strict=report.strict)
        for verdict in report.verdicts
        if verdict.verdict != PRESENT
    )


def _annotation(verdict: Verdict, guard: Guard | None, root: Path, *, strict: bool) -> str:
    fails = verdict.verdict == MISSING or verdict.stale or (strict and verdict.verdict == UNREACHABLE)
    level = "error" if fails else "notice" if verdict.verdict == PENDING else "warning"
    properties = {"title": f"{verdict.name} is {_state(verdict)}"}
    message = [verdict.detail]
    if guard:
        place = {"file": _below(guard.file, root), "line": str(max(guard.line, 1))}
        properties = {**place, **properties}
        message.append(f"why: {guard.why}")
    read = f"{verdict.upstream}@{verdict.ref}" + (f" ({verdict.version})" if verdict.version else "")
    message.append(f"read: {read}, {verdict.place}")
    given = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in properties.items())
    return f"::{level} {given}::{_escaped(_short(chr(10).join(message)))}"


def _below(file: Path, root: Path) -> str:
    """The path as GitHub knows it: from the top of the checkout, where the file is in it."""
    whole, top = file.resolve(), root.resolve()
    return (whole.relative_to(top) if whole.is_relative_to(top) else whole).as_posix()


def _escaped(text: str, more: str = "") -> str:
    """As the runner wants a message to be written; `more` are the further characters of a property."""
    return "".join(f"%{ord(one):02X}" if one in f"%\r\n{more}" else one for one in text)


def load(file: Path) -> CanaryReport:
    """A run, from the JSON that `loudmerge canary --json` printed. Raises ValueError when it is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    good = isinstance(document, dict) and document.get("schema") == 1
    if not good or not all(isinstance(document.get(name, []), list) for name in ("verdicts", "not_run")):
        raise ValueError(f"{file}: expected the document of `loudmerge canary --json`, schema 1")
    verdicts = enumerate(document.get("verdicts", []), start=1)
    found = tuple(_loaded(f"{file}: verdict {number}", one) for number, one in verdicts)
    return CanaryReport(found, not_run=tuple(map(str, document.get("not_run", []))))


def _loaded(where: str, table: Any) -> Verdict:
    fields = get_type_hints(Verdict)
    if not isinstance(table, dict) or table.keys() != fields.keys():
        raise ValueError(f"{where}: found {str(table)[:200]}, expected {', '.join(sorted(fields))}")
    wrong = [name for name, kind in fields.items() if type(table[name]) is not kind]
    if wrong or table["verdict"] not in VERDICTS:
        name = wrong[0] if wrong else "verdict"
        raise ValueError(f"{where}: {name} is {table[name]!r}")
    return Verdict(**table)
