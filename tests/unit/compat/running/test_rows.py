"""A row is made of what the parts left, of a twin's, or of an earlier run's of the same versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from loudmerge.compat.judging.result import FAILED, NOT_INSTALLED, NOT_RUN, UNREACHABLE, CellResult, Tests
from loudmerge.compat.judging.verdict import judged
from loudmerge.compat.running import rows
from tests.unit.compat.made import EXPECTED, FIGURES, VERSIONS, cell, result

TORCH = "torch==2.13.0"
PARTS: Mapping[str, Mapping[str, Any]] = {
    "tests": {"tests": {**asdict(Tests(10, 0, 2, {"why": 2}, suite=1)), "failures": []}, "seconds": 30.5},
    "journey": {
        "figures": {**asdict(FIGURES), "samples": [3, 3]},
        "path": "fused",
        "orientation": "standard",
        "merged": [192, 192],
        "unmoved": 1,
        "seconds": 20.0,
    },
    "families": {"families": {"mixtral": "ok"}, "failures": [], "seconds": 40.0},
    "cross": {"crossed": {"two": "ok"}, "seconds": 5.0},
}


def of_parts(**changes: Mapping[str, Any]) -> CellResult:
    return rows.of_parts(cell(), VERSIONS, {**PARTS, **changes}, 35.04)


def test_a_row_holds_what_each_part_showed() -> None:
    row = of_parts()
    assert (row.figures, row.path, row.orientation, row.merged) == (FIGURES, "fused", "standard", (192, 192))
    assert row.unmoved == 1
    assert row.tests == Tests(10, 0, 2, {"why": 2}, suite=1)
    assert (row.families, row.crossed) == ({"mixtral": "ok"}, {"two": "ok"})
    assert row.stages == {"environment": 35.0, "tests": 30.5, "journey": 20.0, "families": 40.0, "cross": 5.0}
    assert row.seconds == 130.5
    assert judged(EXPECTED, row).status == "ok"


@pytest.mark.parametrize("part", ["tests", "journey", "families"])
def test_a_part_that_did_not_run_to_its_end_falls_short(part: str) -> None:
    row = judged(EXPECTED, of_parts(**{part: {"error": "failed: Killed (exit code -9)", "seconds": 1.0}}))
    assert row.status == FAILED
    assert [each.check for each in row.shortfalls] == [part]
    assert row.detail == f"{part} failed: Killed (exit code -9)"


def test_a_cross_that_died_falls_short_though_there_was_nothing_to_merge() -> None:
    row = judged(EXPECTED, of_parts(cross={"error": "failed: Killed (exit code -9)", "seconds": 1.0}))
    assert [(each.check, each.found) for each in row.shortfalls] == [
        ("crossed", "failed: Killed (exit code -9)")
    ]


def test_a_part_that_ran_on_other_versions_falls_short_and_the_row_names_them() -> None:
    """The environment was changed after it was made. A build's suffix and final zeros are no difference."""
    ran = {**VERSIONS, "peft": "0.21.2", "trl": "0.25.1.0"}
    row = judged(EXPECTED, of_parts(journey={**PARTS["journey"], "versions": ran}))
    assert [(each.check, each.found) for each in row.shortfalls] == [
        ("versions", "journey: peft 0.21.2, expected 0.19.1")
    ]
    assert row.versions["peft"] == "0.21.2"
    same = {**VERSIONS, "peft": "0.19.1+local"}
    assert of_parts(journey={**PARTS["journey"], "versions": same}).errors == {}


def test_a_lane_s_part_ran_on_what_its_environment_was_made_with() -> None:
    latest = cell("latest", "latest", versions={})
    other = {"versions": {**VERSIONS, "transformers": "5.6.0"}}
    row = rows.of_parts(latest, VERSIONS, {**PARTS, "tests": {**PARTS["tests"], **other}}, 1.0)
    assert row.errors == {"versions": "tests: transformers 5.6.0, expected 5.5.0"}


def test_another_patch_of_python_is_no_other_version() -> None:
    """Two jobs of a run may have two images of the runner. Another Python is one."""
    made = {**VERSIONS, "python": "3.11.14"}
    for python, says in (
        ("3.11.13", {}),
        ("3.12.1", {"versions": "tests: python 3.12, expected 3.11"}),
    ):
        ran = {**PARTS["tests"], "versions": {**VERSIONS, "python": python}}
        assert rows.of_parts(cell(), made, {**PARTS, "tests": ran}, 1.0).errors == says


def test_an_environment_of_other_versions_than_the_cell_pins_is_no_reason_to_expect_them() -> None:
    older = {**VERSIONS, "peft": "0.18.1"}
    row = rows.of_parts(cell(), older, {**PARTS, "tests": {**PARTS["tests"], "versions": older}}, 1.0)
    assert row.errors == {"versions": "tests: peft 0.18.1, expected 0.19.1"}


def test_a_failed_family_test_of_no_family_is_a_failed_test() -> None:
    row = of_parts(families={"families": {"mixtral": "ok"}, "failures": ["a.py::b"]})
    assert row.tests == Tests(10, 1, 2, {"why": 2}, ("a.py::b",), 1)


def test_a_twin_says_whose_run_it_was() -> None:
    row = rows.of_twin(cell("latest", "latest"), result())
    assert (row.cell, row.lane, row.figures) == ("latest", "latest", FIGURES)
    assert row.detail == "the versions of one, which ran for both"


def earlier(tmp_path: Path, row: CellResult | None, torch: str = TORCH, **changes: Any) -> CellResult:
    file = tmp_path / "one.json"
    if row is not None:
        file.write_text(json.dumps(row.to_json()), "utf-8")
    return rows.of_earlier(cell(**changes), file, torch, "of this loudmerge")


def test_an_earlier_row_is_kept_and_says_so(tmp_path: Path) -> None:
    row = earlier(tmp_path, result())
    assert row == replace(result(), detail="of an earlier run")
    assert earlier(tmp_path, row) == row


@pytest.mark.parametrize("torch", ["torch==2.13", "torch==2.13.0+cu130", "torch"])
def test_zeros_and_a_build_make_no_other_torch(tmp_path: Path, torch: str) -> None:
    assert earlier(tmp_path, result(), torch).status == "ok"


@pytest.mark.parametrize(
    ("row", "torch", "says"),
    [
        (None, TORCH, "not asked for"),
        (CellResult("one", "released", NOT_RUN, VERSIONS), TORCH, "not asked for"),
        (CellResult("one", "released", UNREACHABLE, VERSIONS), TORCH, "not asked for"),
        (result(versions={**VERSIONS, "peft": "0.19.0"}), TORCH, "its earlier result is of peft 0.19.0"),
        (
            result(versions={**VERSIONS, "torch": "2.12.0+cpu"}),
            TORCH,
            "its earlier result is of torch 2.12.0",
        ),
        (result(), "torch==2.12.0", "is of torch 2.13.0+cpu, expected 2.12.0"),
        (result(source="edited"), TORCH, "its earlier result is of another source of loudmerge"),
        (result(source=""), TORCH, "its earlier result is of another source of loudmerge"),
        (result(cell="two"), TORCH, "its earlier result is of the cell two"),
    ],
)
def test_no_earlier_row_of_these_versions_is_a_row_that_says_so(
    tmp_path: Path, row: CellResult | None, torch: str, says: str
) -> None:
    found = earlier(tmp_path, row, torch)
    assert (found.status, found.figures, found.versions) == (NOT_RUN, None, VERSIONS)
    assert says in found.detail


def test_a_row_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"schema": 0}', "utf-8")
    found = earlier(tmp_path, None)
    assert found.status == NOT_RUN
    assert "cannot be read: schema: found 0, expected 1" in found.detail


@pytest.mark.parametrize("text", ["", '{"cell": "o', "[]", "\xff"])
def test_half_a_row_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.json").write_text(text, "latin-1")
    assert "its earlier result cannot be read: " in earlier(tmp_path, None).detail


def test_an_environment_that_could_not_be_made_is_kept(tmp_path: Path) -> None:
    row = earlier(tmp_path, CellResult("one", "released", NOT_INSTALLED, VERSIONS, detail="No space left"))
    assert (row.status, row.detail) == (NOT_INSTALLED, "of an earlier run; No space left")


def test_the_lanes_have_no_versions_of_their_own(tmp_path: Path) -> None:
    row = result(lane="latest", versions={**VERSIONS, "peft": "9", "torch": "2.13.0"})
    assert earlier(tmp_path, row, lane="latest", versions={}).status == "ok"
