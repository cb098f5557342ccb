"""Does a cell show what matrix.toml expects? Expectation x CellResult -> shortfalls, one for each check.

A figure that is no number (nan) falls short: every comparison is written so that it fails on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from loudmerge.compat.cells import Expectation
from loudmerge.compat.result import FAILED, OK, CellResult, Figures, Shortfall, Tests

RAN = (OK, FAILED)
"""The statuses of a cell that ran: the others say why there is nothing to judge."""

REFUSED = "refused by design"
"""What a family's entry begins with that loudmerge refuses, as its tests require."""


def judged(expected: Expectation, result: CellResult) -> CellResult:
    """The result with its shortfalls and its status. A cell that did not run stays as it is."""
    if result.status not in RAN:
        return result
    shortfalls = tuple(_shortfalls(expected, result))
    return replace(result, shortfalls=shortfalls, status=FAILED if shortfalls else OK)


def _shortfalls(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    if result.figures is None:
        yield Shortfall("journey", result.detail or "no figures", "figures of a trained and merged model")
    else:
        yield from _ways(expected, result)
        yield from _figures(expected, result.figures)
    yield from _tests(result.tests)
    yield from _all_ok("families", result.families, "each merged, or refused by design", least=1)
    yield from _all_ok("crossed", result.crossed, "the same bytes as where it was trained", least=0)


def _ways(expected: Expectation, result: CellResult) -> Iterator[Shortfall]:
    if result.path != expected.path:
        yield Shortfall("path", str(result.path), expected.path)
    if result.orientation != expected.orientation:
        yield Shortfall("orientation", str(result.orientation), str(expected.orientation))
    applied, attempted = result.merged or (0, 0)
    if not 0 < applied == attempted:
        yield Shortfall("merged", f"{applied} / {attempted}", "all of them, and more than none")


def _figures(expected: Expectation, found: Figures) -> Iterator[Shortfall]:
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


def _tests(tests: Tests | None) -> Iterator[Shortfall]:
    if tests is None:
        yield Shortfall("tests", "none ran", "all of them")
    elif tests.failed or tests.failures:
        first = f": {tests.failures[0]}" if tests.failures else ""
        yield Shortfall("tests", f"{tests.failed} failed{first}", "none")
    elif not tests.passed:
        yield Shortfall("tests", f"0 passed, {tests.skipped} skipped", "some that passed")


def _all_ok(check: str, found: Mapping[str, str], expected: str, *, least: int) -> Iterator[Shortfall]:
    if len(found) < least:
        yield Shortfall(check, "none", expected)
    bad = {name: says for name, says in found.items() if says != "ok" and not says.startswith(REFUSED)}
    if bad:
        name, says = next(iter(bad.items()))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        yield Shortfall(check, f"{name}: {says}{more}", expected)
