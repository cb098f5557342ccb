"""A fact is about what the rule's function calls so: not what a helper does, nor what is written since."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.canary_rules.code import found, holds

RULE: dict[str, Any] = {
    "kind": "raises",
    "function": "f",
    "exception": "ValueError",
    "given": {"cfg.bias": True, "mode": 16},
}
RAISE = "if cfg.bias:\n        raise ValueError\n"
HELPER = f"def check(cfg=None, *rest, strict=False):\n    {RAISE}"


def body(code: str) -> str:
    return "def f(cfg, mode):\n    " + code.replace("\n", "\n    ") + "\n"


@pytest.mark.parametrize(
    ("call", "reached"),
    [
        ("check(cfg)", True),
        ("check(cfg=cfg)", True),
        ("other(cfg)", True),
        ("outer(cfg)", True),
        ("check(fresh())", False),
        ("check(cfg.copy(bias=False))", False),
        ("check(defaults)", False),
        ("check()", False),
        ("check(*cfg)", False),
        ("check(**cfg)", False),
        ("bound(cfg)", False),
        ("if biased(cfg):\n    raise ValueError", True),
        ("if biased(defaults):\n    raise ValueError", False),
    ],
)
def test_a_fact_is_about_what_a_helper_is_passed(call: str, *, reached: bool) -> None:
    others = (
        f"def other(c):\n    {RAISE.replace('cfg', 'c')}"
        "def outer(x):\n    other(x)\n"
        f"def bound(c):\n    cfg = load()\n    {RAISE}"
        "def biased(c):\n    return c.bias\n"
    )
    assert holds(f"{HELPER}{others}{body(call)}", **RULE) is reached


def test_a_method_passes_itself_on() -> None:
    rule = {**RULE, "function": "C.f", "given": {"self.bias": True}}
    check = "    def check(this):\n        if this.bias:\n            raise ValueError\n"
    assert holds(f"class C:\n{check}    def f(self):\n        self.check()\n", **rule)
    assert not holds(f"class C:\n{check}    def f(self):\n        C.check(other)\n", **rule)


@pytest.mark.parametrize(
    ("write", "kept"),
    [
        ("setattr(cfg, 'bias', False)", False),
        ("cfg = replace(cfg, bias=False)", False),
        ("cfg = cfg.copy(bias=False)", False),
        ("setattr(cfg, 'bias', True)", True),
        ("setattr(cfg, 'other', False)", True),
        ("cfg = replace(cfg, other=False)", True),
        ("other = replace(cfg, bias=False)", True),
    ],
)
def test_a_fact_that_is_set_by_a_call_is_none(write: str, *, kept: bool) -> None:
    finding = found(body(f"{write}\n{RAISE}"), **RULE)
    assert finding.holds is kept
    assert kept or finding.detail.endswith("writes cfg.bias before it is reached")


@pytest.mark.parametrize(
    ("cases", "reached"),
    [
        ("case True:\n        raise ValueError", True),
        ("case False:\n        pass\n    case _:\n        raise ValueError", True),
        ("case None | False:\n        return\n    case x:\n        raise ValueError", True),
        ("case True as b:\n        raise ValueError", True),
        ("case True if mode == 16:\n        raise ValueError", True),
        ("case False:\n        raise ValueError", False),
        ("case None:\n        raise ValueError", False),
        ("case 'all':\n        raise ValueError", False),
        ("case True if strict:\n        raise ValueError", False),
        ("case True | False:\n        pass\n    case _:\n        raise ValueError", False),
        ("case _ if strict:\n        pass\n    case True:\n        raise ValueError", False),
        ("case [_, _]:\n        raise ValueError", False),
        ("case bool(x):\n        raise ValueError", False),
    ],
)
def test_a_case_is_reached_where_its_pattern_fits_and_none_before_it_does(
    cases: str, *, reached: bool
) -> None:
    assert holds(body(f"match cfg.bias:\n    {cases}"), **RULE) is reached


def test_what_stands_behind_a_match_is_reached_where_a_case_ends() -> None:
    assert holds(
        body(f"match mode:\n    case 16:\n        x = 1\n    case _:\n        return\n{RAISE}"), **RULE
    )
    assert not holds(
        body(f"match mode:\n    case 16:\n        return\n    case _:\n        x = 1\n{RAISE}"), **RULE
    )
    assert not holds(body(f"match mode:\n    case _:\n        return\n{RAISE}"), **RULE)


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("while cfg.bias:\n    break\nelse:\n    raise ValueError", False),
        ("while not cfg.bias:\n    step()\nelse:\n    raise ValueError", True),
        ("return (check(cfg) for _ in [1])", False),
        ("lazy = (check(cfg) for _ in [1])", False),
        ("all(check(cfg) for _ in [1])", True),
        (f"try:\n    {RAISE.replace('raise', '    raise')}except ValueError:\n    raise SystemExit", False),
        (f"try:\n    {RAISE.replace('raise', '    raise')}except ValueError:\n    sys.exit()", False),
        (f"try:\n    {RAISE.replace('raise', '    raise')}except ValueError:\n    raise", True),
    ],
)
def test_an_error_comes_out_where_control_comes_to_it(code: str, *, reached: bool) -> None:
    finding = found(f"{HELPER}{body(code)}", **RULE)
    assert finding.holds is reached, finding.detail


@pytest.mark.parametrize(
    "replaced", ["sys.modules[__name__] = Lazy()", "sys.modules[__name__].__dict__.update(f=g)"]
)
def test_a_module_that_is_another_in_the_end_says_nothing(replaced: str) -> None:
    assert holds(body(RAISE), **RULE)
    assert not holds(f"{body(RAISE)}{replaced}", **RULE)


@pytest.mark.parametrize(
    ("bound", "same"),
    [
        ("check = noop", False),
        ("check = lambda x: None", False),
        ("for check in CHECKS:\n    pass", False),
        ("with quiet() as check:\n    pass", False),
        ("check = traced(check)", True),
        ("from checks import check", True),
        ("def check(x):\n    x.check()", True),
    ],
)
def test_a_call_of_something_else_by_its_name_is_none(bound: str, *, same: bool) -> None:
    assert holds(body(f"{bound}\ncheck(cfg)"), kind="calls", function="f", callee="check") is same


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("if id(m) in seen:\n        break\n    seen.add(id(m))", True),
        ("if m is None or id(m) in seen:\n        return m\n    seen.add(id(m))", True),
        ("if not id(m) not in seen:\n        break\n    seen |= {id(m)}", True),
        ("if id(m) in seen and strict:\n        break\n    seen.add(id(m))", False),
        ("if id(m) not in seen:\n        break\n    seen.add(id(m))", False),
        ("if m.name in seen:\n        break\n    seen.add(id(m))", False),
    ],
)
def test_a_set_of_what_was_visited_ends_a_walk_by_itself(code: str, *, ends: bool) -> None:
    walk = f"def f(m):\n  seen = set()\n  while m is not None:\n    {code}\n    m = m.base_layer\n"
    assert holds(walk, kind="bounded-walk", function="f", follows="base_layer") is ends
