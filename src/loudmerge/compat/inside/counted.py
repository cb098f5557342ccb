"""pytest plugin: `--counted FILE` gets how many tests were to run, and how many ran to their end.

The exit code does not say: `pytest.exit(returncode=0)` in a test ends a run as if all had passed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest


@dataclass
class Counted:
    """collected: tests, without deselected ones. ended: those whose fixtures were taken down, too."""

    collected: int = 0
    ended: int = 0


class Plugin:
    """Counts, and writes what it counted at the end of the session."""

    def __init__(self, file: Path) -> None:
        self.file, self.counted = file, Counted()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.counted.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.counted.ended += report.when == "teardown"

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(asdict(self.counted)), "utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--counted FILE`."""
    parser.addoption("--counted", type=Path, metavar="FILE", help="counts of tests, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Counts where a file is given."""
    file = config.getoption("--counted")
    if file is not None:
        config.pluginmanager.register(Plugin(file), "loudmerge-counted")
