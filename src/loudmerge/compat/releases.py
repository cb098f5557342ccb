"""What the package index serves that is newer than the matrix: `nox -s releases`.

The index is asked through pip, as its configuration and its environment variables say: mirrors, constraints
and credentials are pip's. Pre-releases and yanked releases are left out; releases for another Python than
this one are not: they are released all the same.

Exit codes: 0 nothing is newer, 4 something is, 5 the index was not reached or is older than the
cells, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from packaging.version import Version

from loudmerge.canary.guards import WHEEL
from loudmerge.canary.upstream.fetch import Unreachable
from loudmerge.canary.upstream.packages import Pip
from loudmerge.canary.upstream.sources import SourceOptions
from loudmerge.compat.arguments import DONE, ENVIRONMENT, NEWER
from loudmerge.compat.judging.cells import FILE, PACKAGES, RELEASED, Matrix, MatrixError, load
from loudmerge.errors import EnvironmentFailed


@runtime_checkable
class Index(Protocol):
    """Where released versions are asked for."""

    def versions(self, package: str) -> tuple[str, ...]:
        """Every release, yanked ones and pre-releases aside, oldest first.

        Raises EnvironmentFailed where the index is not reached.
        """


class PipIndex:
    """The package index that pip is configured for."""

    def versions(self, package: str) -> tuple[str, ...]:
        try:
            found = Pip(package, WHEEL, SourceOptions()).versions()
        except Unreachable as error:
            raise EnvironmentFailed(str(error)) from error
        return tuple(sorted(found, key=Version))


@dataclass(frozen=True)
class News:
    """One package. known: the newest version in a cell. newer: what the index has after it, oldest first."""

    package: str
    known: str
    newer: tuple[str, ...]

    @property
    def newest(self) -> str:
        """The newest release; the known one where nothing is newer."""
        return self.newer[-1] if self.newer else self.known


def newest_pins(matrix: Matrix) -> dict[str, str]:
    """Package -> the newest version that a cell of the lane `released` pins. Raises MatrixError."""
    pins = [cell.versions for cell in matrix.cells if cell.is_pinned]
    if not pins:
        raise MatrixError(f"{FILE}: found no cell in lanes.{RELEASED}, expected one at least")
    return {package: max((pin[package] for pin in pins), key=Version) for package in PACKAGES}


def newer(matrix: Matrix, index: Index) -> tuple[News, ...]:
    """What the index has that no cell has, for each of PACKAGES. Raises EnvironmentFailed."""
    return tuple(News(name, pin, _after(name, pin, index)) for name, pin in newest_pins(matrix).items())


def _after(package: str, known: str, index: Index) -> tuple[str, ...]:
    """The releases after `known`, oldest first.

    Raises EnvironmentFailed where the index has neither it nor a newer one: it says nothing of what is new.
    """
    served = index.versions(package)
    if not any(Version(one) >= Version(known) for one in served):
        newest = served[-1] if served else "none"
        raise EnvironmentFailed(
            f"{package}: the newest release on the index is {newest}, expected at least {known}, which a "
            "cell pins. Ask an index that is up to date; if it was yanked, pin another in matrix.toml."
        )
    return tuple(one for one in served if Version(one) > Version(known))


def lag(news: Sequence[News]) -> dict[str, str]:
    """Package -> newest release, of the packages with one that no cell has: what the table shows as lag."""
    return {item.package: item.newest for item in news if item.newer}


def line(matrix: Matrix, news: Sequence[News]) -> str:
    """The line for `released` in matrix.toml: the newest of each, expected to do as the newest cell."""
    versions = {item.package: item.newest for item in news}
    released = [cell for cell in matrix.cells if cell.is_pinned]
    expects = max(released, key=lambda cell: [Version(cell.versions[name]) for name in PACKAGES]).expects
    values = {**versions, "path": expects.path}
    if expects.orientation:
        values["orientation"] = expects.orientation
    return "    { " + ", ".join(f'{key} = "{value}"' for key, value in values.items()) + " },"


def summary(matrix: Matrix, news: Sequence[News]) -> str:
    """Some lines for a person."""
    lines = [f"{one.package}: {', '.join(one.newer)} (newest cell: {one.known})" for one in news if one.newer]
    if not lines:
        return "Nothing is newer than the cells: " + ", ".join(
            f"{item.package} {item.known}" for item in news
        )
    return "\n".join([*lines, "Add to [lanes] released in matrix.toml:", line(matrix, news)])


def markdown(matrix: Matrix, news: Sequence[News]) -> str:
    """An issue's body; empty where nothing is newer."""
    if not lag(news):
        return ""
    rows = [f"| {item.package} | {item.known} | {', '.join(item.newer) or '–'} |" for item in news]
    return "\n".join(
        [
            "Released since, and in no cell of the matrix:",
            "",
            "| package | newest cell | newer releases |",
            "|---|---|---|",
            *rows,
            "",
            "Add to `released` under `[lanes]` in `matrix.toml`. What it expects is the newest cell's:",
            "",
            "```toml",
            line(matrix, news).strip(),
            "```",
            "",
            "Then `nox -s matrix`. Where it falls short, `nox -s bisect` names the release that changed it.",
        ]
    )


def document(matrix: Matrix, news: Sequence[News]) -> dict[str, Any]:
    """A JSON object. lag: as `lag` gives it. add: the line for matrix.toml, null where nothing is newer."""
    return {
        "schema": 1,
        "status": "newer" if lag(news) else "current",
        "packages": [
            {"package": each.package, "cell": each.known, "newest": each.newest, "newer": list(each.newer)}
            for each in news
        ],
        "lag": lag(news),
        "add": line(matrix, news).strip() if lag(news) else None,
    }


def _text(asked: argparse.Namespace, matrix: Matrix, news: Sequence[News]) -> str:
    if asked.json:
        return json.dumps(document(matrix, news), indent=2)
    if asked.lag:
        return "\n".join(f"{package}={newest}" for package, newest in lag(news).items())
    return markdown(matrix, news) if asked.markdown else summary(matrix, news)


def main(arguments: Sequence[str] | None = None, index: Index | None = None) -> int:
    """The command; see the module's docstring. index: by default the one that pip is configured for."""
    parser = argparse.ArgumentParser(prog="nox -s releases --", description=(__doc__ or "").split("\n\n")[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document")
    form.add_argument("--lag", action="store_true", help="PACKAGE=VERSION a line, as the table takes it")
    form.add_argument(
        "--markdown", action="store_true", help="an issue's body; nothing where nothing is newer"
    )
    asked = parser.parse_args(arguments)
    try:
        matrix = load(Path(FILE))
        news = newer(matrix, index or PipIndex())
    except MatrixError as error:
        parser.error(str(error))
    except EnvironmentFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return ENVIRONMENT
    text = _text(asked, matrix, news)
    sys.stdout.write(f"{text}\n" if text else "")
    return NEWER if lag(news) else DONE


if __name__ == "__main__":
    sys.exit(main())
