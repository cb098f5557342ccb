"""Does a cell show what matrix.toml expects? Expectation x CellResult -> shortfalls, one for each check.

A figure that cannot be (nan, infinite, 5 of 3 samples) falls short, whatever is expected of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loudmerge.compat.judging.cells import Expectation
from loudmerge.compat.judging.change import adapterless, packages
from loudmerge.compat.judging.result import (
    FAILED,
    NUMBERS,
    OK,
    REFUSED,
    CellResult,
    Figures,
    Shortfall,
    Tests,
)

RAN = (OK, FAILED)
"""The statuses of a cell that ran: the others say why there is nothing to judge."""


VERSIONS = "versions"
"""The check of a part that ran on others than the cell's."""

SUITE = "tests.unit.test_synthetic_suite"
"""The module of the 52 cases of the original repair, and more: a run without them proves less."""

CROSSED = "cross"
"""The stage in which a cell merges the others' adapters, as cell.CROSS."""

THE_SAME = "the cell's versions in every part"

NOISE = 1e-6
"""How far below 0 rounding may take a KL, in nats a token."""

BOUNDS: Mapping[str, tuple[float, float]] = {"top1_agreement": (0.0, 1.0), "delta_kept": (-math.inf, 1.05)}
"""Between which a figure that is no KL can be. A delta that is added twice is kept twice; rounding alone adds
less than a twentieth."""


def judged(expected: Expectation, result: CellResult) -> CellResult:
    """The result with its shortfalls and its status. A cell that did not run stays as it is."""
    if result.status not in RAN:
        return result
    shortfalls = tuple(_shortfalls(expected, result))
    return replace(result, shortfalls=shortfalls, status=FAILED if shortfalls else OK)


def no_figures(why: str) -> Shortfall:
    """Of a run that shows none."""
    return Shortfall("journey", why, "figures of a trained and merged model")


def _shortfalls(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    found = tuple(_of_what_was_shown(expected, result))
    yield from found
    named = {each.check for each in found}
    for check, error in result.errors.items():
        if check not in named:
            yield Shortfall(check, error, THE_SAME if check == VERSIONS else "a run to its end")


def _of_what_was_shown(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    errors = result.errors
    if result.figures is None:
        yield no_figures(errors.get("journey", "no figures"))
    else:
        yield from _ways(expected, result)
        yield from _figures(expected, result.figures)
        if result.unmoved >= result.figures.samples[1] > 0:
            yield Shortfall("unmoved", f"the base says all {result.unmoved} samples", "one at least is other")
    yield from _tests(expected, result.tests, errors.get("tests", "none ran"))
    yield from _families(expected, result.families, errors.get("families", "none"))
    yield from _all_ok("crossed", result.crossed, "the same bytes as where it was trained")


def _ways(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    if result.path != expected.path:
        yield Shortfall("path", str(result.path), expected.path)
    if result.orientation != expected.orientation:
        yield Shortfall("orientation", str(result.orientation), str(expected.orientation))
    applied, attempted = result.merged or (0, 0)
    if not applied == attempted == expected.merged:
        yield Shortfall("merged", f"{applied} / {attempted}", f"{expected.merged} / {expected.merged}")


def _figures(expected: Expectation, found: Figures) -> Iterator[Shortfall]:
    impossible = tuple(_impossible(found))
    yield from impossible
    named = {each.check for each in impossible}
    yield from (each for each in _short(expected, found) if each.check not in named)


def _impossible(found: Figures) -> Iterator[Shortfall]:
    """Figures that no merge can have, right or wrong: what took them is broken."""
    for name in NUMBERS:
        value, (low, high) = getattr(found, name), BOUNDS.get(name, (-NOISE, math.inf))
        if not low <= value <= high or not math.isfinite(value):
            yield Shortfall(name, f"{value:.3g}", f"a finite number from {low:g} to {high:g}")
    matched, total = found.samples
    if not 0 <= matched <= total:
        yield Shortfall("samples", f"{matched} / {total}", "no more than there are, and no fewer than none")


def _short(expected: Expectation, found: Figures) -> Iterator[Shortfall]:
    moved = found.kl_base_trained
    floor, ceiling = expected.kl_base_trained_at_least, expected.kl_float32_merge_at_most
    share, within = expected.kl_trained_merged_share, expected.kl_base_merged_within
    if not moved >= floor:
        yield Shortfall(
            "kl_base_trained", f"{moved:.3g}", f"at least {floor:g}: the training moved too little"
        )
    if not found.kl_float32_merge <= ceiling:
        yield Shortfall("kl_float32_merge", f"{found.kl_float32_merge:.3g}", f"at most {ceiling:g}")
    if not found.kl_trained_merged <= share * moved:
        expects = f"at most {share:g} of kl_base_trained, {share * moved:.3g}"
        yield Shortfall("kl_trained_merged", f"{found.kl_trained_merged:.3g}", expects)
    if not abs(found.kl_base_merged - moved) <= within * moved:
        expects = f"kl_base_trained, {moved:.4g}, within {within:.0%}"
        yield Shortfall("kl_base_merged", f"{found.kl_base_merged:.4g}", expects)
    coarse = expected.kl_bfloat16_share * moved
    if not found.kl_bfloat16_arithmetic <= coarse:
        expects = f"at most {expected.kl_bfloat16_share:g} of kl_base_trained, {coarse:.3g}"
        yield Shortfall("kl_bfloat16_arithmetic", f"{found.kl_bfloat16_arithmetic:.3g}", expects)
    if not found.delta_kept >= expected.delta_kept_at_least:
        yield Shortfall("delta_kept", f"{found.delta_kept:.4f}", f"at least {expected.delta_kept_at_least:g}")
    if not found.top1_agreement >= expected.top1_at_least:
        yield Shortfall(
            "top1_agreement", f"{found.top1_agreement:.4f}", f"at least {expected.top1_at_least:g}"
        )
    matched, total = found.samples
    least = expected.samples_of if expected.samples == "all" else int(expected.samples)
    if matched < least or total != expected.samples_of:
        yield Shortfall("samples", f"{matched} / {total}", f"{least} of {expected.samples_of} the same")


def _tests(expected: Expectation, tests: Tests | None, absent: str) -> Iterator[Shortfall]:
    if tests is None:
        yield Shortfall("tests", absent, "all of them")
    elif tests.failed or tests.failures:
        first = f": {tests.failures[0]}" if tests.failures else ""
        yield Shortfall("tests", f"{tests.failed} failed{first}", "none")
    elif tests.passed < expected.tests_at_least:
        found = f"{tests.passed} passed, {tests.skipped} skipped"
        yield Shortfall("tests", found, f"{expected.tests_at_least} that passed, at least")
    elif tests.suite < expected.suite_at_least:
        yield Shortfall("tests", f"{tests.suite} passed of {SUITE}", f"{expected.suite_at_least} at least")


def _families(expected: Expectation, found: Mapping[str, str], absent: str) -> Iterator[Shortfall]:
    """Each is merged, or refused by design; not too few are merged."""
    wanted, least = "each merged, or refused by design", expected.families_at_least
    others = {name: says for name, says in found.items() if not says.startswith(REFUSED)}
    bad = tuple(_all_ok("families", others, wanted))
    yield from bad
    if not found:
        yield Shortfall("families", absent, wanted)
    elif not bad and len(others) < least:
        refused = len(found) - len(others)
        yield Shortfall("families", f"{len(others)} merged, {refused} refused by design", f"{least} merged")


def all_crossed(rows: Sequence[CellResult]) -> tuple[CellResult, ...]:
    """The rows of a full run, each with a shortfall where it has not merged all that the others trained.

    Of those whose last stage ran, that is, and of one source. One of the same versions may have run for both.
    """
    without = adapterless(rows)
    trained = [row for row in rows if _has_crossed(row) and row.cell not in without]
    return tuple(_with_missing(row, trained) if _has_crossed(row) else row for row in rows)


def _has_crossed(row: CellResult) -> bool:
    return row.status in RAN and CROSSED in row.stages


def _with_missing(row: CellResult, trained: Sequence[CellResult]) -> CellResult:
    missing = [
        other.cell
        for other in trained
        if other.cell not in row.crossed and other.source == row.source and packages(other) != packages(row)
    ]
    if not missing or "crossed" in {each.check for each in row.shortfalls}:
        return row
    short = Shortfall("crossed", f"nothing of {', '.join(missing)}", "the adapters of all other cells")
    return replace(row, status=FAILED, shortfalls=(*row.shortfalls, short))


def _all_ok(check: str, found: Mapping[str, str], expected: str) -> Iterator[Shortfall]:
    bad = {name: says for name, says in found.items() if says != "ok"}
    if bad:
        name, says = next(iter(bad.items()))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        yield Shortfall(check, f"{name}: {says}{more}", expected)
