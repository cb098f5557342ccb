"""`nox -s matrix -- …`: what it prints, how it ends, and that it needs nothing but Python."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from loudmerge.compat import __main__ as command
from loudmerge.compat import table
from loudmerge.compat.__main__ import main
from loudmerge.compat.environments.alone import alone
from loudmerge.compat.judging.cells import load
from loudmerge.compat.judging.result import CellResult
from tests.unit.compat import checkout
from tests.unit.compat.made import EXPECT, VERSIONS, cell, result

FUSED = 'path = "fused", orientation = "standard"'
HEADS = 'transformers = "h/t", peft = "h/p", trl = "h/l"'
MATRIX = f"""{EXPECT}
[lanes]
released = [
    {{ name = "one", transformers = "5.5.0", peft = "0.19.1", trl = "0.25.1", {FUSED} }},
]
dev = [
    {{ name = "dev", {HEADS}, {FUSED}, optional = true }},
]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout to be in, whose cell `one` has its environment."""
    root = checkout.make(tmp_path, monkeypatch)
    (root / "matrix.toml").write_text(MATRIX, "utf-8")
    checkout.in_place(root, cell("one", versions=VERSIONS))
    monkeypatch.chdir(root)
    monkeypatch.setenv("LOUDMERGE_GITHUB", "http://127.0.0.1:9")
    return root


def test_list_prints_a_name_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(load(Path("matrix.toml")).names)


def test_github_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--github"]) == 0
    assert json.loads(capsys.readouterr().out) == load(Path("matrix.toml")).github()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["three"], "matrix.toml has no cell 'three'; it has: one, dev"),
        (["-j", "0"], "found 0, expected a number from 1 on"),
        (["-j", "x"], "found x, expected a number from 1 on"),
        (["--parts", "tests,lunch"], "found 'lunch', expected some of tests,journey,families,cross"),
        (["--against", "nowhere"], "nowhere: no such folder"),
        (["--against", "."], "found no CELL.json, expected the older results"),
    ],
)
def test_wrong_arguments_are_usage(
    root: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert says in capsys.readouterr().err
    assert not (root / ".compat" / "results").exists()


def test_a_cell_that_falls_short_is_said_and_exits_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["one", "--parts", "tests"]) == 1
    said = capsys.readouterr()
    assert said.out == "2 cells: 1 failed, 1 not-run\n"
    assert (
        "one: failed\n  journey: found no figures, expected figures of a trained and merged model\n"
        in said.err
    )
    assert "one" in (root / ".compat" / "COMPAT.md").read_text("utf-8")
    assert "one" in (root / ".compat" / "compat.html").read_text("utf-8")
    assert {file.stem for file in (root / ".compat" / "results").iterdir()} == {"one", "dev"}


def test_an_optional_cell_that_was_not_reached_exits_0(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row is there and is no pass; the results are where they were asked to be."""
    assert main(["dev", "--results", "elsewhere"]) == 0
    assert capsys.readouterr().out == "2 cells: 1 unreachable, 1 not-run\n"
    assert json.loads((root / "elsewhere" / "dev.json").read_text("utf-8"))["status"] == "unreachable"


def test_the_table_takes_what_the_run_left(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same source; an edit, and it shows nothing of today's."""
    main(["one", "--parts", "tests"])
    capsys.readouterr()
    assert table.main([".compat/results"]) == 0
    assert capsys.readouterr().out == "2 cells: 1 failed, 1 not-run\n"
    (root / "tests" / "unit" / "test_tiny.py").write_text("", "utf-8")
    assert table.main([".compat/results"]) == 0
    assert capsys.readouterr().out == "2 cells: 2 not-run\n"


def test_a_run_that_is_interrupted_leaves_no_table_of_an_earlier_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COMPAT.md", "compat.html"):
        (root / ".compat" / name).write_text("9 cells: 9 ok", "utf-8")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["one"])
    assert not [*(root / ".compat").glob("[Cc]*.*")]


def test_a_full_disk_is_said_in_a_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root / ".compat" / "results" / "one.json"))

    monkeypatch.setattr(command, "run", full)
    assert main(["one"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "the run ended early: [Errno 28] No space left on device: " in said.err
    assert "one.json'. Once that is mended, run the cells again" in said.err


def test_a_second_run_in_the_checkout_is_refused_and_changes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would make the first one's environments anew while their tests run."""
    table_of_the_first = root / ".compat" / "COMPAT.md"
    table_of_the_first.write_text("", "utf-8")
    with alone(root / ".compat"):
        assert main(["one"]) == 2
    assert "a run of the matrix, or a bisection, is in this checkout" in capsys.readouterr().err
    assert table_of_the_first.exists()
    assert not (root / ".compat" / "results").exists()


def test_a_cell_that_was_ok_and_is_not_has_regressed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = root / "older"
    older.mkdir()
    (older / "one.json").write_text(json.dumps(result().to_json()), "utf-8")
    assert main(["one", "--parts", "tests", "--against", "older"]) == 1
    assert "one: regressed: " in capsys.readouterr().err
    assert "regressed" in (root / ".compat" / "COMPAT.md").read_text("utf-8")


def older(root: Path, *found: CellResult) -> None:
    (root / "older").mkdir()
    for row in found:
        (root / "older" / f"{row.cell}.json").write_text(json.dumps(row.to_json()), "utf-8")


def test_an_optional_cell_that_was_ok_and_is_not_reached_now_exits_0(root: Path) -> None:
    older(root, result(cell="dev", lane="dev"))
    assert main(["dev", "--against", "older"]) == 0
    assert "▼ regressed" in (root / ".compat" / "COMPAT.md").read_text("utf-8")


def test_a_cell_that_was_not_asked_for_is_not_compared(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older(root, result(), result(cell="gone"))
    assert main(["dev", "--against", "older"]) == 0
    assert "one: " not in capsys.readouterr().err


def test_a_row_of_the_gpu_is_not_compared_where_there_is_none_now(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another command makes it: this one's run without it has lost nothing."""
    older(root, result(cell="gpu-a", lane="gpu"))
    assert main(["--parts", "tests", "--against", "older"]) == 1
    said = capsys.readouterr()
    assert "gpu-a" not in said.out + said.err + (root / ".compat" / "COMPAT.md").read_text("utf-8")


def test_the_table_has_the_row_that_the_gpu_s_run_left_and_the_exit_code_is_none_of_its(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, today = root / ".compat" / "results", datetime.now(timezone.utc).date()
    results.mkdir()
    for name, date in (("gpu-new", today), ("gpu-old", today - timedelta(days=90))):
        row = result(cell=name, lane="gpu", status="failed", date=date.isoformat())
        (results / f"{name}.json").write_text(json.dumps(row.to_json()), "utf-8")
    older(root, result(cell="dev", lane="dev"), result(cell="gpu-new", lane="gpu"))
    assert main(["dev", "--against", "older"]) == 0
    assert "gpu" not in capsys.readouterr().err
    assert main(["--parts", "tests", "--against", "older"]) == 1
    assert "gpu" not in capsys.readouterr().err
    page = (root / ".compat" / "COMPAT.md").read_text("utf-8")
    assert "| gpu-new (gpu) | ✗ failed | ▼ regressed |" in page
    assert "| gpu-old (gpu) | – not-run |" in page


def test_a_new_cell_that_is_not_ok_fails_as_in_the_table(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And, where all cells are asked for, one that only the older results have."""
    older(root, result(cell="gone"))
    assert main(["--parts", "tests", "--against", "older"]) == 1
    said = capsys.readouterr().err
    assert "one: new: now failed; no older result\n" in said
    assert "gone: regressed: ok → not-run\n" in said


def test_the_matrix_is_run_without_torch_or_any_package() -> None:
    """Only what runs inside a cell's environment needs what is installed there."""
    text = (
        "before = set(sys.modules); import loudmerge.compat.__main__; "
        "new = {name.partition('.')[0] for name in sys.modules if name not in before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'loudmerge', 'tomli'}))"
    )
    source = str(Path("src").resolve())
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {source!r}); {text}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
