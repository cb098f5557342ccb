"""JSON files of the matrix: each is there to its end, as it was, or not at all. Standard library only."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loudmerge import jsonfile


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
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    unnamed = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        unnamed.chmod(0o644)
        unnamed.replace(file)
    finally:
        unnamed.unlink(missing_ok=True)
