"""A cell's row: made of what its parts left, of another cell's row, or of an earlier run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loudmerge.compat.environments.environment import differing
from loudmerge.compat.inside.cell import CROSS, FAMILIES, JOURNEY, TESTS
from loudmerge.compat.judging import document
from loudmerge.compat.judging.cells import Cell
from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    CellResult,
    Figures,
    Tests,
    read_figures,
    read_tests,
)
from loudmerge.compat.judging.verdict import RAN, VERSIONS

KEPT = "of an earlier run"
"""What the row of a cell says that was not asked for now."""


CHECKS: Mapping[str, str] = {CROSS: "crossed"}
"""The check of a part, where it has another name."""


def of_parts(
    cell: Cell,
    versions: Mapping[str, str],
    parts: Mapping[str, Mapping[str, Any]],
    installed_in: float,
    source: str = "",
) -> CellResult:
    """The row of a cell that ran. parts: what each part wrote, empty for one that did not run.

    versions: of its environment, when that was made. installed_in: seconds that it took. source: of the
    checkout that ran. It is still to be judged.
    """
    journey = parts[JOURNEY]
    stages = {"environment": round(installed_in, 1)}
    stages |= {part: found["seconds"] for part, found in parts.items() if "seconds" in found}
    errors = {part: str(found["error"]) for part, found in parts.items() if "error" in found}
    ran = {part: found["versions"] for part, found in parts.items() if "versions" in found}
    others = _others(cell, versions, ran)
    return CellResult(
        cell=cell.name,
        lane=cell.lane,
        status=FAILED,
        versions={**versions, **next((found for part, found in ran.items() if part in others), {})},
        path=journey.get("path"),
        orientation=journey.get("orientation"),
        merged=tuple(journey["merged"]) if "merged" in journey else None,
        figures=_figures(journey.get("figures")),
        tests=_tests(parts[TESTS].get("tests"), parts[FAMILIES].get("failures", ())),
        families=parts[FAMILIES].get("families", {}),
        crossed=parts[CROSS].get("crossed", {}),
        detail="; ".join(f"{part} {error}" for part, error in errors.items()),
        seconds=round(sum(stages.values()), 1),
        stages=stages,
        errors={CHECKS.get(part, part): error for part, error in errors.items()}
        | ({VERSIONS: "; ".join(f"{part}: {says}" for part, says in others.items())} if others else {}),
        source=source,
        unmoved=journey.get("unmoved", 0),
    )


def _others(cell: Cell, versions: Mapping[str, str], ran: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Part -> what it ran on that is not the cell's pins, or where there are none its environment's.

    An environment may have been changed after it was made. Two jobs of one run may have different patches
    of one Python.
    """
    wanted = {**versions, **(cell.versions if cell.is_pinned else {})}
    said = {
        part: differing(_unpatched({**wanted, **found}), _unpatched(wanted)) for part, found in ran.items()
    }
    return {part: others for part, others in said.items() if others}


def _unpatched(versions: Mapping[str, str]) -> dict[str, str]:
    """With `3.11` for Python's `3.11.14`."""
    return {
        name: ".".join(version.split(".")[:2]) if name == "python" else version
        for name, version in versions.items()
    }


def _figures(found: Mapping[str, Any] | None) -> Figures | None:
    if found is None:
        return None
    matched, total = found["samples"]
    return read_figures({**found, "samples": {"matched": matched, "total": total}})


def _tests(found: Mapping[str, Any] | None, others: Any) -> Tests | None:
    """The counts, with failures beside them of family tests that are of no one family."""
    if found is None:
        return None
    tests = read_tests(found)
    return replace(tests, failed=tests.failed + len(others), failures=(*tests.failures, *others))


def of_twin(cell: Cell, twin: CellResult) -> CellResult:
    """The row of a cell whose versions are another's, which ran for both."""
    same = f"the versions of {twin.cell}, which ran for both"
    detail = f"{same}; {twin.detail}" if twin.detail else same
    return replace(twin, cell=cell.name, lane=cell.lane, detail=detail)


def of_earlier(cell: Cell, file: Path, torch: str, source: str) -> CellResult:
    """The row in `file` if it is of this cell, these versions, this torch (a requirement) and this source.

    Else one that says why not.
    """
    empty = CellResult(cell.name, cell.lane, NOT_RUN, cell.versions, detail="not asked for")
    try:
        found = CellResult.from_json(document.read(file)) if file.is_file() else empty
    except ValueError as error:
        return replace(empty, detail=f"not asked for, and its earlier result cannot be read: {error}")
    if found.status not in (*RAN, NOT_INSTALLED):
        return empty
    other = _other(cell, found, torch, source)
    if other:
        return replace(empty, detail=f"not asked for, and its earlier result is of {other}")
    return kept(found)


def kept(row: CellResult) -> CellResult:
    """The row of an earlier run, which says so."""
    if row.detail.startswith(KEPT):
        return row
    return replace(row, detail=f"{KEPT}; {row.detail}" if row.detail else KEPT)


def _other(cell: Cell, found: CellResult, torch: str, source: str) -> str:
    """What the row is of that the cell is not; empty where it is of the same."""
    if found.cell != cell.name:
        return f"the cell {found.cell}"
    if found.status in RAN and found.source != source:
        return "another source of loudmerge"
    return _other_versions(cell, found, torch)


def _other_versions(cell: Cell, found: CellResult, torch: str) -> str:
    """`torch 2.12.0, expected 2.13.0` where the row is of that; empty where all are the same."""
    wanted = dict(cell.versions) if cell.is_pinned else {}
    if torch.startswith("torch==") and found.status in RAN:
        wanted["torch"] = torch.removeprefix("torch==")
    return differing(found.versions, wanted)
