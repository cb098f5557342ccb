"""What `bisect` asks of each version: checks of a figure, a cell's whole expectation, or a pytest node.

A question is a command for an environment's Python, and how its answer is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loudmerge.compat.inside import junit
from loudmerge.compat.judging.cells import PATHS, Expectation
from loudmerge.compat.judging.result import NUMBERS, CellResult
from loudmerge.compat.judging.verdict import judged
from loudmerge.layout import LoraBLayout

LAYOUT = ("path", "orientation", "lora_b_layout")
"""What the installed PEFT can be asked without a training."""
OUTCOMES = (junit.FAILED, junit.SKIPPED, junit.PASSED)
COUNTS = ("merged", "samples")
CHECKS = (*LAYOUT, *COUNTS, *NUMBERS)
OF_A_JOURNEY = ("path", "orientation", *COUNTS, *NUMBERS)
"""What a training, merge and comparison shows."""

VALUES: Mapping[str, str] = {
    "path": "|".join(PATHS),
    "orientation": "standard|swapped|none",
    "lora_b_layout": "|".join((*(layout.value for layout in LoraBLayout), "none")),
    "merged": "[0-9]+/[0-9]+",
    "samples": "[0-9]+/[0-9]+",
}
"""What the value of a check can be: a pattern."""

_CHECK = re.compile(r"(?P<name>\w+)(?:(?P<relation><=|>=|=)(?P<value>[^=<>\s]+))?")


@dataclass(frozen=True)
class Answer:
    """state: what is compared between versions; where equal, nothing changed. shown: the evidence."""

    state: tuple[str, ...]
    shown: str


@runtime_checkable
class Question(Protocol):
    """One question, put to each version."""

    @property
    def text(self) -> str:
        """What is asked: `orientation=swapped`."""

    def command(self, scratch: Path) -> Sequence[str]:
        """What an environment's Python is called with; it may write into the directory `scratch`."""

    def read(self, scratch: Path, code: int) -> Answer | None:
        """The answer, given the exit code; None where the command answered nothing: it crashed."""


@dataclass(frozen=True)
class Check:
    """`orientation` (any change counts), `orientation=swapped`, `kl_trained_merged<=1e-3`, `samples=3/3`."""

    name: str
    relation: str = ""
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Check:
        """Raises ValueError naming what is not understood, or can never be so."""
        found = _CHECK.fullmatch(text.replace(" ", ""))
        if found is None or found["name"] not in CHECKS:
            raise ValueError(
                f"found {text!r}, expected NAME, NAME=VALUE, NAME<=NUMBER or NAME>=NUMBER, NAME one of "
                f"{', '.join(CHECKS)}"
            )
        name, relation, value = found["name"], found["relation"] or "", found["value"] or ""
        if name in NUMBERS and relation not in ("<=", ">="):
            raise ValueError(
                f"found {text!r}, expected {name}<=NUMBER or {name}>=NUMBER: no two runs are equal"
            )
        if relation in ("<=", ">="):
            if name not in NUMBERS:
                raise ValueError(f"found {text!r}, expected {name} or {name}=VALUE: it is no number")
            _number(text, value)
        elif relation and not re.fullmatch(VALUES[name], value):
            raise ValueError(f"found {text!r}, expected one of {VALUES[name]} after {name}=")
        return cls(name, relation, value)

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.value}"

    def state(self, found: Any) -> str:
        """`met` or `not met`; without a value, what was found."""
        if not self.relation:
            return shown(found)
        if self.relation == "=":
            met = shown(found) == self.value
        else:
            number = float(found)
            met = number <= float(self.value) if self.relation == "<=" else number >= float(self.value)
        return "met" if met else "not met"


def _number(text: str, value: str) -> None:
    said = f"found {text!r}, expected a number after its relation"
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(said) from error
    if not math.isfinite(number):
        raise ValueError(said)


def shown(found: Any) -> str:
    """A value of CELL.json as a person writes it: `3/3` for a pair of counts, `none` for null."""
    if found is None:
        return "none"
    if isinstance(found, Mapping):
        return "/".join(str(count) for count in found.values())
    return f"{found:.4g}" if isinstance(found, float) else str(found)


@dataclass(frozen=True)
class Checks:
    """Checks of what one run shows; those of LAYOUT alone need no training."""

    checks: tuple[Check, ...]

    @property
    def text(self) -> str:
        return ", ".join(map(str, self.checks))

    def command(self, scratch: Path) -> Sequence[str]:
        names = {check.name for check in self.checks}
        if names <= set(LAYOUT):
            return _observe("layout", scratch)
        return _observe("both" if names - set(OF_A_JOURNEY) else "journey", scratch)

    def read(self, scratch: Path, code: int) -> Answer | None:
        found = _observed(scratch, code)
        if found is None:
            return None
        words = [f"{check.name} {shown(found[check.name])}" for check in self.checks]
        evidence = f" ({found['evidence']})" if found.get("evidence") else ""
        states = tuple(check.state(found[check.name]) for check in self.checks)
        return Answer(states, ", ".join(words) + evidence)


@dataclass(frozen=True)
class Expected:
    """All that matrix.toml expects of a cell's end-to-end run; its tests and families are not asked for."""

    cell: str
    expects: Expectation

    @property
    def text(self) -> str:
        return f"what matrix.toml expects of {self.cell}"

    def command(self, scratch: Path) -> Sequence[str]:
        return _observe("journey", scratch)

    def read(self, scratch: Path, code: int) -> Answer | None:
        found = _observed(scratch, code)
        if found is None:
            return None
        shortfalls = judged(self.expects, CellResult.from_json(found)).shortfalls
        short = [each for each in shortfalls if each.check not in ("tests", "families", "crossed")]
        words = [f"{each.check}: found {each.found}, expected {each.expected}" for each in short]
        return Answer(tuple(sorted(each.check for each in short)), "; ".join(words) or "all as expected")


@dataclass(frozen=True)
class Node:
    """A pytest node, by what became of its tests."""

    node: str

    @property
    def text(self) -> str:
        return self.node

    def check(self, root: Path) -> None:
        """Raises ValueError where the checkout has no such node: no version would answer."""
        file, *names = self.node.split("::")
        place, name = root / file, names[0].partition("[")[0] if names else ""
        if not (place.is_file() or (place.is_dir() and not names)):
            raise ValueError(f"--node: found no {file}, expected a pytest node: tests/…::test_…")
        if name and not re.search(rf"\b{re.escape(name)}\b", place.read_text("utf-8")):
            raise ValueError(f"--node: found no {name} in {file}")

    def command(self, scratch: Path) -> Sequence[str]:
        report = f"--junitxml={scratch / 'junit.xml'}"
        return ("-m", "pytest", "-q", "-p", "no:cacheprovider", report, self.node)

    def read(self, scratch: Path, code: int) -> Answer | None:
        """Exit codes over 1 mean that pytest did not come to run the node."""
        report = scratch / "junit.xml"
        if code not in (0, 1) or not report.is_file():
            return None
        cases = junit.read(report)
        counts = {word: sum(case.outcome == word for case in cases) for word in OUTCOMES}
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        reasons = [f"{case.name}: {case.reason}" for case in cases if case.outcome != junit.PASSED]
        # Which failed, too: of several, one more may be what changed.
        failed = sorted(case.id for case in cases if case.outcome == junit.FAILED)
        state = (*(word for word, count in counts.items() if count), *failed)
        return Answer(state, f"{words}: {reasons[0]}" if reasons else words)


def _observe(what: str, scratch: Path) -> Sequence[str]:
    return ("-m", "loudmerge.compat.inside.observe", what, str(scratch / "found.json"))


def _observed(scratch: Path, code: int) -> dict[str, Any] | None:
    if code:
        return None
    found: dict[str, Any] = json.loads((scratch / "found.json").read_text("utf-8"))
    return found
