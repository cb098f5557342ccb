"""Runs the drills: every mutant of every guard must be noticed, no refactor may be.

    python -m tests.drills [--quick] [--source PACKAGE=DIR]... [--guard ID]... [--jobs N]

Without --source, a package is downloaded as the canary does, and kept. With --quick, each guard has one
mutant of each operator that applies to it, and two refactors: always the same ones.

Exit 0: all as it must be. 1: a mutant went unnoticed, a refactor was flagged, a guard does not hold on the
file as it is or no drill can trip it, or there were too few drills. 2: wrong arguments. 5: no source.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from loudmerge.canary.guards import Guard, load_guards
from loudmerge.canary.upstream.opener import Opener
from loudmerge.canary.upstream.sources import SourceError, SourceOptions, Unreachable
from tests.drills.drill import GUARDS, Drill, drill
from tests.drills.mutants import OPERATORS

LEAST_MUTANTS = 200
LEAST_REFACTORS = 40
"""Kinds of refactor times files, at least; both count only where no guard is picked."""


def read(guard: Guard, folders: dict[str, Path], opener: Opener) -> tuple[str, str]:
    """(text, path) of a guard's file: in the folder for its package, else in the last release it reads."""
    folder = folders.get(guard.package or "")
    if folder is not None:
        path = next((one for one in guard.paths if (folder / one).is_file()), None)
        if path is not None:
            return (folder / path).read_text(encoding="utf-8"), path
    else:
        source = opener.open(guard, opener.refs(guard, guard.refs[-1])[-1])
        path = next((one for one in guard.paths if source.exists(one)), None)
        if path is not None:
            return source.read(path), path
    raise SourceError(f"{guard.id}: none of {', '.join(guard.paths)} is in {folder or guard.package}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--source", action="append", default=[], metavar="PACKAGE=DIR")
    parser.add_argument("--guard", action="append", default=[], metavar="ID")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


def picked(ids: Sequence[str]) -> list[Guard]:
    """The guards to drill, those that read the same file next to each other. Exits 2 where one is unknown."""
    guards = load_guards(GUARDS)
    unknown = set(ids) - {one.id for one in guards}
    if unknown:
        sys.stderr.write(f"no guard {', '.join(sorted(unknown))} in {GUARDS}\n")
        sys.exit(2)
    return sorted((one for one in guards if not ids or one.id in ids), key=lambda one: one.paths)


def files(guards: Sequence[Guard], sources: Sequence[str]) -> list[tuple[str, str]]:
    """The file of each guard. Raises Unreachable, SourceError."""
    folders = {name: Path(folder) for name, _, folder in (one.partition("=") for one in sources)}
    with Opener(SourceOptions.from_environment()) as opener:
        return [read(one, folders, opener) for one in guards]


def tell(drills: Sequence[Drill]) -> None:
    """How often each mutant and each refactor was tried."""
    for operator in OPERATORS:
        found = [one for result in drills for one in result.mutants if one.startswith(f"{operator}: ")]
        sys.stdout.write(f"{len(found):5} mutants: {operator}\n")
    kinds = sorted({one for result in drills for one in result.refactors})
    for kind in kinds:
        count = sum(result.refactors.count(kind) for result in drills)
        sys.stdout.write(f"{count:5} refactors: {kind}\n")


def verdict(drills: Sequence[Drill], *, all_guards: bool) -> tuple[str, bool]:
    """(the last line, whether all is as it must be)."""
    tried, noticed = sum(len(one.mutants) for one in drills), sum(one.noticed for one in drills)
    harmless, silent = sum(len(one.refactors) for one in drills), sum(one.silent for one in drills)
    never = [one.guard for one in drills if not one.noticed]
    kinds = {(kind, one.file) for one in drills for kind in one.refactors}
    enough = not all_guards or (tried >= LEAST_MUTANTS and len(kinds) >= LEAST_REFACTORS)
    line = (
        f"drills: {len(drills)} guards, {noticed} of {tried} mutants noticed, "
        f"{silent} of {harmless} refactors silent ({len(kinds)} kinds x files), "
        f"{len(never)} guards never tripped"
    )
    good = enough and noticed == tried and silent == harmless and not never
    return line if enough else f"{line}: too few", good and not any(one.problems for one in drills)


def main() -> int:
    """Drills the guards; the exit code."""
    options, started, results = arguments(), time.monotonic(), []
    guards = picked(options.guard)
    try:
        texts, paths = zip(*files(guards, options.source), strict=True)
    except (Unreachable, SourceError) as error:
        sys.stderr.write(f"no source: {error}\n")
        return 5
    quick = [options.quick] * len(guards)
    with ProcessPoolExecutor(options.jobs) as pool:
        for result in pool.map(drill, [one.id for one in guards], texts, paths, quick):
            results.append(result)
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    tell(results)
    line, good = verdict(results, all_guards=not options.guard)
    sys.stdout.write(f"{line}, {time.monotonic() - started:.0f} s\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
