"""A server that plays GitHub, for each test its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.upstream_server import UpstreamServer, running_upstream


@pytest.fixture(autouse=True)
def outside_github(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests find is no news for the workflow they may run in."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[UpstreamServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_upstream() as server:
        yield server
