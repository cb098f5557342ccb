"""`python -m loudmerge.compat [CELL…]` in the project's root: runs cells and renders the table.

0  every cell asked for shows what matrix.toml expects, or is optional and was not reached
1  a cell asked for falls short, or compares badly with the older results (change.fails), or the disk is full
2  usage: the arguments, or matrix.toml, are wrong; or another run is in this checkout
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loudmerge.compat import table
from loudmerge.compat.arguments import DONE, HOME, SHORT, USAGE, add_results, at_least_one
from loudmerge.compat.environments.alone import alone
from loudmerge.compat.environments.children import exit_on_signals
from loudmerge.compat.environments.environment import Installer
from loudmerge.compat.inside.cell import PARTS, source
from loudmerge.compat.judging.cells import FILE, Matrix, MatrixError, load
from loudmerge.compat.judging.result import CellResult
from loudmerge.compat.running.runner import Options, failures, run
from loudmerge.errors import EnvironmentFailed


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. What was asked for goes to stdout, progress to stderr."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        matrix = load(Path(FILE))
        chosen = matrix.chosen(given.cells)
        if given.list:
            _say("\n".join(cell.name for cell in chosen))
            return DONE
        if given.github:
            _say(json.dumps(matrix.github(given.cells)))
            return DONE
        older = None if given.against is None else table.read_older(given.against)
    except (MatrixError, table.ResultError) as error:
        parser.error(str(error))
    try:
        with alone(Path.cwd() / HOME):
            return _run(matrix, given, older)
    except EnvironmentFailed as error:
        _tell(str(error))
        return USAGE
    except OSError as error:
        # A full disk, most of all. The files name themselves; the cells that were done keep their results.
        _tell(f"the run ended early: {error}. Once that is mended, run the cells again that have no result.")
        return SHORT


def _run(matrix: Matrix, given: argparse.Namespace, older: tuple[CellResult, ...] | None) -> int:
    root = Path.cwd()
    installer = Installer.of(root, os.environ, uv=given.uv)
    # An earlier run's would pass for this one's, were it interrupted.
    for file in (table.MARKDOWN, table.PAGE):
        (root / HOME / file).unlink(missing_ok=True)
    options = Options(root, given.results, given.jobs, installer, source(root), tuple(given.parts))
    rows = run(matrix, given.cells, options, _tell)
    gpu = table.of_the_gpu(given.results)
    overview = table.write((*rows, *gpu), root / HOME, older)
    short = failures(matrix.chosen(given.cells), rows)
    for row in short:
        _tell(f"{row.cell}: {row.status}: {row.detail}" if row.detail else f"{row.cell}: {row.status}")
        for each in row.shortfalls:
            _tell(f"  {each.check}: found {each.found}, expected {each.expected}")
    failing = overview.failing(matrix.optional).items()
    # Without names all count, also those that only the older results have; but none that is not run here.
    others = {row.cell for row in gpu}
    worse = {
        cell: change
        for cell, change in failing
        if (cell in given.cells if given.cells else cell not in others)
    }
    for cell, change in worse.items():
        _tell(f"{cell}: {change.word}: {change.detail}")
    _say(overview.counts)
    return SHORT if short or worse else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nox -s matrix --", description="Runs cells of matrix.toml.")
    parser.add_argument("cells", nargs="*", metavar="CELL", help="which; all where there is none")
    parser.add_argument("--list", action="store_true", help="print the cells' names and stop")
    parser.add_argument("--github", action="store_true", help="print the JSON of a strategy.matrix and stop")
    parser.add_argument(
        "-j", "--jobs", type=at_least_one, default=os.cpu_count() or 1, metavar="N", help="parts at a time"
    )
    parser.add_argument("--against", type=Path, metavar="DIR", help="older results: same, regressed or fixed")
    add_results(parser)
    parser.add_argument("--parts", type=_parts, default=PARTS, metavar="PART,…", help=f"of {','.join(PARTS)}")
    parser.add_argument("--uv", action="store_true", help="install with uv (LOUDMERGE_UV=1)")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    unknown = [part for part in found if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {','.join(PARTS)}")
    return found


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
