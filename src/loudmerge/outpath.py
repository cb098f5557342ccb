"""Which OUT is refused: one that exists, one that holds what nobody means to replace, an input."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from loudmerge.errors import MergeRefused, Problem
from loudmerge.sidefiles import walk


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises MergeRefused `out-exists` when OUT exists, and may not be replaced.

    The directory one stands in, the home directory and what holds them are never meant by `overwrite`.
    """
    if not os.path.lexists(out):
        return
    if overwrite:
        _refuse_ground(out)
        return
    raise MergeRefused(
        Problem(
            "out-exists",
            str(out),
            "something of that name",
            "a name that is free",
            "Give another OUT, or --overwrite to replace it once the new one is complete.",
        )
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
