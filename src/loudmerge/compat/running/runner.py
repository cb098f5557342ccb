"""Runs cells: environments, then each cell's parts, then every adapter in every other cell; a row for each.

A cell's row, .compat/results/CELL.json, is written when the last of its parts has run; until then it says
that none has come to its end.
Standard library only: torch and the rest are in the environments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loudmerge.compat.environments.children import Children
from loudmerge.compat.environments.commands import NotInstalled, Unreachable
from loudmerge.compat.environments.environment import (
    Installer,
    pins,
    pins_of,
    requirements,
    sealed,
)
from loudmerge.compat.environments.places import Places
from loudmerge.compat.inside.cell import CROSS, FAMILIES, JOURNEY, PARTS, TESTS, Job
from loudmerge.compat.judging import document
from loudmerge.compat.judging.cells import Cell, Matrix
from loudmerge.compat.judging.result import NOT_INSTALLED, NOT_RUN, OK, UNREACHABLE, CellResult
from loudmerge.compat.judging.verdict import all_crossed, judged
from loudmerge.compat.running import rows

MOST_INSTALLATIONS = 2
"""They share the disk and the index: more at a time take as long."""

PART_SECONDS = 1800
"""How long a part may take before it is ended."""

OWN_PARTS = (FAMILIES, TESTS, JOURNEY)
"""All but the last stage; the longest first, so that no processor waits for one at the end."""

UNREAD = "left a file that cannot be read"

OTHER_SOURCE = (
    "ran on another source than the run began with: its files were edited since, or the environment "
    "holds another loudmerge"
)

Tell = Callable[[str], None]
"""Called with a line of progress."""


class PartFailed(RuntimeError):
    """A part of a cell did not run to its end."""


@dataclass(frozen=True)
class Options(Places):
    """Where and how cells run. jobs: how many parts at a time. parts: which, of PARTS.

    source: of the checkout, as cell.source names it when the run begins.
    """

    results: Path
    jobs: int
    installer: Installer
    source: str
    parts: tuple[str, ...] = PARTS
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True)
class Prepared:
    """A cell, what it consists of today, and whether it has an environment.

    twin: the cell that has the same pins, and runs for both. status, detail: why there is no environment.
    seconds: that the environment took.
    """

    cell: Cell
    pins: Mapping[str, str]
    twin: str | None = None
    status: str | None = None
    detail: str = ""
    seconds: float = 0.0

    @property
    def runs(self) -> bool:
        return self.status is None and self.twin is None

    def of_these(self, options: Options) -> dict[str, Any]:
        """What a part's file names, so that what another combination showed is not taken for this one's."""
        return {"versions": [options.installer.torch, *requirements(self.pins)], "source": options.source}


def run(matrix: Matrix, names: Sequence[str], options: Options, tell: Tell) -> tuple[CellResult, ...]:
    """Runs the cells of these names, or all, and writes a result for every cell of the matrix.

    Gives a row for every cell, in the matrix's order. Raises MatrixError on an unknown name.
    """
    asked = matrix.chosen(names)
    for cell in asked:
        _keep(_begun(cell), options)
    with _workers(min(options.jobs, MOST_INSTALLATIONS)) as (pool, children):
        resolved = _resolve(matrix, asked, options, children, tell)
        for one in resolved:  # twins were not asked for
            _keep(_begun(one.cell), options)
        prepared = list(pool.map(lambda one: _prepare(one, options, children, tell), resolved))
    running = [one for one in prepared if one.runs]
    for one in prepared:
        if one.status is not None:
            _keep(_row(one, options), options)
    own = [part for part in OWN_PARTS if part in options.parts]
    crosses = CROSS in options.parts
    _run_parts(running, own, {}, options, tell, last=not crosses)
    if crosses:
        _run_parts(running, [CROSS], _trained(matrix, options, tell), options, tell, last=True)
    full = not names and set(options.parts) == set(PARTS)
    return _rows(matrix, prepared, options, full=full)


def _begun(cell: Cell) -> CellResult:
    detail = "asked for, and the run has not come to its end"
    return CellResult(cell.name, cell.lane, NOT_RUN, cell.versions, detail=detail)


@contextmanager
def _workers(jobs: int) -> Iterator[tuple[ThreadPoolExecutor, Children]]:
    """Threads, and what runs the commands that they wait for.

    When the block ends, by Ctrl-C say, the commands are killed; what no thread has come to is not begun.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        with Children() as children:
            yield pool, children
    finally:
        pool.shutdown(cancel_futures=True)


def failures(asked: Sequence[Cell], rows: Sequence[CellResult]) -> tuple[CellResult, ...]:
    """The rows that fail a run: of the cells asked for, all not ok, but optional ones not reached."""
    names = {cell.name: cell.optional for cell in asked}
    return tuple(
        row
        for row in rows
        if row.cell in names and row.status != OK and not (row.status == UNREACHABLE and names[row.cell])
    )


def _resolve(
    matrix: Matrix, asked: Sequence[Cell], options: Options, children: Children, tell: Tell
) -> list[Prepared]:
    """What each cell asked for consists of: today, or where its own parts do not run now, when they did.

    One whose pins are a released cell's has it as its twin.
    """
    found: dict[str, Prepared] = {}
    for cell in asked:
        try:
            wanted = _left_pins(cell, options) or pins(cell, options.installer, options.environ, children)
        except (NotInstalled, Unreachable) as error:
            status = _status(error)
            tell(f"{cell.name}: {status}: {error}")
            found[cell.name] = Prepared(cell, cell.versions, status=status, detail=str(error))
            continue
        same = (
            []
            if cell.is_pinned
            else [one for one in matrix.cells if one.is_pinned and one.versions == wanted]
        )
        found[cell.name] = Prepared(cell, wanted, twin=same[0].name if same else None)
        for twin in same[:1]:
            tell(f"{cell.name}: the versions of {twin.name}, which runs for both")
            found.setdefault(twin.name, Prepared(twin, wanted))
    return list(found.values())


def _left_pins(cell: Cell, options: Options) -> dict[str, str]:
    """What a cell that pins nothing consisted of when its own parts ran, where they do not run now.

    A head may have moved since, and the last stage is to be of the same versions. Empty where no part left
    any with this torch and this source.
    """
    if cell.is_pinned or set(OWN_PARTS) & set(options.parts):
        return {}
    for part in OWN_PARTS:
        try:
            of = document.read(options.directory(cell.name) / f"{part}.json").get("of")
        except ValueError:
            continue
        versions = of["versions"] if isinstance(of, dict) and of.get("source") == options.source else []
        if versions[:1] == [options.installer.torch]:
            return pins_of(versions[1:])
    return {}


def _prepare(one: Prepared, options: Options, children: Children, tell: Tell) -> Prepared:
    if not one.runs:
        return one
    name, started = one.cell.name, time.monotonic()
    environment, wanted = options.environment(name), requirements(one.pins)
    try:
        made = environment.make(options.root, wanted, options.installer, children, options.log(name))
    except (NotInstalled, Unreachable) as error:
        status = _status(error)
        tell(f"{name}: {status}: {error}")
        return replace(one, status=status, detail=str(error), seconds=time.monotonic() - started)
    seconds = time.monotonic() - started
    tell(f"{name}: environment {f'made in {seconds:.0f} s' if made else 'in place'}")
    return replace(one, seconds=seconds)


def _status(error: NotInstalled | Unreachable) -> str:
    return UNREACHABLE if isinstance(error, Unreachable) else NOT_INSTALLED


def _run_parts(
    cells: Sequence[Prepared],
    parts: Sequence[str],
    trained: Mapping[str, Path],
    options: Options,
    tell: Tell,
    *,
    last: bool,
) -> None:
    """Runs these parts of the cells. trained: whose adapters are merged. last: no other parts come after."""
    left = Counter(one.cell.name for one in cells for _ in parts)
    with _workers(options.jobs) as (pool, children):
        running = {
            pool.submit(_run_part, one, part, trained, options, children, tell): one
            for part in parts
            for one in cells
        }
        for done in as_completed(running):
            done.result()
            one = running[done]
            left[one.cell.name] -= 1
            if last and not left[one.cell.name]:
                _keep(_row(one, options), options)


def _run_part(
    one: Prepared, part: str, trained: Mapping[str, Path], options: Options, children: Children, tell: Tell
) -> None:
    """Runs a part in the cell's environment; keeps what it showed, or why it did not, with its seconds."""
    name, started = one.cell.name, time.monotonic()
    directory = options.directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{part}.json").unlink(missing_ok=True)
    if part == JOURNEY:
        shutil.rmtree(directory / JOURNEY, ignore_errors=True)
    others = {cell: place for cell, place in trained.items() if cell != name}
    try:
        shown = _in_environment(Job(part, options.root, directory, others), name, options, children)
    except PartFailed as error:
        shown = {"error": str(error), **({"crossed": dict.fromkeys(others, str(error))} if others else {})}
    seconds = time.monotonic() - started
    document.write(
        directory / f"{part}.json", {**shown, "seconds": round(seconds, 1), "of": one.of_these(options)}
    )
    tell(f"{name}: {part} {shown.get('error', 'done')}, {seconds:.0f} s")


def _trained(matrix: Matrix, options: Options, tell: Tell) -> dict[str, Path]:
    """The cells that trained an adapter, and merged it with this loudmerge: cell -> directory."""
    found = {}
    for name in matrix.names:
        try:
            journey = document.read(options.directory(name) / f"{JOURNEY}.json")
        except ValueError as error:
            tell(f"{name}: its journey {UNREAD}: {error}; no other cell merges its adapter")
            continue
        of = journey.get("of")
        if "digest" in journey and isinstance(of, dict) and of.get("source") == options.source:
            found[name] = options.directory(name)
    return found


def _in_environment(job: Job, name: str, options: Options, children: Children) -> dict[str, Any]:
    """What the part showed. Raises PartFailed with the last line of its log."""
    log = options.log(name, job.part)
    log.parent.mkdir(parents=True, exist_ok=True)
    asked, out = job.directory / f"{job.part}-job.json", job.directory / f"{job.part}-out.json"
    out.unlink(missing_ok=True)
    document.write(asked, job.to_json())
    options.environment(name).share_bytecode()
    command = [
        str(options.environment(name).python),
        "-m",
        "loudmerge.compat.inside.cell",
        str(asked),
        str(out),
    ]
    with log.open("w", encoding="utf-8") as file:
        environ = sealed(options.environ)
        try:
            code = children.run(
                command, seconds=PART_SECONDS, cwd=options.root, env=environ, log=file
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise PartFailed(f"was not done after {PART_SECONDS} s") from error
        except OSError as error:
            raise PartFailed(f"could not be started: {error}") from error
    if code or not out.is_file():
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise PartFailed(f"failed: {lines[-1][:300] if lines else 'it said nothing'} (exit code {code})")
    try:
        shown = document.read(out)
    except ValueError as error:
        raise PartFailed(f"{UNREAD}: {error}") from error
    if shown.pop("source", None) != options.source:
        raise PartFailed(OTHER_SOURCE)
    return shown


def _rows(
    matrix: Matrix, prepared: Sequence[Prepared], options: Options, *, full: bool
) -> tuple[CellResult, ...]:
    """A row for every cell of the matrix, judged and written. full: all parts of all cells were asked for."""
    found = {one.cell.name: _row(one, options) for one in prepared if one.twin is None}
    found |= {one.cell.name: rows.of_twin(one.cell, found[one.twin]) for one in prepared if one.twin}
    for cell in matrix.cells:
        if cell.name not in found:
            file = options.results / f"{cell.name}.json"
            earlier = rows.of_earlier(cell, file, options.installer.torch, options.source)
            found[cell.name] = (_left_row(cell, options) if earlier.status == NOT_RUN else None) or earlier
    judgements = tuple(judged(cell.expects, found[cell.name]) for cell in matrix.cells)
    if full:
        judgements = all_crossed(judgements)
    for row in judgements:
        _keep(row, options)
    return judgements


def _row(one: Prepared, options: Options) -> CellResult:
    """The row of a cell that has no twin, judged."""
    cell = one.cell
    if one.status is not None:
        seconds = round(one.seconds, 1)
        return CellResult(cell.name, cell.lane, one.status, one.pins, detail=one.detail, seconds=seconds)
    shown = {part: _shown(one, part, options) for part in PARTS}
    versions = options.environment(cell.name).versions()
    row = rows.of_parts(cell, versions, shown, one.seconds, options.source)
    return judged(cell.expects, row)


def _left_row(cell: Cell, options: Options) -> CellResult | None:
    """A pinned cell's row by what its parts left, if all of them did, of its versions, this torch and source.

    A run of another source in between has written over the row, and not over the parts.
    """
    one = Prepared(cell, cell.versions)
    stamp = options.environment(cell.name).stamped().get("stamp", {})
    if not cell.is_pinned or stamp.get("requirements") != one.of_these(options)["versions"]:
        return None
    whole = all("of" in _shown(one, part, options) for part in PARTS)
    return rows.kept(_row(one, options)) if whole else None


def _keep(row: CellResult, options: Options) -> None:
    document.write(options.results / f"{row.cell}.json", row.to_json())


def _shown(one: Prepared, part: str, options: Options) -> dict[str, Any]:
    """What a part showed of these versions and this source; empty where it did not run on them."""
    try:
        left = document.read(options.directory(one.cell.name) / f"{part}.json")
    except ValueError as error:
        return {"error": f"{UNREAD}: {error}"}
    return left if left.get("of") == one.of_these(options) else {}
