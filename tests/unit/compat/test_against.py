"""Base against head: every change of status, and what is lost while the status stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from loudmerge.compat.against import FIXED, MEANINGS, NEW, REGRESSED, SAME, SYMBOLS, compare, rows_and_changes
from loudmerge.compat.result import (
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
        ({"families": {name: OK for name in rows.FAMILIES if name != "jamba"}}, "family jamba"),
        (
            {"crossed": {**rows.SWAPPED.crossed, rows.STANDARD.cell: "other bytes"}},
            f"adapter of {rows.STANDARD.cell}",
        ),
        ({"shortfalls": (Shortfall("samples", "2 of 3", "3 of 3"),)}, "samples"),
        ({"tests": Tests(1202, 1, 17, failures=("test_a",))}, "test_a"),
    ],
    ids=["family", "family-refused", "family-gone", "adapter", "check", "test"],
)
def test_a_cell_that_loses_something_has_regressed(status: str, head: dict[str, object], lost: str) -> None:
    base = replace(rows.SWAPPED, status=status)
    change = compare(replace(base, **head), base)  # type: ignore[arg-type]
    assert (change.word, change.detail) == (REGRESSED, f"{status} → {status}: {lost}")
    assert compare(base, replace(base, **head)).word == SAME  # type: ignore[arg-type]


def test_what_failed_before_too_is_no_loss() -> None:
    assert compare(rows.BROKEN, rows.BROKEN).word == SAME


def test_an_adapter_that_was_not_there_to_be_merged_is_no_loss() -> None:
    assert compare(replace(rows.SWAPPED, crossed={}), rows.SWAPPED).word == SAME


def test_many_losses_are_counted() -> None:
    change = compare(replace(rows.SWAPPED, families={}), rows.SWAPPED)
    assert change.detail.startswith("ok → ok: family afmoe, family aria_text, ")
    assert change.detail.endswith(f" and {len(rows.FAMILIES) - 8} more")


def test_a_cell_that_only_the_base_has_is_a_row_that_regressed() -> None:
    shown, changes = rows_and_changes([rows.STANDARD], [rows.SWAPPED, rows.STANDARD, rows.UNINSTALLED])
    assert [row.cell for row in shown] == [rows.STANDARD.cell, rows.SWAPPED.cell, rows.UNINSTALLED.cell]
    assert [row.status for row in shown] == [OK, NOT_RUN, NOT_RUN]
    assert shown[1].versions == rows.SWAPPED.versions
    assert shown[1].detail == "only the older results have this cell"
    assert [changes[row.cell].word for row in shown] == [SAME, REGRESSED, SAME]
