"""A signature is what a call meets: decorators, `__new__` and what makes a constructor included."""

from __future__ import annotations

import pytest

from loudmerge.canary.rules.rules import RuleError, validate
from tests.unit.canary_rules.code import found, holds

OWN = "def own(g):\n    def inner(a):\n        return g(a)\n    return inner\n"


@pytest.mark.parametrize("head", [f"{OWN}@own\n", "from zoo import own\n@own\n", "@zoo.own(3)\n"])
def test_a_decorator_may_take_other_parameters(head: str) -> None:
    source = f"{head}def f(a, b=1):\n    return a"
    assert not holds(source, kind="signature", name="f", call="f(1, b=2)")
    assert not holds(source, kind="signature", name="f", accepts=["b"])
    assert "name '" in found(source, kind="signature", name="f", accepts=["b"]).detail
    allowed = ["own", "zoo.own"]
    assert holds(source, kind="signature", name="f", call="f(1, b=2)", decorators=allowed)
    marked = f"{head}class C:\n    def __init__(self, a, b=1):\n        self.a = a"
    assert not holds(marked, kind="signature", name="C", call="f(1, b=2)")
    inner = head.replace("@", "class C:\n    @") + "    def __init__(self, a, b=1):\n        self.a = a"
    assert not holds(inner, kind="signature", name="C", call="f(1, b=2)")
    assert holds(inner, kind="signature", name="C", call="f(1, b=2)", decorators=allowed)


@pytest.mark.parametrize("mark", ["torch.inference_mode", "torch.no_grad()", "functools.lru_cache"])
def test_a_known_decorator_takes_the_same(mark: str) -> None:
    assert holds(f"@{mark}\ndef f(a, b=1):\n    return a", kind="signature", name="f", call="f(1, b=2)")


def test_a_property_takes_nothing() -> None:
    source = "class C:\n    @property\n    def f(self, a=1):\n        return a"
    assert not holds(source, kind="signature", name="C.f", accepts=["a"])
    assert holds(source.replace("    @property\n", ""), kind="signature", name="C.f", accepts=["a"])


INIT = "    def __init__(self, a, b=1):\n        self.a = a\n"


@pytest.mark.parametrize(
    ("body", "admits"),
    [
        (INIT, True),
        ("    def __new__(cls, a):\n        return 1\n" + INIT, False),
        ("    def __new__(cls, *args, **kwargs):\n        return 1\n" + INIT, True),
        ("    __new__ = make()\n" + INIT, False),
        ("    __init__ = make()\n", False),
        ("    a: int\n    b: int = 1\n", False),
    ],
)
def test_a_class_takes_what_its_new_and_its_init_do(body: str, *, admits: bool) -> None:
    for asked in ({"call": "f(1, b=2)"}, {"accepts": ["a", "b"]}):
        assert holds(f"class C:\n{body}", kind="signature", name="C", **asked) is admits
        assert holds(f"class B:\n{body}class C(B):\n    pass", kind="signature", name="C", **asked) is admits
    assert not holds(f"class C:\n{body}C.__init__ = print", kind="signature", name="C", call="f(1, b=2)")


@pytest.mark.parametrize(
    ("head", "field", "admits"),
    [
        ("@dataclass\nclass C:", "b: int = 1", True),
        ("@dataclasses.dataclass(frozen=True)\nclass C:", "b: int = 1", True),
        ("from dataclasses import dataclass as d\n@d\nclass C:", "b: int = 1", True),
        ("class C(NamedTuple):", "b: int = 1", True),
        ("@dataclass(init=False)\nclass C:", "b: int = 1", False),
        ("@dataclass(init=MADE)\nclass C:", "b: int = 1", False),
        ("@dataclass\nclass C:", "b: ClassVar[int] = 1", False),
        ("@dataclass\nclass C:", "b: 'typing.ClassVar[int]' = 1", False),
        ("@dataclass\nclass C:", "b: int = field(init=False)", False),
        ("@dataclass\nclass C:", "b: int = field(default=1)", True),
        ("def dataclass(c):\n    return c\n@dataclass\nclass C:", "b: int = 1", False),
        ("class C(B):", "b: int = 1", False),
        ("class C:", "b: int = 1", False),
    ],
)
def test_annotations_are_parameters_where_something_makes_them_so(
    head: str, field: str, *, admits: bool
) -> None:
    source = f"{head}\n    a: int\n    {field}"
    assert holds(source, kind="signature", name="C", call="f(a=1, b=2)") is admits
    assert holds(source, kind="signature", name="C", accepts=["a", "b"]) is admits


def test_a_field_without_a_default_has_to_be_given() -> None:
    source = "@dataclass\nclass C:\n    a: int\n    b: list = field({})"
    assert holds(source.format("default_factory=list"), kind="signature", name="C", call="f(a=1)")
    assert not holds(source.format("repr=False"), kind="signature", name="C", call="f(a=1)")


def test_a_constructor_that_may_be_imported_is_not_certain() -> None:
    fallback = "try:\n    from zoo import {0}\nexcept ImportError:\n    class {0}:\n    " + INIT.replace(
        "\n", "\n    "
    )
    rule = {"kind": "signature", "call": "f(1, b=2)"}
    assert "`from zoo import C` at line 2" in found(fallback.format("C"), **rule, name="C").detail
    derived = fallback.format("B") + "\nclass C(B):\n    pass"
    assert "B may be one of several" in found(derived, **rule, name="C").detail
    elsewhere = found("class C(zoo.B):\n    pass", **rule, name="C").detail
    assert "its constructor is that of B, of another file" in elsewhere


@pytest.mark.parametrize("call", ["g(1)", "f(*x)", "f(**x)", "f", "f(", "f(1)(2)", "a.f(1)", " "])
def test_a_call_that_is_none_of_the_function_is_a_mistake_of_the_rule(call: str) -> None:
    with pytest.raises(RuleError, match="not a call of f with plain arguments, as f"):
        validate({"kind": "signature", "name": "h", "call": call})
    validate({"kind": "signature", "name": "h", "call": "f(1, b=x)"})
    validate({"kind": "signature", "name": "h", "call": "h(1)"})


def test_a_signature_that_asks_for_nothing_is_a_mistake_of_the_rule() -> None:
    with pytest.raises(RuleError, match="needs `call`, or names in `accepts`"):
        validate({"kind": "signature", "name": "f"})
    for field, nothing in (("accepts", []), ("call", "")):
        with pytest.raises(RuleError, match=f"signature.{field} is empty"):
            validate({"kind": "signature", "name": "f", field: nothing})


def test_an_async_function_is_no_plain_one() -> None:
    rule = {"kind": "signature", "name": "f", "call": "f(1)"}
    finding = found("async def f(a):\n    return a", **rule)
    assert (finding.holds, finding.line) == (False, 1)
    assert "it is async: say `awaited = true` in the rule if our call is awaited" in finding.detail
    assert holds("async def f(a):\n    return a", **rule, awaited=True)
    assert not holds("async def f(a, b):\n    return a", **rule, awaited=True)
