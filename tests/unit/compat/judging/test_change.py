"""Base against head: every change of status, and what is lost while the status stays."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest

from loudmerge.compat.judging.change import (
    FIXED,
    MEANINGS,
    NEW,
    REGRESSED,
    SAME,
    SYMBOLS,
    adapterless,
    compare,
    fails,
    rows_and_changes,
)
from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    OK,
    STATUSES,
    UNREACHABLE,
    CellResult,
    Shortfall,
    Tests,
)
from tests.unit.compat import rows
from tests.unit.compat.made import FIGURES

HEAD = (OK, FAILED, NOT_INSTALLED, UNREACHABLE, NOT_RUN)
TRANSITIONS = {
    OK: (SAME, REGRESSED, REGRESSED, REGRESSED, REGRESSED),
    FAILED: (FIXED, SAME, REGRESSED, SAME, SAME),
    NOT_INSTALLED: (FIXED, SAME, SAME, SAME, SAME),
    UNREACHABLE: (NEW, NEW, NEW, SAME, SAME),
    NOT_RUN: (NEW, NEW, NEW, SAME, SAME),
    None: (NEW, NEW, NEW, NEW, NEW),
}
EXPECTED = {
    (base, head): word for base, line in TRANSITIONS.items() for head, word in zip(HEAD, line, strict=True)
}


def bare(status: str) -> CellResult:
    return CellResult("a", "released", status, {})


@pytest.mark.parametrize(("base", "head"), [*product((*STATUSES, None), STATUSES)])
def test_each_change_of_status_has_its_word(base: str | None, head: str) -> None:
    change = compare(bare(head), None if base is None else bare(base))
    assert change.word == EXPECTED[base, head]
    assert change.detail == (f"now {head}; no older result" if base is None else f"{base} → {head}")


def test_each_word_has_a_symbol_and_a_meaning() -> None:
    words = {SAME, REGRESSED, FIXED, NEW}
    assert set(SYMBOLS) == set(MEANINGS) == words
    assert len(set(SYMBOLS.values())) == len(words)


@pytest.mark.parametrize("status", [OK, FAILED])
@pytest.mark.parametrize(
    ("head", "lost"),
    [
        ({"families": {**rows.SWAPPED.families, "jamba": "no forward"}}, "family jamba"),
        (
            {"families": {**rows.SWAPPED.families, "jamba": "refused by design: unsupported-base"}},
            "family jamba",
        ),
        (
            {"families": {name: says for name, says in rows.SWAPPED.families.items() if name != "jamba"}},
            "family jamba",
        ),
        (
            {"crossed": {**rows.SWAPPED.crossed, rows.STANDARD.cell: "other bytes"}},
            f"adapter of {rows.STANDARD.cell}",
        ),
        (
            {"crossed": {rows.PER_EXPERT.cell: OK}},
            f"adapter of {rows.STANDARD.cell}",
        ),
        ({"shortfalls": (Shortfall("samples", "2 of 3", "3 of 3"),)}, "samples"),
        ({"tests": Tests(1202, 1, 17, failures=("test_a",))}, "test_a"),
        ({"tests": Tests(1, 0, 1219)}, "tests: 1 passed, before 1203"),
        ({"tests": None}, "tests: 0 passed, before 1203"),
    ],
    ids=[
        "family",
        "family-refused",
        "family-gone",
        "adapter",
        "adapter-gone",
        "check",
        "test",
        "tests-gone",
        "no-tests",
    ],
)
def test_a_cell_that_loses_something_has_regressed(status: str, head: dict[str, object], lost: str) -> None:
    base = replace(rows.SWAPPED, status=status)
    change = compare(replace(base, **head), base)  # type: ignore[arg-type]
    assert (change.word, change.detail) == (REGRESSED, f"{status} → {status}: {lost}")
    assert compare(base, replace(base, **head)).word == SAME  # type: ignore[arg-type]


def test_what_failed_before_too_is_no_loss() -> None:
    assert compare(rows.BROKEN, rows.BROKEN).word == SAME


@pytest.mark.parametrize(
    ("was", "now", "lost"),
    [
        ("refused by design: x", "other bytes", True),
        (None, "other bytes", True),
        (None, "refused by design: x", False),
        ("no forward", "other bytes", False),
        ("other bytes", "refused by design: x", False),
    ],
)
def test_a_family_that_is_worse_than_before_is_lost_beside_one_that_failed(
    was: str | None, now: str, lost: bool
) -> None:
    base = replace(
        rows.SWAPPED,
        status=FAILED,
        families={**rows.SWAPPED.families, "jamba": "no forward", **({"new": was} if was else {})},
        shortfalls=(Shortfall("families", "jamba: no forward", "each merged, or refused by design"),),
    )
    change = compare(replace(base, families={**base.families, "new": now}), base)
    assert change.word == (REGRESSED if lost else SAME)
    assert change.detail.endswith("family new") == lost


def test_what_failed_before_and_has_vanished_is_lost() -> None:
    """A part that died shows nothing at all, which is less than a failure."""
    families = {name: says for name, says in rows.BROKEN.families.items() if name != "jamba"}
    crossed = {rows.PER_EXPERT.cell: OK}
    change = compare(replace(rows.BROKEN, families=families, crossed=crossed), rows.BROKEN)
    assert (change.word, change.detail) == (
        REGRESSED,
        f"failed → failed: family jamba, adapter of {rows.SWAPPED.cell}",
    )


def test_a_cell_that_is_ok_because_it_shows_less_is_not_fixed() -> None:
    fixed = replace(rows.SWAPPED, cell=rows.BROKEN.cell, crossed=rows.BROKEN.crossed)
    assert compare(fixed, rows.BROKEN).word == FIXED
    one = replace(fixed, families={"mixtral": OK})
    assert compare(one, rows.BROKEN).word == REGRESSED


def test_a_tenth_of_the_tests_may_go() -> None:
    base = replace(rows.SWAPPED, tests=Tests(1000, 0, 0))
    assert compare(replace(base, tests=Tests(900, 0, 0)), base).word == SAME
    change = compare(replace(base, tests=Tests(899, 0, 0)), base)
    assert (change.word, change.detail) == (REGRESSED, "ok → ok: tests: 899 passed, before 1000")


def test_a_check_that_fails_by_more_than_before_has_regressed() -> None:
    assert rows.BROKEN.figures is not None
    figures = replace(rows.BROKEN.figures, samples=(0, 3))
    change = compare(replace(rows.BROKEN, merged=(0, 192), figures=figures), rows.BROKEN)
    assert (change.word, change.detail) == (
        REGRESSED,
        "failed → failed: merged 0 / 192, before 191 / 192, samples 0 / 3, before 1 / 3",
    )


def far(check: str, value: float, status: str = FAILED) -> CellResult:
    """A row whose one figure is this, and falls short where the row does."""
    short = (Shortfall(check, f"{value:.3g}", "less"),) if status == FAILED else ()
    figures = replace(FIGURES, **{check: value})  # type: ignore[arg-type]
    return replace(rows.SWAPPED, status=status, shortfalls=short, figures=figures)


@pytest.mark.parametrize("check", ["kl_float32_merge", "kl_trained_merged", "kl_bfloat16_arithmetic"])
def test_a_merge_that_is_off_ten_times_as_far_as_before_has_regressed(check: str) -> None:
    change = compare(far(check, 1.2), far(check, 2e-8))
    assert (change.word, change.detail) == (REGRESSED, f"failed → failed: {check} 1.2, before 2e-08")
    assert compare(far(check, math.nan), far(check, 2e-8)).word == REGRESSED
    assert compare(far(check, 9e-8), far(check, 2e-8)).word == SAME
    assert compare(far(check, 9e-8), far(check, 1e-12)).word == SAME, "float32's rounding"


def test_a_merge_within_its_bound_may_be_off_farther_than_before() -> None:
    now = far("kl_float32_merge", 9e-9, OK)
    assert compare(now, far("kl_float32_merge", 1e-12, OK)).word == SAME
    assert compare(far("kl_base_trained", 0.1), far("kl_base_trained", 0.4)).word == SAME


def test_fewer_counts_than_before_are_no_loss_where_all_of_them_are_there() -> None:
    base = replace(rows.BROKEN, merged=(192, 192))
    assert compare(replace(base, merged=(96, 96)), base).word == SAME


def test_a_cell_whose_samples_are_as_many_as_are_asked_for_may_have_fewer_than_before() -> None:
    figures = replace(FIGURES, samples=(2, 3))
    assert compare(replace(rows.SWAPPED, figures=figures), rows.SWAPPED).word == SAME


def test_a_failing_cell_without_figures_is_told_by_its_checks() -> None:
    head = replace(rows.BROKEN, figures=None, merged=None)
    assert compare(head, rows.BROKEN).word == SAME


def test_why_the_older_result_shows_nothing_is_said() -> None:
    base = replace(bare(UNREACHABLE), detail="no host")
    assert compare(bare(OK), base).detail == "unreachable → ok; the older result: no host"


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("base", [None, UNREACHABLE, NOT_RUN])
@pytest.mark.parametrize("status", [OK, FAILED, NOT_INSTALLED])
def test_what_was_not_shown_before_passes_only_where_it_is_ok(
    status: str, base: str | None, optional: bool
) -> None:
    row = bare(status)
    change = compare(row, None if base is None else bare(base))
    assert fails(change, row, optional=optional) == (status != OK)


def test_a_new_cell_that_shows_nothing_fails_unless_it_is_optional_and_was_not_reached() -> None:
    for status, optional, expected in (
        (NOT_RUN, False, True),
        (NOT_RUN, True, True),
        (UNREACHABLE, False, True),
        (UNREACHABLE, True, False),
    ):
        assert fails(compare(bare(status), None), bare(status), optional=optional) == expected


def test_a_regressed_cell_fails_and_one_that_is_as_before_or_fixed_does_not() -> None:
    for head, base, expected in ((FAILED, OK, True), (FAILED, FAILED, False), (OK, FAILED, False)):
        assert fails(compare(bare(head), bare(base)), bare(head), optional=False) == expected


@pytest.mark.parametrize("base", [*STATUSES, None])
def test_an_optional_cell_that_is_unreachable_now_fails_no_comparison(base: str | None) -> None:
    row = bare(UNREACHABLE)
    change = compare(row, None if base is None else bare(base))
    assert not fails(change, row, optional=True)
    assert fails(change, row, optional=False) == (base in (None, OK))


def changed(*head: CellResult, base: tuple[CellResult, ...]) -> str:
    """What the first row changed."""
    return rows_and_changes(head, base)[1][head[0].cell].detail


def test_an_adapter_that_was_not_there_to_be_merged_is_no_loss() -> None:
    """Its own cell says what became of it. A cell that merged none has lost those that were there."""
    all_of_them = (rows.SWAPPED, rows.STANDARD, rows.PER_EXPERT)
    untrained = replace(rows.PER_EXPERT, status=FAILED, figures=None)
    lost = f"ok → ok: adapter of {rows.STANDARD.cell}"
    none = replace(rows.SWAPPED, crossed={})
    assert changed(none, rows.STANDARD, untrained, base=all_of_them) == lost
    assert changed(none, rows.STANDARD, base=all_of_them) == lost
    assert changed(none, *all_of_them[1:], base=all_of_them) == f"{lost}, adapter of {rows.PER_EXPERT.cell}"


def test_the_newest_release_that_has_become_a_cell_is_no_longer_merged_as_two() -> None:
    """The lane `latest` then has the versions of that cell, which runs for both: no adapter of its own."""
    latest = replace(rows.STANDARD, cell="latest", lane="latest")
    older = replace(latest, versions={**latest.versions, "peft": "0.22.0"})
    base = replace(rows.SWAPPED, crossed={"latest": OK})
    head = replace(rows.SWAPPED, crossed={rows.STANDARD.cell: OK})
    assert changed(head, rows.STANDARD, latest, base=(base, older)) == "ok → ok"
    assert changed(head, rows.STANDARD, older, base=(base, older)) == "ok → ok: adapter of latest"


def test_two_pythons_make_no_two_cells_of_one() -> None:
    """A runner's image has a newer patch of Python, and torch may come from elsewhere."""
    latest = replace(rows.STANDARD, cell="latest", lane="latest")
    latest = replace(latest, versions={**latest.versions, "python": "3.11.14", "torch": "2.13.0+cpu"})
    assert latest.versions != rows.STANDARD.versions
    assert adapterless((rows.STANDARD, latest)) == {"latest"}


def test_many_losses_are_counted() -> None:
    change = compare(replace(rows.SWAPPED, families={}), rows.SWAPPED)
    assert change.detail.startswith("ok → ok: family afmoe, family aria_text, ")
    assert change.detail.endswith(f" and {len(rows.SWAPPED.families) - 8} more")


def test_a_cell_that_only_the_base_has_is_a_row_that_regressed() -> None:
    shown, changes = rows_and_changes([rows.STANDARD], [rows.SWAPPED, rows.STANDARD, rows.UNINSTALLED])
    assert [row.cell for row in shown] == [rows.STANDARD.cell, rows.SWAPPED.cell, rows.UNINSTALLED.cell]
    assert [row.status for row in shown] == [OK, NOT_RUN, NOT_RUN]
    assert shown[1].versions == rows.SWAPPED.versions
    assert shown[1].detail == "only the older results have this cell"
    assert [changes[row.cell].word for row in shown] == [SAME, REGRESSED, SAME]
