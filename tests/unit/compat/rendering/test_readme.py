"""The README's table: generated, and found out of date by what a commit decides, not by noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from loudmerge.compat.judging.result import NOT_RUN, OK, CellResult, Figures, Tests
from loudmerge.compat.rendering import readme
from loudmerge.compat.rendering.overview import Overview
from loudmerge.compat.rendering.readme import END, START, ReadmeError, alike, differences, replaced
from loudmerge.compat.table import survey
from tests.unit.compat import rows

TEXT = f"# Title\n\nBefore | this.\n\n{START}\nold\n{END}\n\nAfter.\n"
ROWS = (rows.SWAPPED, rows.STANDARD, rows.PER_EXPERT)
WHERE = "transformers 5.5.0, peft 0.18.1, trl 0.25.1"


def overview(results: Sequence[CellResult] = ROWS) -> Overview:
    return survey(results, generated=rows.GENERATED)


def changed(**fields: Any) -> Overview:
    """The first row with other fields, or other figures."""
    figures = {name: fields.pop(name) for name in [*fields] if name in Figures.__dataclass_fields__}
    assert ROWS[0].figures
    first = replace(ROWS[0], figures=replace(ROWS[0].figures, **figures), **fields)
    return overview((first, *ROWS[1:]))


def found(text: str, results: Overview) -> list[str]:
    return [str(difference) for difference in differences(text, results)]


def fields_of(value: object) -> str:
    return "-".join(value) if isinstance(value, dict) else ""


README = replaced(TEXT, overview())


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    assert README.startswith(f"# Title\n\nBefore | this.\n\n{START}\n\nGenerated on ")
    assert " from what `nox -s matrix` left, with torch " in README
    assert README.endswith(f"|\n\n{END}\n\nAfter.\n")
    assert "old" not in README.split()
    assert replaced(README, overview()) == README


def test_a_row_says_what_a_reader_of_the_readme_wants_to_know() -> None:
    assert (
        "| 5.5.0 | 0.18.1 | 0.25.1 | fused, swapped | 192/192 | 1.86 | 2.4e-5 | 3.2e-13 | 1.6e-4 | 3/3"
        " | 26/26, 1 refused | 2/2 | ✓ ok |"
    ) in README


def test_only_cells_of_the_lane_released_are_shown_and_compared() -> None:
    others = (replace(rows.BROKEN, lane="latest", cell="latest"), rows.DEV)
    assert replaced(TEXT, overview((*ROWS, *others))) == README
    assert found(README, overview((*ROWS, *others))) == []


@pytest.mark.parametrize(
    "noise",
    [
        {"seconds": 500.0, "stages": {}},
        {"kl_trained_merged": 2.3e-4},
        {"kl_trained_merged": 2.6e-6},
        {"kl_base_trained": 0.7},
        {"kl_base_merged": 0.7, "kl_floor": 1.0, "top1_agreement": 0.9, "delta_kept": 0.992},
        {"kl_float32_merge": 0.0},
        {"kl_float32_merge": -2e-12},
        {"kl_float32_merge": 9e-9},
        {"tests": Tests(1300, 0, 0)},
        {"versions": {**ROWS[0].versions, "torch": "2.14.0", "python": "3.13.1"}},
    ],
    ids=fields_of,
)
def test_noise_is_no_difference(noise: dict[str, Any]) -> None:
    assert found(README, changed(**noise)) == []


def test_the_day_is_no_difference() -> None:
    assert found(README, survey(ROWS, generated=rows.GENERATED + timedelta(days=30))) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"status": "failed"}, "status: README has ✓ ok, the results have ✗ failed"),
        ({"orientation": "standard"}, "path: README has fused, swapped, the results have fused, standard"),
        (
            {"path": "per-expert", "orientation": None},
            "path: README has fused, swapped, the results have per-expert",
        ),
        ({"merged": (0, 192)}, "merged: README has 192/192, the results have 0/192"),
        ({"samples": (2, 3)}, "samples: README has 3/3, the results have 2/3"),
        ({"families": {"mixtral": "ok"}}, "families: README has 26/26, 1 refused, the results have 1/1"),
        ({"crossed": {}}, "crossed: README has 2/2, the results have –"),
        ({"kl_trained_merged": 2.5e-4}, "KL trained‖merged: README has 2.4e-5, the results have 2.5e-4"),
        ({"kl_trained_merged": 2.3e-6}, "KL trained‖merged: README has 2.4e-5, the results have 2.3e-6"),
        ({"kl_base_trained": 0.1}, "KL base‖trained: README has 1.86, the results have 0.1"),
        ({"kl_float32_merge": 1.1e-7}, "KL float32 merge: README has 3.2e-13, the results have 1.1e-7"),
        ({"kl_bfloat16_arithmetic": 0.01}, "KL in bfloat16: README has 1.6e-4, the results have 0.01"),
        ({"kl_trained_merged": float("nan")}, "KL trained‖merged: README has 2.4e-5, the results have nan"),
        ({"kl_trained_merged": float("inf")}, "KL trained‖merged: README has 2.4e-5, the results have inf"),
    ],
    ids=fields_of,
)
def test_what_a_commit_decides_is_a_difference(fields: dict[str, Any], said: str) -> None:
    assert found(README, changed(**fields)) == [f"{WHERE}: {said}"]


def test_a_cell_that_was_not_run_is_a_difference() -> None:
    results = overview((CellResult(ROWS[0].cell, "released", NOT_RUN, ROWS[0].versions), *ROWS[1:]))
    assert f"{WHERE}: status: README has ✓ ok, the results have – not-run" in found(README, results)


def test_another_set_of_cells_is_a_difference() -> None:
    other = "transformers 5.24.0, peft 0.21.2, trl 1.16.0"
    assert found(README, overview(ROWS[1:])) == [f"{WHERE}: the row: README has a row, the results have none"]
    assert found(README, overview((*ROWS, rows.BROKEN))) == [
        f"{other}: the row: README has none, the results have a row"
    ]


def test_a_second_row_of_a_cell_is_a_difference() -> None:
    """Whichever of the two is right, a reader sees both."""
    row = next(line for line in README.splitlines() if line.startswith("| 5.5.0 | 0.18.1"))
    for text in (f"{row.replace('192/192', '0/192')}\n{row}", f"{row}\n{row}"):
        (said,) = [each for each in found(README.replace(row, text), overview()) if "the row" in each]
        assert said == f"{WHERE} (2): the row: README has a row, the results have none"


def test_another_version_is_another_cell() -> None:
    results = changed(versions={**ROWS[0].versions, "peft": "0.18.2"})
    assert len(found(README, results)) == 2


@pytest.mark.parametrize(
    "text",
    ["# Title\n", f"{START}\n", f"{END}\n{START}\n", f"{START}\n{END}\n{START}\n{END}\n"],
    ids=["none", "start", "reversed", "twice"],
)
def test_a_readme_without_its_one_place_is_an_error(text: str) -> None:
    for ask in (replaced, differences):
        with pytest.raises(
            ReadmeError, match="found no one place for the matrix, expected one line <!-- matrix:start"
        ):
            ask(text, overview())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT, "found a table of"),
        (README.replace("| samples |", "| sample |"), "found a table of"),
        (README.replace("| 3/3 | 26/26, 1 refused |", "| 3/3 |", 1), "expected 13 cells"),
    ],
    ids=["no-table", "header", "row"],
)
def test_a_readme_without_the_table_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ReadmeError, match=said):
        differences(text, overview())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("1.0e-5", "9.9e-5", True),
        ("1.0e-5", "1.0e-4", False),
        ("0", "1.0e-8", True),
        ("0", "1.0e-7", False),
        ("–", "–", True),
        ("–", "1.0e-9", False),
        ("nan", "nan", True),
        ("nan", "1.0e-9", False),
        ("inf", "1.0e-9", False),
    ],
)
def test_kls_are_alike_within_a_factor_of_ten_or_under_the_floor(a: str, b: str, expected: bool) -> None:
    assert alike(a, b) is alike(b, a) is expected


def test_the_columns_of_the_readme_are_columns_of_the_table() -> None:
    assert set(readme.KLS) < set(readme.TITLES)


def test_adapters_of_cells_that_are_not_released_are_not_counted() -> None:
    """They are there on one day, or where a host answers, and not on another."""
    text = replaced(TEXT, overview())
    crossed = {**ROWS[0].crossed, "latest": OK, "dev": "other weights than where it was trained"}
    assert found(text, changed(crossed=crossed)) == []
    released = {**ROWS[0].crossed, ROWS[1].cell: "other weights than where it was trained"}
    assert found(text, changed(crossed=released)) == [
        f"{WHERE}: crossed: README has 2/2, the results have 1/2"
    ]
