"""The workflows: what they name exists, what they may do is the least, and their scripts do what they say."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from loudmerge.compat.inside.cell import source
from loudmerge.compat.judging.cells import FILE, Cell, load
from loudmerge.compat.judging.result import FAILED, OK, CellResult, Tests
from tests.unit.compat.made import result

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


def test_an_artifact_may_be_uploaded_again_by_a_further_attempt() -> None:
    """Without the option a name that an earlier attempt has used is a conflict, and the step fails."""
    found = [step for file in FILES for step in steps(file)]
    uploads = [step for step in found if "upload-artifact@" in step.given.get("uses", "")]
    assert [step.where for step in uploads if step.given["with"].get("overwrite") is not True] == []


def listed(step: str, job: str) -> str:
    """The command that asks for runs, on one line."""
    text = script("matrix", job, step).replace("\\\n", " ")
    (found,) = re.findall(r"gh run list .*", text)
    return str(found)


@pytest.mark.parametrize(("step", "job", "file"), [("base", "plan", "matrix"), ("gpu", "table", "gpu")])
def test_runs_are_looked_for_by_the_workflow_s_file(step: str, job: str, file: str) -> None:
    """All workflows' runs together would be more than a limit lets through."""
    assert f"--workflow {file}.yml " in listed({"base": BASE, "gpu": GPU}[step], job)
    assert (ROOT / ".github" / "workflows" / f"{file}.yml").is_file()


@pytest.mark.skipif(shutil.which("jq") is None, reason="asks jq")
@pytest.mark.parametrize(("step", "job"), [("base", "plan"), ("gpu", "table")])
def test_a_pull_request_of_a_fork_s_branch_of_that_name_is_not_the_base(step: str, job: str) -> None:
    """GitHub's filter by branch takes a fork's `main` for ours."""
    command = listed({"base": BASE, "gpu": GPU}[step], job)
    (fields,) = re.findall(r"--json (\S+)", command)
    assert fields == "databaseId,event"
    (query,) = re.findall(r"--jq '([^']+)'", command)
    events = ["push", "pull_request", "schedule", "pull_request_target", "workflow_dispatch"]
    runs = json.dumps([{"databaseId": number, "event": event} for number, event in enumerate(events)])
    done = subprocess.run(["jq", query], input=runs, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2", "4"]


class Ran(NamedTuple):
    """How a script ended. calls: of `gh`, one line each. outputs: what it gave to the next steps."""

    code: int
    stdout: str
    stderr: str
    calls: list[str]
    outputs: str
    summary: str


NOX = """#!/bin/sh
if [ -n "$SAYS" ]; then echo "$*"; exit; fi
[ -n "$ROW" ] || exit 1
echo "$ROW" > ".compat/results/$CELL.json"
"""
GH = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$1 $2" in
    "issue list") echo "$OPEN" ;;
    "run list") if [ -n "$RUNS_FAIL" ]; then echo "HTTP 502" >&2; exit 1; fi; printf '%b' "$RUNS" ;;
    "run download")
        [ "$3" = "$HAS" ] || exit 1
        [ -z "$GIVES" ] || echo "$GIVES" > "$7/gpu-a.json" ;;
esac
"""


def run(directory: Path, text: str, **environ: str) -> Ran:
    """Runs a script as GitHub does where `shell: bash` is set, `gh` and `nox` doing what they are told to."""
    tools = directory / "tools"
    tools.mkdir()
    # No link to Python: Python 3.10 would not find its environment, and there tomli, by it.
    python = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'
    for name, tool in (("gh", GH), ("nox", NOX), ("python", python)):
        (tools / name).write_text(tool, "utf-8")
        (tools / name).chmod(0o755)
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


GPU = "The newest rows of the GPU"


@pytest.mark.parametrize(
    ("event", "has", "base", "expected"),
    [
        ("push", "8", True, "now"),
        ("push", "", True, "then"),
        ("push", "", False, None),
        ("pull_request", "8", True, "then"),
        ("pull_request", "8", False, None),
    ],
    ids=["newest", "none-left", "none-ever", "pull-request", "pull-request-without"],
)
def test_the_gpu_s_row_is_the_newest_and_on_a_pull_request_the_base_s(
    tmp_path: Path, event: str, has: str, base: bool, expected: str | None
) -> None:
    """A pull request did not run there: a row that fails is not its fault."""
    if base:
        (tmp_path / ".compat" / "base").mkdir(parents=True)
        (tmp_path / ".compat" / "base" / "gpu-a.json").write_text("then\n", "utf-8")
        (tmp_path / ".compat" / "base" / "one.json").write_text("then\n", "utf-8")
    ran = run(tmp_path, script("matrix", "table", GPU), RUNS=r"9\n8\n7\n", HAS=has, GIVES="now", EVENT=event)
    assert ran.code == 0, ran.stderr
    left = {file.name: file.read_text("utf-8") for file in (tmp_path / ".compat" / "results").iterdir()}
    assert left == ({} if expected is None else {"gpu-a.json": f"{expected}\n"})


def test_a_gpu_run_of_some_layers_leaves_the_row_of_all_of_them(tmp_path: Path) -> None:
    """By hand, the day before: without it the cell would be gone, and the comparison would fail."""
    (tmp_path / ".compat" / "base").mkdir(parents=True)
    (tmp_path / ".compat" / "base" / "gpu-all.json").write_text("then\n", "utf-8")
    ran = run(tmp_path, script("matrix", "table", GPU), RUNS=r"9\n", HAS="9", GIVES="now", EVENT="push")
    assert ran.code == 0, ran.stderr
    left = {file.name: file.read_text("utf-8") for file in (tmp_path / ".compat" / "results").iterdir()}
    assert left == {"gpu-all.json": "then\n", "gpu-a.json": "now\n"}


def test_a_github_that_does_not_answer_is_not_taken_for_having_no_gpu_rows(tmp_path: Path) -> None:
    ran = run(tmp_path, script("matrix", "table", GPU), RUNS_FAIL="1", EVENT="schedule")
    assert ran.code != 0


def test_the_gpu_s_rows_are_among_the_results_that_are_compared_with() -> None:
    """Otherwise they would be new each time, and a failing one would fail every comparison."""
    given = jobs(ROOT / ".github" / "workflows" / "matrix.yml")["table"]["steps"]
    names = [step.get("name") or step.get("with", {}).get("name") for step in given]
    assert names.index("base") < names.index(GPU) < names.index("results")


E2E = "Train, merge, reload, compare"


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, "--require"),
        (
            {"WEIGHTS": "Qwen/Qwen3-30B-A3B", "LAYERS": "2"},
            "--require --weights=Qwen/Qwen3-30B-A3B --layers=2",
        ),
        (
            {"LEARNING_RATE": "1e-3", "DIRECTORY": "/a disk"},
            "--require --learning-rate=1e-3 --directory=/a disk",
        ),
    ],
    ids=["none", "weights", "others"],
)
def test_the_gpu_s_workflow_fails_without_a_gpu_and_takes_the_command_s_options(
    tmp_path: Path, given: dict[str, str], options: str
) -> None:
    """What the workflow's inputs are called is what the command calls them."""
    file = ROOT / ".github" / "workflows" / "gpu.yml"
    (step,) = [step for step in steps(file) if step.given.get("name") == E2E]
    empty = dict.fromkeys(step.given["env"], "")
    ran = run(tmp_path, script("gpu", "e2e", E2E), **{**empty, **given}, ROW="x", SAYS="1")
    assert ran.stdout == f"-s e2e_gpu -- {options}\n"
    given_by_hand = {str(key): value for key, value in workflow(file).items()}["True"]  # YAML's `on`
    inputs = given_by_hand["workflow_dispatch"]["inputs"]
    values = [f"${{{{ inputs.{name} }}}}" for name in inputs]
    assert sorted(step.given["env"].values()) == sorted(values)
    text = (ROOT / "src" / "loudmerge" / "compat" / "gpu.py").read_text("utf-8")
    assert all(f'"--{name}"' in text for name in inputs)


def test_the_gpu_s_workflow_names_the_gpu_there_is() -> None:
    (job,) = jobs(ROOT / ".github" / "workflows" / "gpu.yml").values()
    assert [step for step in job["steps"] if step.get("run", "").startswith("nvidia-smi ||")]


CROSS = "Merge what the other cells trained"


@pytest.mark.parametrize("row", ["", "of the cross job"])
def test_the_row_of_the_cell_s_own_job_does_not_pass_for_the_cross_job_s(tmp_path: Path, row: str) -> None:
    results = tmp_path / ".compat" / "results"
    results.mkdir(parents=True)
    for cell in ("one", "two"):
        (results / f"{cell}.json").write_text("of the cell's job\n", "utf-8")
    ran = run(tmp_path, script("matrix", "cross", CROSS), CELL="one", ROW=row)
    assert (ran.code == 0) == bool(row)
    left = {file.name: file.read_text("utf-8") for file in results.iterdir()}
    assert left.get("one.json") == (f"{row}\n" if row else None)
    assert left["two.json"] == "of the cell's job\n"


def test_the_table_has_the_rows_of_cross_jobs_that_ran_and_no_others() -> None:
    given = jobs(ROOT / ".github" / "workflows" / "matrix.yml")
    (upload,) = [step for step in given["cross"]["steps"] if "upload-artifact@" in step.get("uses", "")]
    assert upload["if"] == "${{ !cancelled() && steps.cross.outcome != 'skipped' }}"
    downloads = [step["with"] for step in given["table"]["steps"] if "download-" in step.get("uses", "")]
    assert [download.get("pattern") or download["name"] for download in downloads] == ["row-*", "base"]


def test_on_a_pull_request_the_comparison_with_its_base_decides() -> None:
    """What is red there, too, is so in the README's check: it fails no pull request that has a base."""
    given = jobs(ROOT / ".github" / "workflows" / "matrix.yml")
    lets = "${{ github.event_name == 'pull_request' && needs.plan.outputs.base == 'true' }}"
    assert given["cell"]["continue-on-error"] == given["cross"]["continue-on-error"] == lets
    steps = {step.get("run", "").strip(): step for step in given["table"]["steps"]}
    (check,) = [step for command, step in steps.items() if "--readme README.md --check" in command]
    assert check["continue-on-error"] == lets
    (compare,) = [step for command, step in steps.items() if "--against .compat/base" in command]
    assert "continue-on-error" not in compare


def test_ci_runs_what_the_script_runs_but_for_the_matrix_which_has_a_workflow() -> None:
    ci, matrix = (workflow(ROOT / ".github" / "workflows" / f"{name}.yml") for name in ("ci", "matrix"))
    commands = "\n".join(step.get("run", "") for step in ci["jobs"]["test"]["steps"])
    assert ".ci/run" not in commands
    sessions = set(re.findall(r"-s ([a-z ]+)", commands))
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    said = {*re.findall(r'nox" .*-s ([a-z ]+)', text), *re.findall(r"-m tests\.(drills )--quick", text)}
    assert sessions - {"tests"} == said - {"matrix"}
    assert "nox -s drills -- --quick" in commands
    rendered = [step.get("run", "") for step in matrix["jobs"]["table"]["steps"]]
    check = "-m loudmerge.compat.table .compat/results --readme README.md --check"
    assert check in text
    assert [command for command in rendered if check in command]


def test_every_workflow_that_installs_torch_takes_the_repository_s_index() -> None:
    for name in ("ci", "matrix"):
        given = workflow(ROOT / ".github" / "workflows" / f"{name}.yml")["env"]
        assert given["LOUDMERGE_TORCH"] == "${{ vars.LOUDMERGE_TORCH }}"
        assert given["LOUDMERGE_TORCH_INDEX"] == "${{ vars.LOUDMERGE_TORCH_INDEX }}"


class Session:
    """What a session of noxfile.py runs and installs."""

    def __init__(self) -> None:
        self.virtualenv = SimpleNamespace(location=str(ROOT / "src"))
        self.installed: list[str] = []
        self.ran: list[tuple[str, ...]] = []
        self.posargs: list[str] = []

    def run(self, *arguments: str, **__: object) -> None:
        self.ran.append(arguments)

    def install(self, *arguments: str) -> None:
        self.installed += arguments


@pytest.fixture(scope="module")
def noxfile() -> Iterator[dict[str, Any]]:
    """What noxfile.py defines. nox lets it be run once a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # which noxfile.py takes away
        before = signal.getsignal(signal.SIGTERM)
        yield runpy.run_path("noxfile.py")
        signal.signal(signal.SIGTERM, before)


def test_nox_ends_what_it_runs_when_it_is_terminated(noxfile: dict[str, Any]) -> None:
    """It does at Ctrl-C; of SIGTERM it would die alone."""
    assert noxfile["nox"]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


@pytest.mark.parametrize("index", ["", "https://index.example/cpu"])
def test_sessions_install_torch_from_the_further_index(
    noxfile: dict[str, Any], monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setenv("LOUDMERGE_TORCH", "torch==1")
    monkeypatch.setenv("LOUDMERGE_TORCH_INDEX", index)
    session = Session()
    noxfile["install"](session)
    assert "torch==1" in session.installed
    assert ("--extra-index-url" in session.installed) == bool(index)
    if index:
        assert session.installed[session.installed.index("--extra-index-url") + 1] == index


@pytest.mark.parametrize(("name", "seeds"), [("demo", True), ("lint", True), ("e2e_gpu", False)])
def test_a_session_on_a_gpu_takes_no_other_session_s_torch(
    noxfile: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, seeds: bool
) -> None:
    """2.13.0 may be 2.13.0+cpu there, which an installer takes for what was asked for."""
    monkeypatch.setenv("LOUDMERGE_TORCH", "torch==2.13.0")
    session = Session()
    noxfile[name].func(session)
    assert (
        any("loudmerge.compat.environments.links" in ran and "torch==2.13.0" in ran for ran in session.ran)
        == seeds
    )


RENDER = "Render, and compare with the base"


def put(directory: Path, *rows: CellResult) -> None:
    directory.mkdir(parents=True)
    for row in rows:
        (directory / f"{row.cell}.json").write_text(json.dumps(row.to_json()), "utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("src", "tests", "pyproject.toml", FILE):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def rows() -> tuple[CellResult, ...]:
    """Of the cells there are, each with what it must show, and of the source that is there."""
    of = source(ROOT)
    return tuple(replace(shown(cell), source=of) for cell in load(ROOT / FILE).cells)


def shown(cell: Cell) -> CellResult:
    wanted = cell.expects
    return result(
        cell=cell.name,
        lane=cell.lane,
        versions=cell.versions,
        path=wanted.path,
        orientation=wanted.orientation,
        merged=(wanted.merged, wanted.merged),
        tests=Tests(wanted.tests_at_least, 0, 0, suite=wanted.suite_at_least),
        families={f"family_{number}": OK for number in range(wanted.families_at_least)},
    )


def test_a_row_that_was_edited_fails_the_job_whatever_its_status_says(checkout: Path) -> None:
    first, *others = rows()
    put(checkout / ".compat" / "results", replace(first, merged=(0, 96)), *others)
    put(checkout / ".compat" / "base", first, *others)
    (checkout / "lag.txt").touch()
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="true")
    assert ran.code == 1
    assert f"{first.cell}: regressed: ok → failed: merged" in ran.stderr


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


def test_a_new_cell_that_is_not_ok_fails_the_job(checkout: Path) -> None:
    """Its own jobs may fail on a pull request: here it is told apart from one that failed before."""
    first, *others = rows()
    put(checkout / ".compat" / "results", replace(first, status=FAILED), *others)
    put(checkout / ".compat" / "base", *others)
    (checkout / "lag.txt").touch()
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="true")
    assert ran.code == 1
    assert f"{first.cell}: new: now failed" in ran.stderr


def test_a_cell_that_left_no_result_is_a_row(checkout: Path) -> None:
    first, *others = rows()
    put(checkout / ".compat" / "results", *others)
    (checkout / "lag.txt").touch()
    ran = run(checkout, script("matrix", "table", RENDER), PYTHONPATH="src", BASE="false")
    assert ran.code == 0, ran.stderr
    assert first.cell in ran.summary
