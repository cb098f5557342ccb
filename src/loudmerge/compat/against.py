"""Base against head: each cell of two results folders is the same, regressed, fixed, or new.

| older → now | ok | failed | not-installed | unreachable, not-run, no row |
|---|---|---|---|---|
| ok | same, but regressed where a family or adapter is lost | regressed | regressed | regressed |
| failed | fixed | same, but regressed where something else fails now | regressed | same |
| not-installed | fixed | same | same | same |
| unreachable, not-run | new | new | new | same |
| no row | new | new | new | new |

What was not shown before cannot have regressed: `new`. A cell that was ok and shows nothing now has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loudmerge.compat.result import FAILED, NOT_INSTALLED, NOT_RUN, OK, CellResult

SAME, REGRESSED, FIXED, NEW = "same", "regressed", "fixed", "new"

SYMBOLS: Mapping[str, str] = {SAME: "=", REGRESSED: "▼", FIXED: "▲", NEW: "+"}

MEANINGS: Mapping[str, str] = {
    SAME: "ok as before, or still not ok",
    REGRESSED: "something that was shown before is not shown now",
    FIXED: "not ok before, ok now",
    NEW: "the older results show nothing of it",
}

SHOWN = (OK, FAILED, NOT_INSTALLED)
"""The statuses that say something about the versions; the others say that nobody looked."""


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


def compare(head: CellResult, base: CellResult | None) -> Change:
    """How a cell changed from the older result, None where there is none, to this one."""
    if base is None:
        return Change(NEW, f"now {head.status}; no older result")
    statuses = f"{base.status} → {head.status}"
    if base.status not in SHOWN:
        return Change(NEW if head.status in SHOWN else SAME, statuses)
    if head.status == OK != base.status:
        return Change(FIXED, statuses)
    lost = losses(head, base) if base.status in (OK, FAILED) else ()
    if lost:
        return Change(REGRESSED, f"{statuses}: {_few(lost)}")
    worse = base.status == OK != head.status or (base.status, head.status) == (FAILED, NOT_INSTALLED)
    return Change(REGRESSED if worse else SAME, statuses)


def losses(head: CellResult, base: CellResult) -> tuple[str, ...]:
    """What the base showed and the head does not: checks, families, adapters of other cells, tests.

    A family that has vanished is lost. An adapter that was not there to be merged is not: which ones are
    depends on the cells that ran.
    """
    if head.status not in (OK, FAILED):
        return ()
    before = {shortfall.check for shortfall in base.shortfalls}
    checks = dict.fromkeys(each.check for each in head.shortfalls if each.check not in before)
    families = [name for name, was in base.families.items() if was == OK != head.families.get(name)]
    crossed = [name for name, now in head.crossed.items() if now != OK == base.crossed.get(name)]
    failing = () if base.tests is None else base.tests.failures
    tests = [] if head.tests is None else [test for test in head.tests.failures if test not in failing]
    return (
        *checks,
        *(f"family {name}" for name in families),
        *(f"adapter of {name}" for name in crossed),
        *tests,
    )


def _few(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def rows_and_changes(
    head: Sequence[CellResult], base: Sequence[CellResult]
) -> tuple[tuple[CellResult, ...], dict[str, Change]]:
    """The head's rows, and a not-run row for each cell that only the base has; changes by cell."""
    older = {row.cell: row for row in base}
    present = {row.cell for row in head}
    gone = [_gone(row) for row in base if row.cell not in present]
    rows = (*head, *gone)
    return rows, {row.cell: compare(row, older.get(row.cell)) for row in rows}


def _gone(row: CellResult) -> CellResult:
    detail = "only the older results have this cell"
    return CellResult(cell=row.cell, lane=row.lane, status=NOT_RUN, versions=row.versions, detail=detail)
