"""The workflows: what they name exists, what they may do is the least, and their scripts do what they say."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from loudmerge.compat.cells import FILE, load
from loudmerge.compat.result import FAILED, OK, CellResult

ROOT = Path(__file__).parents[3]
FILES = [ROOT / ".github" / "workflows" / f"{name}.yml" for name in ("ci", "gpu", "matrix")]
WRITES = {("matrix", "releases", "issues")}
"""The jobs that may write, and what."""


@dataclass(frozen=True)
class Step:
    """One step. where: for a failure's message."""

    where: str
    job: str
    given: dict[str, Any]


def workflow(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = workflow(file)["jobs"]
    return found


def steps(file: Path) -> Iterator[Step]:
    for job, given in jobs(file).items():
        for number, step in enumerate(given["steps"]):
            yield Step(f"{file.name}: {job}: step {number}", job, step)


def script(name: str, job: str, step: str) -> str:
    """The shell of the step that has this name."""
    file = ROOT / ".github" / "workflows" / f"{name}.yml"
    (found,) = [each["run"] for each in jobs(file)[job]["steps"] if each.get("name") == step]
    return str(found)


each_file = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


@each_file
def test_every_nox_session_and_module_that_is_run_exists(file: Path) -> None:
    sessions = nox_sessions()
    for step in steps(file):
        for name in re.findall(r"nox (?:-\S+ )*-s ([\w-]+)", step.given.get("run", "")):
            assert name in sessions, step.where
        for name in re.findall(r"python -m (loudmerge[\w.]*)", step.given.get("run", "")):
            assert (ROOT / "src" / f"{name.replace('.', '/')}.py").is_file(), step.where


def nox_sessions() -> set[str]:
    """The functions of noxfile.py that are sessions, read without running it."""
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    marks = {node.name: [ast.unparse(mark) for mark in node.decorator_list] for node in functions}
    return {name for name, found in marks.items() if any(re.match(r"nox\.session\b", mark) for mark in found)}


@each_file
def test_jobs_need_jobs_that_are_there_and_use_what_those_give(file: Path) -> None:
    for name, job in jobs(file).items():
        needed = job.get("needs", [])
        needed = [needed] if isinstance(needed, str) else needed
        assert set(needed) <= set(jobs(file)), name
        text = yaml.safe_dump(job)
        for other, output in re.findall(r"needs\.([\w-]+)\.outputs\.([\w-]+)", text):
            assert other in needed, f"{name} uses {other}"
            assert output in jobs(file)[other]["outputs"], f"{name} uses {other}'s {output}"
        assert set(re.findall(r"needs\.([\w-]+)\.result", text)) <= set(needed), name
        ids = {step.get("id") for step in job["steps"]}
        assert set(re.findall(r"steps\.([\w-]+)\.", text)) <= ids, name


@each_file
def test_an_output_of_a_step_is_written_by_its_script(file: Path) -> None:
    for name, job in jobs(file).items():
        scripts = {step.get("id"): step.get("run", "") for step in job["steps"]}
        for step, output in re.findall(r"steps\.([\w-]+)\.outputs\.([\w-]+)", yaml.safe_dump(job)):
            assert f'echo "{output}=' in scripts[step], f"{name}: {step}"


@each_file
def test_jobs_may_read_and_only_the_named_ones_write(file: Path) -> None:
    assert workflow(file)["permissions"] == {"contents": "read"}
    for name, job in jobs(file).items():
        writes = {right for right, level in job.get("permissions", {}).items() if level != "read"}
        assert {(file.stem, name, right) for right in writes} <= WRITES


@each_file
def test_every_job_ends_and_no_two_runs_work_on_the_same(file: Path) -> None:
    assert "group" in workflow(file)["concurrency"]
    for name, job in jobs(file).items():
        assert 0 < job["timeout-minutes"] <= 240, name


@each_file
def test_actions_are_pinned_by_major_version_and_a_checkout_keeps_no_token(file: Path) -> None:
    for step in steps(file):
        uses = step.given.get("uses")
        if uses and not uses.startswith("./"):
            assert re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)*@v\d+", uses), step.where
            if uses.startswith("actions/checkout@"):
                assert step.given["with"]["persist-credentials"] is False, step.where


@each_file
def test_no_expression_is_pasted_into_a_script(file: Path) -> None:
    """GitHub pastes before the shell reads: a branch's name could be a command. They go through `env`."""
    for step in steps(file):
        assert "${{" not in step.given.get("run", ""), step.where


@each_file
def test_the_shell_reads_every_script(file: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    for step in steps(file):
        if "run" in step.given:
            command = ["bash", "-n"] if shellcheck is None else [shellcheck, "--shell=bash", "-"]
            done = subprocess.run(
                command, input=step.given["run"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{step.where}: {done.stdout}{done.stderr}"


def test_every_artifact_that_is_read_is_written_and_hidden_ones_are_taken() -> None:
    """`.compat` is hidden: without the option actions/upload-artifact takes nothing of it, and goes on."""
    found = [step for file in FILES for step in steps(file)]
    uploads = [step.given["with"] for step in found if "upload-artifact@" in step.given.get("uses", "")]
    names = [re.sub(r"\$\{\{.*?\}\}", "CELL", upload["name"]) for upload in uploads]
    assert all(upload["include-hidden-files"] is True for upload in uploads if ".compat" in upload["path"])
    downloads = [step.given["with"] for step in found if "download-artifact@" in step.given.get("uses", "")]
    wanted = [download.get("name") or download["pattern"] for download in downloads]
    for step in found:
        wanted += re.findall(r"gh run download \S+ --name (\S+)", step.given.get("run", ""))
    assert {"cell-*", "row-*", "results", "base", "gpu-results"} <= set(wanted)
    for pattern in wanted:
        assert fnmatch.filter(names, pattern), pattern


def test_runs_are_looked_for_under_the_names_that_the_workflows_have() -> None:
    """By name, not by file: GitHub answers with an error to a file that is not on the default branch yet."""
    names = {workflow(file)["name"] for file in FILES}
    text = (ROOT / ".github" / "workflows" / "matrix.yml").read_text("utf-8")
    assert set(re.findall(r'workflowName == "([^"]+)"', text)) == {"Matrix", "GPU"} <= names


class Ran(NamedTuple):
    """How a script ended. calls: of `gh`, one line each. outputs: what it gave to the next steps."""

    code: int
    stdout: str
    stderr: str
    calls: list[str]
    outputs: str
    summary: str


GH = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$1 $2" in
    "issue list") echo "$OPEN" ;;
    "run list") if [ -n "$RUNS_FAIL" ]; then echo "HTTP 502" >&2; exit 1; fi; printf '%b' "$RUNS" ;;
    "run download") [ "$3" = "$HAS" ] ;;
esac
"""


def run(directory: Path, text: str, **environ: str) -> Ran:
    """Runs a script as GitHub does where `shell: bash` is set, with a `gh` that says what it is told to."""
    tools = directory / "tools"
    tools.mkdir()
    (tools / "gh").write_text(GH, "utf-8")
    (tools / "gh").chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    files = {name: directory / name.lower() for name in ("CALLS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text],
        cwd=directory,
        env={**os.environ, **{name: str(file) for name, file in files.items()}, "PATH": path, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    calls, outputs, summary = (file.read_text("utf-8") for file in files.values())
    return Ran(done.returncode, done.stdout, done.stderr, calls.splitlines(), outputs, summary)


@pytest.mark.parametrize(
    ("body", "is_open", "calls"),
    [
        ("", "", []),
        ("", "7", ["issue close 7 --comment Every release has its cell."]),
        ("peft 0.22.0\n", "", ["issue create --title T --label new-releases --body-file releases.md"]),
        ("peft 0.22.0\n", "7", ["issue edit 7 --body-file releases.md"]),
    ],
    ids=["nothing-new", "nothing-new-any-more", "new", "new-and-known"],
)
def test_one_issue_is_opened_updated_and_closed(
    tmp_path: Path, body: str, is_open: str, calls: list[str]
) -> None:
    (tmp_path / "releases.md").write_text(body, "utf-8")
    text = script("matrix", "releases", "Open, update or close the one issue")
    ran = run(tmp_path, text, OPEN=is_open, LABEL="new-releases", TITLE="T")
    assert ran.code == 0, ran.stderr
    assert ran.calls[0].startswith("label create new-releases --force")
    assert ran.calls[1].startswith("issue list --label new-releases --state open")
    assert ran.calls[2:] == calls


BASE = "The newest results of the base branch"


def test_the_base_is_the_newest_run_that_has_results(tmp_path: Path) -> None:
    ran = run(tmp_path, script("matrix", "plan", BASE), RUNS=r"9\n8\n7\n", HAS="8", BRANCH="main")
    assert ran.code == 0, ran.stderr
    assert ran.outputs == "found=true\n"
    assert [call.split()[2] for call in ran.calls if call.startswith("run download")] == ["9", "8"]
    assert "--branch main" in ran.calls[0]


def test_without_any_results_there_is_no_base(tmp_path: Path) -> None:
    ran = run(tmp_path, script("matrix", "plan", BASE), RUNS=r"9\n8\n", HAS="", BRANCH="main")
    assert (ran.code, ran.outputs) == (0, "found=false\n")


def test_a_github_that_does_not_answer_is_not_taken_for_having_no_base(tmp_path: Path) -> None:
    """Without a base a pull request's own red cells would be all that is looked at."""
    ran = run(tmp_path, script("matrix", "plan", BASE), RUNS_FAIL="1", BRANCH="main")
    assert ran.code != 0
    assert ran.outputs == ""


RENDER = "Render, and compare with the base"


def put(directory: Path, *rows: CellResult) -> None:
    directory.mkdir(parents=True)
    for row in rows:
        (directory / f"{row.cell}.json").write_text(json.dumps(row.to_json()), "utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("src", FILE):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def rows() -> tuple[CellResult, ...]:
    cells = load(ROOT / FILE).cells
    return tuple(CellResult(cell.name, cell.lane, OK, cell.versions) for cell in cells)


def test_the_table_goes_to_the_summary_and_is_green_where_nothing_regressed(checkout: Path) -> None:
    put(checkout / ".compat" / "results", *rows())
    put(checkout / ".compat" / "base", *rows())
    (checkout / "lag.txt").write_text("peft=99.0.0\n", "utf-8")
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="true")
    assert ran.code == 0, ran.stderr
    assert all(row.cell in ran.summary for row in rows())
    assert "peft 99.0.0" in ran.summary


def test_a_regression_against_the_base_fails_the_job_and_still_shows_the_table(checkout: Path) -> None:
    first, *others = rows()
    put(checkout / ".compat" / "results", replace(first, status=FAILED), *others)
    put(checkout / ".compat" / "base", first, *others)
    (checkout / "lag.txt").touch()
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="true")
    assert ran.code == 1
    assert f"{first.cell}: regressed" in ran.stderr
    assert first.cell in ran.summary


def test_a_cell_that_left_no_result_is_a_row(checkout: Path) -> None:
    first, *others = rows()
    put(checkout / ".compat" / "results", *others)
    (checkout / "lag.txt").touch()
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="false")
    assert ran.code == 0, ran.stderr
    assert first.cell in ran.summary
