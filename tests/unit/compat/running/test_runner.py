"""Cells run in processes of their own, and every cell of the matrix has a row, whatever became of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loudmerge
from loudmerge.compat.environments.environment import Installer, requirements
from loudmerge.compat.inside.cell import PARTS, digest, source
from loudmerge.compat.judging.cells import Matrix, MatrixError
from loudmerge.compat.judging.result import FAILED, NOT_INSTALLED, NOT_RUN, OK, UNREACHABLE, CellResult
from loudmerge.compat.running import runner
from loudmerge.compat.running.runner import failures, run
from tests.unit import reference
from tests.unit.compat import checkout
from tests.unit.compat.made import VERSIONS, cell, result
from tests.unit.synthetic import FAMILIES, Case

ONE, TWO = cell("one"), cell("two", versions={**VERSIONS, "peft": "0.18.1"})
MATRIX = Matrix((ONE, TWO))

Run = Callable[..., dict[str, CellResult]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return checkout.make(tmp_path, monkeypatch)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run_cells(root: Path, told: list[str]) -> Run:
    """Runs cells and gives the rows by cell, each as it was written."""

    def run_cells(
        *names: str, matrix: Matrix = MATRIX, parts: tuple[str, ...] = (), **changes: Any
    ) -> dict[str, CellResult]:
        options = replace(checkout.options(root, parts), **changes)
        rows = run(matrix, names, options, told.append)
        assert [row.cell for row in rows] == list(matrix.names)
        for row in rows:
            document = json.loads((options.results / f"{row.cell}.json").read_text("utf-8"))
            assert CellResult.from_json(document) == row
        return {row.cell: row for row in rows}

    return run_cells


def test_a_cell_s_tests_run_in_its_environment(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    rows = run_cells("one", parts=("tests",))
    tests = rows["one"].tests
    assert tests is not None
    assert (tests.passed, tests.failed, tests.skips) == (1, 0, {"nothing to ask": 1})
    assert rows["one"].versions["peft"] == "0.19.1"
    assert {"environment", "tests"} == rows["one"].stages.keys()
    assert [each.check for each in rows["one"].shortfalls] == ["journey", "tests", "families"]
    assert (rows["two"].status, rows["two"].detail) == (NOT_RUN, "not asked for")


def test_a_part_that_dies_is_a_row_that_says_how(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    python = checkout.options(root, ()).environment("one").python
    python.write_text("#!/bin/sh\necho working\necho Killed: out of memory >&2\nexit 137\n", "utf-8")
    row = run_cells("one", parts=("tests", "journey"))["one"]
    assert row.status == FAILED
    why = "failed: Killed: out of memory (exit code 137)"
    assert row.detail == f"tests {why}; journey {why}"
    assert [each.check for each in row.shortfalls] == ["journey", "tests", "families"]


def test_tests_that_cannot_be_collected_are_no_pass(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    (root / "tests" / "conftest.py").write_text("raise RuntimeError('broken')", "utf-8")
    row = run_cells("one", parts=("tests",))["one"]
    assert row.tests is None
    assert "tests failed: RuntimeError: pytest ended with exit code 4: see the log" in row.detail


def test_a_test_module_that_cannot_be_imported_is_a_failed_test(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    (root / "tests" / "unit" / "test_broken.py").write_text(
        "from loudmerge import nothing_of_the_kind", "utf-8"
    )
    row = run_cells("one", parts=("tests",))["one"]
    assert row.tests is not None
    assert (row.tests.failed, row.tests.failures) == (1, ("tests.unit.test_broken",))
    assert "tests" in [each.check for each in row.shortfalls]


@pytest.mark.parametrize(
    ("text", "conftest", "says"),
    [
        ("def test_exit(): pytest.exit('enough', returncode=0)", "", "ended after 1 of 3 tests"),
        ("def test_exit(): pytest.exit('enough', returncode=1)", "", "ended with exit code 1"),
        (
            "",
            "def pytest_sessionfinish(session): session.exitstatus = 1",
            "ended with exit code 1",
        ),
    ],
)
def test_a_pytest_that_ends_early_is_no_pass(
    root: Path, run_cells: Run, text: str, conftest: str, says: str
) -> None:
    checkout.in_place(root, ONE)
    (root / "tests" / "unit" / "conftest.py").write_text(conftest, "utf-8")
    tests = f"import pytest\ndef test_ok(): pass\n{text}\ndef test_after(): pass\n"
    (root / "tests" / "unit" / "test_tiny.py").write_text(tests, "utf-8")
    row = run_cells("one", parts=("tests",))["one"]
    assert row.tests is None
    assert f"tests failed: RuntimeError: pytest {says}" in row.detail
    assert "tests" in [each.check for each in row.shortfalls]


def test_a_test_that_ends_pytest_has_not_passed_though_it_is_the_last(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    tests = "import pytest\ndef test_ok(): pass\ndef test_exit(): pytest.exit('enough', returncode=0)\n"
    (root / "tests" / "unit" / "test_tiny.py").write_text(tests, "utf-8")
    row = run_cells("one", parts=("tests",))["one"]
    assert "pytest ended after 1 of 2 tests" in row.detail


def test_a_timed_out_part_leaves_nothing_running(
    root: Path, run_cells: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.in_place(root, ONE)
    beats = root / "beats"
    slow = f"def test_slow():\n    for _ in range(100):\n        with open({str(beats)!r}, 'a') as file:\n"
    beating = f"{slow}            file.write('.')\n        time.sleep(0.1)\n"
    (root / "tests" / "unit" / "test_tiny.py").write_text(f"import time\n{beating}", "utf-8")
    beats.touch()  # a busy machine may not have come to the first
    monkeypatch.setattr(runner, "PART_SECONDS", 4)
    row = run_cells("one", parts=("tests",))["one"]
    assert row.detail == "tests was not done after 4 s"
    before = beats.stat().st_size
    time.sleep(1)
    assert beats.stat().st_size == before


def trained(root: Path, name: str, seed: int) -> Path:
    """What the journey of a cell leaves for the others: a base, an adapter, and what its merge wrote."""
    directory = checkout.options(root, ()).directory(name)
    built = reference.build(Case(FAMILIES[0], seed, fused=("down",)), directory / "journey")
    loudmerge.merge(built.base, built.adapter, directory / "out")
    of = {"versions": [], "source": source(root)}
    journey = {"digest": digest(directory / "out"), "seconds": 1.0, "of": of}
    (directory / "journey.json").write_text(json.dumps(journey), "utf-8")
    return directory


def test_every_other_cell_s_adapter_is_merged_here(root: Path, run_cells: Run) -> None:
    """The same bytes are ok; other bytes, and an adapter that is refused here, are not."""
    cells = [cell(name) for name in ("one", "same", "other", "refused", "edited", "untrained")]
    checkout.in_place(root, cells[0])
    for seed, name in enumerate(("one", "same", "other", "refused", "edited")):
        trained(root, name, seed)
    directory = checkout.options(root, ()).directory
    written = json.loads((directory("other") / "journey.json").read_text("utf-8"))
    written["digest"]["weights"] = "0" * 64
    (directory("other") / "journey.json").write_text(json.dumps(written), "utf-8")
    written["of"]["source"] = "by another loudmerge, which may have rounded otherwise"
    (directory("edited") / "journey.json").write_text(json.dumps(written), "utf-8")
    (directory("refused") / "journey" / "adapter" / "adapter_config.json").unlink()

    row = run_cells("one", matrix=Matrix(tuple(cells)), parts=("cross",))["one"]
    assert row.crossed.keys() == {"same", "other", "refused"}
    assert row.crossed["same"] == "ok"
    assert row.crossed["other"] == "other weights than where it was trained"
    assert row.crossed["refused"].startswith("unsupported-adapter: ")
    assert "crossed" in [each.check for each in row.shortfalls]


def test_a_cross_that_dies_is_no_pass(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    trained(root, "two", 1)
    checkout.options(root, ()).environment("one").python.write_text("#!/bin/sh\nexit 1\n", "utf-8")
    row = run_cells("one", parts=("cross",))["one"]
    assert row.crossed == {"two": "failed: it said nothing (exit code 1)"}


def test_a_cross_that_dies_is_no_pass_though_there_is_nothing_to_merge(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    checkout.options(root, ()).environment("one").python.write_text("#!/bin/sh\nexit 1\n", "utf-8")
    row = run_cells("one", parts=("cross",))["one"]
    assert row.crossed == {}
    assert ("crossed", "failed: it said nothing (exit code 1)") in [
        (each.check, each.found) for each in row.shortfalls
    ]


def test_a_python_that_cannot_be_started_is_a_row_that_says_so(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    checkout.in_place(root, TWO)
    checkout.options(root, ()).environment("two").python.write_text("#!/nonexistent/python\n", "utf-8")
    rows = run_cells(parts=("tests",))
    assert rows["two"].detail.startswith("tests could not be started: ")
    assert rows["one"].tests is not None


def test_an_environment_that_was_changed_since_it_was_made_falls_short(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    checkout.holds(checkout.options(root, ()).environment("one"), "peft", "0.21.2")
    row = run_cells("one", parts=("tests",))["one"]
    assert row.versions["peft"] == "0.21.2"
    assert row.errors == {"versions": "tests: peft 0.21.2, expected 0.19.1"}
    assert "versions" in [each.check for each in row.shortfalls]


def test_a_part_during_which_a_file_was_edited_shows_nothing_of_the_source_it_began_with(
    root: Path, run_cells: Run
) -> None:
    """Tests that passed on the edited files would stand for the others."""
    checkout.in_place(root, ONE)
    edit = "import pathlib\ndef test_edits(): pathlib.Path('tests/unit/test_other.py').touch()\n"
    (root / "tests" / "unit" / "test_tiny.py").write_text(edit, "utf-8")
    row = run_cells("one", parts=("tests",))["one"]
    assert (row.status, row.tests) == (FAILED, None)
    assert row.detail.startswith("tests ran on another source than the run began with: its files were edited")


def test_an_environment_that_holds_another_loudmerge_shows_nothing_of_this_one(
    root: Path, run_cells: Run, tmp_path: Path
) -> None:
    checkout.in_place(root, ONE)
    package = Path(loudmerge.__file__).parent
    shutil.copytree(package, tmp_path / "elsewhere" / "loudmerge")
    (tmp_path / "elsewhere" / "loudmerge" / "another.py").touch()
    python = checkout.options(root, ()).environment("one").python
    script = python.read_text("utf-8").replace(str(package.parent), str(tmp_path / "elsewhere"))
    python.write_text(script, "utf-8")
    row = run_cells("one", parts=("tests",))["one"]
    assert (row.status, row.tests) == (FAILED, None)
    assert row.detail.endswith("or the environment holds another loudmerge")


@pytest.mark.parametrize("text", ["", '{"path": "fus', "[]", '{"digest": {"weights": "x"}}'])
def test_what_a_killed_run_left_half_written_costs_no_row(
    root: Path, run_cells: Run, told: list[str], text: str
) -> None:
    """Of a cell that is not asked for: its adapter is not merged. Of one that is: that part did not run."""
    checkout.in_place(root, ONE)
    for name, part in (("two", "journey"), ("one", "families")):
        directory = checkout.options(root, ()).directory(name)
        directory.mkdir(parents=True)
        (directory / f"{part}.json").write_text(text, "utf-8")
    row = run_cells("one", parts=("tests", "cross"))["one"]
    assert row.tests is not None
    assert (row.crossed, row.families) == ({}, {})
    unread = [line for line in told if line.startswith("two: its journey left a file that cannot be read")]
    whole = text.endswith("}")
    assert len(unread) == (0 if whole else 1)
    assert row.detail.startswith("" if whole else "families left a file that cannot be read: ")


def test_what_other_versions_showed_is_not_kept(root: Path, run_cells: Run) -> None:
    """A new environment, by real venv and pip; what the same versions left is taken, as CI needs."""
    left = checkout.options(root, ()).directory("one")
    left.mkdir(parents=True)
    pins = ["torch==2.13.0", "transformers==5.5.0", "peft==0.19.1", "trl==0.25.1"]
    of = {"versions": pins, "source": source(root)}
    same = {"families": {"mixtral": "ok"}, "failures": [], "seconds": 2.0, "of": of}
    older = {"versions": [*pins[:2], "peft==0.18.1", pins[3]], "source": source(root)}
    other = {"crossed": {"two": "ok"}, "seconds": 1.0, "of": older}
    edited = {"error": "by another loudmerge", "seconds": 1.0, "of": {**of, "source": "0" * 64}}
    for part, document in {"families": same, "cross": other, "tests": edited}.items():
        (left / f"{part}.json").write_text(json.dumps(document), "utf-8")
    row = run_cells("one")["one"]
    assert row.stages.keys() == {"environment", "families"}
    assert (row.families, row.crossed, row.detail) == ({"mixtral": "ok"}, {}, "")
    assert row.versions.items() >= {**VERSIONS, "torch": "2.13.0"}.items()


def test_a_part_that_ran_before_the_tests_were_edited_is_none_of_the_row(root: Path, run_cells: Run) -> None:
    """They may fail now: what they showed before stands for nothing."""
    checkout.in_place(root, ONE)
    assert run_cells("one", parts=("tests",))["one"].tests is not None
    (root / "tests" / "unit" / "test_tiny.py").write_text("def test_a(): assert 0\n", "utf-8")
    row = run_cells("one", parts=("cross",))["one"]
    assert row.tests is None
    assert row.stages.keys() == {"environment", "cross"}


def test_a_full_run_in_which_an_adapter_was_not_merged_falls_short(
    root: Path, run_cells: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of some cells, or of some parts, merges what there is."""
    for each in (ONE, TWO):
        checkout.in_place(root, each)
    shown = {
        name: result(cell=name, versions=each.versions, stages={"cross": 1.0}, crossed={})
        for name, each in (("one", ONE), ("two", replace(TWO)))
    }
    monkeypatch.setattr(runner, "_row", lambda one, _: shown[one.cell.name])
    monkeypatch.setattr(runner, "_run_parts", lambda *_, **__: None)
    for parts, names, status in (
        (PARTS, (), FAILED),
        (PARTS, ("one", "two"), OK),
        (("tests", "journey"), (), OK),
    ):
        rows = run_cells(*names, parts=parts)
        assert {row.status for row in rows.values()} == {status}


def test_an_environment_that_cannot_be_made_is_a_row_that_says_so(run_cells: Run) -> None:
    gone = cell("gone", versions={**VERSIONS, "peft": "0.1"})
    matrix = Matrix((ONE, gone))
    row = run_cells("gone", matrix=matrix, parts=("tests",))["gone"]
    assert (row.status, row.versions) == (NOT_INSTALLED, gone.versions)
    assert row.detail == "ERROR: No matching distribution found for peft==0.1"
    assert failures((gone,), (row,)) == (row,)


def test_heads_that_cannot_be_reached_are_a_row_and_no_pass(run_cells: Run) -> None:
    """An optional cell that was not reached does not fail the run; any other does."""
    dev = cell("dev", lane="dev", versions={"peft": "huggingface/peft"}, optional=True)
    environ = {"LOUDMERGE_GITHUB": "http://127.0.0.1:9"}
    row = run_cells("dev", matrix=Matrix((ONE, dev)), parts=("tests",), environ=environ)["dev"]
    assert (row.status, row.tests) == (UNREACHABLE, None)
    assert row.detail.startswith("fatal: ")
    assert failures((dev,), (row,)) == ()
    assert failures((replace(dev, optional=False),), (row,)) == (row,)
    assert failures((dev,), (replace(row, status=NOT_INSTALLED),)) != ()


def test_a_mistyped_repository_is_no_host_s_fault_and_fails_the_run(root: Path, run_cells: Run) -> None:
    dev = cell("dev", lane="dev", versions={"peft": "huggingface/pfet"}, optional=True)
    environ = {"LOUDMERGE_GITHUB": (root / "nowhere").as_uri()}
    row = run_cells("dev", matrix=Matrix((ONE, dev)), parts=("tests",), environ=environ)["dev"]
    assert row.status == NOT_INSTALLED
    assert failures((dev,), (row,)) == (row,)


def test_the_latest_that_is_a_released_cell_runs_once(root: Path, run_cells: Run, told: list[str]) -> None:
    """What the index serves is asked of pip; the row is the other cell's and says so."""
    checkout.in_place(root, ONE)
    latest = cell("latest", lane="latest", versions={})
    rows = run_cells("latest", matrix=Matrix((ONE, TWO, latest)), parts=("tests",))
    assert rows["latest"] == replace(
        rows["one"],
        cell="latest",
        lane="latest",
        detail="the versions of one, which ran for both",
        shortfalls=rows["latest"].shortfalls,
    )
    assert rows["one"].tests is not None
    assert rows["two"].status == NOT_RUN
    assert not checkout.options(root, ()).directory("latest").exists()
    assert "latest: the versions of one, which runs for both" in told


def test_the_latest_that_is_no_released_cell_has_its_own_environment(root: Path, run_cells: Run) -> None:
    latest = cell("latest", lane="latest", versions={})
    checkout.in_place(root, replace(latest, versions=VERSIONS))
    rows = run_cells("latest", matrix=Matrix((TWO, latest)), parts=("tests",))
    assert rows["latest"].tests is not None
    assert rows["latest"].versions["peft"] == "0.19.1"


def test_a_row_that_is_kept_is_judged_by_today_s_expectations(root: Path, run_cells: Run) -> None:
    results = checkout.options(root, ()).results
    results.mkdir(parents=True)
    two = result(
        cell="two",
        versions={**TWO.versions, "torch": "2.13.0"},
        orientation="swapped",
        source=source(root),
    )
    (results / "two.json").write_text(json.dumps(two.to_json()), "utf-8")
    checkout.in_place(root, ONE)
    row = run_cells("one")["two"]
    assert (row.status, row.detail, row.figures) == (FAILED, "of an earlier run", two.figures)
    assert [each.check for each in row.shortfalls] == ["orientation"]
    strict = Matrix((ONE, replace(TWO, expects=replace(TWO.expects, orientation="swapped"))))
    assert run_cells("one", matrix=strict)["two"].status == OK


def test_a_row_that_another_source_wrote_over_comes_back_with_its_own(root: Path, run_cells: Run) -> None:
    """From what its parts left. Not where one of them ran on something else since, or its environment is."""
    for each in (ONE, TWO):
        checkout.in_place(root, each)
    trained(root, "one", 1)
    before = run_cells(parts=("tests", "cross"))["two"]
    directory = checkout.options(root, ()).directory("two")
    of = {"versions": ["torch==2.13.0", *requirements(TWO.versions)], "source": source(root)}
    families, journey = {"families": {"mixtral": "ok"}, "of": of}, {"path": "fused", "of": of}
    (directory / "families.json").write_text(json.dumps(families), "utf-8")
    (directory / "journey.json").write_text(json.dumps(journey), "utf-8")
    edited = run_cells("one", source="edited")["two"]
    assert (edited.status, edited.tests) == (NOT_RUN, None)
    found = run_cells("one")["two"]
    assert found.detail == "of an earlier run"
    assert (found.status, found.tests, found.crossed) == (FAILED, before.tests, before.crossed)
    assert (found.families, found.versions) == ({"mixtral": "ok"}, before.versions)

    run_cells("one", source="edited")
    other = Installer("torch==2.12.0")
    assert run_cells("one", installer=other)["two"].status == NOT_RUN
    (directory / "families.json").unlink()
    assert run_cells("one")["two"].status == NOT_RUN


@pytest.mark.parametrize(
    ("edited", "torch", "asks"),
    [("", "torch==2.13.0", False), ("edited", "torch==2.13.0", True), ("", "torch==2.12.0", True)],
    ids=["same", "edited", "torch"],
)
def test_the_last_stage_is_of_the_heads_that_the_others_were_of(
    root: Path, run_cells: Run, edited: str, torch: str, asks: bool
) -> None:
    """One may have moved since: here no host is asked, which none would answer."""
    heads = {name: f"git+https://h.invalid/{name}@{'a' * 40}" for name in VERSIONS}
    dev = cell("dev", lane="dev", versions={name: f"h/{name}" for name in VERSIONS})
    checkout.in_place(root, replace(dev, versions=heads))
    left = checkout.options(root, ()).directory("dev")
    left.mkdir(parents=True)
    of = {"versions": [torch, *requirements(heads)], "source": edited or source(root)}
    families = {"families": {"mixtral": "ok"}, "failures": [], "seconds": 2.0, "of": of}
    (left / "families.json").write_text(json.dumps(families), "utf-8")
    (left / "journey.json").write_text("{", "utf-8")
    environ = {"LOUDMERGE_GITHUB": "http://127.0.0.1:9"}
    row = run_cells("dev", matrix=Matrix((ONE, dev)), parts=("cross",), environ=environ)["dev"]
    assert (row.status == UNREACHABLE) == asks
    assert row.families == ({} if asks else {"mixtral": "ok"})
    again = run_cells("dev", matrix=Matrix((ONE, dev)), parts=("tests", "cross"), environ=environ)["dev"]
    assert again.status == UNREACHABLE


def test_only_the_cells_asked_for_fail_a_run() -> None:
    rows = (result(status=FAILED), result(cell="two"))
    assert failures((TWO,), rows) == ()
    assert failures((ONE, TWO), rows) == rows[:1]


def test_an_unknown_cell_is_refused_before_anything_runs(root: Path, run_cells: Run) -> None:
    with pytest.raises(MatrixError, match="no cell 'three'"):
        run_cells("three")
    assert not (root / ".compat").exists()


def test_a_part_sees_no_package_from_outside_and_has_one_thread(root: Path, run_cells: Run) -> None:
    checkout.in_place(root, ONE)
    python = checkout.options(root, ()).environment("one").python
    python.write_text("#!/bin/sh\nenv\nexit 1\n", "utf-8")
    environ = {"PATH": "/bin:/usr/bin", "CI": "1", "PYTHONPATH": "/elsewhere", "OMP_NUM_THREADS": "8"}
    run_cells("one", parts=("tests",), environ=environ)
    seen = checkout.options(root, ()).log("one", "tests").read_text("utf-8").splitlines()
    assert {"OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1"} <= set(seen)
    assert not [line for line in seen if line.startswith(("PYTHONPATH=", "CI="))]
