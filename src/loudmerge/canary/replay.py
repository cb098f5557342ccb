"""Runs guards over upstream's past: at which commit, or with which release, each verdict changed.

    python -m loudmerge.canary.replay CLONE [--guards DIR] [--guard ID] [--first REV] [--last REV]
    python -m loudmerge.canary.replay --package peft --first 0.17.1 --last 0.21.2

Every commit that touches a guard's file is judged: a verdict may change and change back, so that a search by
halves would miss it. Files that did not change between two commits, or releases, are judged once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

import click

from loudmerge.canary.guards import Guard, GuardError, default_directory, load_guards
from loudmerge.canary.run import MISSING, OPENERS, UNREACHABLE, VERDICTS, Verdict, evaluate, excused
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.clone import Clone, CommitSource
from loudmerge.canary.upstream.fetch import Unreachable
from loudmerge.canary.upstream.opener import Opener
from loudmerge.canary.upstream.sources import Source, SourceOptions, normalised
from loudmerge.errors import plural

Content = tuple[str, str, str]
"""(guard, path, identity of the file): the verdict on it is the same at every step."""


@dataclass(frozen=True)
class Step:
    """A commit or a release. date and subject are a commit's, and empty for a release."""

    name: str
    date: str = ""
    subject: str = ""

    def __str__(self) -> str:
        name = self.name[:12] if self.date else self.name
        return " ".join(part for part in (name, self.date, self.subject) if part)


@dataclass(frozen=True)
class Turn:
    """A guard whose verdict is another at `step` than at the step before. detail: what was found there."""

    guard: str
    step: Step
    before: str
    after: str
    detail: str


@dataclass(frozen=True)
class Replay:
    """What a replay found. verdicts: those at the first step. evaluations: different files really judged."""

    steps: tuple[Step, ...]
    verdicts: tuple[Verdict, ...]
    turns: tuple[Turn, ...]
    evaluations: int

    def to_json(self) -> dict[str, object]:
        return {
            "schema": 1,
            "steps": [asdict(step) for step in self.steps],
            "first": {verdict.guard: verdict.verdict for verdict in self.verdicts},
            "turns": [asdict(turn) for turn in self.turns],
            "evaluations": self.evaluations,
        }

    def summary(self) -> str:
        """The turns by step, between the count of each verdict at the first step and the number of steps."""
        counted = Counter(verdict.verdict for verdict in self.verdicts)
        start = ", ".join(f"{counted[name]} {name}" for name in VERDICTS if counted[name])
        lines = [f"{self.steps[0]}: {start}"]
        step = None
        for turn in self.turns:
            lines += [str(turn.step)] if turn.step is not step else []
            step = turn.step
            lines.append(f"    {turn.guard}: {turn.before} -> {turn.after}: {turn.detail}")
        to = f"{plural(len(self.steps), 'step')} to {self.steps[-1].name[:12]}"
        found = f"{plural(self.evaluations, 'file')} judged, {plural(len(self.turns), 'turn')}"
        return "\n".join([*lines, f"replay: {to}, {plural(len(self.verdicts), 'guard')}, {found}"])


@runtime_checkable
class Past(Protocol):
    """Upstream's steps, oldest first, and what each held."""

    @property
    def steps(self) -> tuple[Step, ...]: ...

    def source(self, guard: Guard, step: Step) -> Source:
        """Raises Unreachable, SourceError."""


@dataclass(frozen=True)
class Commits:
    """The past in a clone."""

    clone: Clone
    steps: tuple[Step, ...]
    sources: Mapping[str, CommitSource]

    @classmethod
    def of(cls, clone: Clone, guards: Sequence[Guard], first: str | None, last: str) -> Commits:
        """Raises SourceError."""
        paths = list(dict.fromkeys(path for guard in guards for path in guard.paths))
        changes = sorted({guard.since for guard in guards})
        found = clone.commits(paths, first, last, changes)
        landed = {change: clone.landed(change) for change in changes}
        holding = {change: clone.since(commit, last) for change, commit in landed.items() if commit}
        sources = {
            commit.id: CommitSource(
                clone, commit.id, {change: commit.id in after for change, after in holding.items()}
            )
            for commit in found
        }
        return cls(clone, tuple(Step(one.id, one.date, one.subject) for one in found), sources)

    def source(self, guard: Guard, step: Step) -> Source:
        del guard
        return self.sources[step.name]


@dataclass(frozen=True)
class Releases:
    """The past of a package, as its releases."""

    opener: Opener
    steps: tuple[Step, ...]

    def source(self, guard: Guard, step: Step) -> Source:
        return self.opener.open(guard, step.name)


def replay_clone(
    tree: Path,
    guards: Sequence[Guard],
    *,
    upstream: str | None = None,
    first: str | None = None,
    last: str = "HEAD",
) -> Replay:
    """The guards of an upstream over the commits of a clone of it, from `first` (its beginning) to `last`.

    upstream: which repository it is a clone of; by default, what its remote `origin` is.
    Raises SourceError when it is no whole clone, has no such revision, or no guard reads it.
    """
    clone = Clone.at(tree, upstream)
    read = [guard for guard in guards if (guard.upstream or "").lower() == clone.upstream.lower()]
    if not read:
        raise SourceError(f"{tree}: no guard reads {clone.upstream}")
    return _replay(read, Commits.of(clone, read, first, last))


def replay_releases(
    package: str,
    guards: Sequence[Guard],
    options: SourceOptions,
    *,
    first: str | None = None,
    last: str | None = None,
) -> Replay:
    """The guards of a package over its releases from `first` to `last`, both counted, by default over all.

    Raises Unreachable when the index could not be asked, SourceError when no release or guard is left.
    """
    read = [guard for guard in guards if normalised(guard.package or "") == normalised(package)]
    if not read:
        raise SourceError(f"no guard reads the package {package}")
    with Opener(options) as opener:
        steps = tuple(Step(name) for name in opener.refs(read[0], f"{first or '0'}..{last or ''}"))
        asked = [(guard, step.name) for guard in {one.dist: one for one in read}.values() for step in steps]
        with ThreadPoolExecutor(OPENERS) as pool:
            list(pool.map(opener.prepare, *zip(*asked, strict=True)))
        return _replay(read, Releases(opener, steps))


def _replay(guards: Sequence[Guard], past: Past) -> Replay:
    contents = {(guard.id, step): _content(past, guard, step) for guard in guards for step in past.steps}
    cases: dict[Content, tuple[Guard, Step]] = {}
    for step in past.steps:
        for guard in guards:
            # In this order the guards of one file follow each other, so that it is parsed once.
            cases.setdefault(contents[guard.id, step], (guard, step))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda case: _evaluated(past, *case), cases.values())
        judged = dict(zip(cases, found, strict=True))
    rows = [
        [_at(past, guard, step, judged[contents[guard.id, step]]) for guard in guards] for step in past.steps
    ]
    turns = [
        Turn(after.guard, step, before.verdict, after.verdict, after.detail)
        for step, earlier, later in zip(past.steps[1:], rows, rows[1:], strict=False)
        for before, after in zip(earlier, later, strict=True)
        if before.verdict != after.verdict
    ]
    evaluations = sum(verdict.evaluated for verdict, _ in judged.values())
    if not evaluations:
        raise SourceError(f"nothing could be judged: {rows[0][0].detail}")
    return Replay(past.steps, tuple(rows[0]), tuple(turns), evaluations)


def _content(past: Past, guard: Guard, step: Step) -> Content:
    """What a guard's verdict at a step rests on; where there is no file to read, on the step itself."""
    nothing = (guard.id, "", step.name)
    try:
        source = past.source(guard, step)
        path = next((path for path in guard.paths if source.exists(path)), None)
        return (guard.id, path, sha256(source.read(path).encode()).hexdigest()) if path else nothing
    except (Unreachable, SourceError):
        return nothing


def _evaluated(past: Past, guard: Guard, step: Step) -> tuple[Verdict, bool]:
    """The verdict, and whether it may be `pending` instead."""
    try:
        return evaluate(guard, step.name, past.source(guard, step))
    except Unreachable as error:
        return Verdict(guard.id, guard.name, step.name, guard.paths[0], UNREACHABLE, str(error)), False
    except SourceError as error:
        detail = f"cannot be read: {error}"
        return Verdict(guard.id, guard.name, step.name, guard.paths[0], MISSING, detail), False


def _at(past: Past, guard: Guard, step: Step, found: tuple[Verdict, bool]) -> Verdict:
    """The verdict on a file, at a step that holds it."""
    verdict, excusable = found
    here = replace(verdict, ref=step.name, version=step.name)
    return excused(guard, past.source(guard, step), here) if excusable else here


@click.command("replay", help="Run guards over the past of an upstream: a clone of it, or its releases.")
@click.argument("clone", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--package", help="Replay over the releases of this package.")
@click.option("--upstream", metavar="OWNER/NAME", help="What CLONE is of, if not its origin.")
@click.option(
    "--guards", "directory", type=click.Path(path_type=Path), help="The directory of the guard files."
)
@click.option("--guard", "names", multiple=True, metavar="ID", help="Only this guard.")
@click.option("--first", metavar="REV", help="The commit or release to begin with.")
@click.option("--last", metavar="REV", help="The commit or release to end with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    *,
    clone: Path | None,
    package: str | None,
    upstream: str | None,
    directory: Path | None,
    names: tuple[str, ...],
    first: str | None,
    last: str | None,
    as_json: bool,
) -> None:
    """The command. Raises click.UsageError, click.ClickException."""
    if (clone is None) == (package is None):
        raise click.UsageError("expected a clone or --package, one of the two")
    try:
        guards = chosen(load_guards(directory or default_directory(Path())), names)
        if clone is not None:
            found = replay_clone(clone, guards, upstream=upstream, first=first, last=last or "HEAD")
        else:
            options = SourceOptions.from_environment()
            found = replay_releases(package or "", guards, options, first=first, last=last)
    except (GuardError, SourceError, Unreachable) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.summary())


def chosen(guards: Sequence[Guard], names: Sequence[str]) -> tuple[Guard, ...]:
    """The guards of these ids; all where none is given. Raises GuardError for an id that no guard has."""
    unknown = set(names) - {guard.id for guard in guards}
    if unknown:
        raise GuardError(f"found no guard {', '.join(sorted(unknown))}")
    return tuple(guard for guard in guards if not names or guard.id in names)


if __name__ == "__main__":
    main()
