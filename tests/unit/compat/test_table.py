"""COMPAT.md, and the command that writes it, compat.html and the README's section."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from loudmerge import __version__
from loudmerge.compat import table
from loudmerge.compat.judging.result import FAILED, NOT_INSTALLED, NOT_RUN, STATUSES, CellResult
from loudmerge.compat.rendering import markdown
from loudmerge.compat.rendering.overview import kl, share
from loudmerge.compat.rendering.readme import END, START
from loudmerge.compat.table import MARKDOWN, PAGE, ResultError, in_order, main, read, read_older, survey
from tests.unit.compat import rows
from tests.unit.compat.made import EXPECT

MATRIX = (
    EXPECT
    + """
[lanes]
released = [
    { transformers = "5.5.0", peft = "0.19.1", trl = "0.25.1", path = "fused", orientation = "standard" },
    { transformers = "5.5.0", peft = "0.18.1", trl = "0.25.1", path = "fused", orientation = "swapped" },
]
latest = [{ name = "latest", path = "fused", orientation = "standard" }]
"""
)


def save(directory: Path, results: Sequence[CellResult]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        (directory / f"{result.cell}.json").write_text(json.dumps(result.to_json()), "utf-8")
    return directory


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables as GitHub splits them: at each | that is not escaped."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


@pytest.fixture(scope="module")
def text() -> str:
    overview = survey(rows.ALL, rows.OLDER, lag=rows.LAG, generated=rows.GENERATED)
    return markdown.render(overview)


def test_the_rows_used_here_have_every_status() -> None:
    assert {row.status for row in rows.ALL} == set(STATUSES)


def test_there_is_a_row_for_each_cell_in_order_and_for_the_one_that_is_gone(text: str) -> None:
    first = tables(text)[0]
    names = [line[0].strip() for line in first[2:]]
    assert names == [*(row.cell for row in rows.ALL), "tf5.4.0-peft0.18.1-trl0.25.1"]


def test_a_row_shows_versions_path_counts_figures_tests_and_status(text: str) -> None:
    assert (
        "| tf5.5.0-peft0.18.1-trl0.25.1 | ✓ ok | = same | 5.5.0 | 0.18.1 | 0.25.1 | fused, swapped | 192/192"
        " | 0.9991 | 1.86 | 1.86 | 2.4e-5 | 3.2e-13 | 1.9e-4 | 1.6e-4 | 0.9987 | 3/3 | 1203 / 0 / 17"
        " | 26/26, 1 refused | 2/2 | 137 |"
    ) in text


def test_what_falls_short_is_marked_in_its_row_and_said_below(text: str) -> None:
    row = next(line for line in text.splitlines() if line.startswith("| tf5.24.0"))
    assert "| ✗ failed | ▼ regressed |" in row
    assert "| 191/192 ✗ |" in row
    assert "| 0.0312 ✗ | 0.0309 ✗ |" in row
    assert "| tf5.24.0-peft0.21.2-trl1.16.0 | kl_float32_merge | 0.0309 | at most 1e-08 |" in text


def test_a_cell_that_did_not_run_is_a_row_with_its_reason(text: str) -> None:
    assert re.search(r"^\| latest \| – not-run \| \+ new \| – \|", text, re.MULTILINE)
    assert "| latest | not-run | not asked for: lane latest |" in text
    assert "| dev | unreachable | github.com was not reached" in text
    assert "| not-installed | ERROR: No matching distribution found for peft==0.17.1" in text


def test_skips_are_told_by_reason_with_their_number_and_cells(text: str) -> None:
    assert "| no CUDA device | 12 | all 4 that ran |" in text
    assert f"| transformers 4 has no fused experts | 29 | {rows.PER_EXPERT.cell} |" in text


def test_failed_tests_families_and_adapters_are_named(text: str) -> None:
    assert f"| tests/unit/test_delta.py::test_a\\[1\\|2\\] | {rows.BROKEN.cell} |" in text
    assert f"| mixtral | KL 0.0312 of the float32 merge, expected at most 1e-8 | {rows.BROKEN.cell} |" in text
    assert (
        f"| {rows.SWAPPED.cell} | other bytes: model-00001-of-00002.safetensors | {rows.BROKEN.cell} |"
        in text
    )


def test_a_family_that_is_refused_by_design_is_told_apart_from_one_that_is_not_ok(text: str) -> None:
    not_ok, refused = text.partition("## Families that are not ok")[2].split("## Families refused by design")
    assert "longcat_flash" not in not_ok
    cells = ", ".join(row.cell for row in (rows.SWAPPED, rows.STANDARD, rows.BROKEN))
    assert f"| longcat_flash | refused by design: experts-incomplete | {cells} |" in refused


def test_families_by_cell_are_symbols(text: str) -> None:
    grid = next(lines for lines in tables(text) if lines[0][0].strip() == "family" and len(lines[0]) > 3)
    by_family = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in grid[2:]}
    assert [*by_family] == sorted([*rows.FAMILIES, "longcat_flash"])
    assert by_family["longcat_flash"] == ["R", "R", "–", "R", "–", "–", "–", "–"]
    assert by_family["mixtral"] == ["✓", "✓", "✓", "✗", "–", "–", "–", "–"]
    assert by_family["gemma4_text"] == ["✓", "✓", "–", "✓", "–", "–", "–", "–"]


def test_torch_date_version_lag_and_counts_stand_above(text: str) -> None:
    assert "8 cells: 3 ok, 1 failed, 1 not-installed, 1 unreachable, 2 not-run." in text
    assert "Against the older results: 3 same, 1 fixed, 2 new, 2 regressed." in text
    assert "torch 2.13.0, Python 3.12.7." in text
    assert "Released since, and in no cell yet: transformers 5.25.0, peft 0.22.0." in text
    assert f"loudmerge {__version__}, 2026-11-25 01:30 UTC." in text


@pytest.mark.parametrize(
    ("ran", "lag"),
    [
        (
            {"transformers": "5.100.0", "peft": "0.22.0", "trl": "0.25.1"},
            {"transformers": "5.100.0", "peft": "0.22.0"},
        ),
        ({"transformers": "5.5.0", "peft": "0.9.0", "trl": "0.25.1"}, {}),
        ({"transformers": "5.100.0"}, {"transformers": "5.100.0"}),
    ],
)
def test_where_nobody_says_the_lag_it_is_what_the_latest_lane_ran_with(
    ran: dict[str, str], lag: dict[str, str]
) -> None:
    latest = replace(rows.STANDARD, cell="latest", lane="latest", versions=ran)
    pinned = (rows.SWAPPED, rows.STANDARD)
    assert survey((*pinned, latest)).lag == lag
    assert survey((*pinned, replace(latest, status=NOT_RUN))).lag == {}
    assert survey((latest,)).lag == {}
    assert survey((*pinned, latest), lag={"trl": "9"}).lag == {"trl": "9"}


def test_different_torches_are_each_named_with_their_cells() -> None:
    other = replace(rows.STANDARD, versions={**rows.STANDARD.versions, "torch": "2.12.0"})
    overview = survey([rows.SWAPPED, other])
    assert overview.shared("torch") == f"2.13.0 ({rows.SWAPPED.cell}); 2.12.0 ({rows.STANDARD.cell})"


def test_without_older_results_nothing_is_said_of_changes() -> None:
    text = markdown.render(survey(rows.ALL, generated=rows.GENERATED))
    assert "change" not in text
    assert "older" not in text


def test_with_empty_older_results_each_cell_is_new() -> None:
    assert {change.word for change in survey(rows.ALL, []).changes.values()} == {"new"}


def test_every_table_has_as_many_cells_in_each_row(text: str) -> None:
    for lines in tables(text):
        assert len({len(line) for line in lines}) == 1, lines


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.text("a_*`[]()<>|\\&#;!~ \n"))
@example("![a](b) <b> **c** `d` &amp; \\| __e__ a_b [f]: g")
def test_any_text_shows_as_it_is_in_its_cell_of_a_table(said: str) -> None:
    source = "\n".join(markdown.table(("a", "b"), [(said, "x")]))
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source)
    shown = [token.children or [] for token in tokens if token.type == "inline"]
    assert {child.type for children in shown for child in children} <= {"text", "text_special"}
    texts = ["".join(child.content for child in children) for children in shown]
    assert texts == ["a", "b", *([" ".join(said.split())] if said.split() else [""]), "x"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.8612, "1.86"),
        (0.01, "0.01"),
        (0.00999, "1.0e-2"),
        (1.62e-5, "1.6e-5"),
        (3e-13, "3.0e-13"),
        (0.0, "0"),
    ],
)
def test_a_kl_is_shown_by_its_size(value: float, shown: str) -> None:
    assert kl(value) == shown
    assert kl(float("nan")) == "nan"


def test_a_share_is_rounded_down_so_that_1_means_all_of_it() -> None:
    assert [share(value) for value in (1.0, 0.99999, 0.5, float("nan"), 1e308)] == [
        "1.0000",
        "0.9999",
        "0.5000",
        "nan",
        "1e+308",
    ]


def test_rows_come_in_the_matrix_s_order_and_others_after_them() -> None:
    expected = [CellResult(name, "released", NOT_RUN, {}) for name in ("missing", rows.STANDARD.cell)]
    results = {row.cell: row for row in (rows.SWAPPED, rows.STANDARD)}
    assert in_order(results, expected) == (expected[0], rows.STANDARD, rows.SWAPPED)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert read(save(tmp_path, rows.ALL)) == {
        row.cell: row for row in sorted(rows.ALL, key=lambda row: row.cell)
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "found a JSON list, expected an object"),
        ("{}", "schema: missing"),
        (json.dumps(rows.LATEST.to_json()), "found the result of 'latest', expected that of 'a'"),
        ("\udcff", "can't decode"),
        ("[" * 100_000, "nest"),
    ],
    ids=["no-json", "list", "empty", "name", "no-utf8", "deep"],
)
def test_a_result_that_cannot_be_read_is_a_failed_row_that_says_why(
    tmp_path: Path, content: str, said: str
) -> None:
    save(tmp_path, [rows.STANDARD])
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = read(tmp_path)
    assert found[rows.STANDARD.cell] == rows.STANDARD
    assert found["a"].status == FAILED
    assert re.match(rf"unreadable: .*{said}", found["a"].detail)
    (older, _) = read_older(tmp_path)
    assert (older.cell, older.status, older.detail, older.shortfalls) == ("a", NOT_RUN, found["a"].detail, ())


def test_older_results_without_a_single_one_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"found no CELL\.json, expected the older results"):
        read_older(tmp_path)


def test_the_date_is_now_unless_given(tmp_path: Path) -> None:
    before = datetime.now(timezone.utc)
    overview = table.write(rows.ALL, tmp_path / "a" / "b")
    assert before <= overview.generated <= datetime.now(timezone.utc)
    assert (tmp_path / "a" / "b" / MARKDOWN).read_text("utf-8") == markdown.render(overview)
    assert (tmp_path / "a" / "b" / PAGE).stat().st_size > 10_000


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with results of two cells of three, and a README with a place for the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "source", lambda _: rows.STANDARD.source)
    (tmp_path / "matrix.toml").write_text(MATRIX, "utf-8")
    (tmp_path / "README.md").write_text(f"# A\n\n{START}\n{END}\n", "utf-8")
    save(tmp_path / ".compat/results", [rows.SWAPPED, rows.STANDARD])
    return tmp_path


def test_the_command_writes_beside_the_results_and_a_missing_result_is_a_row(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([".compat/results", "--lag", "peft=0.22.0"]) == 0
    assert capsys.readouterr().out == "3 cells: 2 ok, 1 not-run\n"
    text = (project / ".compat" / MARKDOWN).read_text("utf-8")
    assert [line[0].strip() for line in tables(text)[0][2:]] == [
        rows.STANDARD.cell,
        rows.SWAPPED.cell,
        "latest",
    ]
    assert "| latest | not-run | there is no result of it |" in text
    assert "in no cell yet: peft 0.22.0." in text
    assert (project / ".compat" / PAGE).is_file()


def test_the_command_fails_where_a_cell_regressed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(project / "older", [rows.SWAPPED, rows.STANDARD, rows.LATEST])
    arguments = [".compat/results", "--against", "older", "--out", "out"]
    assert main(arguments) == 0
    save(project / ".compat/results", [replace(rows.STANDARD, status="failed")])
    assert main(arguments) == 1
    assert f"{rows.STANDARD.cell}: regressed: ok → failed\n" in capsys.readouterr().err
    assert "▼ regressed" in (project / "out" / MARKDOWN).read_text("utf-8")
    (project / ".compat/results" / f"{rows.STANDARD.cell}.json").unlink()
    assert main(arguments) == 1
    assert f"{rows.STANDARD.cell}: regressed: ok → not-run\n" in capsys.readouterr().err


def test_the_command_fails_where_a_new_cell_is_not_ok(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(project / "older", [rows.STANDARD])
    (project / "matrix.toml").write_text(MATRIX.partition("latest =")[0], "utf-8")
    arguments = [".compat/results", "--against", "older"]
    assert main(arguments) == 0
    save(project / ".compat/results", [replace(rows.SWAPPED, status=FAILED)])
    assert main(arguments) == 1
    assert f"{rows.SWAPPED.cell}: new: now failed; no older result\n" in capsys.readouterr().err
    (project / ".compat/results" / f"{rows.SWAPPED.cell}.json").unlink()
    assert main(arguments) == 1
    assert f"{rows.SWAPPED.cell}: new: now not-run; no older result\n" in capsys.readouterr().err


@pytest.mark.parametrize(("optional", "code"), [("true", 0), ("false", 1)])
def test_the_command_lets_an_optional_cell_be_unreachable(project: Path, optional: str, code: int) -> None:
    lane = MATRIX.replace(
        'orientation = "standard" }]', f'orientation = "standard", optional = {optional} }}]'
    )
    (project / "matrix.toml").write_text(lane, "utf-8")
    save(project / "older", [rows.STANDARD, rows.SWAPPED])
    save(project / ".compat/results", [replace(rows.DEV, cell="latest")])
    assert main([".compat/results", "--against", "older"]) == code


def test_the_command_fails_for_a_row_of_a_cell_that_the_matrix_has_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GPU's: it fails as any cell does, and not where it did so before."""
    (project / "matrix.toml").write_text(MATRIX.partition("latest =")[0], "utf-8")
    save(project / "older", [rows.STANDARD, rows.SWAPPED])
    gpu = CellResult("gpu-a", "gpu", FAILED, {}, date="2026-11-29")
    save(project / ".compat/results", [gpu])
    assert main([".compat/results", "--against", "older"]) == 1
    assert "gpu-a: new: now failed; no older result\n" in capsys.readouterr().err
    text = (project / ".compat" / MARKDOWN).read_text("utf-8")
    assert "| gpu-a (gpu) | failed | no reason was recorded; of 2026-11-29 |" in text
    save(project / "older", [gpu])
    assert main([".compat/results", "--against", "older"]) == 0


def test_the_command_renders_and_fails_where_a_result_cannot_be_read(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it was not ok before, or there is nothing to compare with."""
    save(project / "older", [rows.SWAPPED, replace(rows.STANDARD, status=NOT_INSTALLED), rows.LATEST])
    file = project / ".compat/results" / f"{rows.STANDARD.cell}.json"
    file.write_text(file.read_text("utf-8")[:200], "utf-8")
    for against in ([], ["--against", "older"]):
        assert main([".compat/results", *against]) == 1
        said = capsys.readouterr()
        assert f"{rows.STANDARD.cell}: unreadable: Expecting ',' delimiter" in said.err
        assert said.out.startswith("3 cells: 1 ok, 1 failed, 1 not-run")
        text = (project / ".compat" / MARKDOWN).read_text("utf-8")
        assert f"| {rows.STANDARD.cell} | failed | unreadable: Expecting ',' delimiter" in text
        assert re.search(
            rf"^\| {rows.STANDARD.cell} \| ✗ failed \| .*5\.5\.0 \| 0\.19\.1", text, re.MULTILINE
        )


def test_an_older_result_that_cannot_be_read_shows_nothing_of_its_cell(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(project / "older", [rows.SWAPPED, rows.LATEST])
    (project / "older" / f"{rows.STANDARD.cell}.json").write_text("{", "utf-8")
    arguments = [".compat/results", "--against", "older"]
    assert main(arguments) == 0
    text = (project / ".compat" / MARKDOWN).read_text("utf-8")
    assert f"| {rows.STANDARD.cell} | + new | not-run → ok; the older result: unreadable: Expecting" in text
    save(project / ".compat/results", [replace(rows.STANDARD, status=FAILED)])
    assert main(arguments) == 1
    assert f"{rows.STANDARD.cell}: new: not-run → failed; the older result: " in capsys.readouterr().err


def test_the_command_keeps_the_readme_current(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [".compat/results", "--readme", "README.md"]
    assert main([*arguments, "--check"]) == 2
    assert "found a table of []" in capsys.readouterr().err
    assert main(arguments) == 0
    written = (project / "README.md").read_text("utf-8")
    assert main([*arguments, "--check"]) == 0
    save(project / ".compat/results", [replace(rows.STANDARD, merged=(191, 192))])
    assert main([*arguments, "--check"]) == 1
    said = capsys.readouterr().err
    assert "peft 0.19.1, trl 0.25.1: merged: README has 192/192, the results have 191/192\n" in said
    assert "python -m loudmerge.compat.table .compat/results --readme README.md\n" in said
    assert (project / "README.md").read_text("utf-8") == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        ([".compat/results", "--against", "nowhere"], "nowhere: no such folder"),
        ([".compat/results", "--against", "."], ".: found no CELL.json"),
        ([".compat/results", "--matrix", "nowhere.toml"], "nowhere.toml: no such file"),
        ([".compat/results", "--readme", "nowhere.md"], "nowhere.md"),
    ],
    ids=["results", "against", "against-nothing", "matrix", "readme"],
)
def test_what_is_not_there_is_named(
    project: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.is_dir()
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([".compat/results", "--check"], "--check needs --readme FILE"),
        ([".compat/results", "--lag", "peft"], "found 'peft', expected PACKAGE=VERSION"),
    ],
    ids=["check", "lag"],
)
def test_wrong_arguments_are_usage_errors(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err
