"""What pytest's settings keep from being run: `addopts`, and which files and functions are tests."""

from __future__ import annotations

import ast
import configparser
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.rules.surroundings import Subject, Surroundings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = {"pytest.ini": "pytest", "pyproject.toml": "", "tox.ini": "pytest", "setup.cfg": "tool:pytest"}
"""Where pytest looks, in this order, and the section in it.
https://docs.pytest.org/en/stable/reference/customize.html"""
LEAVING = frozenset({"--ignore", "--ignore-glob", "--deselect", "-k", "-m"})
LISTING = frozenset({"--collect-only", "--co"})


def deselected(test: Subject, around: Surroundings) -> str:
    """Why pytest, run as its settings say, leaves a test out; empty where nothing is seen to."""
    place, settings = _settings(around)
    for option, value in _options(settings.get("addopts", "")):
        if option in LISTING or (option in LEAVING and _leaves_out(test, option, value)):
            return f"is not run: {place} has {f'{option} {value}'.strip()!r} in addopts"
    for name, said, matches in (
        ("python_files", PurePosixPath(test.path).name, fnmatch),
        ("python_functions", test.name, _begins),
        ("python_classes", test.owner, _begins),
    ):
        wanted = _words(settings.get(name, ""))
        if wanted and said and not any(matches(said, one) for one in wanted):
            return f"is not run: {place} has {name} = {' '.join(wanted)}"
    return ""


def _settings(around: Surroundings) -> tuple[str, Mapping[str, Any]]:
    """(file, settings) that pytest takes for the file: of the nearest folder that has any."""
    for folder in PurePosixPath(around.path).parents:
        for name, section in FILES.items():
            text = around.read(str(folder / name))
            found = _section(text, section) if text is not None else None
            if found is not None:
                return str(folder / name), found
    return "", {}


def _section(text: str, section: str) -> Mapping[str, Any] | None:
    """The settings in a file; None where it has none, or cannot be read: pytest says so itself."""
    try:
        if not section:
            tool = tomllib.loads(text).get("tool", {}).get("pytest", {})
            return tool.get("ini_options", tool) or None
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
    except (tomllib.TOMLDecodeError, configparser.Error):
        return None
    return dict(parser[section]) if parser.has_section(section) else None


def _words(value: Any) -> list[str]:
    try:
        return [str(one) for one in value] if isinstance(value, list) else shlex.split(str(value))
    except ValueError:
        return []


def _options(value: Any) -> Iterator[tuple[str, str]]:
    """(option, value) of each word in addopts: `--ignore=a`, `--ignore a`, `-k a`, `-ka`."""
    words = _words(value)
    for number, word in enumerate(words):
        option, equals, given = word.partition("=")
        behind = words[number + 1] if number + 1 < len(words) else ""
        if not word.startswith("--") and word[:2] in LEAVING and len(word) > 2:
            yield word[:2], word[2:].removeprefix("=")
        else:
            yield option, given if equals or option not in LEAVING else behind


def _leaves_out(test: Subject, option: str, value: str) -> bool:
    if option == "--ignore-glob":
        return fnmatch(test.path, value)
    if option in {"--ignore", "--deselect"}:
        node = "::".join(one for one in (test.path, test.owner, test.name) if one)
        said = value.removeprefix("./").rstrip("/")
        return node == said or node.startswith((f"{said}/", f"{said}::"))
    known = (*test.path.split("/"), test.owner, test.name, *test.marks)
    if option == "-m":
        return _met(value, lambda name: name in test.marks) is False
    return _met(value, lambda name: any(name.lower() in one.lower() for one in known)) is False


def _met(text: str, holds: Callable[[str], bool]) -> bool | None:
    """Whether an expression of `-k` or `-m` is met; None for one that is not of names alone."""
    try:
        return _truth(parsed(text, "eval").body, holds)
    except (SyntaxError, ValueError):
        return None


def _truth(node: ast.expr, holds: Callable[[str], bool]) -> bool | None:
    if isinstance(node, ast.Name):
        return holds(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _truth(node.operand, holds)
        return None if inner is None else not inner
    if not isinstance(node, ast.BoolOp):
        return None
    ends = isinstance(node.op, ast.Or)
    values = [_truth(one, holds) for one in node.values]
    return ends if ends in values else None if None in values else not ends


def _begins(name: str, pattern: str) -> bool:
    return name.startswith(pattern) or fnmatch(name, pattern)
