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
        (("--command", "no-such-tool {base} {adapter} {out}"), "found no program 'no-such-tool' to run"),
        (("--command", "env 'a {base} {adapter} {out}"), "No closing quotation"),
        (("--server", "env 'a"), "No closing quotation"),
        (
            ("--command", "env {base} {adapter} {out}", "--json", "/no/such/card.json"),
            "no directory /no/such",
        ),
        (("--command", "env {base} {adapter} {out}", "--time-limit", "0"), "0.0 is not in the range x>0"),
        (("--command", "env {base} {out}"), "found no {adapter}"),
        (("--command", "env {base} {adapter} {out}", "--version", "1.2"), "expected NAME=VERSION"),
        (("--case", "other", "--list"), "found no case 'other'"),
        (("--server", "/no/such/tool"), "No such file"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: tuple[str, ...], says: str, suite: Suite) -> None:
    done = invoke(suite, *arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_a_server_that_breaks_the_protocol_is_said_in_a_line(suite: Suite, tmp_path: Path) -> None:
    text = f"{test_server.HELLO}; input(); print('?', flush=True); input()"
    done = invoke(suite, "--server", test_server.line(tmp_path, text))
    assert done.exit_code == 1
    assert "wrote b'?', expected a JSON line" in done.output


def test_a_tool_that_cannot_start_passes_no_case(suite: Suite) -> None:
    """Else `--case nan` would call any mistyped command line right."""
    done = invoke(suite, "--command", "false {base} {adapter} {out}", "--case", "nan")
    assert done.exit_code == 4
    assert "0/1, 0 % (1 moot)" in done.output
