"""What a call of something else in the file does, and what it gives."""

from __future__ import annotations

from textwrap import indent

import pytest

from tests.unit.canary_rules.code import found, holds
from tests.unit.canary_rules.test_certainty import CHECK, RAISES, merge


def test_a_manager_runs_where_it_is_entered() -> None:
    helper = f"@contextmanager\ndef check():\n{indent(CHECK, '    ')}\n    yield"
    assert holds(merge("with check():\n    work(model)", helper), **RAISES)
    assert holds(merge("stack.enter_context(check())", helper), **RAISES)
    assert not holds(merge("with quiet(check):\n    work(model)", helper), **RAISES)
    for body in ("check()", "checked = check()"):
        detail = found(merge(body, helper), **RAISES).detail
        assert "is not seen to run: check is a generator at line 2: calling it runs nothing" in detail


def test_what_an_assert_calls_is_not_called_without_asserts() -> None:
    helper = f"def check():\n{indent(CHECK, '    ')}"
    assert holds(merge("check()", helper), **RAISES)
    finding = found(merge("assert check() is None", helper), **RAISES)
    assert "`__debug__` is not settled" in finding.detail
    assert not holds(merge("assert model, check()", helper), **RAISES)
    calls = {"kind": "calls", "function": "merge", "callee": "check"}
    assert holds(merge("assert check()"), **calls)
    assert not holds(merge("assert check()"), **calls, given={})


@pytest.mark.parametrize(
    "copied",
    [
        "dict(STATE)",
        "STATE.copy()",
        "copy.deepcopy(STATE)",
        "dict(STATE, seconds=3)",
        "dict(fallback=STATE['fallback'])",
    ],
)
def test_a_copy_of_what_is_given_is_given(copied: str) -> None:
    assert holds(merge(f"state = {copied}\n{CHECK.replace('STATE', 'state')}"), **RAISES)


@pytest.mark.parametrize(
    "copied",
    ["dict(STATE, fallback=0)", "dict(STATE, **other)", "dict(other)", "dict(zip(a, b))", "dict(a, b)"],
)
def test_a_copy_of_something_else_is_not(copied: str) -> None:
    assert not holds(merge(f"state = {copied}\n{CHECK.replace('STATE', 'state')}"), **RAISES)
