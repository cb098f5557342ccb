"""Runs guards: one verdict for each guard and ref."""

from __future__ import annotations

import atexit
import gc
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

from packaging.version import Version

from loudmerge.canary.guards import Guard, is_package_ref, is_version
from loudmerge.canary.rules import rules
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Unreachable
from loudmerge.canary.upstream.opener import Key, Opener
from loudmerge.canary.upstream.sources import KnowsHistory, ReadLog, Source, SourceOptions, normalised

PRESENT, MISSING, PENDING, UNREACHABLE = "present", "missing", "pending", "unreachable"
VERDICTS = (PRESENT, MISSING, PENDING, UNREACHABLE)

OPENERS = 4
"""How many servers and pips are waited for at a time."""


@dataclass(frozen=True)
class Verdict:
    """What a guard says about its upstream at a ref.

    path: the file that was read, or the first that was looked for. line: in it, 0 when there is none.
    version: the exact commit or version read, empty when nothing was. evaluated: the rule was really applied.
    stale: unreachable for so long that it fails everywhere.
    """

    guard: str
    upstream: str
    ref: str
    path: str
    verdict: str
    detail: str
    line: int = 0
    version: str = ""
    evaluated: bool = False
    stale: bool = False

    def __str__(self) -> str:
        at = f"{self.upstream}@{self.ref}" + (f" ({self.version})" if self.version else "")
        return f"{self.verdict:<11} {self.guard}  {at}  {self.place}: {inert(self.detail)}"

    @property
    def place(self) -> str:
        """The file, and the line where there is one."""
        return f"{self.path}:{self.line}" if self.line else self.path

    @property
    def name(self) -> str:
        """The guard at its ref."""
        return f"{self.guard}@{self.ref}"


def inert(text: str) -> str:
    """Words from elsewhere, for a terminal or a log: no control characters, and no workflow command.

    A line that begins with `::`, or one with `##[`, is a command to GitHub's runner.
    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    shown = "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)
    return re.sub(r"(?m)^([^\S\n]*):(?=:)", r"\1: ", shown).replace("##[", "## [")


@dataclass(frozen=True)
class CanaryReport:
    """All verdicts of a run, in the order of the guard files. strict: unreachable fails.

    not_run: cases, `guard@ref`, that the run was to judge and did not: it was cut short, or some were
    deselected.
    """

    verdicts: tuple[Verdict, ...]
    strict: bool = False
    not_run: tuple[str, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether a guard is gone, or cannot be evaluated."""
        return any(verdict.verdict == MISSING for verdict in self.verdicts)

    @property
    def unasked(self) -> bool:
        """Whether a source that could not be asked makes the run fail."""
        return any(
            verdict.stale or self.strict for verdict in self.verdicts if verdict.verdict == UNREACHABLE
        )

    def to_json(self) -> dict[str, object]:
        evaluated = sum(verdict.evaluated for verdict in self.verdicts)
        document: dict[str, object] = {
            "schema": 1,
            "evaluated": evaluated,
            "total": len(self.verdicts),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }
        return {**document, "not_run": list(self.not_run)} if self.not_run else document

    def summary(self) -> str:
        return "\n".join([*(str(verdict) for verdict in self.verdicts), tally(self.verdicts)])


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many were really evaluated, and how many there are of each verdict."""
    counted = Counter(verdict.verdict for verdict in verdicts)
    evaluated = sum(verdict.evaluated for verdict in verdicts)
    each = ", ".join(f"{counted[name]} {name}" for name in VERDICTS)
    return f"canary: {evaluated} of {len(verdicts)} guards evaluated ({each})"


class Judge:
    """Gives verdicts. Threads may share it."""

    def __init__(self, opener: Opener) -> None:
        self.opener = opener
        self.log = ReadLog(opener.options.cache)
        # All that was read would be gone through, several times, as the interpreter ends.
        atexit.register(gc.freeze)

    def verdicts(self, guard: Guard, ref: str) -> tuple[Verdict, ...]:
        """One verdict, or one for each release when `ref` is a range."""
        try:
            refs = self.opener.refs(guard, ref)
        except Unreachable as error:
            return (self._unreachable(guard, ref, error),)
        except SourceError as error:
            return (_verdict(guard, ref, MISSING, str(error)),)
        return tuple(self.verdict(guard, each) for each in refs)

    def verdict(self, guard: Guard, ref: str) -> Verdict:
        """The verdict at one ref."""
        try:
            source = self.opener.open(guard, ref)
            with _uncollected():
                found = judged(guard, ref, source)
        except Unreachable as error:
            return self._unreachable(guard, ref, error)
        except SourceError as error:
            return _verdict(guard, ref, MISSING, f"cannot be read: {error}")
        self.log.succeeded(guard.name, ref)
        return found

    def _unreachable(self, guard: Guard, ref: str, error: Unreachable) -> Verdict:
        age = self.log.stale_for(guard.name, ref)
        stale = f"stale, not read for {age / 3600:.0f} h: " if age is not None else ""
        return _verdict(guard, ref, UNREACHABLE, f"{stale}{error}", stale=age is not None)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No collections of garbage: what is parsed has no cycles, and is looked through at each of them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def judged(guard: Guard, ref: str, source: Source) -> Verdict:
    """The verdict on an open source. Raises Unreachable, SourceError."""
    found, excusable = evaluate(guard, ref, source)
    return excused(guard, source, found) if excusable else found


def evaluate(guard: Guard, ref: str, source: Source) -> tuple[Verdict, bool]:
    """`present` or `missing`, and whether it may be `pending` instead: what cannot be evaluated may not.

    Raises Unreachable, SourceError.
    """
    path = next((path for path in guard.paths if source.exists(path)), None)
    if path is None:
        detail = f"no file {' or '.join(guard.paths)} in {source.version or ref}: moved, renamed or removed"
        return _verdict(guard, ref, MISSING, detail, version=source.version), True
    text = source.read(path)
    version = source.version or f"sha256:{sha256(text.encode()).hexdigest()[:12]}"
    try:
        finding = rules.check(
            guard.rule, text, path, lambda one: source.read(one) if source.exists(one) else None
        )
    except (rules.RuleError, SyntaxError, RecursionError) as error:
        detail = f"the rule cannot be evaluated: {error}"
        return _verdict(guard, ref, MISSING, detail, path, version=version), False
    verdict = PRESENT if finding.holds else MISSING
    found = _verdict(guard, ref, verdict, finding.detail, path, finding.line, version, evaluated=True)
    return found, not finding.holds


def excused(guard: Guard, source: Source, found: Verdict) -> Verdict:
    """`pending` when what is missing is known to lie before the guard's change, else what was found."""
    try:
        before = lies_before(guard, source)
    except Unreachable as error:
        unknown = f"whether {guard.since} is in {found.ref} could not be asked: {error}"
        return replace(found, detail=f"{found.detail} ({unknown})")
    return replace(found, verdict=PENDING, detail=f"{before}: {found.detail}") if before else found


def lies_before(guard: Guard, source: Source) -> str | None:
    """Why the source is known to lie before the change that brought the guard; None when it is not.

    Raises Unreachable when only a server knows, and it cannot be asked.
    """
    if guard.since_version and is_version(source.version):
        if Version(source.version) < Version(guard.since_version):
            return f"{source.version} is older than {guard.since_version}, which has {guard.since}"
        return None
    if isinstance(source, KnowsHistory) and source.contains(guard.since) is False:
        return f"{guard.since} has not landed in {source.version}"
    return None


def _verdict(
    guard: Guard,
    ref: str,
    verdict: str,
    detail: str,
    path: str = "",
    line: int = 0,
    version: str = "",
    *,
    evaluated: bool = False,
    stale: bool = False,
) -> Verdict:
    place = path or guard.paths[0]
    return Verdict(guard.id, guard.name, ref, place, verdict, detail, line, version, evaluated, stale)


def parse_ref(text: str) -> tuple[str, str]:
    """`UPSTREAM=REF` in its two parts. Raises ValueError."""
    name, _, ref = text.partition("=")
    if not (name.strip() and ref.strip()):
        raise ValueError(f"found {text!r}, expected UPSTREAM=REF")
    return name.strip(), ref.strip()


def at_refs(guards: Sequence[Guard], refs: Sequence[tuple[str, str]]) -> tuple[Guard, ...]:
    """The guards, those of the named upstreams or packages at these refs instead of their own.

    refs: (upstream or package, ref). Raises ValueError when no guard reads it, or not by such a ref.
    """
    wanted: dict[str, list[str]] = {}
    for name, ref in refs:
        wanted.setdefault(normalised(name), []).append(ref)
    unknown = wanted.keys() - {normalised(name) for guard in guards for name in guard.names}
    if unknown:
        raise ValueError(f"no guard reads {', '.join(sorted(unknown))}")
    return tuple(
        _at(guard, [ref for name in guard.names for ref in wanted.get(normalised(name), ())])
        for guard in guards
    )


def _at(guard: Guard, refs: Sequence[str]) -> Guard:
    for ref in refs:
        if guard.upstream is None and not guard.reads_package(ref):
            raise ValueError(f"guard {guard.id} reads a package, expected a release of it, found {ref!r}")
        if guard.package is None and is_package_ref(ref) and not is_version(ref):
            raise ValueError(f"guard {guard.id} reads a repository, expected a ref of it, found {ref!r}")
    return replace(guard, refs=tuple(dict.fromkeys(refs))) if refs else guard


def run(guards: Sequence[Guard], *, sources: SourceOptions) -> tuple[Verdict, ...]:
    """A verdict for each guard and ref, in order. Guards are judged while other sources are still opened."""
    asked = [(guard, ref) for guard in guards for ref in guard.refs]
    with (
        Opener(sources) as opener,
        ThreadPoolExecutor(OPENERS) as openers,
        ThreadPoolExecutor(os.cpu_count() or 1) as judges,
    ):
        judge = Judge(opener)
        readers: dict[Key, list[int]] = {}
        for number, case in enumerate(asked):
            readers.setdefault(opener.key(*case), []).append(number)
        opened = {openers.submit(opener.prepare, *asked[numbers[0]]): numbers for numbers in readers.values()}
        judged: dict[int, Future[tuple[Verdict, ...]]] = {}
        for future in as_completed(opened):
            future.result()
            judged |= {number: judges.submit(judge.verdicts, *asked[number]) for number in opened[future]}
        return tuple(verdict for number in range(len(asked)) for verdict in judged[number].result())
