"""Environments that hold the same packages share the files: a hard link in place of a second copy.

Eight cells with torch and transformers of their own are 10 GB, of which three quarters are the same bytes.
pip and uv replace a file, they never write into one, so that a later installation in one leaves the others as
they are. Standard library only.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

LEAST_BYTES = 64 << 10
"""Smaller files are left: many, and together a twentieth of an environment."""


def share(environment: Path, others: Iterable[Path]) -> int:
    """Links each large file of `environment` to the one that another has at the same place, byte for byte.

    Returns the bytes saved. Where the file system has no hard links, or the directories lie on two, raises
    OSError: nothing is lost then, the file is its own copy still.
    """
    found = [other for other in others if other.resolve() != environment.resolve() and other.is_dir()]
    return sum(_link(file, file.relative_to(environment), found) for file in _large(environment))


def _large(environment: Path) -> list[Path]:
    # Not source: compiled files name the time of theirs, and would be made anew at every import.
    walk = os.walk(environment)
    files = (Path(folder) / name for folder, _, names in walk for name in names if not name.endswith(".py"))
    return [file for file in files if not file.is_symlink() and file.stat().st_size >= LEAST_BYTES]


def _link(file: Path, place: Path, others: Sequence[Path]) -> int:
    for other in others:
        # The other may be made anew just now.
        with contextlib.suppress(FileNotFoundError):
            if file.samefile(other / place):
                return 0
            if _same(file, other / place):
                beside = file.with_name(f".{file.name}.link")
                os.link(other / place, beside)
                beside.replace(file)
                return file.stat().st_size
    return 0


def _same(one: Path, two: Path) -> bool:
    first, second = one.stat(), two.stat()
    alike = (first.st_size, first.st_mode) == (second.st_size, second.st_mode)
    return alike and filecmp.cmp(one, two, shallow=False)


def main(directories: Sequence[str]) -> None:
    """The first directory's files, shared with those of the others."""
    share(Path(directories[0]), [Path(directory) for directory in directories[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
