"""JSON files of the matrix: each is there to its end, as it was, or not at all. Standard library only."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loudmerge.system import jsonfile


def read(file: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file. Raises ValueError on anything else."""
    try:
        found = jsonfile.parse(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    if isinstance(found, dict):
        return found
    raise ValueError(f"found a JSON {type(found).__name__}, expected an object")


def write(file: Path, document: Mapping[str, Any]) -> None:
    """Writes the object beside the file and renames it: whoever is killed leaves no half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    unnamed = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        unnamed.write_text(text, "utf-8")
        unnamed.replace(file)
    finally:
        unnamed.unlink(missing_ok=True)
