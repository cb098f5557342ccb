"""What the table says, as a value: rows in order, the columns and their words, what changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from loudmerge.compat.judging.change import Change, fails
from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    OK,
    REFUSED,
    STATUSES,
    UNREACHABLE,
    CellResult,
)

ABSENT = "–"
GOOD, BAD, WITHHELD = "✓", "✗", "R"

SYMBOLS: Mapping[str, str] = {OK: GOOD, FAILED: BAD, NOT_INSTALLED: "⊘", UNREACHABLE: "?", NOT_RUN: ABSENT}
"""One for each status: a reader without colours tells them apart."""

MEANINGS: Mapping[str, str] = {
    OK: "all that matrix.toml expects was shown",
    FAILED: "it ran and fell short; see Shortfalls",
    NOT_INSTALLED: "pip could not make the environment",
    UNREACHABLE: "it needs a host that was not reached; never counted as a pass",
    NOT_RUN: "it was not asked for, or never came to it",
}


@dataclass(frozen=True)
class Column:
    """One column. meaning: one line. text: what it shows of a row. checks: the shortfalls that mark it."""

    title: str
    group: str
    meaning: str
    text: Callable[[CellResult], str]
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overview:
    """All of the table. changes: by cell, empty without older results. lag: package -> newer release."""

    rows: tuple[CellResult, ...]
    generated: datetime
    version: str
    changes: Mapping[str, Change] = field(default_factory=dict)
    lag: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[Column, ...]:
        """COLUMNS, with what changed behind the status where there are older results."""
        if not self.changes:
            return COLUMNS
        changed = Column("change", "", "against the older results", lambda row: self.changes[row.cell].text)
        return (*COLUMNS[:2], changed, *COLUMNS[2:])

    @property
    def counts(self) -> str:
        """`9 cells: 8 ok, 1 not-run`, and what changed."""
        of = {status: sum(row.status == status for row in self.rows) for status in STATUSES}
        parts = [f"{number} {status}" for status, number in of.items() if number]
        text = f"{_count(len(self.rows), 'cell')}: {', '.join(parts)}" if parts else "no cells"
        words = [change.word for change in self.changes.values()]
        changed = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
        return text + (f". Against the older results: {', '.join(changed)}" if changed else "")

    def failing(self, optional: Collection[str]) -> dict[str, Change]:
        """By cell, the changes for which the comparison fails. optional: cells that may be unreachable."""
        rows = [row for row in self.rows if row.cell in self.changes]
        return {
            row.cell: self.changes[row.cell]
            for row in rows
            if fails(self.changes[row.cell], row, optional=row.cell in optional)
        }

    @property
    def lagging(self) -> str:
        """Which packages have a release that no cell has; empty where none has."""
        newer = ", ".join(f"{package} {version}" for package, version in self.lag.items())
        return f"Released since, and in no cell yet: {newer}" if newer else ""

    def shared(self, package: str) -> str:
        """The one version that all rows have; else each version with its cells."""
        cells: dict[str, list[str]] = {}
        for row in self.rows:
            if package in row.versions:
                cells.setdefault(row.versions[package], []).append(row.cell)
        if len(cells) == 1:
            return next(iter(cells))
        return "; ".join(f"{version} ({', '.join(names)})" for version, names in cells.items()) or "not known"


def kl(value: float) -> str:
    """A KL: three digits from 0.01 on (`1.86`), else two (`1.6e-5`)."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) >= 1e-2:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float) -> str:
    """A share to four digits, rounded down: 1.0000 is all of it."""
    return f"{math.floor(value * 10_000) / 10_000:.4f}" if math.isfinite(value * 10_000) else str(value)


def path(row: CellResult) -> str:
    """`fused, swapped` or `per-expert`."""
    return ", ".join(part for part in (row.path, row.orientation) if part) or ABSENT


def ratio(pair: tuple[int, int] | None) -> str:
    """`18432/18432`."""
    return ABSENT if pair is None else f"{pair[0]}/{pair[1]}"


def symbol(outcome: str | None) -> str:
    """Of a family's or an adapter's outcome, None where it was not run."""
    if outcome is None:
        return ABSENT
    return GOOD if outcome == OK else WITHHELD if outcome.startswith(REFUSED) else BAD


def good(outcomes: Mapping[str, str]) -> str:
    """`49/49, 3 refused`: how many are ok, of those that were to be merged."""
    if not outcomes:
        return ABSENT
    symbols = [symbol(outcome) for outcome in outcomes.values()]
    refused = symbols.count(WITHHELD)
    text = f"{symbols.count(GOOD)}/{len(symbols) - refused}"
    return f"{text}, {refused} refused" if refused else text


def figure(name: str, shown: Callable[[float], str]) -> Callable[[CellResult], str]:
    """Reads one figure of a row."""
    return lambda row: ABSENT if row.figures is None else shown(getattr(row.figures, name))


def version(package: str) -> Callable[[CellResult], str]:
    """Reads one version of a row."""
    return lambda row: row.versions.get(package, ABSENT)


def named(row: CellResult) -> str:
    """The cell's name, with its lane where that is neither `released` nor the name."""
    return row.cell if row.lane in ("released", row.cell) else f"{row.cell} ({row.lane})"


def status(row: CellResult) -> str:
    """`✓ ok`."""
    return f"{SYMBOLS[row.status]} {row.status}"


def tests(row: CellResult) -> str:
    """`1203 / 0 / 14`."""
    counted = row.tests
    return ABSENT if counted is None else f"{counted.passed} / {counted.failed} / {counted.skipped}"


def _samples(row: CellResult) -> str:
    return ABSENT if row.figures is None else ratio(row.figures.samples)


def _seconds(row: CellResult) -> str:
    return f"{row.seconds:.0f}" if row.seconds else ABSENT


def _kl_column(title: str, name: str, meaning: str) -> Column:
    return Column(f"KL {title}", "KL, nats a token", meaning, figure(name, kl), (name,))


COMBINATION = "combination"
_MERGE = "merge"
_AGREEMENT = "agreement"
_CHECKS = "checks"

COLUMNS: tuple[Column, ...] = (
    Column("cell", "", "its name in matrix.toml; a lane other than released in brackets", named),
    Column("status", "", "ok, failed, not-installed, unreachable or not-run", status),
    Column(
        "transformers", COMBINATION, "as installed; as pinned where not installed", version("transformers")
    ),
    Column("peft", COMBINATION, "as for transformers", version("peft")),
    Column("trl", COMBINATION, "as for transformers", version("trl")),
    Column(
        "path",
        _MERGE,
        "how the adapter holds its experts, and for fused ones the orientation",
        path,
        ("path", "orientation"),
    ),
    Column(
        "merged",
        _MERGE,
        "per-expert projections applied, of those attempted",
        lambda row: ratio(row.merged),
        ("merged",),
    ),
    Column(
        "kept",
        _MERGE,
        "share of the update that the bfloat16 file holds (delta_kept)",
        figure("delta_kept", share),
        ("delta_kept",),
    ),
    _kl_column("base‖trained", "kl_base_trained", "how far the training moved the model"),
    _kl_column(
        "base‖merged", "kl_base_merged", "how far the merged model is from the base: base‖trained again"
    ),
    _kl_column(
        "trained‖merged", "kl_trained_merged", "what the bfloat16 merge is off, in float32 arithmetic"
    ),
    _kl_column(
        "float32 merge", "kl_float32_merge", "what a merge written in float32 is off: is the merge right?"
    ),
    _kl_column("noise floor", "kl_floor", "the trained weights in float32 against bfloat16 arithmetic"),
    _kl_column(
        "in bfloat16",
        "kl_bfloat16_arithmetic",
        "trained‖merged, both run in bfloat16: what unslothai/unsloth-zoo#647 reports",
    ),
    Column(
        "top-1",
        _AGREEMENT,
        "share of tokens where trained and merged prefer the same next token",
        figure("top1_agreement", share),
        ("top1_agreement",),
    ),
    Column("samples", _AGREEMENT, "greedy samples that are the same", _samples, ("samples",)),
    Column("tests", _CHECKS, "passed / failed / skipped", tests, ("tests",)),
    Column(
        "families",
        _CHECKS,
        "model families ok, of those to be merged; and refused by design",
        lambda row: good(row.families),
        ("families",),
    ),
    Column(
        "crossed",
        _CHECKS,
        "adapters of other cells that give the same bytes here",
        lambda row: good(row.crossed),
        ("crossed",),
    ),
    Column("seconds", _CHECKS, "of all its stages", _seconds, ("seconds",)),
)


def why(row: CellResult) -> str:
    """What the run says of a row that stopped early, or is of another run; and of which day and source."""
    said = row.detail or ("" if row.figures else "no reason was recorded")
    of = ", ".join(part for part in (row.date, row.source and f"source {row.source[:12]}") if part)
    return "; ".join(part for part in (said, row.date and f"of {of}") if part)


def marked(column: Column, row: CellResult) -> bool:
    """Whether the row falls short in this column."""
    return any(shortfall.check in column.checks for shortfall in row.shortfalls)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
