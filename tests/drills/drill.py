"""The drill of one guard: what is done to upstream's file, and what the guard says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from loudmerge.canary.code.syntax import parse
from loudmerge.canary.guards import Guard, load_guards
from loudmerge.canary.rules.rules import RuleError, check
from tests.drills.conditions import Mutant
from tests.drills.mutants import OPERATORS, mutants
from tests.drills.refactors import refactors
from tests.drills.subjects import Subject, subjects

GUARDS = Path(__file__).parents[2] / "canary" / "guards"
QUICK_REFACTORS = 2


@dataclass
class Drill:
    """What the drill of one guard on one file found. mutants, refactors: what was done, each in a word."""

    guard: str
    file: str
    mutants: list[str] = field(default_factory=list)
    refactors: list[str] = field(default_factory=list)
    noticed: int = 0
    silent: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = (
            f"{self.noticed} of {len(self.mutants)} mutants, {self.silent} of {len(self.refactors)} refactors"
        )
        return "\n    ".join([f"{self.guard}: {counts}", *self.problems])


@lru_cache(maxsize=1)
def _guards() -> dict[str, Guard]:
    return {one.id: one for one in load_guards(GUARDS)}


def holds(guard: Guard, text: str, path: str) -> bool:
    """Whether the guard's rule holds; a rule that cannot be evaluated does not."""
    try:
        return check(guard.rule, text, path).holds
    except RuleError:
        return False


Changes = dict[str, tuple[str, str]]
"""Changed file -> (what was changed in it, how)."""


def each(text: str, found: list[Subject], make: Callable[[str, Subject], Iterator[Mutant]]) -> Changes:
    """Every changed file once."""
    changed: Changes = {}
    for subject in found:
        for what, after in make(text, subject):
            changed.setdefault(after, (subject.path, what))
    changed.pop(text, None)
    return changed


def some(name: str, changes: Changes, count: int) -> Changes:
    """So many of them, always the same for one name, and others for another."""
    return dict(sorted(changes.items(), key=lambda one: sha256(f"{name} {one[1]}".encode()).digest())[:count])


def one_of_each_operator(name: str, changes: Changes) -> Changes:
    """One for each operator that applies."""
    found: Changes = {}
    for operator in OPERATORS:
        found |= some(name, {after: one for after, one in changes.items() if one[1].startswith(operator)}, 1)
    return found


def drill(name: str, text: str, path: str, quick: bool) -> Drill:
    """All mutants and refactors of one guard on one file. By its id: a guard does not travel to a process."""
    guard, result = _guards()[name], Drill(name, path)
    if not holds(guard, text, path):
        result.problems.append("does not hold on the file as it is")
        return result
    found = subjects(guard.rule, parse(text, path).tree)
    harmful, harmless = each(text, found, mutants), each(text, found, refactors)
    if quick:
        harmful, harmless = one_of_each_operator(name, harmful), some(name, harmless, QUICK_REFACTORS)
    for after, (subject, what) in harmful.items():
        result.mutants.append(what)
        if holds(guard, after, path):
            result.problems.append(f"did not notice: {subject} {what}")
        else:
            result.noticed += 1
    for after, (subject, what) in harmless.items():
        result.refactors.append(what)
        if holds(guard, after, path):
            result.silent += 1
        else:
            result.problems.append(f"flagged a refactor: {subject} {what}")
    if not result.noticed:
        result.problems.append("no drill can trip it")
    return result
