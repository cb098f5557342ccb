"""A name that a `try` or an `if` of the file binds in more than one way is none of them for certain."""

from __future__ import annotations

from textwrap import indent
from typing import Any

import pytest

from tests.unit.canary_rules.code import found, holds

F = "def f(a):\n    g(a)\n    if a:\n        raise RuntimeError('x')\n    return 7\n"
INNER = indent(F, "    ")
G = "def g(a):\n    return a\n"
CASES = [{"call": "f(1)", "raises": "RuntimeError"}, {"call": "f(0)", "equals": 7}]
RULES: dict[str, dict[str, Any]] = {
    "probe": {"extract": ["f"], "cases": CASES},
    "raises": {"function": "f", "exception": "RuntimeError", "mentions": ["a"]},
    "calls": {"function": "f", "callee": "g"},
    "returns": {"function": "f", "values": [7]},
    "branch": {"function": "f", "mentions": ["a"], "does": ["raise"]},
    "signature": {"name": "f", "call": "f(1)"},
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "source",
    [
        f"try:\n    from fast import f\nexcept ImportError:\n{INNER}",
        f"try:\n    from fast import f as old\n    f = old\nexcept ImportError:\n{INNER}",
        f"{F}try:\n    from fast import f\nexcept ImportError:\n    pass",
        f"try:\n    from fast import f\nexcept ImportError:\n    f = None\nif f is None:\n{INNER}",
        f"if fast():\n    from fast import f\nelse:\n{INNER}",
        f"if not fast():\n{INNER}else:\n    from fast import f",
        f"from fast import f\nif not f:\n{INNER}",
        f"try:\n    from fast import f\nexcept ImportError:\n    f = None\nfor _ in versions:\n{INNER}",
        f"try:\n    from fast import h\nexcept ImportError:\n{INNER.replace(' f', ' h')}f = h",
        f"try:\n    import fast\nexcept ImportError:\n{INNER}else:\n    f = fast.f",
        f"from fast import f\ntry:\n    need()\n{INNER}except ImportError:\n    pass",
    ],
)
def test_a_function_that_may_be_imported_is_not_certain(kind: str, source: str) -> None:
    assert holds(G + F, kind=kind, **RULES[kind])
    assert not holds(G + source, kind=kind, **RULES[kind])


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "source",
    [
        f"try:\n    from fast import f\nexcept ImportError:\n    pass\n{F}",
        f"import sys\nif sys.path:\n{INNER}else:\n    raise ImportError('fast')",
        f"try:\n{INNER}except ImportError:\n    raise",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fast import f\nelse:\n{INNER}",
        f"try:\n    from fast import other\nexcept ImportError:\n    other = None\n{F}",
        f"import io\nwith io.StringIO():\n{INNER}",
    ],
)
def test_a_function_that_nothing_else_can_be_is(kind: str, source: str) -> None:
    assert holds(G + source, kind=kind, **RULES[kind])


def test_the_alternatives_are_named() -> None:
    source = f"try:\n    from fast import f\nexcept ImportError:\n{INNER}"
    finding = found(source, kind="returns", function="f", values=[7])
    assert finding.detail == (
        "f may be one of several: `from fast import f` at line 2; `def f(a):` at line 4"
    )
    assert finding.line == 2


def test_a_method_is_as_certain_as_its_class() -> None:
    method = "class C(B):\n    def f(self):\n        raise ValueError\n"
    rule = {"kind": "raises", "function": "C.f", "exception": "ValueError", "always": True}
    base = "try:\n    from fast import B\nexcept ImportError:\n    class B:\n        pass\n"
    assert holds(base + method, **rule)
    source = f"try:\n    from fast import C\nexcept ImportError:\n{indent(method, '    ')}"
    assert "C may be one of several" in found(source, **rule).detail
    inherited = (
        f"try:\n    from fast import C\nexcept ImportError:\n{indent(method, '    ')}class D(C):\n    pass"
    )
    assert "C may be one of several" in found(inherited, **{**rule, "function": "D.f"}).detail


def test_each_alternative_of_a_symbol_has_to_be_as_the_rule_says() -> None:
    rule = {"kind": "symbol", "name": "f", "type": "function"}
    source = "if old():\n    def f(x):\n        return x + 1\nelse:\n    def f(x):\n        {}"
    assert holds(source.format("return x + 2"), **rule)
    assert not holds(source.format("pass"), **rule)
    keys = {"kind": "symbol", "name": "STATE", "keys": ["a"]}
    assert holds("STATE = dict(a=1, b=2)", **keys)
    assert holds("def fresh():\n    return {'a': 1}\nSTATE = fresh()", **keys)
    assert holds("STATE = {'a': torch.float32, 'b': x}", **keys)
    assert not holds("STATE = dict(b=1)", **keys)
    assert not holds("STATE = dict(zip(a, b))", **keys)
    source = "try:\n    from fast import {}\nexcept ImportError:\n    STATE = {{'a': 1}}"
    assert not holds(source.format("STATE"), **keys)
    assert holds(source.format("other") + "\nSTATE = {'a': 1}", **keys)
    members = {"kind": "symbol", "name": "C", "members": ["a"]}
    source = "try:\n    from fast import {}\nexcept ImportError:\n    pass\nelse:\n    pass\n"
    assert not holds("class C:\n    a = 1\n" + source.format("C"), **members)
    assert holds("class C:\n    a = 1\n" + source.format("D"), **members)
    attribute = {"kind": "symbol", "name": "C.a"}
    assert not holds("class C:\n    a = 1\n" + source.format("C"), **attribute)
    assert holds("class C:\n    a = 1\n" + source.format("D"), **attribute)
