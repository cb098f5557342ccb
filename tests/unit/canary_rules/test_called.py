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


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("key = find(model)\nreturn key", ""),
        ("a, b = find(model)\nreturn b", ""),
        ("return find(model)", ""),
        ("model.key = find(model)", ""),
        ("print(find(model))", ""),
        ("find(model)", "its result is dropped"),
        ("key = find(model)\nreturn model", "its result is never read: key"),
        ("a, b = find(model)\nreturn model", "its result is never read: a, b"),
    ],
)
def test_a_rule_can_ask_that_a_result_is_used(body: str, problem: str) -> None:
    rule = {"kind": "calls", "function": "merge", "callee": "find"}
    finding = found(merge(body), **rule, used=True)
    assert finding.holds is not bool(problem)
    assert problem in finding.detail
    assert holds(merge(body), **rule)


def test_a_rule_can_ask_that_a_call_comes_before_another() -> None:
    rule = {"kind": "calls", "function": "merge", "callee": "reset", "before": "work"}
    assert holds(merge("reset()\nfor one in model:\n    work(one)"), **rule)
    assert holds(merge("start()\nwork(model)", "def start():\n    reset()"), **rule)
    assert "it comes after a call of work" in found(merge("work(model)\nreset()"), **rule).detail
    assert not holds(merge("begin()\nreset()", "def begin():\n    work(1)"), **rule)
    assert "no call of work comes after it" in found(merge("reset()"), **rule).detail


def test_what_a_raise_handles_gets_to_it() -> None:
    rule = {"kind": "raises", "function": "merge", "exception": "RuntimeError", "handles": "work"}
    outer = "try:\n{}\nexcept Exception as error:\n    raise RuntimeError from error"
    assert holds(merge(outer.format("    work(model)")), **rule)
    assert holds(merge(outer.format("    run(model)"), "def run(model):\n    work(model)"), **rule)
    for kept in (
        "try:\n    work(model)\nexcept Exception:\n    pass",
        "with suppress(Exception):\n    work(model)",
    ):
        body = outer.format(indent(f"{kept}\nload(model)", "    "))
        assert "it does not handle an error of work: " in found(merge(body), **rule).detail
        assert not holds(merge(body), **rule)
    assert not holds(merge(outer.format("    load(model)")), **rule)


FACTS = {
    "kind": "raises",
    "function": "merge",
    "exception": "ValueError",
    "given": {"model.bias": True},
    "otherwise": {"model.bias": False},
}
BIASED = "if model.bias:\n    raise ValueError(model)"


@pytest.mark.parametrize(
    "before",
    [
        "vars(model)['bias'] = False",
        "model.__dict__['bias'] = False",
        "vars(model).update(bias=False)",
        "model.__dict__.update(r=3, bias=False)",
        "object.__setattr__(model, 'bias', False)",
        "model = clean(model)",
        "model = zoo.clean(config=model)",
        "model = model.clean()",
        "model = cleaned(model)",
    ],
)
def test_what_may_change_a_given_attribute_is_seen(before: str) -> None:
    helper = "def cleaned(model):\n    return {'bias': False}\n"
    assert holds(merge(BIASED), **FACTS)
    finding = found(merge(f"{before}\n{BIASED}", helper), **FACTS)
    assert not finding.holds
    assert "writes model.bias before it is reached" in finding.detail


@pytest.mark.parametrize(
    "before",
    [
        "vars(model)['bias'] = True",
        "vars(model)['r'] = False",
        "vars(model).update(r=3)",
        "vars(other)['bias'] = False",
        "vars()['bias'] = False",
        "object.__setattr__(model, name, False)",
        "model = copy.deepcopy(model)",
        "model = replace(model, r=3)",
        "other = clean(model)",
        "model = cleaned(model)",
    ],
)
def test_what_leaves_it_is_not(before: str) -> None:
    helper = "def cleaned(model):\n    return {'bias': True}\n"
    finding = found(merge(f"{before}\n{BIASED}", helper), **FACTS)
    assert finding.holds, finding.detail


@pytest.mark.parametrize(
    ("ended", "gets_out"),
    [("return 0", False), ("if not model:\n        return 0", False), ("close()", True)],
)
def test_a_finally_that_returns_drops_what_a_handler_raises(ended: str, *, gets_out: bool) -> None:
    rule = {"kind": "raises", "function": "merge", "exception": "RuntimeError", "handles": "work"}
    body = (
        f"try:\n    work(model)\nexcept Exception as e:\n    raise RuntimeError from e\nfinally:\n    {ended}"
    )
    finding = found(merge(body), **rule)
    assert finding.holds is gets_out
    assert gets_out or "returns, which drops the exception" in finding.detail
    loop = f"for one in model:\n    try:\n        pass\n    finally:\n        continue\n{CHECK}"
    assert holds(merge(loop), **RAISES)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("L = namedtuple('L', 'name rank')", True),
        ("class L(typing.NamedTuple):\n    name: str\n    rank: int", True),
        ("class L:\n    pass", False),
        ("L = list", False),
    ],
)
def test_a_named_tuple_has_its_places(kind: str, *, known: bool) -> None:
    rule = {"kind": "returns", "function": "f", "values": ["a", "b"], "position": 0}
    body = "def f(x):\n    if x:\n        return L('a', 1)\n    return L('b', x)"
    assert holds(f"{kind}\n{body}", **rule) is known
    assert not holds(f"{kind}\n{body.replace(repr('b'), 'x')}", **rule)
    assert not holds(f"{kind}\n{body}", **{**rule, "position": 2})


@pytest.mark.parametrize(
    ("over", "runs"),
    [("(a, model)", True), ("[work(model), *a]", True), ("(*a,)", False), ("()", False), ("a", False)],
)
def test_a_loop_over_what_is_written_down_runs(over: str, *, runs: bool) -> None:
    finding = found(merge(f"for one in {over}:\n{indent(CHECK, '    ')}"), **RAISES)
    assert finding.holds is runs, finding.detail
