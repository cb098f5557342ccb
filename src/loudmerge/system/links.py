"""Links to files that are gone, as in a Hub cache whose blobs were removed."""

from __future__ import annotations

from pathlib import Path

from loudmerge.errors import Problem


def link_to_nothing(file: Path) -> Problem | None:
    """A problem for a link that leads nowhere: a name that is there, without a file."""
    if not file.is_symlink() or file.exists():
        return None
    return Problem(
        "corrupt-file",
        str(file),
        f"a link to {file.readlink()}, where nothing is",
        "a file",
        "Get it again, or remove the link.",
    )
