"""A tool's verdicts, summed: for people, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loudmerge.conformance.judge import VERDICTS, Verdict

SCHEMA = 1


@dataclass(frozen=True)
class Scorecard:
    """tool: its name. date: ISO, of the run. versions: package to version. command: how it was run."""

    tool: str
    date: str
    command: str
    verdicts: tuple[Verdict, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        return sum(verdict.passed for verdict in self.verdicts)

    @property
    def ok(self) -> bool:
        return self.passed == len(self.verdicts) > 0

    @property
    def score(self) -> str:
        """`passed/all`, and the percentage: 100 % only where all passed."""
        total = len(self.verdicts)
        return f"{self.passed}/{total}, {100 * self.passed // total if total else 0} %"

    def counts(self) -> dict[str, int]:
        """How many cases got each verdict."""
        found = Counter(verdict.verdict for verdict in self.verdicts)
        return {name: found[name] for name in VERDICTS}

    def topics(self) -> dict[str, tuple[int, int]]:
        """(passed, all) of each topic, in the order of the cases' topics."""
        names = sorted({verdict.topic for verdict in self.verdicts})
        found = {
            name: [verdict.passed for verdict in self.verdicts if verdict.topic == name] for name in names
        }
        return {name: (sum(passed), len(passed)) for name, passed in found.items()}

    def with_verdict(self, *names: str) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.verdict in names]

    def to_json(self, *, brief: bool = False) -> dict[str, Any]:
        """The document of `--json`. brief: without what the tool printed."""
        document = {
            "schema": SCHEMA,
            "tool": self.tool,
            "versions": dict(self.versions),
            "date": self.date,
            "command": self.command,
            "passed": self.passed,
            "total": len(self.verdicts),
            "counts": self.counts(),
        }
        verdicts = [replace(verdict, said="") if brief else verdict for verdict in self.verdicts]
        return {**document, "verdicts": [asdict(verdict) for verdict in verdicts]}


def read_scorecard(file: Path) -> Scorecard:
    """A scorecard that `--json` wrote. Raises ValueError for one of another schema."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{file}: found schema {document.get('schema')!r}, expected {SCHEMA}")
    verdicts = tuple(Verdict(**values) for values in document["verdicts"])
    return Scorecard(document["tool"], document["date"], document["command"], verdicts, document["versions"])


def show(card: Scorecard, console: Console) -> None:
    """Prints it: what failed, each topic, and the score."""
    for verdict in card.verdicts:
        if not verdict.passed:
            console.print(
                f"{verdict.verdict}  {verdict.case}: {verdict.detail}", markup=False, highlight=False
            )
    table = Table("topic", "passed", "of")
    for topic, (passed, total) in card.topics().items():
        table.add_row(topic, str(passed), str(total), style="" if passed == total else "bold")
    console.print(table)
    counts = ", ".join(f"{count} {name}" for name, count in card.counts().items() if count)
    console.print(f"{card.tool}: {card.score} ({counts})", markup=False, highlight=False)
