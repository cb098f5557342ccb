"""JSON from files that others wrote, and the file that must hold an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loudmerge.errors import MergeRefused, Problem
from loudmerge.system.placeholders import link_to_nothing, pointer_problem

WANTED = "a JSON object"

DEEPEST = 100
"""Levels of lists and objects in a file, far from where walking them would exhaust Python's stack."""


def parse(text: str | bytes) -> Any:
    """The JSON value. Raises ValueError for what is none, and for what is nested deeper than `DEEPEST`."""
    said = f"nested more than {DEEPEST} levels deep"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(said) from error
    if _is_deeper(value, DEEPEST):
        raise ValueError(said)
    return value


def dump(value: object) -> bytes:
    """A JSON file. A lone surrogate, such as a name that is not UTF-8 has, becomes its JSON escape."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def read_json(file: Path, missing: str, wanted: str) -> dict[str, Any]:
    """The object in the file.

    Raises MergeRefused: the code `missing` when there is no such file, where `wanted` was expected;
    `corrupt-file` when it holds something else, or is a link to nothing.
    """
    if not file.is_file():
        hint = f"Give the directory that holds {file.name}."
        absent = Problem(missing, str(file.parent), f"no {file.name}", wanted, hint)
        raise MergeRefused(link_to_nothing(file) or absent)
    try:
        value = parse(file.read_text("utf-8"))
    except ValueError as error:
        raise MergeRefused(pointer_problem(file, WANTED) or _no_object(file, f"no JSON ({error})")) from error
    if not isinstance(value, dict):
        raise MergeRefused(_no_object(file, f"a JSON {type(value).__name__}"))
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    held = [value]
    for _ in range(levels):
        nested = (item for item in held if isinstance(item, (dict, list)))
        held = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, (dict, list)) for item in held)


def _no_object(file: Path, found: str) -> Problem:
    return Problem("corrupt-file", str(file), found, WANTED, "Get the file again.")
