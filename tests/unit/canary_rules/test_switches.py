"""A probe's answer counts where no name that is not here decides it, and where it is upstream's at all."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.canary_rules.code import found, holds

HEAD = "import flags\nfrom flags import MODE, SOFT, STRICT, enabled\n"
PROBE: dict[str, Any] = {
    "kind": "probe",
    "extract": ["f"],
    "cases": [{"call": "f(1)", "raises": "RuntimeError"}, {"call": "f(0)", "equals": 7}],
}


def guarded(test: str) -> str:
    return f"{HEAD}def f(a):\n    if {test}:\n        raise RuntimeError('x')\n    return 7\n"


@pytest.mark.parametrize(
    "test",
    [
        "a and STRICT",
        "a and not SOFT",
        "a and not (STRICT and not SOFT)",
        "a and flags.strict",
        "a and enabled('strict')",
        "a and MODE == 'strict'",
        "a and MODE != 'legacy'",
        "a and MODE == flags.STRICT",
        "a and 'strict' in flags.MODES",
        "a and a not in flags.LEGACY",
        "a and object() not in flags.LEGACY",
        "a and STRICT is True",
        "a and MODE is not None",
        "a and flags.legacy is None",
    ],
)
def test_a_guard_behind_a_switch_that_is_imported_may_be_off(test: str) -> None:
    assert not holds(guarded(test), **PROBE)


@pytest.mark.parametrize("early", ["SOFT", "MODE == 'x'", "not STRICT", "SOFT and not STRICT"])
def test_a_return_before_it_by_such_a_switch_is_one_too(early: str) -> None:
    body = f"    if {early}:\n        return 7\n    if a:\n        raise RuntimeError\n    return 7\n"
    assert not holds(f"{HEAD}def f(a):\n{body}", **PROBE)


def test_a_switch_that_changes_no_answer_is_none() -> None:
    body = "def f(a):\n    b = 1 if STRICT else 2\n    if SOFT and MODE == 'x':\n        b += 1\n"
    assert holds(f"{HEAD}{body}    if a:\n        raise RuntimeError(b)\n    return 7\n", **PROBE)
    assert holds(guarded("a and flags.f32 == flags.f32"), **PROBE)


def test_a_prelude_says_how_a_switch_stands() -> None:
    assert holds(guarded("a and enabled()"), **PROBE, prelude="def enabled():\n    return True")
    assert not holds(guarded("a and enabled()"), **PROBE, prelude="def enabled():\n    return False")


def test_the_switch_is_named() -> None:
    finding = found(guarded("a and MODE == 'strict'"), **PROBE)
    assert finding.detail == (
        "running f: f(1) gives something else where MODE == 'strict' is false: "
        "it is imported, so say in the rule's `prelude` what it is"
    )


def test_switches_without_end_are_not_all_tried() -> None:
    many = "\n".join(f"    b = 1 if flags.a{number} else 2" for number in range(9))
    finding = found(f"{HEAD}def f(a):\n{many}\n    return 7\n", **{**PROBE, "cases": PROBE["cases"][1:]})
    assert finding.detail.startswith("running f: more than 64 ways, by flags.a0, ")


C = "class C:\n    {}\n    def f(a):\n        return 7\n    def g(self):\n        return 7\n"


@pytest.mark.parametrize(
    ("source", "extract", "call", "touches"),
    [
        ("def f(a):\n    return 7\n", "f", "f(1)", True),
        ("def f(a):\n    return 7\n", "f", "7", False),
        ("def f(a):\n    return 7\n", "f", "seven()", False),
        ("def f(a):\n    return 7\n", "f", "through(f)", True),
        ("import functools\n@functools.cache\ndef f(a):\n    return 7\n", "f", "f(1)", True),
        (C.format("@staticmethod"), "C.f", "C.f(1)", True),
        (C.format("@staticmethod"), "C.f", "C().f and 7", False),
        (C.format("@property"), "C.f", "C().f", True),
        (C.format("@classmethod"), "C.f", "C.f()", True),
        ("class C:\n    seven = 7\n", "C.seven", "C.seven", True),
    ],
)
def test_a_case_that_never_runs_what_is_extracted_says_nothing(
    source: str, extract: str, call: str, *, touches: bool
) -> None:
    setup = "def seven():\n    return 7\ndef through(g):\n    return g(1)\n"
    finding = found(source, kind="probe", extract=[extract], setup=setup, cases=[{"call": call, "equals": 7}])
    assert finding.holds is touches, finding.detail
    assert touches or finding.detail == f"running {extract}: {call} never runs {extract}"


def test_a_setup_that_hides_what_is_extracted_says_nothing_either() -> None:
    source = "def f(a):\n    return None\n"
    hidden = {"setup": "def f(a):\n    return 7\n", "cases": [{"call": "f(1)", "equals": 7}]}
    assert not holds(source, kind="probe", extract=["f"], **hidden)
