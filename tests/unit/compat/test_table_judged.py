"""The table judges what it reads: a row's own status, its versions and its day are not taken on trust."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from loudmerge.compat import table
from loudmerge.compat.judging.cells import load
from loudmerge.compat.judging.result import FAILED, NOT_RUN, OK, CellResult, Shortfall
from loudmerge.compat.rendering.overview import why
from loudmerge.compat.rendering.readme import END, START
from loudmerge.compat.table import MARKDOWN, in_order, main, read, read_older
from tests.unit.compat import rows
from tests.unit.compat.made import FIGURES
from tests.unit.compat.test_table import MATRIX, save


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with results of two cells of three."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "source", lambda _: rows.STANDARD.source)
    (tmp_path / "matrix.toml").write_text(MATRIX, "utf-8")
    save(tmp_path / ".compat/results", [rows.SWAPPED, rows.STANDARD])
    return tmp_path


def judged_by_the_command(project: Path, *found: CellResult) -> CellResult:
    """The first row, as the command takes it beside those that the project has."""
    save(project / ".compat/results", found)
    cells = read(project / ".compat/results")
    matrix = load(project / "matrix.toml")
    rows_now = {row.cell: row for row in table._judged(matrix, in_order(cells, table._expected(matrix)))}
    return rows_now[found[0].cell]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"figures": None}, "journey"),
        ({"figures": replace(FIGURES, kl_trained_merged=5.0)}, "kl_trained_merged"),
        ({"merged": (0, 192)}, "merged"),
        ({"tests": replace(rows.TESTS, failed=99)}, "tests"),
        ({"versions": {**rows.STANDARD.versions, "peft": "0.18.1"}}, "versions"),
        ({"versions": {}}, "versions"),
    ],
    ids=["no-figures", "far-off", "nothing-merged", "failed-tests", "another-peft", "no-versions"],
)
def test_a_row_is_judged_by_what_it_shows_not_by_its_status(
    project: Path, change: dict[str, Any], check: str
) -> None:
    """Of whatever run it is: an older one's, another checkout's, one that was edited."""
    found = judged_by_the_command(project, replace(rows.STANDARD, **change))
    assert (found.status, [each.check for each in found.shortfalls]) == (FAILED, [check])
    main([".compat/results"])
    text = (project / ".compat" / MARKDOWN).read_text("utf-8")
    assert f"| {rows.STANDARD.cell} | ✗ failed |" in text


def test_another_version_in_a_row_is_named(project: Path) -> None:
    other = {**rows.STANDARD.versions, "peft": "0.18.1", "torch": "1.0"}
    (short,) = judged_by_the_command(project, replace(rows.STANDARD, versions=other)).shortfalls
    assert (short.found, short.expected) == (
        "the row: peft 0.18.1, expected 0.19.1",
        "the cell's versions in every part",
    )


@pytest.mark.parametrize("status", ["not-run", "not-installed", "unreachable", "failed"])
def test_a_row_that_is_not_ok_is_not_judged_to_be(project: Path, status: str) -> None:
    found = judged_by_the_command(project, replace(rows.STANDARD, status=status, detail="why"))
    assert (found.status, found.detail) == (status, "why")


def test_a_row_that_is_kept_has_merged_what_there_was_then(project: Path) -> None:
    """Of a run of one cell: what another trained since was not there to be merged."""
    one, two = (replace(row, stages={"cross": 1.0}, crossed={}) for row in (rows.STANDARD, rows.SWAPPED))
    assert judged_by_the_command(project, one, two).status == FAILED
    kept = replace(one, detail="of an earlier run")
    assert judged_by_the_command(project, kept, replace(two, crossed={one.cell: OK})) == kept


def test_a_row_of_another_source_than_the_checkout_s_is_not_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of results outlives the commit that they are of: they show nothing of this one."""
    (project / "README.md").write_text(f"{START}\n{END}\n", "utf-8")
    arguments = [".compat/results", "--readme", "README.md"]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    save(project / ".compat/results", [replace(rows.STANDARD, source="before an edit")])
    assert main([*arguments, "--check"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "3 cells: 1 ok, 2 not-run"
    assert "trl 0.25.1: status: README has ✓ ok, the results have – not-run\n" in said.err
    text = (project / ".compat" / MARKDOWN).read_text("utf-8")
    assert f"| {rows.STANDARD.cell} | not-run | its result is of another source of loudmerge |" in text


@pytest.mark.parametrize(
    "change", [{"figures": None}, {"shortfalls": (Shortfall("samples", "2 / 3", "3 of 3 the same"),)}]
)
def test_a_row_that_no_line_of_the_matrix_is_about_is_not_ok_where_it_shows_nothing(
    project: Path, change: dict[str, Any]
) -> None:
    """The GPU's: its run has judged it, and whoever edits the row does not get past what it says itself."""
    gpu = replace(rows.SWAPPED, cell="gpu-a", lane="gpu")
    assert judged_by_the_command(project, gpu) == gpu
    found = judged_by_the_command(project, replace(gpu, **change))
    assert found.status == FAILED
    assert len(found.shortfalls) == 1


def test_what_an_earlier_judgement_found_is_not_told_of_a_row_that_is_ok(project: Path) -> None:
    older = replace(rows.STANDARD, shortfalls=(Shortfall("samples", "2 / 3", "3 of 3 the same"),))
    assert judged_by_the_command(project, older) == rows.STANDARD


def test_what_is_left_of_a_cell_that_the_matrix_no_longer_has_is_no_row(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing says what it must show. The GPU's rows are of no lane of matrix.toml."""
    gpu = replace(rows.SWAPPED, cell="gpu-a", lane="gpu")
    save(project / ".compat/results", [replace(rows.SWAPPED, cell="tf5.4.0-peft0.18.1-trl0.25.1"), gpu])
    assert main([".compat/results"]) == 0
    assert capsys.readouterr().out == "4 cells: 3 ok, 1 not-run\n"
    assert "tf5.4.0" not in (project / ".compat" / MARKDOWN).read_text("utf-8")


@pytest.mark.parametrize(
    ("days", "runs"), [(0, True), (-1, True), (60, True), (61, False), (400, False), (-3, False)]
)
def test_a_row_that_names_its_day_is_one_of_the_last_60(tmp_path: Path, days: int, runs: bool) -> None:
    """The GPU's, which goes from table to table: a runner that is gone leaves its last row for ever."""
    day = (datetime.now(timezone.utc) - timedelta(days)).date().isoformat()
    gpu = replace(rows.SWAPPED, cell="gpu-a", lane="gpu", date=day, source="0123456789abcdef")
    save(tmp_path / "results", [gpu])
    found = read(tmp_path / "results")["gpu-a"]
    if runs:
        assert found == gpu
        assert why(found) == f"of {day}, source 0123456789ab"
        return
    assert (found.status, found.figures, found.date) == (NOT_RUN, None, day)
    assert why(found) == f"its last run is not of the last 60 days; of {day}"
    (older,) = read_older(tmp_path / "results")
    assert older == found, "neither is it shown to have regressed"


def test_what_is_no_file_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "cell.json").mkdir()
    row = read(tmp_path)["cell"]
    assert (row.status, "Is a directory" in row.detail) == (FAILED, True)


def test_a_day_that_is_none_is_not_of_late(tmp_path: Path) -> None:
    save(tmp_path, [replace(rows.SWAPPED, date="yesterday")])
    assert read(tmp_path)[rows.SWAPPED.cell].status == NOT_RUN
