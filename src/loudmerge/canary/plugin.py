"""The canary under pytest: one test for each guard and ref.

A test that takes `canary_case` is run for each of them and calls `canary_case.check()`. Where no test takes
it, `pytest --canary-guards DIR` adds the tests itself, so that a project needs nothing but guard files.

    --canary-guards DIR       the guard files; canary/guards below the root directory by default
    --canary-strict           an unreachable upstream fails. So it does when CI is set
    --canary-source U=PLACE   reads an upstream from a directory, an archive, a URL, or `installed`
    --canary-markdown FILE    writes the report there; where GITHUB_STEP_SUMMARY is set, there too
    --canary-json FILE        writes the document of `loudmerge canary --json`
    --canary-annotations      annotates the guards' lines on GitHub, as where GITHUB_ACTIONS is set

`present` passes, `missing` fails, `pending` is an expected failure, `unreachable` fails when strict or stale
and is skipped otherwise. The run ends with how many guards were evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from loudmerge.canary.guards import Guard
    from loudmerge.canary.run import CanaryReport, Judge, Verdict
    from loudmerge.canary.upstream.opener import Key

NAME = "loudmerge.canary.plugin"
"""Its name among pytest's plugins, and that of the entry point."""

FIXTURE = "canary_case"
PROPERTY = "canary"


@dataclass(frozen=True)
class CanaryCase:
    """A guard at a ref, as a test."""

    guard: Guard
    ref: str

    @property
    def name(self) -> str:
        return f"{self.guard.id}@{self.ref}"

    def verdicts(self, config: pytest.Config) -> tuple[Verdict, ...]:
        """Asks the run that all cases share. More than one where the ref is a range."""
        return config.stash[RUN].judge().verdicts(self.guard, self.ref)


class CanaryRun:
    """What the cases of one pytest process share: the opened sources. overrides: UPSTREAM=PLACE."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = dict(_override(text) for text in overrides)
        self._judge: Judge | None = None
        self._openers: ThreadPoolExecutor | None = None

    def open_ahead(self, cases: Sequence[CanaryCase]) -> None:
        """Begins to open what these cases read: most of a run would be waiting for servers, one by one."""
        from loudmerge.canary.run import OPENERS

        opener = self.judge().opener
        readers: dict[Key, CanaryCase] = {}
        for case in cases:
            readers.setdefault(opener.key(case.guard, case.ref), case)
        self._openers = ThreadPoolExecutor(OPENERS)
        for case in readers.values():
            self._openers.submit(opener.prepare, case.guard, case.ref)

    def judge(self) -> Judge:
        """The judge, made when it is first needed."""
        if self._judge is None:
            from loudmerge.canary.run import Judge
            from loudmerge.canary.upstream.opener import Opener
            from loudmerge.canary.upstream.sources import SourceOptions

            self._judge = Judge(Opener(SourceOptions.from_environment(self.overrides)))
        return self._judge

    def close(self) -> None:
        """Gives back its connections."""
        if self._openers is not None:
            self._openers.shutdown(cancel_futures=True)
        if self._judge is not None:
            self._judge.opener.close()


def _override(text: str) -> tuple[str, str]:
    from loudmerge.canary.upstream.sources import parse_override

    try:
        return parse_override(text)
    except ValueError as error:
        raise pytest.UsageError(f"--canary-source: {error}") from error


RUN = pytest.StashKey[CanaryRun]()


class CanaryItem(pytest.Item):
    """A case without a test function."""

    def __init__(self, case: CanaryCase, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case = case

    def runtest(self) -> None:
        check(self.case, self)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.case.guard.file, max(self.case.guard.line - 1, 0), self.case.name


def check(case: CanaryCase, item: pytest.Item) -> None:
    """Turns the verdicts of a case into the outcome of a test, and notes them for the tally."""
    from loudmerge.canary.run import MISSING, PENDING, UNREACHABLE

    verdicts = case.verdicts(item.config)
    item.user_properties += [(PROPERTY, json.dumps([case.name, asdict(verdict)])) for verdict in verdicts]
    strict = is_strict(item.config)
    failed = [
        verdict
        for verdict in verdicts
        if verdict.verdict == MISSING or (verdict.verdict == UNREACHABLE and (strict or verdict.stale))
    ]
    if failed:
        lines = [*(str(verdict) for verdict in failed), f"why: {case.guard.why}", f"guard: {case.guard.file}"]
        pytest.fail("\n".join(lines), pytrace=False)
    for verdict in verdicts:
        if verdict.verdict == UNREACHABLE:
            pytest.skip(str(verdict))
    for verdict in verdicts:
        if verdict.verdict == PENDING:
            pytest.xfail(str(verdict))


def is_strict(config: pytest.Config) -> bool:
    """Whether an unreachable upstream fails."""
    return bool(config.getoption("canary_strict", False) or os.environ.get("CI"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("canary", "upstream guards (loudmerge)")
    group.addoption(
        "--canary-guards", metavar="DIR", type=Path, help="Guard files: one test for each guard and ref."
    )
    group.addoption(
        "--canary-strict", action="store_true", help="An unreachable upstream fails, as when CI is set."
    )
    group.addoption(
        "--canary-source",
        metavar="UPSTREAM=DIR_OR_ARCHIVE_OR_URL",
        action="append",
        default=[],
        help="Read an upstream or a package from there.",
    )
    group.addoption("--canary-markdown", metavar="FILE", type=Path, help="Write a report there.")
    group.addoption("--canary-json", metavar="FILE", type=Path, help="Write all verdicts there.")
    group.addoption(
        "--canary-annotations",
        action="store_true",
        help="Annotate the guards' lines, as in GitHub's workflows.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Reads `--canary-source`. Raises pytest.UsageError when it names nothing."""
    config.stash[RUN] = CanaryRun(config.getoption("canary_source", []))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the run."""
    run = config.stash.get(RUN, None)
    if run is not None:
        run.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `canary_case` for each case."""
    if FIXTURE in metafunc.fixturenames:
        cases = load_cases(metafunc.config)
        metafunc.parametrize(FIXTURE, cases, ids=[case.name for case in cases], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Adds the cases that no test function takes. First, so that -k and -m select among them too."""
    if config.getoption("canary_guards", None) is None:
        return
    if not any(FIXTURE in getattr(item, "fixturenames", ()) for item in items):
        items += [CanaryItem.from_parent(session, name=case.name, case=case) for case in load_cases(config)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Opens the sources ahead. Not in a process of xdist, which runs some of the cases only."""
    cases = [case for item in session.items if (case := _case(item)) is not None]
    if cases and not (session.config.option.collectonly or hasattr(session.config, "workerinput")):
        session.config.stash[RUN].open_ahead(cases)


def _case(item: pytest.Item) -> CanaryCase | None:
    """The case of an item that is one, or that takes one."""
    if isinstance(item, CanaryItem):
        return item.case
    taken = getattr(item, "callspec", None)
    return taken.params.get(FIXTURE) if taken is not None else None


def load_cases(config: pytest.Config) -> list[CanaryCase]:
    """The cases of the guard files. Raises pytest.UsageError when there are none, or a bad one."""
    from loudmerge.canary.guards import OWN, GuardError, load_guards
    from loudmerge.canary.upstream.sources import parse_overrides

    given = config.getoption("canary_guards", None)
    try:
        guards = load_guards(given or config.rootpath / OWN)
        parse_overrides(
            config.getoption("canary_source", []), {name for guard in guards for name in guard.names}
        )
    except (GuardError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    return [CanaryCase(guard, ref) for guard in guards for ref in guard.refs]


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fails a test that took a case, ended without an error, and never asked for the verdict."""
    taken = getattr(item, "funcargs", {}).get(FIXTURE)
    if isinstance(taken, CanaryTest) and not any(name == PROPERTY for name, _ in item.user_properties):
        pytest.fail(
            f"{taken.case.name} was not checked: the test never called {FIXTURE}.check()", pytrace=False
        )


@pytest.fixture
def canary_case(request: pytest.FixtureRequest) -> CanaryTest:
    """A guard at a ref; `canary_case.check()` asserts it."""
    return CanaryTest(request.param, request.node)


@dataclass(frozen=True)
class CanaryTest:
    """A case inside a test function."""

    case: CanaryCase
    item: pytest.Item

    def check(self) -> None:
        """Passes, fails, skips or xfails the test by the verdict."""
        __tracebackhide__ = True
        check(self.case, self.item)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many guards were really evaluated, also where xdist ran them, and the reports asked for."""
    noted = [
        json.loads(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not noted and not any(config.getoption(name, None) for name in ("canary_markdown", "canary_json")):
        return
    from loudmerge.canary.run import tally

    cases = load_cases(config)
    report = _report(cases, noted, strict=is_strict(config))
    terminalreporter.section("canary")
    terminalreporter.line(tally(report.verdicts))
    for line in _write(config, report, cases):
        terminalreporter.line(line)


def _report(cases: Sequence[CanaryCase], noted: Sequence[Sequence[Any]], *, strict: bool) -> CanaryReport:
    """The verdicts in the guard files' order, whichever process gave them. noted: [case, verdict]."""
    from loudmerge.canary.run import CanaryReport, Verdict

    by_case: dict[str, list[Verdict]] = {case.name: [] for case in cases}
    for name, verdict in noted:
        by_case.setdefault(name, []).append(Verdict(**verdict))
    verdicts = tuple(verdict for found in by_case.values() for verdict in found)
    return CanaryReport(verdicts, strict, tuple(name for name, found in by_case.items() if not found))


def _write(config: pytest.Config, report: CanaryReport, cases: Sequence[CanaryCase]) -> tuple[str, ...]:
    """Writes the reports; what is to be printed for GitHub's runner."""
    from loudmerge.canary.report import Reports

    file = config.getoption("canary_json", None)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    wanted = bool(config.getoption("canary_annotations", False))
    reports = Reports.from_environment(config.getoption("canary_markdown", None), annotations=wanted)
    return reports.write(report, [case.guard for case in cases])
