"""Where OUT may not be, and the directories around it: what exists, an input, what others own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from loudmerge.errors import EnvironmentFailed, MergeRefused, Problem
from loudmerge.reading.sidefiles import walk


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises MergeRefused `out-exists` when OUT exists, and may not be replaced.

    The directory one stands in, the home directory and what holds them are never meant by `overwrite`, and a
    mount point, a container's volume say, cannot be replaced: no rename moves it.
    """
    if not os.path.lexists(out):
        return
    if overwrite:
        _refuse_ground(out)
    found, hint = "something of that name", "--overwrite to replace it once the new one is complete"
    if os.path.ismount(out):
        found, hint = "a mount point, which cannot be replaced", f"a folder in it: {out / 'merged'}"
    elif overwrite:
        return
    raise MergeRefused(
        Problem("out-exists", str(out), found, "a name that is free", f"Give another OUT, or {hint}.")
    )


def make_parents(out: Path) -> list[Path]:
    """Makes the directories that OUT will lie in; gives those that were not there, the innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_parents(missing)
        raise
    return missing


def remove_parents(made: Sequence[Path]) -> None:
    """Removes what `make_parents` made, unless OUT, or something of somebody else, is in it."""
    for directory in made:
        with suppress(OSError):
            directory.rmdir()


def own_directory(path: Path) -> int:
    """A descriptor of a directory, which is made where there is none.

    Raises EnvironmentFailed for a link in its place: what it leads to is no merge's, to remove or fill.
    """
    try:
        path.mkdir(exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
            raise
        raise EnvironmentFailed(
            f"{path}: found a link or a file, expected a directory that merges make. Neither it nor "
            "what it leads to was written to. Remove it, or take another OUT."
        ) from error


def _refuse_ground(out: Path) -> None:
    target = out.resolve()
    for name, path in {"current": Path.cwd(), "home": Path(os.environ.get("HOME", "/")).resolve()}.items():
        if target == path or target in path.parents:
            raise MergeRefused(
                Problem(
                    "out-exists",
                    str(out.absolute()),
                    f"a directory that is or holds the {name} directory {path}",
                    "one whose files may all be removed",
                    "Give another OUT: --overwrite replaces the whole directory.",
                )
            )


def refuse_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """Raises MergeRefused `out-exists` when writing OUT would touch an input, or a file that it links to."""
    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        found = ""
        if target == source or target in source.parents or source in target.parents:
            found = f"a directory that is, holds or lies in the input {path}"
        elif linked := next(_files_in(target, path), None):
            found = f"{linked}, which BASE or ADAPTER links to"
        if found:
            expected = "a directory apart from BASE and ADAPTER"
            raise MergeRefused(Problem("out-exists", str(out), found, expected, "Give another OUT."))


def _files_in(target: Path, source: Path) -> Iterator[Path]:
    """The files of an OUT that is there, which files of an input are links to."""
    for file in walk(source) if target.exists() and source.is_dir() else ():
        # Unlike Path.resolve, this can be asked of a link that leads to itself.
        real = Path(os.path.realpath(file))
        if target in (real, *real.parents) and real.is_file():
            yield real
