"""The conformance suite under pytest: one test for each case.

    --conformance-command LINE   the merge command: "mytool {base} {adapter} {out}"; without it, no tests
    --conformance-data DIR       the suite's data; conformance/ of the root directory, else what is shipped
    --conformance-time-limit S   seconds for one case

A case passes when the command merges it right, or refuses where it must. Placeholders:
`loudmerge.conformance.runner`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from loudmerge.conformance.cases import Case
    from loudmerge.conformance.judge import Verdict
    from loudmerge.conformance.runner import Controls

NAME = "loudmerge.conformance.plugin"
"""Its name among pytest's plugins, and that of the entry point."""


class ConformanceItem(pytest.Item):
    """A case as a test."""

    def __init__(self, case: Case, controls: Controls, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case, self.controls = case, controls

    def runtest(self) -> None:
        from loudmerge.conformance.runner import run

        verdict = run(self.case, self.controls.tool)
        self.controls.known[self.case.id] = verdict
        verdict = self.controls.judged(self.case, verdict)
        if not verdict.passed:
            pytest.fail(_message(self.case, verdict), pytrace=False)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.case.adapter, None, self.case.id


def _message(case: Case, verdict: Verdict) -> str:
    lines = [
        f"{verdict.verdict}: {verdict.detail}",
        f"why: {case.why}",
        f"base: {case.base}",
        f"adapter: {case.adapter}",
    ]
    return "\n".join([*lines, "it said:", verdict.said] if verdict.said else lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("conformance", "merge conformance suite (loudmerge)")
    group.addoption(
        "--conformance-command",
        metavar="LINE",
        help='One test for each case: "mytool {base} {adapter} {out}".',
    )
    group.addoption("--conformance-data", metavar="DIR", type=Path, help="The suite's data.")
    group.addoption("--conformance-time-limit", metavar="S", type=float, help="Seconds for one case.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Adds the cases. First, so that -k and -m select among them. Raises pytest.UsageError without data
    or command.
    """
    line = config.getoption("conformance_command", None)
    if line is None:
        return
    from loudmerge.conformance.cases import DataError, default_directory, load
    from loudmerge.conformance.runner import TIME_LIMIT, Command, Controls

    try:
        command = Command(line, config.getoption("conformance_time_limit") or TIME_LIMIT)
        suite = load(config.getoption("conformance_data") or default_directory(config.rootpath))
    except (DataError, ValueError) as error:
        raise pytest.UsageError(f"--conformance-command: {error}") from error
    controls = Controls(suite, command)
    items += [
        ConformanceItem.from_parent(
            session, name=case.id, nodeid=f"conformance::{case.id}", case=case, controls=controls
        )
        for case in suite.cases
    ]
