"""The reusable action and the workflow: parsed, and the action's steps really run in another repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.issue_server import REPOSITORY, running_issues
from tests.unit.canary.wheelhouse import CHECKOUT, closure, own, project, repack, wanted
from tests.unit.canary.world import GONE, KEPT, PATH, TOKEN, UPSTREAM, guard_file

ACTION: dict[str, Any] = yaml.safe_load(CHECKOUT.joinpath("action.yml").read_text(encoding="utf-8"))
WORKFLOW: dict[Any, Any] = yaml.safe_load(
    CHECKOUT.joinpath(".github/workflows/canary.yml").read_text(encoding="utf-8")
)
EXPRESSION = re.compile(r"\$\{\{ *(.*?) *\}\}")
STEPS: list[dict[str, Any]] = [
    *ACTION["runs"]["steps"],
    *(step for job in WORKFLOW["jobs"].values() for step in job["steps"]),
]


def test_no_script_has_an_input_pasted_into_it() -> None:
    """Inputs reach the scripts as environment variables: a quote in one is no code."""
    scripts = [step["run"] for step in STEPS if "run" in step]
    assert len(scripts) >= 7
    assert not [script for script in scripts if "${{" in script]


def test_every_input_is_used_and_every_used_input_is_declared() -> None:
    text = json.dumps(ACTION["runs"])
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(ACTION["inputs"])
    assert all("default" in one and one["description"] for one in ACTION["inputs"].values())
    ids = {step.get("id") for step in ACTION["runs"]["steps"]}
    assert set(re.findall(r"steps\.(\w+)\.", json.dumps(ACTION))) <= ids


def test_only_the_tracking_job_may_write_and_never_for_a_pull_request() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    jobs = WORKFLOW["jobs"]
    assert jobs["tracking"]["permissions"] == {"contents": "read", "issues": "write"}
    assert "github.event_name != 'pull_request'" in jobs["tracking"]["if"]
    assert [name for name, job in jobs.items() if "permissions" in job] == ["tracking"]
    assert all(
        step["with"]["persist-credentials"] is False
        for step in STEPS
        if str(step.get("uses", "")).startswith("actions/checkout@")
    )


def test_the_workflow_runs_daily_and_on_pull_requests_that_touch_the_canary() -> None:
    when = WORKFLOW[True]  # YAML 1.1 reads the key `on` so
    assert re.fullmatch(r"\d+ \d+ \* \* \*", when["schedule"][0]["cron"])
    assert "canary/**" in when["pull_request"]["paths"]
    text = json.dumps(WORKFLOW["jobs"]["canary"])
    assert "nox -s canary -- --canary-markdown" in text
    assert "--canary-json canary-report/canary.json" in text


@pytest.mark.parametrize("where", ["action", "workflow"])
def test_the_clock_of_stale_sources_is_kept_when_the_run_fails(where: str) -> None:
    steps = ACTION["runs"]["steps"] if where == "action" else WORKFLOW["jobs"]["canary"]["steps"]
    caches = [step for step in steps if str(step.get("uses", "")).startswith("actions/cache/")]
    restore, save = caches
    assert restore["with"]["path"] == save["with"]["path"]
    assert save["with"]["path"].endswith("cache/reads")
    assert save["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert save["if"].startswith("always()")


def test_the_tracking_job_installs_what_the_canary_needs() -> None:
    (install,) = (
        step["run"] for step in WORKFLOW["jobs"]["tracking"]["steps"] if "pip install" in step.get("run", "")
    )
    extra = [Requirement(text).name for text in project()["optional-dependencies"]["canary"]]
    assert {"click", *extra} - {"tomli"} == set(install.split("--quiet ")[1].split())


class Runner:
    """Runs the action's steps in a repository, as GitHub's runner does."""

    def __init__(self, place: Path, house: Path) -> None:
        self.repository, self.temporary, self.house = place / "repository", place / "temp", house
        self.output, self.summary = place / "output", place / "summary.md"
        for directory in (self.repository, self.temporary):
            directory.mkdir()
        self.known = {f"inputs.{name}": one["default"] for name, one in ACTION["inputs"].items()}
        self.known |= {"github.action_path": str(own(house)), "inputs.token": TOKEN}
        self.known |= {"steps.python.outputs.python-path": sys.executable, "github.run_id": "7"}
        self.known |= {"github.server_url": "https://github.test", "github.repository": REPOSITORY}

    def step(self, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a step's script. What it writes to GITHUB_OUTPUT is known to later ones."""
        (step,) = (one for one in ACTION["runs"]["steps"] if one.get("name") == name)
        given = {key: self.evaluate(value) for key, value in step["env"].items()}
        script = self.temporary / "step.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.repository,
            env={**self.environment(), **given, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        for line in self.output.read_text().splitlines() if self.output.exists() else ():
            key, _, value = line.partition("=")
            self.known[f"steps.{step.get('id')}.outputs.{key}"] = value
        self.output.unlink(missing_ok=True)
        return done

    def evaluate(self, text: str) -> str:
        return EXPRESSION.sub(lambda found: self.known[found[1]], text)

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.defpath,
            "HOME": str(self.temporary),
            "NO_PROXY": "127.0.0.1",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.house),
            "PIP_CONFIG_FILE": os.devnull,
            "CI": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(self.repository),
            "GITHUB_REPOSITORY": REPOSITORY,
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "RUNNER_TEMP": str(self.temporary),
        }

    def verdicts(self) -> list[dict[str, Any]]:
        """Those of the JSON that the canary's step left."""
        file = self.repository / self.known["steps.canary.outputs.json"]
        found: list[dict[str, Any]] = json.loads(file.read_text())["verdicts"]
        return found

    def python(self, code: str) -> str:
        """What the action's Python prints."""
        python = self.known["steps.install.outputs.python"]
        return subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    house = tmp_path / "wheels"
    for name in closure([need for need in wanted("canary") if need.name != "torch"]):
        repack(name, house)
    return Runner(tmp_path, house)


def test_the_action_runs_the_guards_of_another_repository_without_torch(runner: Runner) -> None:
    installed = runner.step("Install")
    assert installed.returncode == 0, installed.stderr
    names = "[d.metadata['Name'] for d in importlib.metadata.distributions()]"
    found = {canonicalize_name(name) for name in json.loads(runner.python(_PRINT.format(names)))}
    assert {"loudmerge", *(canonicalize_name(need.name) for need in wanted("canary"))} - found == {"torch"}
    _judge(runner)
    _track(runner)


_PRINT = "import importlib.metadata, json; print(json.dumps({}))"


def _judge(runner: Runner) -> None:
    guard_file(runner.repository / "canary" / "guards")
    source = runner.repository / "checkout" / PATH
    source.parent.mkdir(parents=True)
    runner.known["inputs.sources"] = f"\n{UPSTREAM}=checkout\n"
    source.write_text(KEPT)
    assert runner.step("Canary").returncode == 0
    assert [one["verdict"] for one in runner.verdicts()] == ["present"]
    source.write_text(GONE)
    done = runner.step("Canary")
    assert (done.returncode, done.stdout) == (4, "")
    assert [one["verdict"] for one in runner.verdicts()] == ["missing"]
    assert runner.repository.joinpath(runner.known["steps.canary.outputs.markdown"]).exists()
    assert done.stderr.startswith(
        "::error file=canary/guards/zoo.toml,line=2,title=zoo-guarded@main is missing"
    )
    assert "## Canary: 1 missing" in runner.summary.read_text()
    assert list(runner.temporary.glob("loudmerge-canary-cache/reads/*.json"))
    runner.known["inputs.refs"] = f"{UPSTREAM}=v1 \n\n{UPSTREAM}=v2"
    runner.known["inputs.guards"] = "canary/guards"
    runner.step("Canary")
    assert [one["ref"] for one in runner.verdicts()] == ["v1", "v2"]
    runner.known["inputs.refs"] = runner.known["inputs.sources"] = ""
    nobody = {"LOUDMERGE_GITHUB_API_URL": "http://127.0.0.1:9"}
    assert runner.step("Canary", **nobody).returncode == 5
    runner.known["inputs.strict"] = "false"
    assert runner.step("Canary", **nobody).returncode == 0
    runner.known["inputs.guards"] = "canary/guards$(touch pwned)`touch pwned`\"; touch pwned; '"
    assert runner.step("Canary").returncode == 2
    assert not runner.repository.joinpath("pwned").exists()
    runner.known |= {"inputs.guards": "canary/guards", "inputs.sources": f"{UPSTREAM}=checkout"}


def _track(runner: Runner) -> None:
    source = runner.repository / "checkout" / PATH
    with running_issues() as github:
        for text, said in ((GONE, "issue #1 opened\n"), (KEPT, "issue #1 closed\n")):
            source.write_text(text)
            runner.step("Canary")
            assert runner.step("Tracking issue", GITHUB_API_URL=github.api).stdout == said
        body: str = github.issues[0]["body"]
    assert f"https://github.test/{REPOSITORY}/actions/runs/7" in body


def test_the_workflows_sample_guard_is_one(tmp_path: Path) -> None:
    """The script that the workflow writes the sample with, and the guard against the release that is here."""
    steps: list[Mapping[str, Any]] = WORKFLOW["jobs"]["action"]["steps"]
    (script,) = (step["run"] for step in steps if step.get("name") == "Guards of another repository")
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, check=True)
    arguments = ["canary", "--guards", "sample", "--source", "packaging=installed", "--markdown", "out.md"]
    subprocess.run(
        [sys.executable, "-m", "loudmerge", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "LOUDMERGE_CANARY_CACHE": str(tmp_path)},
        check=True,
        capture_output=True,
    )
    check = next(step["run"] for step in steps if "MARKDOWN" in step.get("env", {}))
    subprocess.run(["bash", "-c", check], cwd=tmp_path, env={"MARKDOWN": "out.md"}, check=True)
