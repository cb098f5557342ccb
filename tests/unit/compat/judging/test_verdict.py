"""Each thing that a cell can fail to show turns it red by its own check; a cell that shows all is green."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    OK,
    UNREACHABLE,
    CellResult,
    Shortfall,
    Tests,
)
from loudmerge.compat.judging.verdict import all_crossed, judged
from tests.unit.compat.made import EXPECTED, result


def checks(row: CellResult, **expected: Any) -> list[str]:
    found = judged(replace(EXPECTED, **expected), row)
    assert found.status == (FAILED if found.shortfalls else OK)
    return [each.check for each in found.shortfalls]


def test_a_cell_that_shows_all_is_ok() -> None:
    assert checks(result()) == []


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("path", {"path": "per-expert"}),
        ("orientation", {"orientation": "swapped"}),
        ("orientation", {"orientation": None}),
        ("merged", {"merged": (191, 192)}),
        ("merged", {"merged": (1, 1)}),
        ("merged", {"merged": (193, 193)}),
        ("merged", {"merged": (0, 0)}),
        ("merged", {"merged": None}),
        ("kl_float32_merge", {"kl_float32_merge": 1.1e-8}),
        ("kl_trained_merged", {"kl_trained_merged": 1.9e-3}),
        ("kl_base_merged", {"kl_base_merged": 1.84}),
        ("kl_base_merged", {"kl_base_merged": 1.88}),
        ("kl_bfloat16_arithmetic", {"kl_bfloat16_arithmetic": 0.019}),
        ("kl_bfloat16_arithmetic", {"kl_bfloat16_arithmetic": math.nan}),
        ("delta_kept", {"delta_kept": 0.98}),
        ("samples", {"samples": (2, 3)}),
        ("samples", {"samples": (0, 0)}),
        ("samples", {"samples": (1, 1)}),
        ("samples", {"samples": (4, 4)}),
        ("top1_agreement", {"top1_agreement": 0.9}),
        ("unmoved", {"unmoved": 3}),
        ("tests", {"tests": Tests(9, 1, 0, {}, ("a::b",))}),
        ("tests", {"tests": Tests(10, 0, 0, failures=("a::b",), suite=1)}),
        ("tests", {"tests": Tests(9, 0, 2999, {"why": 2999}, suite=1)}),
        ("tests", {"tests": Tests(10, 0, 0)}),
        ("tests", {"tests": Tests(0, 0, 3, {"why": 3})}),
        ("tests", {"tests": None}),
        ("families", {"families": {"mixtral": "ok", "qwen3_moe": "its logits differ"}}),
        ("families", {"families": {}}),
        ("crossed", {"crossed": {"two": "other weights than where it was trained"}}),
        ("crossed", {"crossed": {"two": "refused by design: eh"}}),
        ("journey", {"figures": None}),
        ("crossed", {"crossed": {}, "errors": {"crossed": "failed: Killed (exit code -9)"}}),
        ("crossed", {"crossed": {"two": "failed: Killed"}, "errors": {"crossed": "failed: Killed"}}),
        ("versions", {"errors": {"versions": "journey: peft 0.21.2, expected 0.19.1"}}),
        ("kl_float32_merge", {"kl_float32_merge": math.nan}),
        ("kl_trained_merged", {"kl_trained_merged": math.nan}),
        ("kl_base_merged", {"kl_base_merged": math.nan}),
        ("delta_kept", {"delta_kept": math.nan}),
    ],
)
def test_each_thing_falls_short_by_its_own_check(check: str, change: dict[str, Any]) -> None:
    """A figure that is no number does, too."""
    assert checks(result(**change)) == [check]


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("kl_base_trained", math.inf),
        ("kl_trained_merged", -5.0),
        ("kl_float32_merge", -5.0),
        ("kl_floor", math.nan),
        ("kl_bfloat16_arithmetic", math.inf),
        ("top1_agreement", math.nan),
        ("top1_agreement", 1.5),
        ("delta_kept", 2.0),
        ("delta_kept", math.inf),
        ("samples", (5, 3)),
        ("samples", (-1, -1)),
    ],
)
def test_a_figure_that_cannot_be_falls_short(check: str, value: object) -> None:
    """No merge, right or wrong, has it: 5 of 3 samples, say. Rounding may leave a KL a little below 0."""
    assert check in checks(result(**{check: value}))
    assert checks(result(kl_float32_merge=-1e-9)) == []


def test_a_training_that_moved_nothing_proves_nothing() -> None:
    """Whatever else is right: the merge of nothing is right, too."""
    nothing = {"kl_trained_merged": 0.0, "kl_bfloat16_arithmetic": 0.0}
    still = result(kl_base_trained=0.01, kl_base_merged=0.01, **nothing)
    assert checks(still) == ["kl_base_trained"]
    assert "kl_base_trained" in checks(result(kl_base_trained=math.nan))


@pytest.mark.parametrize(
    ("sabotage", "expected"),
    [
        # An expert's delta is dropped: the samples may be the same; the weights are not the trained ones.
        (
            {"kl_float32_merge": 3e-3, "kl_trained_merged": 3e-3, "delta_kept": 0.97},
            ["kl_float32_merge", "kl_trained_merged", "delta_kept"],
        ),
        # Another reading of A and B: everything is applied, in the wrong place.
        (
            {"kl_float32_merge": 1.5, "kl_trained_merged": 1.5, "kl_base_merged": 2.4, "samples": (0, 3)},
            ["kl_float32_merge", "kl_trained_merged", "kl_base_merged", "samples"],
        ),
        # The base itself is written.
        (
            {"kl_float32_merge": 1.86, "kl_trained_merged": 1.86, "kl_base_merged": 0.0, "delta_kept": 0.0},
            ["kl_float32_merge", "kl_trained_merged", "kl_base_merged", "delta_kept"],
        ),
    ],
    ids=["one-expert-dropped", "other-layout", "nothing-merged"],
)
def test_the_figures_of_a_wrong_merge_turn_the_cell_red(
    sabotage: dict[str, Any], expected: list[str]
) -> None:
    assert checks(result(**sabotage)) == expected


def test_a_shortfall_says_what_was_found_and_what_was_expected() -> None:
    row = judged(EXPECTED, result(kl_trained_merged=0.5, samples=(1, 3), tests=Tests(9, 1, 0, {}, ("a::b",))))
    assert [(each.found, each.expected) for each in row.shortfalls] == [
        ("0.5", "at most 0.001 of kl_base_trained, 0.00186"),
        ("1 / 3", "3 of 3 the same"),
        ("1 failed: a::b", "none"),
    ]


def test_some_samples_may_be_the_base_s_too() -> None:
    assert checks(result(unmoved=2)) == []


def test_what_kept_the_families_from_running_is_what_was_found() -> None:
    row = judged(EXPECTED, result(families={}, errors={"families": "failed: Killed (exit code -9)"}))
    assert [(each.check, each.found) for each in row.shortfalls] == [
        ("families", "failed: Killed (exit code -9)")
    ]


def test_too_few_families_fall_short_though_each_is_merged() -> None:
    row = judged(replace(EXPECTED, families_at_least=2), result())
    assert [(each.check, each.found, each.expected) for each in row.shortfalls] == [
        ("families", "1 merged, 0 refused by design", "2 merged")
    ]


def crossing(name: str, *others: str, **changes: Any) -> CellResult:
    """The row of a cell whose last stage ran."""
    versions = {"transformers": "5.5.0", "peft": name, "trl": "0.25.1"}
    crossed = dict.fromkeys(others, OK)
    return result(
        **{"cell": name, "versions": versions, "crossed": crossed, "stages": {"cross": 1.0}, **changes}
    )


def test_in_a_full_run_each_cell_has_merged_what_all_others_trained() -> None:
    a, b, c = crossing("a", "b", "c"), crossing("b", "a", "c"), crossing("c", "b")
    found = all_crossed((a, b, c))
    assert found[:2] == (a, b)
    assert [(each.check, each.found) for each in found[2].shortfalls] == [("crossed", "nothing of a")]
    assert found[2].status == FAILED


@pytest.mark.parametrize(
    "other",
    [
        crossing("a", figures=None),
        crossing("a", stages={"journey": 1.0}),
        crossing("a", source="another"),
        crossing("a", status=NOT_RUN),
        crossing("a", versions=crossing("b").versions),
        crossing("a", lane="gpu", stages={"train": 1.0}),
    ],
    ids=["untrained", "no-last-stage", "other-source", "not-run", "twin", "gpu"],
)
def test_what_another_cell_did_not_train_for_it_is_not_missing(other: CellResult) -> None:
    row = crossing("b")
    assert all_crossed((other, row))[1] == row


def test_what_is_missing_is_said_once() -> None:
    died = crossing("b", shortfalls=(Shortfall("crossed", "failed: Killed", "a run to its end"),))
    assert all_crossed((crossing("a", "b"), died))[1] == died


def test_a_refusal_by_design_is_no_shortfall() -> None:
    refused = {"longcat_flash": "refused by design: experts-incomplete"}
    assert checks(result(families={"mixtral": "ok", **refused})) == []
    row = judged(EXPECTED, result(families=refused))
    assert [each.found for each in row.shortfalls] == ["0 merged, 1 refused by design"]


def test_a_cell_may_expect_less() -> None:
    assert (
        checks(result(samples=(2, 3), kl_float32_merge=1e-7), samples=2, kl_float32_merge_at_most=1e-6) == []
    )
    assert checks(result(samples=(1, 3)), samples=2) == ["samples"]


@pytest.mark.parametrize("status", [NOT_INSTALLED, NOT_RUN, UNREACHABLE])
def test_what_did_not_run_keeps_its_status(status: str) -> None:
    row = CellResult("one", "released", status, {}, detail="why")
    assert judged(EXPECTED, row) == row


def test_shortfalls_of_an_earlier_judgement_are_not_kept() -> None:
    red = judged(EXPECTED, result(orientation="swapped"))
    assert checks(red, orientation="swapped") == []
