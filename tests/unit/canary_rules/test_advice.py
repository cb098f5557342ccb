"""Where a guard alarms, its detail says at which line and why, and what its author can do about it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.canary_rules.code import found, holds

RAISES: dict[str, Any] = {"kind": "raises", "function": "f", "exception": "ValueError", "always": True}
FUNCTION = "def f(x):\n    raise ValueError\n"
CLASS = "class A:\n    def f(self):\n        raise ValueError\n"


@pytest.mark.parametrize(
    ("source", "detail", "line"),
    [
        (f"{FUNCTION}exec('f = print')", "f may be bound anew at line 3: exec('f = print')", 3),
        (f"{FUNCTION}from .common import *", "f may be bound anew at line 3: from .common import *", 3),
        (f"{FUNCTION}f = wrap(f)", "f may be bound anew at line 3: f = wrap(f)", 3),
        (f"{FUNCTION}class f:\n    pass", "f may be bound anew at line 3: class f:", 3),
        (f"{FUNCTION}f.__code__ = g", "f may be bound anew at line 3: f.__code__ = g", 3),
        (f"{FUNCTION}def g():\n    global f\n    f = 1", "f may be bound anew at line 4: global f", 4),
        (f"{FUNCTION}def g():\n    globals()['f'] = 1", "f may be bound anew at line 4: globals()['f']", 4),
        ("from .common import f", "f is imported at line 1: from .common import f", 1),
        ("def g():\n    raise ValueError", "there is no function f that is reached", 0),
    ],
)
def test_what_binds_a_function_anew_is_said_with_its_line(source: str, detail: str, line: int) -> None:
    finding = found(source, **RAISES)
    assert (finding.holds, finding.detail, finding.line) == (False, detail, line)


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        (f"{CLASS}A.f = wrap(A.f)", "A.f may be bound anew at line 4: A.f = wrap(A.f)"),
        (f"{CLASS}def g():\n    A.f = h", "A.f may be bound anew at line 5: A.f = h"),
        (f"{CLASS}def g():\n    A.f, b = h", "A.f may be bound anew at line 5: A.f, b = h"),
        (f"{CLASS}def g(self):\n    A.f = self.f", "A.f may be bound anew at line 5: A.f = self.f"),
        (f"{CLASS}setattr(A, 'f', h)", "A.f may be bound anew at line 4: setattr(A, 'f', h)"),
        (f"{CLASS}def g():\n    setattr(A, 'f', h)", "A.f may be bound anew at line 5: setattr(A, 'f', h)"),
        (f"{CLASS}for n in N:\n    setattr(A, n, h)", "A.f may be bound anew at line 5: setattr(A, n, h)"),
        (f"{CLASS}if fast:\n    A.f = h", "A.f may be bound anew at line 5: A.f = h"),
        ("class A:\n    f = wrap(g)", "A.f may be bound anew at line 2: f = wrap(g)"),
        (f"{CLASS}A = wrap(A)", "A.f may be bound anew at line 4: A = wrap(A)"),
        ("from .common import A", "A.f is imported at line 1: from .common import A"),
        ("class A:\n    g = 1", "there is no function A.f that is reached"),
    ],
)
def test_what_binds_a_method_anew_is_said_with_its_line(source: str, detail: str) -> None:
    finding = found(source, **{**RAISES, "function": "A.f"})
    assert (finding.holds, finding.detail) == (False, detail)


@pytest.mark.parametrize("other", ["def g():\n    B.f = h", "def g(A):\n    A.g = h", "setattr(a, 'f', h)"])
def test_what_binds_another_method_is_no_matter(other: str) -> None:
    assert holds(f"{CLASS}{other}", **{**RAISES, "function": "A.f"})


def test_what_binds_a_test_anew_is_said_with_its_line() -> None:
    source = "def test_a():\n    assert f()\ntest_a = None"
    finding = found(source, kind="tests", names=["test_a"])
    assert finding.detail == "test_a may be bound anew at line 3: test_a = None"


def test_an_async_test_can_be_said_to_be_awaited() -> None:
    source = "async def test_a():\n    assert await f()"
    rule = {"kind": "tests", "names": ["test_a"]}
    advice = "no mark says what awaits it: say `awaited = true` in the rule if pytest does"
    assert advice in found(source, **rule).detail
    assert holds(source, **rule, awaited=True)
    assert not holds(source, **rule, awaited=False)
    assert not holds(f"{source}\n    yield", **rule, awaited=True)


def test_a_condition_that_is_not_settled_is_said_with_what_may_settle_it() -> None:
    advice = "is not settled where {'a': 1}: add to the rule's `given` what decides it"
    detail = found("def f(a, s):\n    if bad(s):\n        raise ValueError", **RAISES, given={"a": 1}).detail
    assert f"but `bad(s)` {advice}" in detail
    detail = found("def f(a, s):\n    for b in s:\n        raise ValueError", **RAISES, given={"a": 1}).detail
    assert f"but the loop over `s`, which may run over nothing, {advice}" in detail
