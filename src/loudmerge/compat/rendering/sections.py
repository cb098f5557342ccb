"""What the table says below its rows: shortfalls, what was not run and why, families, skips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loudmerge.compat.judging.change import SAME
from loudmerge.compat.judging.result import OK, CellResult
from loudmerge.compat.rendering.overview import ABSENT, BAD, GOOD, WITHHELD, Overview, named, symbol, why

Found = tuple[tuple[str, ...], str]
"""The columns of one thing that was found, and its cell."""


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
        _families_not_ok(rows),
        _families_refused(rows),
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
    return _gathered(
        "Failed tests",
        "By node id.",
        ("test", "cells"),
        (((test,), named(row)) for row in rows if row.tests for test in row.tests.failures),
        [named(row) for row in rows if row.tests],
        ("No test failed.", "No test ran."),
    )


def _families_not_ok(rows: Sequence[CellResult]) -> Section:
    return _gathered(
        "Families that are not ok",
        "A random adapter of the family, merged and compared with the model in memory.",
        ("family", "why", "cells"),
        _outcomes(rows, BAD),
        [named(row) for row in rows if row.families],
        ("Each family that ran is ok, or refused by design.", "No family ran."),
    )


def _families_refused(rows: Sequence[CellResult]) -> Section:
    return _gathered(
        "Families refused by design",
        "They are shown to be refused, with this code.",
        ("family", "why", "cells"),
        _outcomes(rows, WITHHELD),
        [named(row) for row in rows if row.families],
        ("No family was refused.", "No family ran."),
    )


def _outcomes(rows: Sequence[CellResult], wanted: str) -> Iterator[Found]:
    for row in rows:
        found = ((name, said) for name, said in row.families.items() if symbol(said) == wanted)
        yield from ((key, named(row)) for key in found)


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
    return _gathered(
        "Adapters of other cells that are not ok",
        "An adapter gives the same merged bytes, whatever is installed where it is merged.",
        ("adapter of", "why", "merged in"),
        (((name, why), named(row)) for row in rows for name, why in row.crossed.items() if why != OK),
        [named(row) for row in rows if row.crossed],
        ("Each adapter gave the same bytes in each cell that merged it.", "No adapter was crossed."),
    )


def _skips(rows: Sequence[CellResult]) -> Section:
    found = (
        ((reason, str(times)), named(row))
        for row in rows
        if row.tests
        for reason, times in row.tests.skips.items()
    )
    return _gathered(
        "Skipped tests",
        "By reason, and how many in each of the cells.",
        ("reason", "tests", "cells"),
        sorted(found, key=lambda each: each[0][0]),
        [named(row) for row in rows if row.tests],
        ("No test was skipped.", "No test ran."),
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


def _gathered(
    title: str,
    meaning: str,
    header: tuple[str, ...],
    found: Iterable[Found],
    ran: Sequence[str],
    nothing: tuple[str, str],
) -> Section:
    """What was found, each once, with the names of its cells; `all that ran` where it is all of `ran`.

    nothing: what stands there where nothing was found, and where nothing ran.
    """
    cells: dict[tuple[str, ...], list[str]] = {}
    for key, cell in found:
        cells.setdefault(key, []).append(cell)
    rows = tuple((*key, _cells(names, ran)) for key, names in cells.items())
    return Section(title, meaning, header, rows, nothing[0] if ran else nothing[1])


def _cells(names: Sequence[str], ran: Sequence[str]) -> str:
    return f"all {len(ran)} that ran" if len(ran) > 1 and set(names) == set(ran) else ", ".join(names)


def _seconds(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.0f}"
