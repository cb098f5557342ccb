"""The pytest plugin, in a pytest of its own: what a project sees that keeps guard files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import loudmerge
from tests.support import upstream_server as server
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, UPSTREAM, guard_file

TEST = """
def test_kept(canary_case):
    canary_case.check()
"""


class Project:
    """A directory with guard files, and pytest in it."""

    def __init__(self, place: Path, upstream: UpstreamServer) -> None:
        self.place, self.upstream = place, upstream
        self.repository = upstream.repository(UPSTREAM)
        guard_file(place / "guards")
        place.joinpath("pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")

    def pytest(self, *arguments: str, plugins: str = "loudmerge.canary.plugin", **environment: str) -> str:
        """Runs pytest; its exit code and output."""
        paths = [str(Path(loudmerge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        kept = {name: value for name, value in os.environ.items() if name not in {"CI", "PYTEST_ADDOPTS"}}
        settings = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": plugins,
            "LOUDMERGE_GITHUB_API_URL": self.upstream.api,
            "LOUDMERGE_GITHUB_RAW_URL": self.upstream.raw,
            "LOUDMERGE_CANARY_CACHE": str(self.place / "cache"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command,
            cwd=self.place,
            env={**kept, **settings, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return f"{done.stdout}{done.stderr}\nexit {done.returncode}"


@pytest.fixture
def project(tmp_path: Path, upstream: UpstreamServer) -> Project:
    return Project(tmp_path, upstream)


def test_guard_files_are_enough(project: Project) -> None:
    project.repository.commit({PATH: KEPT})
    guard_file(project.place / "guards", GUARD.replace("zoo-guarded", "another"), "another.toml")
    output = project.pytest("--canary-guards", "guards")
    assert "2 passed" in output
    assert "another@main" in output
    assert "canary: 2 of 2 guards evaluated (2 present, 0 missing, 0 pending, 0 unreachable)" in output
    assert output.endswith("exit 0")


def test_a_test_function_takes_the_cases_and_they_run_once(project: Project) -> None:
    project.repository.commit({PATH: KEPT})
    (project.place / "test_guards.py").write_text(TEST)
    output = project.pytest("--canary-guards", "guards")
    assert "test_kept[zoo-guarded@main]" in output
    assert "1 passed" in output
    project.place.joinpath("canary").mkdir()
    (project.place / "guards").rename(project.place / "canary" / "guards")
    assert "1 passed" in project.pytest()


@pytest.mark.parametrize("body", ["pass", "canary_case.check", "if False:\n        canary_case.check()"])
def test_a_test_that_takes_a_case_and_never_checks_it_fails(project: Project, body: str) -> None:
    project.repository.commit({PATH: KEPT})
    (project.place / "test_guards.py").write_text(f"def test_kept(canary_case):\n    {body}\n")
    output = project.pytest("--canary-guards", "guards")
    assert "zoo-guarded@main was not checked: the test never called canary_case.check()" in output
    assert "1 failed" in output
    assert output.endswith("exit 1")


def test_a_test_that_skips_a_case_by_itself_is_left_alone(project: Project) -> None:
    (project.place / "test_guards.py").write_text(
        "import pytest\n\ndef test_kept(canary_case):\n    pytest.skip('known')\n"
    )
    output = project.pytest("--canary-guards", "guards")
    assert "1 skipped" in output
    assert output.endswith("exit 0")


def test_a_missing_guard_fails_and_says_why(project: Project) -> None:
    project.repository.commit({PATH: GONE}, pull=7)
    output = project.pytest("--canary-guards", "guards")
    assert "1 failed" in output
    assert "why: the test needs it" in output
    assert "zoo.toml" in output
    assert "1 of 1 guards evaluated (0 present, 1 missing" in output
    assert output.endswith("exit 1")


def test_a_source_that_no_guard_reads_is_a_usage_error(project: Project) -> None:
    project.repository.commit({PATH: KEPT})
    output = project.pytest("--canary-guards", "guards", "--canary-source", f"zo={project.place}")
    assert "no guard reads zo, expected one of" in output
    assert output.endswith("exit 4")


def test_a_pending_guard_is_an_expected_failure(project: Project) -> None:
    project.repository.commit({PATH: GONE})
    project.repository.pulls[7] = None
    output = project.pytest("--canary-guards", "guards")
    assert "1 xfailed" in output
    assert "owner/zoo#7 has not landed" in output
    assert output.endswith("exit 0")


@pytest.mark.parametrize(("arguments", "environment"), [(["--canary-strict"], {}), ([], {"CI": "true"})])
def test_unreachable_is_skipped_on_a_laptop_and_fails_in_ci(
    project: Project, arguments: list[str], environment: dict[str, str]
) -> None:
    project.upstream.fail("/commits/", server.status(401))
    output = project.pytest("--canary-guards", "guards")
    assert "1 skipped" in output
    assert "HTTP 401" in output
    assert "0 of 1 guards evaluated (0 present, 0 missing, 0 pending, 1 unreachable)" in output
    strict = project.pytest("--canary-guards", "guards", *arguments, **environment)
    assert "1 failed" in strict
    assert strict.endswith("exit 1")


def test_a_source_replaces_the_upstream(project: Project) -> None:
    checkout = project.place / "checkout" / PATH
    checkout.parent.mkdir(parents=True)
    checkout.write_text(KEPT)
    output = project.pytest("--canary-guards", "guards", "--canary-source", f"{UPSTREAM}=checkout")
    assert "1 passed" in output
    assert project.upstream.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--canary-guards", "none"], "found no guard file"),
        (["--canary-guards", "guards", "--canary-source", "zoo=nowhere"], "no such directory or file"),
    ],
)
def test_wrong_arguments_are_usage_errors(project: Project, arguments: list[str], message: str) -> None:
    output = project.pytest(*arguments)
    assert message in output
    assert output.endswith("exit 4")


def test_a_bad_guard_file_fails_the_run(project: Project) -> None:
    guard_file(project.place / "guards", "", "empty.toml")
    output = project.pytest("--canary-guards", "guards")
    assert "empty.toml: found no [[guard]]" in output
    assert not output.endswith("exit 0")


def test_a_project_without_guards_is_left_alone(project: Project) -> None:
    (project.place / "test_other.py").write_text(
        "import sys\n\ndef test_other():\n    assert 'requests' not in sys.modules\n"
    )
    output = project.pytest()
    assert "1 passed" in output
    assert "canary" not in output


def test_the_tally_is_whole_where_several_processes_run_the_cases(project: Project) -> None:
    pytest.importorskip("xdist")
    project.repository.commit({PATH: KEPT})
    text = "".join(GUARD.replace("zoo-guarded", f"guard-{number}") for number in range(5))
    guard_file(project.place / "guards", text)
    output = project.pytest(
        "--canary-guards", "guards", "-n", "2", plugins="xdist.plugin,loudmerge.canary.plugin"
    )
    assert "5 passed" in output
    assert "canary: 5 of 5 guards evaluated (5 present" in output
