"""Does a cell show what matrix.toml expects? Expectation x CellResult -> shortfalls, one for each check.

A figure that cannot be (nan, infinite, 5 of 3 samples) falls short, whatever is expected of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loudmerge.compat.cells import Expectation
from loudmerge.compat.result import FAILED, NUMBERS, OK, CellResult, Figures, Shortfall, Tests

RAN = (OK, FAILED)
"""The statuses of a cell that ran: the others say why there is nothing to judge."""

REFUSED = "refused by design"
"""What a family's entry begins with that loudmerge refuses, as its tests require."""


VERSIONS = "versions"
"""The check of a part that ran on others than the cell's."""

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
        found = errors.get("journey", "no figures")
        yield Shortfall("journey", found, "figures of a trained and merged model")
    else:
        yield from _ways(expected, result)
        yield from _figures(expected, result.figures)
    yield from _tests(result.tests, errors.get("tests", "none ran"))
    yield from _families(result.families, errors.get("families", "none"))
    yield from _all_ok("crossed", result.crossed, "the same bytes as where it was trained")


def _ways(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    if result.path != expected.path:
        yield Shortfall("path", str(result.path), expected.path)
    if result.orientation != expected.orientation:
        yield Shortfall("orientation", str(result.orientation), str(expected.orientation))
    applied, attempted = result.merged or (0, 0)
    if not 0 < applied == attempted:
        yield Shortfall("merged", f"{applied} / {attempted}", "all of them, and more than none")


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
    if not found.delta_kept >= expected.delta_kept_at_least:
        yield Shortfall("delta_kept", f"{found.delta_kept:.4f}", f"at least {expected.delta_kept_at_least:g}")
    matched, total = found.samples
    least = max(total, 1) if expected.samples == "all" else int(expected.samples)
    if matched < least:
        yield Shortfall("samples", f"{matched} / {total}", f"{least} the same")


def _tests(tests: Tests | None, absent: str) -> Iterator[Shortfall]:
    if tests is None:
        yield Shortfall("tests", absent, "all of them")
    elif tests.failed or tests.failures:
        first = f": {tests.failures[0]}" if tests.failures else ""
        yield Shortfall("tests", f"{tests.failed} failed{first}", "none")
    elif not tests.passed:
        yield Shortfall("tests", f"{tests.passed} passed, {tests.skipped} skipped", "some that passed")


def _families(found: Mapping[str, str], absent: str) -> Iterator[Shortfall]:
    """Each is merged, or refused by design; one at least is merged."""
    expected = "each merged, or refused by design"
    others = {name: says for name, says in found.items() if not says.startswith(REFUSED)}
    if not found:
        yield Shortfall("families", absent, expected)
    elif not others:
        yield Shortfall("families", f"all {len(found)} refused by design", "one merged at least")
    yield from _all_ok("families", others, expected)


def _all_ok(check: str, found: Mapping[str, str], expected: str) -> Iterator[Shortfall]:
    bad = {name: says for name, says in found.items() if says != "ok"}
    if bad:
        name, says = next(iter(bad.items()))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        yield Shortfall(check, f"{name}: {says}{more}", expected)
