"""What is in a file's place without the file: a link to nothing, or a Git LFS pointer."""

from __future__ import annotations

from pathlib import Path

from loudmerge.errors import Problem

BEGINNING = b"version https://git-lfs.github.com/spec/"
"""What a pointer begins with; then come the address and the size of the content."""


def link_to_nothing(file: Path) -> Problem | None:
    """A `corrupt-file` for a link that leads nowhere, as in a Hub cache whose blobs were removed."""
    if not file.is_symlink() or file.exists():
        return None
    found = f"a link to {file.readlink()}, where nothing is"
    return Problem("corrupt-file", str(file), found, "a file", "Get it again, or remove the link.")


def pointer_problem(file: Path, expected: str) -> Problem | None:
    """A `corrupt-file` for what a clone without git-lfs has. Raises OSError for what cannot be read."""
    with file.open("rb") as stream:
        if stream.read(len(BEGINNING)) != BEGINNING:
            return None
    found = "a Git LFS pointer in place of the file"
    return Problem("corrupt-file", str(file), found, expected, "Get the file itself: git lfs pull.")
