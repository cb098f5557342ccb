"""The matrix's one table: COMPAT.md, compat.html and the README's section, from results.

    python -m loudmerge.compat.table RESULTS_DIR [--against DIR] [--readme README.md [--check]]

Each row is judged by what it shows and matrix.toml expects, whatever status its file names. One of another
source of loudmerge than the checkout's is not run; one of a cell that matrix.toml no longer has is left out.

Exit 1: a cell regressed against the older results, or is new and not ok; a result cannot be read; or the
README is not current. Exit 2: the arguments, or a file that is read, are wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timezone
from pathlib import Path

from loudmerge import __version__
from loudmerge.compat.arguments import DONE, SHORT, USAGE
from loudmerge.compat.environments.environment import differing
from loudmerge.compat.inside.cell import source
from loudmerge.compat.judging import document
from loudmerge.compat.judging.cells import (
    FILE,
    LANES,
    LATEST,
    PACKAGES,
    RELEASED,
    Cell,
    Matrix,
    MatrixError,
    load,
)
from loudmerge.compat.judging.change import rows_and_changes
from loudmerge.compat.judging.result import FAILED, NOT_RUN, OK, CellResult, Shortfall
from loudmerge.compat.judging.verdict import RAN, VERSIONS, all_crossed, judged, no_figures
from loudmerge.compat.rendering import markdown, page, readme
from loudmerge.compat.rendering.overview import Overview
from loudmerge.compat.running import rows

MARKDOWN, PAGE = "COMPAT.md", "compat.html"
UNREADABLE = "unreadable"
"""The check that a CELL.json falls short of which cannot be read."""

DAYS = 60
"""How old a row that names its day may be: the GPU's, which is carried from one table to the next. The GPU's
workflow runs weekly; one that has left no row for so long says nothing of today's code."""


class ResultError(ValueError):
    """A results folder, or a file in it, is wrong."""


def write(
    results: Sequence[CellResult],
    out_dir: Path,
    against: Sequence[CellResult] | None = None,
    *,
    lag: Mapping[str, str] | None = None,
    generated: datetime | None = None,
) -> Overview:
    """Writes COMPAT.md and compat.html into out_dir, which it makes; returns what they say.

    results: all rows in order, also those of cells that were not run. against: older results; a cell that
    only they have is a row, not run. lag: package -> a release newer than any cell's; what the lane `latest`
    ran with where nothing is given. generated: now if not given.
    """
    overview = survey(results, against, lag=lag, generated=generated)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MARKDOWN).write_text(markdown.render(overview), "utf-8")
    (out_dir / PAGE).write_text(page.render(overview), "utf-8")
    return overview


def survey(
    results: Sequence[CellResult],
    against: Sequence[CellResult] | None = None,
    *,
    lag: Mapping[str, str] | None = None,
    generated: datetime | None = None,
) -> Overview:
    """What `write` would write, as a value."""
    rows, changes = (tuple(results), {}) if against is None else rows_and_changes(results, against)
    when = generated or datetime.now(timezone.utc)
    return Overview(rows, when, __version__, changes, lag or _seen(rows))


def _seen(results: Sequence[CellResult]) -> dict[str, str]:
    """What the lane that pins nothing ran with, and is newer than in any row that does."""
    pinned = [row.versions for row in results if row.lane == RELEASED]
    newest = {
        package: max((_numbers(versions.get(package, "")) for versions in pinned), default=[sys.maxsize])
        for package in PACKAGES
    }
    return {
        package: version
        for row in results
        if row.lane == LATEST and row.status in RAN
        for package, version in row.versions.items()
        if package in newest and _numbers(version) > newest[package]
    }


def _numbers(version: str) -> list[int]:
    """Of a release: 5.24.0 comes after 5.5.0. There is no library for it where the table is made."""
    return [int(part) for part in re.findall(r"\d+", version)]


def read(directory: Path) -> dict[str, CellResult]:
    """Cell -> its result, of all CELL.json in a folder. Raises ResultError where there is no such folder.

    A file that cannot be read is a failed row that says so, one of more than DAYS ago is not run.
    """
    if not directory.is_dir():
        raise ResultError(f"{directory}: no such folder, expected one of CELL.json files")
    today = datetime.now(timezone.utc).date()
    results = (_of_late(_read(file), today) for file in sorted(directory.glob("*.json")))
    return {result.cell: result for result in results}


def _of_late(row: CellResult, today: date) -> CellResult:
    """The row, or that there is none of late. A day that is none is no reason to believe one."""
    try:
        late = not row.date or -1 <= (today - date.fromisoformat(row.date)).days <= DAYS
    except ValueError:
        late = False
    if late:
        return row
    detail = f"its last run is not of the last {DAYS} days"
    return CellResult(row.cell, row.lane, NOT_RUN, row.versions, detail=detail, date=row.date)


def of_the_gpu(directory: Path) -> tuple[CellResult, ...]:
    """The rows in a folder that are of no lane of the matrix: another command leaves them."""
    return tuple(row for row in read(directory).values() if row.lane and row.lane not in LANES)


def read_older(directory: Path) -> tuple[CellResult, ...]:
    """The results to compare with. Raises ResultError where there are none at all.

    One that cannot be read shows nothing of its cell, and its detail says so.
    """
    found = read(directory).values()
    if not found:
        raise ResultError(f"{directory}: found no CELL.json, expected the older results")
    return tuple(replace(row, status=NOT_RUN, shortfalls=()) if _unreadable(row) else row for row in found)


def _read(file: Path) -> CellResult:
    try:
        result = CellResult.from_json(document.read(file))
        if result.cell != file.stem:
            raise ResultError(f"found the result of {result.cell!r}, expected that of {file.stem!r}")
    except (ValueError, OSError) as error:
        short = Shortfall(UNREADABLE, str(error), "a whole CELL.json")
        detail = f"{UNREADABLE}: {error}"
        return CellResult(file.stem, "", FAILED, {}, shortfalls=(short,), detail=detail)
    return result


def _unreadable(row: CellResult) -> bool:
    return any(shortfall.check == UNREADABLE for shortfall in row.shortfalls)


def in_order(results: Mapping[str, CellResult], expected: Sequence[CellResult]) -> tuple[CellResult, ...]:
    """A row for each expected cell, that given where it has no result; then the results of other cells.

    One that cannot be read is of the expected lane and versions.
    """
    names = {row.cell for row in expected}
    others = (row for cell, row in results.items() if cell not in names)
    return (*(_placed(results.get(row.cell, row), row) for row in expected), *others)


def _placed(found: CellResult, expected: CellResult) -> CellResult:
    if not _unreadable(found):
        return found
    return replace(found, lane=expected.lane, versions=expected.versions)


def _of_now(matrix: Matrix, found: Sequence[CellResult], checkout: str) -> tuple[CellResult, ...]:
    """The rows of cells that the matrix has, and the GPU's; without what another source showed.

    checkout: its source, as cell.source names it. A row of the GPU says itself of which it is.
    """
    kept = (row for row in found if row.cell in matrix.names or row.lane not in LANES)
    return tuple(_of_source(checkout, row) if row.cell in matrix.names else row for row in kept)


def _of_source(checkout: str, row: CellResult) -> CellResult:
    if row.status not in RAN or row.source == checkout or _unreadable(row):
        return row
    detail = "its result is of another source of loudmerge"
    return CellResult(row.cell, row.lane, NOT_RUN, row.versions, detail=detail)


def _judged(matrix: Matrix, found: Sequence[CellResult]) -> tuple[CellResult, ...]:
    """The rows by what the matrix expects now, whatever status their files name.

    A row that its own run failed stays so. One that is kept of an earlier run has merged what there was then.
    """
    cells = {cell.name: cell for cell in matrix.cells}
    judgements = {row.cell: _by(cells.get(row.cell), row) for row in found}
    now = [row for row in judgements.values() if not row.detail.startswith(rows.KEPT)]
    judgements |= {row.cell: row for row in all_crossed(now)}
    return tuple(judgements.values())


def _by(cell: Cell | None, row: CellResult) -> CellResult:
    """cell: None of a row that its own run judged, the GPU's; without figures it shows nothing even so."""
    if row.status not in RAN or _unreadable(row):
        return row
    if cell is None:
        none = () if row.figures else (no_figures("no figures"),)
        short = row.shortfalls or none
        return replace(row, status=FAILED, shortfalls=short) if row.status == OK and short else row
    others = differing(row.versions, cell.versions) if cell.is_pinned else ""
    told = replace(row, errors={**row.errors, VERSIONS: f"the row: {others}"}) if others else row
    found = judged(cell.expects, told)
    return row if row.status == FAILED and not found.shortfalls else found


def _expected(matrix: Matrix) -> tuple[CellResult, ...]:
    return tuple(
        CellResult(cell.name, cell.lane, NOT_RUN, cell.versions, detail="there is no result of it")
        for cell in matrix.cells
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loudmerge.compat.table", description="Renders the matrix."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS_DIR", help="folder of CELL.json files")
    parser.add_argument("--against", type=Path, metavar="DIR", help="older results: same, regressed or fixed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder that RESULTS_DIR is in")
    parser.add_argument("--matrix", type=Path, default=Path(FILE), help="the cells (default: %(default)s)")
    parser.add_argument("--lag", action="append", default=[], type=_release, metavar="PACKAGE=VERSION")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the table between its markers")
    parser.add_argument("--check", action="store_true", help="only say whether --readme is current")
    read_arguments = parser.parse_args(arguments)
    if read_arguments.check and not read_arguments.readme:
        parser.error("--check needs --readme FILE")
    return read_arguments


def _release(text: str) -> tuple[str, str]:
    package, equals, version = text.partition("=")
    if not (package and equals and version):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected PACKAGE=VERSION")
    return package, version


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = _arguments(arguments)
    try:
        matrix = load(given.matrix)
        left = in_order(read(given.results), _expected(matrix))
        found = _judged(matrix, _of_now(matrix, left, source(given.matrix.parent)))
        older = None if given.against is None else read_older(given.against)
        overview = write(found, given.out or given.results.parent, older, lag=dict(given.lag))
        problems = [*_broken(found), *_failing(overview, matrix), *_readme(given, overview)]
    except (MatrixError, OSError, ResultError, readme.ReadmeError) as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    sys.stdout.write(f"{overview.counts}\n")
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return SHORT if problems else DONE


def _broken(rows: Sequence[CellResult]) -> list[str]:
    return [f"{row.cell}: {row.detail}" for row in rows if _unreadable(row)]


def _failing(overview: Overview, matrix: Matrix) -> list[str]:
    failing = overview.failing(matrix.optional)
    return [f"{cell}: {change.word}: {change.detail}" for cell, change in failing.items()]


def _readme(given: argparse.Namespace, overview: Overview) -> list[str]:
    if given.readme is None:
        return []
    text = given.readme.read_text("utf-8")
    if not given.check:
        given.readme.write_text(readme.replaced(text, overview), "utf-8")
        return []
    found = [str(difference) for difference in readme.differences(text, overview)]
    command = f"python -m loudmerge.compat.table {given.results} --readme {given.readme}"
    return [*found, f"{given.readme} is not current. Run: {command}"] if found else []


if __name__ == "__main__":
    sys.exit(main())
