"""Short sources that the tests of the rules read."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

from loudmerge.canary.rules.rules import Finding, check


def found(source: str, **rule: Any) -> Finding:
    """What a rule says of a source."""
    return check(rule, dedent(source), "upstream.py")


def holds(source: str, **rule: Any) -> bool:
    return found(source, **rule).holds
