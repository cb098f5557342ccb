"""Which release of a package changed something: `nox -s bisect -- --package peft --good 0.18.1 --bad 0.19.1`.

The released versions between the two ends are tried in environments of their own (`.compat/env`, kept), the
other packages pinned as in a cell. The two ends are tried first. A version that cannot be installed, or that
crashes, is skipped and named; where the change lies among such versions the answer is a range.

Exit codes: 0 answered, 2 usage, 3 the two ends do not differ, 5 the index was not reached, an end cannot be
tried, or another run is in this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.version import Version

from loudmerge.compat.arguments import ALIKE, DONE, ENVIRONMENT, HOME
from loudmerge.compat.environments import environment
from loudmerge.compat.environments.alone import alone
from loudmerge.compat.environments.children import Children, exit_on_signals
from loudmerge.compat.environments.commands import NotInstalled, Unreachable
from loudmerge.compat.environments.environment import Environment, Installer
from loudmerge.compat.environments.places import Places
from loudmerge.compat.judging import cells
from loudmerge.compat.judging.cells import PACKAGES, Cell, Matrix
from loudmerge.compat.releases import Index, PipIndex
from loudmerge.compat.running.questions import CHECKS, Check, Checks, Expected, Node, Question
from loudmerge.errors import EnvironmentFailed

SECONDS = 1800
"""How long one version may take to answer."""


@dataclass(frozen=True)
class Finding:
    """What one version showed. state: None where it could not be tried, and `shown` says why."""

    version: str
    state: tuple[str, ...] | None
    shown: str
    installed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "tried": self.state is not None,
            "found": self.shown,
            "installed": dict(self.installed),
        }


Trial = Callable[[str], Finding]
"""Tries one version. Raises EnvironmentFailed where the index is not reached."""


@dataclass(frozen=True)
class Search:
    """last: the newest version that is as the older end. first: the oldest known not to be; None where the
    ends do not differ. skipped: between the two. tried: all findings, in the order of trying.
    """

    last: Finding
    first: Finding | None
    skipped: tuple[Finding, ...]
    tried: tuple[Finding, ...]


def search(versions: Sequence[str], trial: Trial) -> Search:
    """Finds where the state changes, in versions that are in order of release; the ends are tried first.

    It takes for granted that the state changes once. Raises EnvironmentFailed where an end cannot be tried.
    """
    tried = {index: trial(versions[index]) for index in (0, len(versions) - 1)}
    for end in tried.values():
        if end.state is None:
            raise EnvironmentFailed(f"{end.version} cannot be tried: {end.shown}")
    low, high = tried
    if tried[low].state == tried[high].state:
        return Search(tried[low], None, (), tuple(tried.values()))
    while untried := [index for index in range(low + 1, high) if index not in tried]:
        middle = min(untried, key=lambda index: abs(2 * index - low - high))
        found = tried[middle] = trial(versions[middle])
        if found.state is not None:
            low, high = (middle, high) if found.state == tried[low].state else (low, middle)
    skipped = tuple(tried[index] for index in range(low + 1, high))
    return Search(tried[low], tried[high], skipped, tuple(tried.values()))


@dataclass(frozen=True)
class Bisection:
    """The answer. base: the cell that pins the other packages. unfit: cells in which an end fails."""

    package: str
    question: str
    base: Cell
    found: Search
    unfit: tuple[str, ...] = ()

    def summary(self) -> str:
        """Some lines for a person."""
        found = self.found
        others = ", ".join(
            f"{name} {pin}" for name, pin in self.base.versions.items() if name != self.package
        )
        lines = [self._headline(), f"asked: {self.question}; with {others} ({self.base.name})"]
        shown = found.tried if found.first is None else (found.last, *found.skipped, found.first)
        lines += [f"  {_line(finding)}" for finding in shown]
        lines += [f"not in {reason}" for reason in self.unfit]
        return "\n".join([*lines, f"tried: {', '.join(each.version for each in found.tried)}"])

    def _headline(self) -> str:
        first, last = self.found.first, self.found.last
        if first is None:
            older, newer = (finding.version for finding in self.found.tried)
            return (
                f"{self.package} {older} and {newer} do not differ in this: there is nothing to search for. "
                "Ask for another check, or name other ends."
            )
        if self.found.skipped:
            return (
                f"{self.package}: the first version where it changes is after {last.version}, and "
                f"{first.version} at the latest; {_versions(self.found.skipped)} cannot be tried."
            )
        return f"{self.package} {first.version} is the first version where it changes."

    def to_json(self) -> dict[str, Any]:
        """A JSON object. first: the answer, null where it is a range or where the ends do not differ."""
        found = self.found
        exact = found.first is not None and not found.skipped
        return {
            "schema": 1,
            "package": self.package,
            "question": self.question,
            "cell": self.base.name,
            "versions": {k: v for k, v in self.base.versions.items() if k != self.package},
            "first": found.first.version if found.first and exact else None,
            "after": found.last.version,
            "at_the_latest": found.first.version if found.first else None,
            "skipped": [finding.version for finding in found.skipped],
            "tried": [finding.to_json() for finding in found.tried],
            "unfit": list(self.unfit),
        }


def _line(finding: Finding) -> str:
    if finding.state is None:
        return f"{finding.version}  not tried: {finding.shown}"
    installed = ", ".join(f"{name} {version}" for name, version in finding.installed.items())
    return f"{finding.version}  {finding.shown}" + (f" [{installed}]" if installed else "")


def _versions(findings: Sequence[Finding]) -> str:
    return ", ".join(finding.version for finding in findings)


def between(released: Sequence[str], one: str, other: str) -> tuple[str, ...]:
    """The releases from the older end to the newer one, oldest first. Raises ValueError."""
    known = {Version(version): version for version in released}
    for end in (one, other):
        if Version(end) not in known:
            newest = ", ".join(known[version] for version in sorted(known, reverse=True)[:12])
            said = "no such release (yanked and pre-releases are not tried)"
            raise ValueError(f"{end}: {said}. The newest are {newest}")
    low, high = sorted((Version(one), Version(other)))
    if low == high:
        raise ValueError(f"found {one} for both ends, expected two versions")
    return tuple(known[version] for version in sorted(known) if low <= version <= high)


def bases(matrix: Matrix, package: str, ends: Sequence[str]) -> tuple[Cell, ...]:
    """Cells to take the other packages' pins from, the likeliest first.

    First those pins with which the matrix has both ends, then the rest, each newest first. The cell of the
    first end stands for its pins: what it expects was so at that end.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in matrix.cells:
        if cell.is_pinned:
            others = tuple(cell.versions[name] for name in PACKAGES if name != package)
            groups.setdefault(others, []).append(cell)

    def rank(others: tuple[str, ...]) -> tuple[bool, list[Version]]:
        pinned = {cell.versions[package] for cell in groups[others]}
        return pinned >= set(ends), [Version(version) for version in others]

    ordered = sorted(groups, key=rank, reverse=True)
    return tuple(_representative(groups[others], package, ends[0]) for others in ordered)


def _representative(group: Sequence[Cell], package: str, end: str) -> Cell:
    newest = max(group, key=lambda cell: Version(cell.versions[package]))
    return next((cell for cell in group if cell.versions[package] == end), newest)


@dataclass(frozen=True)
class Laboratory(Places):
    """Makes environments and asks in them. say: takes a line for a person."""

    installer: Installer
    children: Children
    say: Callable[[str], None]

    def trial(self, package: str, base: Cell, question: Question) -> Trial:
        """Puts the question to one version of the package, the others pinned as in `base`; each once."""
        known: dict[str, Finding] = {}

        def remembered(version: str) -> Finding:
            if version not in known:
                pins = {**base.versions, package: version}
                known[version] = self._try(
                    replace(base, name=cells.name_of(pins), versions=pins), version, question
                )
                self.say(f"{package} {_line(known[version])}")
            return known[version]

        return remembered

    def _try(self, cell: Cell, version: str, question: Question) -> Finding:
        made = self.environment(cell.name)
        wanted = environment.requirements(cell.versions)
        self.say(f"{cell.name} …")
        try:
            made.make(self.root, wanted, self.installer, self.children, self.log(cell.name))
        except NotInstalled as error:
            return Finding(version, None, f"not installed: {error}")
        except Unreachable as error:
            raise EnvironmentFailed(f"{cell.name}: {error}") from error
        with tempfile.TemporaryDirectory() as scratch:
            return self._ask(made, cell.versions, version, question, Path(scratch))

    def _ask(
        self, made: Environment, pins: Mapping[str, str], version: str, question: Question, scratch: Path
    ) -> Finding:
        """pins: what the environment has to hold, whatever it was made of."""
        line = [str(made.python), *question.command(scratch)]
        environ = environment.sealed(os.environ)
        try:
            installed = made.running(self.children)
        except (NotInstalled, Unreachable) as error:
            return Finding(version, None, f"its environment does not say what it holds: {error}")
        others = environment.differing(installed, pins)
        if others:
            return Finding(version, None, f"its environment was changed since: {others}", installed)
        try:
            done = self.children.run(line, seconds=SECONDS, cwd=self.root, env=environ)
        except subprocess.TimeoutExpired:
            return Finding(version, None, f"no answer after {SECONDS} s", installed)
        answer = question.read(scratch, done.returncode)
        if answer is None:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            return Finding(version, None, f"crashed ({done.returncode}): {said[:400]}", installed)
        return Finding(version, answer.state, answer.shown, installed)


def bisect(
    package: str,
    versions: Sequence[str],
    bases: Sequence[Cell],
    ask: Callable[[Cell], Question],
    laboratory: Laboratory,
) -> Bisection:
    """Searches in the first base in which both ends can be tried. Raises EnvironmentFailed without one."""
    unfit: list[str] = []
    for base in bases:
        question = ask(base)
        trial = laboratory.trial(package, base, question)
        failed = next((end for end in map(trial, (versions[0], versions[-1])) if end.state is None), None)
        if failed is None:
            return Bisection(package, question.text, base, search(versions, trial), tuple(unfit))
        unfit.append(f"{base.name}: {package} {_line(failed)}")
    raise EnvironmentFailed("no cell's pins suit both ends:\n" + "\n".join(unfit))


def _check(text: str) -> Check:
    try:
        return Check.parse(text)
    except ValueError as error:
        # Of any other exception argparse says no more than that the value is invalid.
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nox -s bisect --", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--package", required=True, choices=PACKAGES)
    parser.add_argument("--good", required=True, metavar="VERSION", help="one end; the older may be either")
    parser.add_argument("--bad", required=True, metavar="VERSION", help="the other end")
    asked = parser.add_mutually_exclusive_group()
    checks = f"NAME, NAME=VALUE, NAME<=NUMBER or NAME>=NUMBER, of {', '.join(CHECKS)}; may be given again"
    asked.add_argument("--expect", action="append", type=_check, metavar="CHECK", default=[], help=checks)
    asked.add_argument("--node", type=Node, metavar="NODE", help="a pytest node: tests/…::test_…")
    parser.add_argument("--cell", metavar="NAME", help="the cell that pins the other packages")
    parser.add_argument("--json", action="store_true", help="the answer as one JSON document on stdout")
    parser.add_argument("--uv", action="store_true", help="make environments with uv")
    return parser


def _chosen(asked: argparse.Namespace, root: Path, index: Index) -> tuple[tuple[str, ...], tuple[Cell, ...]]:
    """The releases to search and the cells to take pins from. Raises ValueError, EnvironmentFailed."""
    matrix = cells.load(root / cells.FILE)
    if asked.node:
        asked.node.check(root)
    if asked.cell and not (named := matrix.chosen([asked.cell]))[0].is_pinned:
        raise ValueError(f"{asked.cell}: of lane {named[0].lane}, expected a cell that pins versions")
    found = between(index.versions(asked.package), asked.good, asked.bad)
    good_is_older = Version(asked.good) < Version(asked.bad)
    ends = (found[0], found[-1]) if good_is_older else (found[-1], found[0])
    chosen = named if asked.cell else bases(matrix, asked.package, ends)
    if not chosen:
        raise ValueError(f"{cells.FILE}: found no cell that pins versions, expected one at least")
    return found, chosen


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(arguments: Sequence[str] | None = None, index: Index | None = None) -> int:
    """The command; see the module's docstring. index: by default the one that pip is configured for."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    root = Path.cwd()

    def ask(base: Cell) -> Question:
        if asked.node:
            return Node(asked.node.node)
        return Checks(tuple(asked.expect)) if asked.expect else Expected(base.name, base.expects)

    try:
        versions, chosen = _chosen(asked, root, index or PipIndex())
    except ValueError as error:
        parser.error(str(error))
    except EnvironmentFailed as error:
        _say(f"error: {error}")
        return ENVIRONMENT
    installer = Installer.of(root, os.environ, uv=asked.uv)
    try:
        with alone(root / HOME), Children() as children:
            laboratory = Laboratory(root, installer, children, _say)
            found = bisect(asked.package, versions, chosen, ask, laboratory)
    except EnvironmentFailed as error:
        _say(f"error: {error}")
        return ENVIRONMENT
    sys.stdout.write((json.dumps(found.to_json(), indent=2) if asked.json else found.summary()) + "\n")
    return ALIKE if found.found.first is None else DONE


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
