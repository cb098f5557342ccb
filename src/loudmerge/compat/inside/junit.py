"""pytest's JUnit file: what passed, failed and was skipped, and why; the same by model family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from loudmerge.compat.judging.result import REFUSED, Tests
from loudmerge.compat.judging.verdict import SUITE

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

OF_A_FAMILY = "test_out_is_what_peft_makes_of_the_live_model"
"""The test that runs once for each family that can be built: its cases name the families."""


@dataclass(frozen=True)
class Case:
    """One test. place: its module's, dotted. reason: of a failure or skip. refused: its property."""

    place: str
    name: str
    outcome: str
    reason: str = ""
    refused: str = ""

    @property
    def id(self) -> str:
        """A node id; the dotted name of a module that could not be imported."""
        return f"{self.place.replace('.', '/')}.py::{self.name}" if self.place else self.name

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]

    @property
    def parameters(self) -> str:
        return self.name.partition("[")[2].removesuffix("]")


def read(file: Path) -> tuple[Case, ...]:
    """The tests in pytest's JUnit file; one that failed and then failed to clean up is there once."""
    root = ET.parse(file).getroot()  # noqa: S314 - pytest's own, just written
    found: dict[tuple[str, str], Case] = {}
    for element in root.iter("testcase"):
        case = _case(element)
        found.setdefault((case.place, case.name), case)
    return tuple(found.values())


def _case(element: ET.Element) -> Case:
    place, name = element.get("classname", ""), element.get("name", "")
    refused = "".join(
        item.get("value", "") for item in element.iter("property") if item.get("name") == "refused"
    )
    for child in element:
        if child.tag in ("failure", "error"):
            return Case(place, name, FAILED, _line(child.get("message", "")), refused)
        if child.tag == "skipped":
            return Case(place, name, SKIPPED, _line(child.get("message", "")), refused)
    return Case(place, name, PASSED, "", refused)


def _line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[0][:300] if lines else "no reason given"


def tests(cases: Iterable[Case]) -> Tests:
    """How many passed, failed and were skipped, and why."""
    cases = tuple(cases)
    failed = tuple(case.id for case in cases if case.outcome == FAILED)
    skips = Counter(case.reason for case in cases if case.outcome == SKIPPED)
    passed = [case for case in cases if case.outcome == PASSED]
    suite = sum(case.place == SUITE for case in passed)
    return Tests(len(passed), len(failed), skips.total(), dict(skips), failed, suite)


def families(cases: Sequence[Case]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Family -> its worst: a failure's reason, "ok", or "refused by design: CODE"; and failures of no family.

    A case is of a family where its parameters or the end of its function's name say so. A skip says that a
    test has nothing to ask of a family; a family that was only skipped has the reason.
    """
    names = sorted(case.parameters for case in cases if case.function == OF_A_FAMILY)
    by_family: dict[str, list[Case]] = {name: [] for name in names}
    other = []
    for case in cases:
        family = _family(case, names)
        if family:
            by_family[family].append(case)
        elif case.outcome == FAILED:
            other.append(case.id)
    return {family: _worst(found) for family, found in by_family.items()}, tuple(other)


def _family(case: Case, names: Sequence[str]) -> str | None:
    for name in sorted(names, key=len, reverse=True):  # one may begin with another
        in_parameters = re.search(rf"(^|-){re.escape(name)}($|-)", case.parameters)
        if in_parameters or case.function.endswith(f"_of_{name}"):
            return name
    return None


def _worst(cases: Sequence[Case]) -> str:
    failed = [case for case in cases if case.outcome == FAILED]
    if failed:
        return f"{failed[0].name}: {failed[0].reason}"
    refused = [case.refused for case in cases if case.refused and case.function == OF_A_FAMILY]
    if refused:
        return f"{REFUSED}: {refused[0]}"
    skipped = [case.reason for case in cases if case.outcome == SKIPPED]
    return "ok" if any(case.outcome == PASSED for case in cases) else f"skipped: {skipped[0]}"
