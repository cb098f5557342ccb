from __future__ import annotations

import re
import sys

import pytest

from loudmerge.canary.rules.rules import RuleError, check, validate
from tests.unit.canary_rules.code import found, holds

GUARD = """
STATE = {"fallback": 0}

def merge(save):
    BODY
"""
RAISES = {
    "kind": "raises",
    "function": "merge",
    "exception": "RuntimeError",
    "mentions": ["STATE", "fallback"],
    "given": {"STATE": {"fallback": 1}},
    "otherwise": {"STATE": {"fallback": 0}},
}


def merge(body: str) -> str:
    return GUARD.replace("BODY", body.replace("\n", "\n    "))


@pytest.mark.parametrize(
    "body",
    [
        'if STATE["fallback"] > 0:\n    raise RuntimeError("partial")',
        'if not STATE["fallback"]:\n    return save\nraise RuntimeError("partial")',
        'n = STATE.get("fallback")\nif n:\n    error = RuntimeError(n)\n    raise error',
        'try:\n    if STATE["fallback"] > 0:\n        raise RuntimeError("x")\nexcept ValueError:\n    pass',
        'try:\n    if STATE["fallback"] > 0:\n        raise RuntimeError(0)\nexcept Exception:\n    raise',
        'if STATE["fallback"] <= 0:\n    pass\nelse:\n    raise RuntimeError("partial")',
    ],
)
def test_raises_holds_however_the_condition_is_written(body: str) -> None:
    assert holds(merge(body), **RAISES)


@pytest.mark.parametrize(
    "body",
    [
        'raise RuntimeError("always")',
        'if STATE["fallback"] < 0:\n    raise RuntimeError("partial")',
        'if STATE["fallback"] > 99:\n    raise RuntimeError("partial")',
        'if STATE["fallback"] > 0 and False:\n    raise RuntimeError("partial")',
        'return save\nif STATE["fallback"] > 0:\n    raise RuntimeError("partial")',
        'try:\n    if STATE["fallback"] > 0:\n        raise RuntimeError("x")\nexcept Exception:\n    pass',
        'try:\n    if STATE["fallback"] > 0:\n        raise RuntimeError("x")\nfinally:\n    return save',
        'def never():\n    if STATE["fallback"] > 0:\n        raise RuntimeError("partial")',
        'if STATE["fallback"] > 0:\n    raise KeyError("partial")',
        'if STATE["fallback"] > 0:\n    print("partial")',
    ],
)
def test_raises_fails_where_the_raise_is_dead_swallowed_unconditional_or_another(body: str) -> None:
    assert not holds(merge(body), **RAISES)


def test_raises_is_found_in_a_helper_that_is_called() -> None:
    helper = 'def refuse(n):\n    if n > 0:\n        raise RuntimeError("partial")\n'
    assert holds(helper + merge('refuse(STATE["fallback"])'), **RAISES)
    assert not holds(helper + merge("return save"), **RAISES)


def test_what_a_handler_catches_is_a_condition_of_its_raise() -> None:
    rule = {"kind": "raises", "function": "merge", "exception": "RuntimeError", "mentions": ["Exception"]}
    handler = "except Exception as error:\n    raise RuntimeError(0) from error"
    other = "if save:\n    raise RuntimeError(1)"
    assert holds(merge(f"try:\n    write(save)\n{handler}\n{other}"), **rule)
    assert not holds(merge(f"try:\n    write(save)\nexcept Exception:\n    pass\n{other}"), **rule)


def test_a_raise_can_be_asked_to_handle_the_error_of_a_call() -> None:
    rule = {"kind": "raises", "function": "merge", "exception": "RuntimeError", "handles": "write"}
    handler = "except Exception as error:\n    raise RuntimeError(0) from error"
    assert holds(merge(f"try:\n    write(save)\n{handler}"), **rule)
    assert not holds(merge(f"try:\n    read(save)\n{handler}\nwrite(save)"), **rule)
    assert not holds(merge("write(save)\nraise RuntimeError(1)"), **rule)


def test_the_condition_of_a_loop_variable_is_traced_to_what_it_runs_over() -> None:
    source = "def f(given):\n    for one in given.shapes:\n        if one != 3:\n            raise ValueError"
    rule = {"kind": "raises", "function": "f", "exception": "ValueError"}
    assert holds(source, **rule, mentions=["shapes"])
    assert not holds(source, **rule, mentions=["axes"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="except* is of Python 3.11")
def test_a_group_of_handlers_swallows_as_one_does() -> None:
    source = "def f(x):\n    try:\n        if x:\n            raise ValueError\n    except* {}:\n        pass"
    rule = {"kind": "raises", "function": "f", "exception": "ValueError", "mentions": ["x"]}
    assert not holds(source.format("ValueError"), **rule)
    assert holds(source.format("KeyError"), **rule)


def test_raises_says_what_swallows_it() -> None:
    body = 'try:\n    if STATE["fallback"] > 0:\n        raise RuntimeError("x")\nexcept Exception:\n    pass'
    finding = found(merge(body), **RAISES)
    assert "the except at line 8 swallows it" in finding.detail
    assert finding.line == 7


@pytest.mark.parametrize(
    ("body", "reached"),
    [
        ("check(save)", True),
        ("if save:\n    check(save)", True),
        ("inspect = check\ninspect(save)", True),
        ("def inner():\n    check(save)\ninner()", True),
        ("if False:\n    check(save)", False),
        ("off = False\nif off:\n    check(save)", False),
        ("while True:\n    pass\ncheck(save)", False),
        ("lambda: check(save)", False),
        ("save and check", False),
        ("def inner():\n    check(save)", False),
        ("for _ in ():\n    check(save)", False),
        ("False and check(save)", False),
    ],
)
def test_calls_holds_only_on_a_path_that_is_reached(body: str, reached: bool) -> None:
    source = "def check(x):\n    return x\n" + merge(body)
    assert holds(source, kind="calls", function="merge", callee="check") is reached


def test_calls_sees_through_import_aliases_and_asks_for_keywords() -> None:
    source = merge("from zoo import check as look\nlook(save, strict=True)")
    rule = {"kind": "calls", "function": "merge", "callee": "check"}
    assert holds(source, **rule, keywords={"strict": True}, args=["save"])
    assert not holds(source, **rule, keywords={"strict": False})
    assert not holds(source, **rule, args=["tokenizer"])


@pytest.mark.parametrize(
    ("body", "out"),
    [
        ("for one in save:\n    n = write(one)", True),
        ("try:\n    write(save)\nexcept KeyError:\n    log()", True),
        ("try:\n    write(save)\nexcept Exception as e:\n    raise ValueError(0) from e", True),
        ("with torch.no_grad():\n    write(save)", True),
        (
            "for one in save:\n    try:\n        n = write(one)\n    except Exception:\n        continue",
            False,
        ),
        ("write(0)\ntry:\n    write(save)\nexcept RuntimeError:\n    log()", False),
        ("with suppress(RuntimeError):\n    write(save)", False),
        ("with zoo.timer():\n    write(save)", False),
        ("try:\n    write(save)\nfinally:\n    return save", False),
    ],
)
def test_an_error_of_every_call_can_be_asked_to_get_out(body: str, out: bool) -> None:
    rule = {"kind": "calls", "function": "merge", "callee": "write", "lets_out": ["RuntimeError"]}
    finding = found(merge(body), **rule)
    assert finding.holds is out, finding.detail
    assert out or "its RuntimeError does not get out: " in finding.detail
    if "timer" in body:
        assert holds(merge(body), **rule, managers=["timer"])


@pytest.mark.parametrize(
    ("body", "out"),
    [
        ("with Pool() as pool:\n    pool.submit(write, save)", False),
        ("pool.submit(fn=write)", False),
        ("safely(partial(write, save))", False),
        ("safely(lambda: write(save))", False),
        ("def one(s):\n    write(s)\nsafely(one)", False),
        ("def one(s):\n    write(s)\none(save)", True),
        ("if not hasattr(write, 'calls'):\n    write.calls = 0", True),
    ],
)
def test_a_call_that_is_left_to_others_may_keep_its_error(body: str, out: bool) -> None:
    rule = {"kind": "calls", "function": "merge", "callee": "write", "lets_out": ["RuntimeError"]}
    finding = found(merge(f"{body}\nwrite(0)"), **rule)
    assert finding.holds is out, finding.detail
    assert out or finding.detail.endswith("there others are left to call it, who may keep its errors")


def test_returns_reads_names_branches_dicts_and_calls() -> None:
    source = """
    NAMES = {"a": "swapped"}
    def other(x):
        return "standard" if x else "unknown"
    def layout(x):
        if x:
            kind, r = NAMES["a"], 1
            return kind, r
        return other(x), 2
    """
    rule = {"kind": "returns", "function": "layout", "position": 0}
    assert holds(source, **rule, values=["swapped", "standard", "unknown"])
    assert not holds(source, **rule, values=["grouped"])
    assert not holds(source.replace("if x:", "if False:"), **rule, values=["swapped"])


@pytest.mark.parametrize(
    ("loop", "bounded"),
    [
        ("for _ in range(16):\n    m = getattr(m, 'base_layer', None)", True),
        ("while m is not None:\n    m = m.base_layer", False),
        ("while True:\n    m = m.base_layer", False),
        ("for _ in range(10 ** 9):\n    m = m.base_layer", False),
        ("seen = set()\nwhile id(m) not in seen:\n    seen.add(id(m))\n    m = m.base_layer", True),
        ("seen = set()\nwhile id(m) not in seen:\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n += 1\n    m = m.base_layer", True),
        ("n = 0\nwhile n < 16:\n    m = m.base_layer", False),
        ("n = 9\nwhile n > 0 and m:\n    n -= 1\n    m = m.base_layer", True),
        ("n = 0\nwhile m:\n    n += 1\n    if n > 16:\n        break\n    m = m.base_layer", True),
        ("n = 0\nwhile n < 16:\n    n -= 1\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n = n + 1\n    m = m.base_layer", True),
        ("n = 0\nwhile n < 16:\n    n = n - 1\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n = m.n + 1\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n = m().n + 1\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n = n + m.step\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n += 0\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16:\n    n += 1\n    m = m.base_layer\n    n = 0", False),
        ("n = 0\nwhile n < 16:\n    if m:\n        n += 1\n    m = m.base_layer", False),
        ("n = 0\nwhile n < 16 or m:\n    n += 1\n    m = m.base_layer", False),
        ("seen = set()\nwhile id(m) not in seen:\n    seen |= {id(m)}\n    m = m.base_layer", True),
        ("seen = []\nwhile m not in seen:\n    seen += [m]\n    m = m.base_layer", True),
        ("seen = set()\nwhile id(m) not in seen:\n    seen -= {id(m)}\n    m = m.base_layer", False),
        ("seen = set()\nwhile id(m) not in seen:\n    seen.add(1)\n    m = m.base_layer", False),
        (
            "seen = set()\nwhile m not in seen:\n    seen.add(m)\n    m = m.base_layer\n    seen.clear()",
            False,
        ),
        ("while m:\n    s = set()\n    if m in s:\n        break\n    s.add(m)\n    m = m.base_layer", False),
        ("s = []\nwhile m:\n    if m in s:\n        break\n    s.append(m)\n    m = m.base_layer", True),
        ("for _ in range(3):\n    m = m.base_layer\nreturn walk(m)", False),
        ("for _ in range(3):\n    m = m.base_layer\nreturn one(m)", True),
        ("for _ in range(3):\n    m = m.base_layer\ndef on(m):\n    return walk(m)\nreturn on(m)", False),
        ("while 0:\n    if id(m) in seen:\n        break\n    seen.add(id(m))\n    m = m.base_layer", False),
        ("pass", False),
    ],
)
def test_a_walk_is_bounded_by_a_range_a_counter_or_a_visited_set(loop: str, bounded: bool) -> None:
    source = "def walk(m):\n    " + loop.replace("\n", "\n    ")
    assert holds(source, kind="bounded-walk", function="walk", follows="base_layer") is bounded


def test_a_symbol_must_be_reachable_and_do_something() -> None:
    rule = {"kind": "symbol", "name": "f", "type": "function"}
    assert holds("def f(x):\n    return x + 1", **rule)
    assert holds("def g(x):\n    return x + 1\nf = g", **rule)
    assert not holds("def f(x):\n    '''Says much.'''\n    pass", **rule)
    assert not holds("if False:\n    def f(x):\n        return x + 1", **rule)
    assert not holds("def f(x):\n    return x + 1\nf = lambda x: None", **rule)
    assert not holds("def f(x):\n    return x + 1\ndel f", **rule)


def test_a_signature_admits_the_call() -> None:
    source = "class C:\n    def __init__(self, a, *, b=1):\n        self.a = a"
    assert holds(source, kind="signature", name="C", call="C(1, b=2)")
    assert not holds(source, kind="signature", name="C", call="C(1, c=2)")
    assert holds(source, kind="signature", name="C", accepts=["a", "b"])
    fields = "@dataclass\nclass P:\n    a: int\nclass C(P):\n    b: int = 2"
    assert holds(fields, kind="signature", name="C", call="C(a=1)")
    assert not holds(fields, kind="signature", name="C", call="C(b=1)")


@pytest.mark.parametrize(
    ("test", "guards"),
    [
        ("def test_a():\n    assert f() == 1", True),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", True),
        ("def check():\n    assert f() == 1\ndef test_a():\n    check()", True),
        ("class TestA:\n    def test_a(self):\n        assert f()", True),
        ("def test_a():\n    f()", False),
        ("def test_a():\n    assert True", False),
        ("def test_a():\n    assert f() == f()", False),
        ("def test_a():\n    pytest.skip('later')\n    assert f()", False),
        ("@pytest.mark.xfail\ndef test_a():\n    assert f()", False),
        ("pytestmark = pytest.mark.skip\ndef test_a():\n    assert f()", False),
        ("@pytest.mark.parametrize('x', [])\ndef test_a(x):\n    assert f()", False),
        ("def test_a():\n    try:\n        assert f()\n    except Exception:\n        pass", False),
        ("def test_b():\n    assert f()", False),
        ("CASES = []\n@pytest.mark.parametrize('x', CASES)\ndef test_a(x):\n    assert f()", False),
        ("@pytest.mark.parametrize('x', [c for c in [] if c])\ndef test_a(x):\n    assert f()", False),
        ("C = []\nC.append(1)\n@pytest.mark.parametrize('x', C)\ndef test_a(x):\n    assert f()", True),
        ("@pytest.mark.skipif(condition=True)\ndef test_a():\n    assert f()", False),
        ("off = pytest.mark.skip(reason='x')\n@off\ndef test_a():\n    assert f()", False),
        ("pytestmark = []\npytestmark += [pytest.mark.skip]\ndef test_a():\n    assert f()", False),
        ("from pytest import skip\ndef test_a():\n    skip('x')\n    assert f()", False),
        ("from pytest import skip as s\ns('x')\ndef test_a():\n    assert f()", False),
        ("def test_a():\n    skip = pytest.skip\n    skip('x')\n    assert f()", False),
        ("def test_a():\n    assert x()\n    pytest.skip('x')\n    assert f()", False),
        ("def test_a():\n    yield\n    assert f()", False),
        ("async def test_a():\n    assert f()", False),
        ("@pytest.mark.asyncio\nasync def test_a():\n    assert f()", True),
        ("@pytest.fixture\ndef test_a():\n    assert f()", False),
        ("def test_a():\n    assert f()\ntest_a.__test__ = False", False),
        ("class TestA:\n    __test__ = False\n    def test_a(self):\n        assert f()", False),
        ("class Helper:\n    def test_a(self):\n        assert f()", False),
        ("class Some(unittest.TestCase):\n    def test_a(self):\n        assert f()", True),
        (
            "class TestA:\n    def __init__(self):\n        x()\n    def test_a(self):\n        assert f()",
            False,
        ),
        ("def test_a():\n    assert (f() == 1, 'x')", False),
        ("from a import f\ndef test_a():\n    assert f", False),
        ("def test_a():\n    x = f()\n    assert x or not x", False),
    ],
)
def test_a_test_guards_only_if_it_runs_and_can_fail(test: str, guards: bool) -> None:
    assert holds(test, kind="tests", names=["test_a"]) is guards


def test_a_branch_must_act() -> None:
    rule = {"kind": "branch", "function": "f", "mentions": ["kind"]}
    assert holds("def f(kind):\n    if kind == 1:\n        return 2", **rule)
    assert not holds("def f(kind):\n    if kind == 1:\n        pass", **rule)
    assert not holds("def f(kind):\n    if kind == 1:\n        print(kind)", **rule)
    assert not holds("def f(kind):\n    if kind == 1:\n        return 2", **rule, does=["raise"])


@pytest.mark.parametrize("does", ["turn", "m.turn", "call:turn", "assign:m", "raise"])
def test_what_a_branch_does_is_said_by_name(does: str) -> None:
    rule = {"kind": "branch", "function": "f", "mentions": ["is_turned"], "does": [does]}
    assert holds("def f(m):\n    if m.is_turned:\n        m = m.turn(0)\n    return m", **rule) is (
        does != "raise"
    )
    assert not holds("def f(m):\n    if m.is_turned:\n        n = m.other(0)\n    return m", **rule)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"kind": "grep"}, "rule.kind is 'grep'"),
        ({"kind": "symbol"}, "a symbol rule needs the field 'name'"),
        ({"kind": "symbol", "name": "a", "pattern": "b"}, "a symbol rule has no field 'pattern'"),
        ({"kind": "returns", "function": "f", "values": []}, "returns.values is empty"),
        ({"kind": "symbol", "name": "a", "keys": []}, "symbol.keys is empty"),
        ({"kind": "symbol", "name": "a", "contains": [["b"]]}, "symbol.contains holds ['b']"),
        ({"kind": "calls", "function": "f", "callee": "g", "before": ""}, "calls.before is empty"),
        ({"kind": "calls", "function": "f", "callee": "g", "lets_out": [1]}, "calls.lets_out holds 1"),
        ({"kind": "tests", "names": ["a"], "uses": [""]}, "tests.uses holds '', expected a text"),
        ({"kind": "calls", "function": 1, "callee": "f"}, "calls.function is 1"),
        ({"kind": "probe", "extract": ["f"], "cases": [{"call": "f()"}]}, "a probe's case is"),
        ({"kind": "all", "rules": [{"kind": "grep"}]}, "rule.kind is 'grep'"),
        ({"kind": "raises", "function": "f", "exception": "OSError"}, "any other OSError would do"),
        (
            {"kind": "raises", "function": "f", "exception": "OSError", "always": False},
            "a raises rule needs `mentions`, `given`, `otherwise`, `handles` or `always`",
        ),
    ],
)
def test_a_rule_that_says_nothing_is_refused(rule: dict[str, object], says: str) -> None:
    with pytest.raises(RuleError, match=re.escape(says)):
        validate(rule)


def test_a_source_that_is_not_python_cannot_be_evaluated() -> None:
    with pytest.raises(RuleError, match="not readable as Python"):
        check({"kind": "symbol", "name": "f"}, "<html>", "page.html")


def test_what_a_test_only_imports_it_does_not_use() -> None:
    rule = {"kind": "tests", "names": ["test_a"], "uses": ["merge"]}
    assert holds("def test_a():\n    from a import merge as m\n    assert m() == 1", **rule)
    assert not holds("def test_a():\n    from a import merge\n    assert other() == 1", **rule)
