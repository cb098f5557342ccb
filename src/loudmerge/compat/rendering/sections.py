"""What the table says below its rows: shortfalls, what was not run and why, families, skips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loudmerge.compat.judging.against import SAME
from loudmerge.compat.judging.result import OK, CellResult
from loudmerge.compat.rendering.overview import ABSENT, BAD, GOOD, WITHHELD, Overview, named, symbol, why


@dataclass(frozen=True)
class Section:
    """A table of text. nothing: what stands there where it has no rows. grid: its cells are symbols."""

    title: str
    meaning: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    nothing: str
    grid: bool = False


def sections(overview: Overview) -> tuple[Section, ...]:
    """All of them, in order; what changed only where there are older results."""
    rows = overview.rows
    changed = (_changed(overview),) if overview.changes else ()
    return (
        *changed,
        _shortfalls(rows),
        _remarks(rows),
        _failures(rows),
        _not_ok(rows),
        _refused(rows),
        _grid(rows),
        _crossed(rows),
        _skips(rows),
        _stages(rows),
    )


def _changed(overview: Overview) -> Section:
    changes = [(cell, change) for cell, change in overview.changes.items() if change.word != SAME]
    return Section(
        "Against the older results",
        "What was shown before and is not now has regressed.",
        ("cell", "change", "what"),
        tuple((cell, change.text, change.detail) for cell, change in changes),
        "Each cell is as before.",
    )


def _shortfalls(rows: Sequence[CellResult]) -> Section:
    return Section(
        "Shortfalls",
        "What matrix.toml expects and a cell did not show.",
        ("cell", "check", "found", "expected"),
        tuple((named(row), each.check, each.found, each.expected) for row in rows for each in row.shortfalls),
        "No cell that ran fell short.",
    )


def _remarks(rows: Sequence[CellResult]) -> Section:
    remarked = [row for row in rows if row.detail or row.date or row.figures is None]
    return Section(
        "Remarks",
        "Why a cell did not run or stopped early, or which run its row is of.",
        ("cell", "status", "why"),
        tuple((named(row), row.status, why(row)) for row in remarked),
        "None.",
    )


def _failures(rows: Sequence[CellResult]) -> Section:
    failing = [(test, named(row)) for row in rows if row.tests for test in row.tests.failures]
    ran = [named(row) for row in rows if row.tests]
    return Section(
        "Failed tests",
        "By node id.",
        ("test", "cells"),
        tuple(
            (test, cells) for (test,), cells in _by_cells((((test,), cell) for test, cell in failing), ran)
        ),
        "No test failed." if ran else "No test ran.",
    )


def _not_ok(rows: Sequence[CellResult]) -> Section:
    return Section(
        "Families that are not ok",
        "A random adapter of the family, merged and compared with the model in memory.",
        ("family", "why", "cells"),
        _outcomes(rows, BAD),
        "Each family that ran is ok, or refused by design." if _ran_families(rows) else "No family ran.",
    )


def _refused(rows: Sequence[CellResult]) -> Section:
    return Section(
        "Families refused by design",
        "They are shown to be refused, with this code.",
        ("family", "why", "cells"),
        _outcomes(rows, WITHHELD),
        "No family was refused." if _ran_families(rows) else "No family ran.",
    )


def _outcomes(rows: Sequence[CellResult], wanted: str) -> tuple[tuple[str, ...], ...]:
    found = (
        ((name, said), named(row))
        for row in rows
        for name, said in row.families.items()
        if symbol(said) == wanted
    )
    return tuple((*key, cells) for key, cells in _by_cells(found, _ran_families(rows)))


def _ran_families(rows: Sequence[CellResult]) -> list[str]:
    return [named(row) for row in rows if row.families]


def _grid(rows: Sequence[CellResult]) -> Section:
    families = sorted({name for row in rows for name in row.families})
    return Section(
        "Families by cell",
        f"{GOOD} ok, {BAD} not ok, {WITHHELD} refused by design, {ABSENT} not run there.",
        ("family", *(named(row) for row in rows)),
        tuple((name, *(symbol(row.families.get(name)) for row in rows)) for name in families),
        "No family ran.",
        grid=True,
    )


def _crossed(rows: Sequence[CellResult]) -> Section:
    found = (((name, why), named(row)) for row in rows for name, why in row.crossed.items() if why != OK)
    ran = [named(row) for row in rows if row.crossed]
    return Section(
        "Adapters of other cells that are not ok",
        "An adapter gives the same merged bytes, whatever is installed where it is merged.",
        ("adapter of", "why", "merged in"),
        tuple((*key, cells) for key, cells in _by_cells(found, ran)),
        "Each adapter gave the same bytes in each cell that merged it." if ran else "No adapter was crossed.",
    )


def _skips(rows: Sequence[CellResult]) -> Section:
    found = (
        ((reason, str(times)), named(row))
        for row in rows
        if row.tests
        for reason, times in row.tests.skips.items()
    )
    ran = [named(row) for row in rows if row.tests]
    return Section(
        "Skipped tests",
        "By reason, and how many in each of the cells.",
        ("reason", "tests", "cells"),
        tuple((*key, cells) for key, cells in sorted(_by_cells(found, ran), key=lambda each: each[0][0])),
        "No test was skipped." if ran else "No test ran.",
    )


def _stages(rows: Sequence[CellResult]) -> Section:
    stages = tuple(dict.fromkeys(stage for row in rows for stage in row.stages))
    ran = [row for row in rows if row.stages]
    return Section(
        "Seconds by stage",
        "Of each cell.",
        ("cell", *stages),
        tuple((named(row), *(_seconds(row.stages.get(stage)) for stage in stages)) for row in ran),
        "No cell ran.",
    )


def _by_cells(
    found: Iterable[tuple[tuple[str, ...], str]], ran: Sequence[str]
) -> list[tuple[tuple[str, ...], str]]:
    """What was found, each once, with the names of its cells; `all that ran` where it is all of `ran`."""
    cells: dict[tuple[str, ...], list[str]] = {}
    for key, cell in found:
        cells.setdefault(key, []).append(cell)
    return [(key, _cells(names, ran)) for key, names in cells.items()]


def _cells(names: Sequence[str], ran: Sequence[str]) -> str:
    return f"all {len(ran)} that ran" if len(ran) > 1 and set(names) == set(ran) else ", ".join(names)


def _seconds(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.0f}"
