"""CELL.json holds what the contract names, at the top, and reads back as it was written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from loudmerge.compat.judging.result import ASIDE, FAILED, NOT_RUN, CellResult, Shortfall, Tests
from tests.unit.compat.made import FIGURES, result

CONTRACT = {
    *("cell", "versions", "path", "merged", "kl_trained_merged", "kl_base_trained", "kl_base_merged"),
    *("top1_agreement", "samples", "tests", "families", "seconds", "status"),
}


def through_json(row: CellResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(row.to_json(), allow_nan=False))
    return found


@pytest.mark.parametrize(
    "row",
    [
        result(),
        result(status=FAILED, shortfalls=(Shortfall("samples", "1 / 3", "3 the same"),)),
        result(path="per-expert", orientation=None, tests=Tests(1, 2, 3, {"why": 3}, ("a::b", "a::c"))),
        CellResult("gone", "released", NOT_RUN, {"peft": "1"}, detail="not asked for"),
        result(errors={"crossed": "failed: Killed"}),
    ],
    ids=["ok", "failed", "per-expert", "not-run", "errors"],
)
def test_a_row_reads_back_as_it_was_written(row: CellResult) -> None:
    assert CellResult.from_json(through_json(row)) == row


def test_the_keys_of_the_contract_stand_at_the_top() -> None:
    document = through_json(result())
    assert document.keys() >= CONTRACT
    assert document["merged"] == {"applied": 192, "attempted": 192}
    assert document["samples"] == {"matched": 3, "total": 3}
    assert document["tests"].items() >= {"passed": 10, "failed": 0, "skipped": 0}.items()


def test_what_was_not_taken_is_null_and_there() -> None:
    document = through_json(CellResult("gone", "released", NOT_RUN, {}))
    assert document.keys() == through_json(result()).keys()
    assert [document[key] for key in ("kl_trained_merged", "samples", "tests", "merged", "path")] == [
        None
    ] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_json_and_comes_back(value: float) -> None:
    found = CellResult.from_json(through_json(result(kl_trained_merged=value)))
    assert found.figures is not None
    assert str(found.figures.kl_trained_merged) == str(value)


@pytest.mark.parametrize("key", sorted(result().to_json().keys() - ASIDE.keys()))
def test_a_missing_key_is_named(key: str) -> None:
    document = through_json(result())
    del document[key]
    with pytest.raises(ValueError, match=f"^{key}: missing"):
        CellResult.from_json(document)


@pytest.mark.parametrize("key", sorted(ASIDE))
def test_a_row_of_before_a_key_that_nothing_is_judged_by_is_read(key: str) -> None:
    document = through_json(result(detail="why", date="2026-11-29"))
    del document[key]
    row = CellResult.from_json(document)
    assert row == replace(result(detail="why", date="2026-11-29"), **{key: ASIDE[key]})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schema", 2, "schema: found 2, expected 1"),
        ("status", "fine", "status: found 'fine', expected one of ok, failed"),
        ("seconds", True, "seconds: found True, expected a number"),
        pytest.param("seconds", 10**400, "found 'a number of 401 digits', expected one that a", id="huge"),
        ("date", 20261129, "date: found 20261129, expected a string"),
        ("kl_floor", None, "kl_floor: found None, expected a figure, as for the others"),
        ("samples", {"matched": 3}, "total: missing"),
        ("samples", {"matched": 9, "total": 3}, "expected no more matched than total"),
        ("merged", {"applied": -1, "attempted": 3}, "expected no more applied than attempted"),
        ("merged", {"applied": 1.5, "attempted": 2}, "applied: found 1.5, expected an integer"),
        ("versions", {"peft": 1}, "peft: found 1, expected a string"),
        ("families", ["ok"], r"families: found \['ok'\], expected an object"),
        ("shortfalls", ["samples"], "shortfalls: found 'samples', expected only dict"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object, says: str) -> None:
    document = {**through_json(result()), key: value}
    with pytest.raises(ValueError, match=says):
        CellResult.from_json(document)


def test_the_figures_that_rows_are_made_with_are_all_different() -> None:
    """So that a figure in another's place is seen."""
    numbers = [value for name, value in vars(FIGURES).items() if name != "samples"]
    assert len(set(numbers)) == len(numbers)
