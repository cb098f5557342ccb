"""Upstream still keeps what canary/guards/*.toml says: one test for each guard and ref."""

from __future__ import annotations

from loudmerge.canary.plugin import CanaryTest


def test_upstream_keeps_this_guard(canary_case: CanaryTest) -> None:
    canary_case.check()
