"""Git LFS pointers: what a clone without git-lfs has in a file's place."""

from __future__ import annotations

from pathlib import Path

from loudmerge.errors import Problem

BEGINNING = b"version https://git-lfs.github.com/spec/"
"""What a pointer begins with; then come the address and the size of the content."""


def pointer_problem(file: Path, expected: str) -> Problem | None:
    """A `corrupt-file` where a pointer is in the file's place. Raises OSError for what cannot be read."""
    with file.open("rb") as stream:
        if stream.read(len(BEGINNING)) != BEGINNING:
            return None
    found = "a Git LFS pointer in place of the file"
    return Problem("corrupt-file", str(file), found, expected, "Get the file itself: git lfs pull.")
