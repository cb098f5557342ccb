"""docs/canary.md: its commands are run and print what it says, its examples are the shipped guards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loudmerge
from loudmerge.canary.guards import load_guards
from loudmerge.canary.rules.rules import validate
from loudmerge.canary.rules.schema import FIELDS
from tests.unit.canary.wheelhouse import CHECKOUT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = CHECKOUT.joinpath("docs", "canary.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", TEXT)
TUTORIAL = [
    (language, text)
    for language, text in BLOCKS
    if language == "console" or text.startswith("# canary/guards/")
]
RULES = [text for language, text in BLOCKS if language == "toml" and (language, text) not in TUTORIAL]
END = "\0"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """loudmerge and pytest as commands, and the plugin as an installation registers it."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("loudmerge", "pytest"):
        commands.joinpath(name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
        commands.joinpath(name).chmod(0o700)
    kept = {name: value for name, value in os.environ.items() if name not in {"CI", "PYTEST_ADDOPTS"}}
    return kept | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(loudmerge.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "loudmerge.canary.plugin",
        "LOUDMERGE_CANARY_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "80",
    }


def said(block: str, place: Path, environment: dict[str, str]) -> list[str]:
    """What each command of a console block prints, in one shell."""
    commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    script = "".join(f"{command}\ncode=$?; printf '\\0'; (exit $code)\n" for command in commands)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.split(END)[:-1]


def expected(block: str) -> list[str]:
    """What the block says that each command prints."""
    return [part.partition("\n")[2] for part in f"\n{block}".split("\n$ ")[1:]]


def matches(wanted: str, got: str) -> bool:
    """Versions and line numbers are those of the packaging that is installed; `…` is anything."""
    shown = [re.sub(r"\(\d[\w.]*\)|(?<=\.py):\d+", "N", text.strip()) for text in (wanted, got)]
    return re.fullmatch(re.escape(shown[0]).replace("…", ".*"), shown[1]) is not None


def test_the_tutorials_commands_print_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    project = tmp_path / "project"
    project.mkdir()
    ran = 0
    for language, text in TUTORIAL:
        if language == "toml":
            file = project / text.partition("\n")[0].removeprefix("# ")
            file.parent.mkdir(parents=True)
            file.write_text(text)
            continue
        for wanted, got in zip(expected(text), said(text, project, environment), strict=True):
            assert matches(wanted, got), f"printed:\n{got}\nexpected:\n{wanted}"
            ran += 1
    assert ran == 8


def test_a_wrong_output_would_be_noticed() -> None:
    line = "present     a  p@installed (26.3)  p/u.py:76: 2 answers"
    assert matches(line, "present     a  p@installed (25.0)  p/u.py:46: 2 answers")
    assert not matches(line, "missing     a  p@installed (25.0)  p/u.py:46: 2 answers")
    assert not matches(line, "present     a  p@installed (25.0)  p/u.py:46: 3 answers")


@pytest.mark.parametrize("text", RULES, ids=[text.partition("\n")[0].removeprefix("# ") for text in RULES])
def test_an_example_is_the_guard_that_is_shipped(text: str) -> None:
    name = text.partition("\n")[0].removeprefix("# ")
    rule = tomllib.loads(text)["rule"]
    validate(rule)
    (guard,) = (one for one in load_guards(CHECKOUT / "canary" / "guards") if one.id == name)
    assert rule == dict(guard.rule)


def test_every_kind_of_rule_is_explained() -> None:
    assert {kind for kind in FIELDS if f"**`{kind}`**" not in TEXT} == set()
    guards = {guard.id for guard in load_guards(CHECKOUT / "canary" / "guards")}
    assert "peft-orientation-body" in guards
