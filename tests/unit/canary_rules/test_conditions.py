"""What the given facts settle of a condition, part by part, and what a rule's `mentions` excuses."""

from __future__ import annotations

import pytest

from tests.unit.canary_rules.code import found, holds
from tests.unit.canary_rules.test_certainty import RAISES, merge


def test_a_condition_on_what_is_mentioned_is_open_only_where_the_facts_say_nothing_of_it() -> None:
    check = 'if count(model) != 3:\n    raise RuntimeError("some")'
    rule = {**RAISES, "mentions": ["count"], "given": {"mode": 16}}
    rule.pop("otherwise")
    assert holds(merge(f"if mode == 4:\n    return model\n{check}"), **rule)
    assert not holds(merge(f"if mode == 4 or strict:\n    return model\n{check}"), **rule)
    hidden = 'a = STATE["fallback"]\nb = a\nif b and strict:\n    raise RuntimeError("partial")'
    assert holds(merge(hidden.replace(" and strict", "")), **RAISES)
    assert not holds(merge(hidden), **RAISES)


HELPER = "def few(n, much):\n    return n != 3 and much\n"


@pytest.mark.parametrize(
    ("test", "open_part"),
    [
        ("count(model) != 3", ""),
        ("not count(model) == 3", ""),
        ("count(model) != 3 or strict", ""),
        ("few(count(model), mode)", ""),
        ("count(model) != 3 and mode", ""),
        ("count(model) != 3 and strict", "`strict`"),
        ("not (count(model) == 3 or strict)", "`not (strict)`"),
        ("few(count(model), strict)", "`strict`"),
        ("(bad := count(model) != 3 and os.environ.get('STRICT'))", "`os.environ.get('STRICT')`"),
        ("(count(model) != 3 and mode) and strict", "`strict`"),
    ],
)
def test_what_is_joined_with_a_condition_that_is_mentioned_is_a_condition_too(
    test: str, open_part: str
) -> None:
    rule = {**RAISES, "mentions": ["count"], "given": {"mode": 16}}
    rule.pop("otherwise")
    for body in (f"if {test}:", f"bad = {test}\nif bad:"):
        finding = found(merge(f"{body}\n    raise RuntimeError('some')", HELPER), **rule)
        assert finding.holds is not bool(open_part)
        assert f"but {open_part} is not settled" in finding.detail or finding.holds


def test_an_exit_that_joins_what_is_mentioned_with_something_else_is_not_settled() -> None:
    check = 'if count(model) != 3:\n    raise RuntimeError("some")'
    rule = {**RAISES, "mentions": ["count"], "given": {"mode": 16}}
    rule.pop("otherwise")
    assert holds(merge(f"if count(model) == 3:\n    return model\n{check}"), **rule)
    assert not holds(merge(f"if count(model) != 3 and strict:\n    return model\n{check}"), **rule)


def test_a_fact_can_be_what_a_call_gives_whatever_it_is_passed() -> None:
    rule = {**RAISES, "mentions": ["count"], "given": {"count()": 2, "write()": [0, []]}}
    rule["otherwise"] = {"count()": 0, "write()": [0, []]}
    loop = "done = 0\nfor one in model:\n    n, keys = write(one)\n    done += n\nfew = zoo.count(model)\n"
    raises = '\n    raise RuntimeError("some")'
    for test in ("few != done", "not few == done", "few > done", "done - few"):
        assert holds(merge(f"{loop}if {test}:{raises}"), **rule), test
    for test in ("few == done", "few < done", "few != done and strict", "few != 2", "not done"):
        assert not holds(merge(f"{loop}if {test}:{raises}"), **rule), test
    assert not holds(merge(f"{loop.replace('+= n', '+= 1')}if few != done:{raises}"), **rule)
    assert not holds(merge(f"{loop.replace('zoo.count', 'zoo.recount')}if few != done:{raises}"), **rule)
