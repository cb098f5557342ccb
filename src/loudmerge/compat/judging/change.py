"""Base against head: each cell of two results folders is the same, regressed, fixed, or new.

| older → now | ok | failed | not-installed | unreachable, not-run, no row |
|---|---|---|---|---|
| ok | same, but regressed where something is lost | regressed | regressed | regressed |
| failed | fixed, but regressed where something is lost | same, but regressed likewise | regressed | same |
| not-installed | fixed | same | same | same |
| unreachable, not-run | new | new | new | same |
| no row | new | new | new | new |

What was not shown before cannot have regressed: `new`, which passes only where it is ok. A cell that was ok
and shows nothing now has regressed. An optional cell that is unreachable now fails no comparison, whatever
its word. `losses` says what counts as lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loudmerge.compat.judging.cells import LANES, PACKAGES, RELEASED
from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    OK,
    REFUSED,
    UNREACHABLE,
    CellResult,
    Tests,
)
from loudmerge.errors import some

SAME, REGRESSED, FIXED, NEW = "same", "regressed", "fixed", "new"

SYMBOLS: Mapping[str, str] = {SAME: "=", REGRESSED: "▼", FIXED: "▲", NEW: "+"}

MEANINGS: Mapping[str, str] = {
    SAME: "ok as before, or still not ok",
    REGRESSED: "something that was shown before is not shown now",
    FIXED: "not ok before, ok now",
    NEW: "the older results show nothing of it; unless it is ok, the comparison fails",
}

SHOWN = (OK, FAILED, NOT_INSTALLED)
"""The statuses that say something about the versions; the others say that nobody looked."""


TESTS_KEPT = 0.9
"""Of the tests that passed before, the share that has to pass now: what is not found does not fail."""

MERGES = ("kl_trained_merged", "kl_float32_merge", "kl_bfloat16_arithmetic")
"""The figures that say how far a merge is off."""
WORSE = 10.0
"""So many times the older figure is worse; less may be another processor's rounding."""
ROUNDING = 1e-8
"""Nats a token: below it a KL is float32's own rounding."""

NAMED = 8
"""So many losses are named, the others counted."""


@dataclass(frozen=True)
class Change:
    """word: same, regressed, fixed or new. detail: the statuses, or what was lost."""

    word: str
    detail: str

    @property
    def text(self) -> str:
        """`▼ regressed`."""
        return f"{SYMBOLS[self.word]} {self.word}"


def compare(head: CellResult, base: CellResult | None, without: Collection[str] = ()) -> Change:
    """How a cell changed from the older result, None where there is none, to this one.

    without: the cells that left no adapter of their own for others to merge.
    """
    if base is None:
        return Change(NEW, f"now {head.status}; no older result")
    statuses = f"{base.status} → {head.status}"
    if base.status not in SHOWN:
        why = f"{statuses}; the older result: {base.detail}" if base.detail else statuses
        return Change(NEW if head.status in SHOWN else SAME, why)
    lost = losses(head, base, without) if base.status in (OK, FAILED) else ()
    if lost:
        return Change(REGRESSED, f"{statuses}: {some(lost, NAMED)}")
    if head.status == OK != base.status:
        return Change(FIXED, statuses)
    worse = base.status == OK != head.status or (base.status, head.status) == (FAILED, NOT_INSTALLED)
    return Change(REGRESSED if worse else SAME, statuses)


def fails(change: Change, row: CellResult, *, optional: bool) -> bool:
    """Whether the comparison fails for this row: it regressed, or is new and not ok.

    optional: the cell may be unreachable.
    """
    if optional and row.status == UNREACHABLE:
        return False
    return change.word == REGRESSED or (change.word == NEW and row.status != OK)


def losses(head: CellResult, base: CellResult, without: Collection[str] = ()) -> tuple[str, ...]:
    """What the base showed and the head does not: checks, families, adapters of other cells, counts, tests.

    What has vanished is lost, whatever the base said of it: a part that died leaves nothing. But for the
    adapters of the cells in `without`, which nothing could merge.
    """
    if head.status not in (OK, FAILED):
        return ()
    before = {shortfall.check for shortfall in base.shortfalls}
    checks = dict.fromkeys(each.check for each in head.shortfalls if each.check not in before)
    crossed = {name: was for name, was in base.crossed.items() if name in head.crossed or name not in without}
    failing = () if base.tests is None else base.tests.failures
    tests = [] if head.tests is None else [test for test in head.tests.failures if test not in failing]
    return (
        *checks,
        *(f"family {name}" for name in _worse(head.families, base.families)),
        *(f"adapter of {name}" for name in _worse(head.crossed, crossed)),
        *_counts(head, base),
        *_farther(head, base),
        *_fewer(head.tests, base.tests),
        *tests,
    )


def _worse(head: Mapping[str, str], base: Mapping[str, str]) -> list[str]:
    """The names whose outcome is worse than it was, or bad and new, or that have vanished."""
    names = [*base, *(name for name in head if name not in base)]
    return [name for name in names if name not in head or _rank(head[name]) > _rank(base.get(name, REFUSED))]


def _rank(outcome: str) -> int:
    return 0 if outcome == OK else 1 if outcome.startswith(REFUSED) else 2


def _counts(head: CellResult, base: CellResult) -> list[str]:
    """Of a cell that fails: where more is missing than before, `merged 0 / 96, before 95 / 96`.

    A cell that is ok has as many as matrix.toml asks for.
    """
    if head.status == OK:
        return []
    pairs = {"merged": (head.merged, base.merged)}
    if head.figures is not None and base.figures is not None:
        pairs["samples"] = (head.figures.samples, base.figures.samples)
    return [
        f"{name} {now[0]} / {now[1]}, before {was[0]} / {was[1]}"
        for name, (now, was) in pairs.items()
        if now is not None and was is not None and now[1] - now[0] > was[1] - was[0]
    ]


def _farther(head: CellResult, base: CellResult) -> list[str]:
    """Of checks that failed before, too: `kl_float32_merge 1.2, before 2e-08`. A bound lets one grow."""
    if head.figures is None or base.figures is None:
        return []
    short = {each.check for each in head.shortfalls} & {each.check for each in base.shortfalls}
    pairs = {
        name: (getattr(head.figures, name), getattr(base.figures, name)) for name in MERGES if name in short
    }
    return [
        f"{name} {now:.2g}, before {was:.2g}"
        for name, (now, was) in pairs.items()
        if math.isfinite(was) and not now < WORSE * max(was, ROUNDING)
    ]


def _fewer(head: Tests | None, base: Tests | None) -> list[str]:
    """`tests: 1 passed, before 3000`"""
    now, was = (0 if tests is None else tests.passed for tests in (head, base))
    return [f"tests: {now} passed, before {was}"] if now < TESTS_KEPT * was else []


def rows_and_changes(
    head: Sequence[CellResult], base: Sequence[CellResult]
) -> tuple[tuple[CellResult, ...], dict[str, Change]]:
    """The head's rows, and a not-run row for each cell that only the base has; changes by cell.

    But for the GPU's, of no lane of the matrix: another command makes it, where there is a GPU.
    """
    older = {row.cell: row for row in base}
    present = {row.cell for row in head}
    gone = [_gone(row) for row in base if row.cell not in present and row.lane in LANES]
    rows = (*head, *gone)
    without = adapterless(rows)
    return rows, {row.cell: compare(row, older.get(row.cell), without) for row in rows}


def adapterless(rows: Sequence[CellResult]) -> frozenset[str]:
    """The cells that trained none: not to its end, or a released one of the same versions ran for both."""
    released = [packages(row) for row in rows if row.lane == RELEASED]
    return frozenset(
        row.cell
        for row in rows
        if row.figures is None or (row.lane != RELEASED and packages(row) in released)
    )


def packages(row: CellResult) -> list[str | None]:
    """The versions that make a cell what it is; two of the same may have run on different Pythons."""
    return [row.versions.get(name) for name in PACKAGES]


def _gone(row: CellResult) -> CellResult:
    detail = "only the older results have this cell"
    return CellResult(cell=row.cell, lane=row.lane, status=NOT_RUN, versions=row.versions, detail=detail)
