"""Environments that hold the same packages share the files: a hard link in place of a second copy.

Eight cells with torch and transformers of their own are 10 GB, of which three quarters are the same bytes.
pip and uv replace a file, they never write into one, so that a later installation in one leaves the others as
they are. Standard library only.
"""

from __future__ import annotations

import contextlib
import csv
import filecmp
import importlib.util
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath

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
                _replace(file, other / place, os.link)
                return file.stat().st_size
    return 0


def seed(environment: Path, others: Sequence[Path], wanted: Iterable[str]) -> dict[str, Path]:
    """Puts what others have of just these versions into an environment that has none, as an installer does.

    wanted: requirements, of which those that are `name==version` count. An installer finds them satisfied,
    and unpacks the rest. Files that `share` would leave are copied with their times, so that `share_bytecode`
    can tell them. Gives for each name the environment that it came from.
    """
    found: dict[str, Path] = {}
    for requirement in wanted:
        name, exact, version = requirement.partition("==")
        for other in others if exact and not _distributed(environment, name) else ():
            files = _whole(other, name, version)
            # It may be made anew just now. What says that a package is there comes last.
            with contextlib.suppress(FileNotFoundError):
                for file in sorted(files, key=lambda file: file.parts[0].endswith(".dist-info")):
                    _put(environment, other, file)
                if files:
                    found[name] = other
                    break
    return found


def share_bytecode(environment: Path, seeded: Mapping[str, Path]) -> int:
    """Links what Python has compiled since of the files that `seed` put. Gives how many."""
    found = 0
    for name, other in seeded.items():
        for file in _distributed(other, name):
            theirs, ours = _site(other) / file, _site(environment) / file
            if file.suffix != ".py" or not ours.is_file():
                continue
            made, wanted = (Path(importlib.util.cache_from_source(str(one))) for one in (theirs, ours))
            if made.is_file() and not wanted.exists() and _age(theirs) == _age(ours):
                wanted.parent.mkdir(exist_ok=True)
                _link_or_copy(made, wanted)
                found += 1
    return found


def _age(source: Path) -> tuple[int, int]:
    """What a compiled file names of its source."""
    status = source.stat()
    return status.st_size, int(status.st_mtime)


@cache  # asked for each of ten thousand files
def _site(environment: Path) -> Path:
    base = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "posix_prefix", base))


def _distributed(environment: Path, name: str, version: str = "") -> list[PurePosixPath]:
    """The files of a package, by its own record, there or not; none where it has another version."""
    for one in metadata.distributions(name=name, path=[str(_site(environment))]):
        if not version or one.version.partition("+")[0] == version:
            # Not its `files`: from Python 3.12 on they are without those that are missing.
            return [PurePosixPath(row[0]) for row in csv.reader((one.read_text("RECORD") or "").splitlines())]
    return []


def _whole(environment: Path, name: str, version: str) -> list[PurePosixPath]:
    """The same, where all of them are there, and inside the environment."""
    files = _distributed(environment, name, version)
    site, inside = _site(environment), str(environment) + os.sep
    places = [os.path.normpath(site / file) for file in files]
    return files if all(place.startswith(inside) and Path(place).is_file() for place in places) else []


def _put(environment: Path, other: Path, file: PurePosixPath) -> None:
    theirs, ours = (Path(os.path.normpath(_site(one) / file)) for one in (other, environment))
    ours.parent.mkdir(parents=True, exist_ok=True)
    ours.unlink(missing_ok=True)  # never written into: it may be a link
    if ours.parent == environment / "bin":  # a script begins with the path of its Python
        ours.write_bytes(theirs.read_bytes().replace(os.fsencode(other), os.fsencode(environment)))
        shutil.copymode(theirs, ours)
    elif file.suffix != ".py" and theirs.stat().st_size >= LEAST_BYTES:
        _link_or_copy(theirs, ours)
    else:
        shutil.copy2(theirs, ours)


def _link_or_copy(theirs: Path, ours: Path) -> None:
    try:
        _replace(ours, theirs, os.link)
    except OSError:  # the file system has no hard links
        _replace(ours, theirs, shutil.copy2)


def _replace(file: Path, source: Path, put: Callable[[Path, Path], object]) -> None:
    """In one step: another thread, or Python itself, may do or read the same just now."""
    beside = file.with_name(f".{file.name}.{threading.get_ident()}.link")
    put(source, beside)
    beside.replace(file)
    beside.unlink(missing_ok=True)  # renaming a file to another name of its own does nothing


def _same(one: Path, two: Path) -> bool:
    first, second = one.stat(), two.stat()
    alike = (first.st_size, first.st_mode) == (second.st_size, second.st_mode)
    return alike and filecmp.cmp(one, two, shallow=False)


def main(arguments: Sequence[str]) -> None:
    """[NAME==VERSION …] ENVIRONMENT OTHER…: seeds ENVIRONMENT with these, or shares what it has."""
    wanted = [one for one in arguments if "==" in one]
    environment, *others = (Path(one).absolute() for one in arguments if "==" not in one)
    if wanted:
        seed(environment, [one for one in others if one != environment], wanted)
    else:
        share(environment, others)


if __name__ == "__main__":
    main(sys.argv[1:])
