"""One JSON file that must hold an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loudmerge.errors import MergeRefused, Problem


def read_json(file: Path, missing: str, wanted: str) -> dict[str, Any]:
    """The object in the file.

    Raises MergeRefused: the code `missing` when there is no such file, where `wanted` was expected;
    `corrupt-file` when it holds something else.
    """
    if not file.is_file():
        hint = f"Give the directory that holds {file.name}."
        raise MergeRefused(Problem(missing, str(file.parent), f"no {file.name}", wanted, hint))
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise MergeRefused(_no_object(file, f"no JSON ({error})")) from error
    if not isinstance(value, dict):
        raise MergeRefused(_no_object(file, f"a JSON {type(value).__name__}"))
    return value


def _no_object(file: Path, found: str) -> Problem:
    return Problem("corrupt-file", str(file), found, "a JSON object", "Get the file again.")
