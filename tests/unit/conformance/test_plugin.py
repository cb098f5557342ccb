"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loudmerge
from loudmerge.conformance.cases import Suite
from tests.unit.conformance.world import line


def pytest_in(folder: Path, *arguments: str | Path) -> tuple[int, str]:
    """Runs pytest with the plugin; its exit code and output."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (folder / "test_other.py").write_text("def test_other():\n    pass\n")
    paths = [str(Path(loudmerge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "loudmerge.conformance.plugin",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=folder,
        env={**kept, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_case_is_a_test(suite: Suite, tmp_path: Path) -> None:
    command = line("right", tmp_path)
    code, text = pytest_in(tmp_path / "p", "--conformance-command", command, "--conformance-data", suite.root)
    assert code == 0, text
    assert "5 passed" in text
    assert all(f"conformance::{case.id}\n" in text for case in suite.cases), text


def test_a_failure_says_what_came_out_and_why_it_matters(suite: Suite, tmp_path: Path) -> None:
    command = line("copies the base", tmp_path)
    data = ("--conformance-data", suite.root)
    code, text = pytest_in(tmp_path / "p", "--conformance-command", command, *data, "-k", "plain")
    assert code == 1
    assert "wrong-silently: model.q_proj.weight: unchanged, the base's\nwhy: why plain matters.\n" in text
    assert f"adapter: {suite.root / 'adapters/plain'}" in text
    assert "1 failed, 4 deselected" in text


def test_a_refusal_by_a_tool_that_merges_nothing_fails(suite: Suite, tmp_path: Path) -> None:
    command, data = line("refuses", tmp_path), ("--conformance-data", suite.root)
    code, text = pytest_in(tmp_path / "p", "--conformance-command", command, *data, "-k", "nan")
    assert code == 1
    assert "moot: it fails on plain, too, which it has to merge\nwhy: why nan matters." in text


def test_without_a_command_nothing_is_added(tmp_path: Path) -> None:
    code, text = pytest_in(tmp_path / "p")
    assert code == 0
    assert "1 passed" in text


def test_a_command_that_cannot_be_run_on_cases_is_a_usage_error(suite: Suite, tmp_path: Path) -> None:
    data = ("--conformance-data", suite.root)
    code, text = pytest_in(tmp_path / "p", "--conformance-command", "env {base}", *data)
    assert code == 4
    assert "found no {adapter}" in text


def test_missing_data_is_a_usage_error(tmp_path: Path) -> None:
    command = ("--conformance-command", "env {base} {adapter} {out}")
    code, text = pytest_in(tmp_path / "p", *command, "--conformance-data", tmp_path / "none")
    assert code == 4
    assert "found no manifest" in text
