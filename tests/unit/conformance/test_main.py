"""`python -m loudmerge.conformance`, from its arguments to its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loudmerge.conformance.__main__ import main
from loudmerge.conformance.cases import Suite
from tests.unit.conformance import test_server
from tests.unit.conformance.world import line


def invoke(suite: Suite, *arguments: str | Path) -> Result:
    given = ["--data", str(suite.root), *(str(argument) for argument in arguments)]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def test_a_right_tool_ends_with_0_and_leaves_its_scorecard(suite: Suite, tmp_path: Path) -> None:
    command = line("right", tmp_path)
    files = ("--json", tmp_path / "card.json", "--markdown", tmp_path / "card.md")
    done = invoke(
        suite, "--command", command, "--jobs", "2", "--version", "tool=1.2", "--name", "mine", *files
    )
    assert done.exit_code == 0, done.output
    assert "mine: 4/4, 100 % (3 right, 1 refused)" in done.output
    document = json.loads((tmp_path / "card.json").read_text())
    assert (document["passed"], document["total"]) == (4, 4)
    assert document["versions"] == {"tool": "1.2"}
    assert document["command"] == command
    assert "| mine | tool 1.2 |" in (tmp_path / "card.md").read_text()


def test_a_wrong_tool_ends_with_4(suite: Suite, tmp_path: Path) -> None:
    done = invoke(suite, "--command", line("copies the base", tmp_path), "--case", "plain", "--case", "nan")
    assert done.exit_code == 4
    assert "0/2, 0 % (2 wrong-silently)" in done.output


def test_a_serving_tool_names_itself(suite: Suite, tmp_path: Path) -> None:
    done = invoke(suite, "--server", test_server.line(tmp_path), "--json", tmp_path / "card.json")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "card.json").read_text())
    assert document["tool"] == "small"
    assert list(document["versions"]) == ["numpy"]


def test_cases_are_listed_without_a_tool(suite: Suite) -> None:
    done = invoke(suite, "--list")
    assert done.exit_code == 0
    assert "nan  plain, refuse: why nan matters.\n" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give --command, or --server."),
        (("--command", "a {base} {adapter} {out}", "--server", "b"), "Give --command, or --server."),
        (("--command", "tool {base} {out}"), "found no {adapter}"),
        (("--command", "t {base} {adapter} {out}", "--version", "1.2"), "expected NAME=VERSION"),
        (("--case", "other", "--list"), "found no case 'other'"),
        (("--server", "/no/such/tool"), "No such file"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: tuple[str, ...], says: str, suite: Suite) -> None:
    done = invoke(suite, *arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
