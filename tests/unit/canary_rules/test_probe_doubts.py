"""A probe runs what it cuts out of a file: it is no answer where upstream would run something else."""

from __future__ import annotations

import pytest

from tests.unit.canary_rules.code import found, holds

F = "def f(a):\n    if a:\n        raise RuntimeError('x')\n    return 7\n"
PROBE = {
    "kind": "probe",
    "extract": ["f"],
    "cases": [{"call": "f(1)", "raises": "RuntimeError"}, {"call": "f(0)", "equals": 7}],
}
C = "class C:\n    def f(self, a):\n        if a:\n            raise RuntimeError('x')\n        return 7\n"
METHOD = {
    "kind": "probe",
    "extract": ["C.f"],
    "cases": [{"call": "C().f(1)", "raises": "RuntimeError"}, {"call": "C().f(0)", "equals": 7}],
}


@pytest.mark.parametrize(
    "later",
    [
        "from fast import f",
        "from fast import g as f",
        "from fast import *",
        "from fast import quiet\nf = quiet(f)",
        "from fast import g\nf = g",
        "globals()['f'] = print",
        "globals().update(f=print)",
        "import sys\nsetattr(sys.modules[__name__], 'f', print)",
        "def kill():\n    global f\n    f = None\nkill()",
        "f.__code__ = print.__code__",
        "try:\n    from fast import f\nexcept ImportError:\n    pass",
    ],
)
def test_a_function_that_is_replaced_is_not_the_one_that_a_probe_runs(later: str) -> None:
    assert holds(F, **PROBE)
    assert not holds(F + later, **PROBE)
    helper = F.replace("def f", "def h") + later.replace("f", "h").replace("hrom", "from").replace(
        "deh", "def"
    )
    assert holds(F.replace("def f", "def h") + "def f(a):\n    return h(a)", **PROBE)
    assert not holds(helper + "\ndef f(a):\n    return h(a)", **PROBE)


@pytest.mark.parametrize(
    "later",
    [
        "from fast import C",
        "from fast import D as C",
        "from fast import *",
        "C.f = print",
        "from fast import quiet\nC.f = quiet(C.f)",
        "from fast import quiet\nC = quiet(C)",
        "def kill():\n    global C\n    C = None",
        "try:\n    from fast import C\nexcept ImportError:\n    pass",
    ],
)
def test_a_class_or_method_that_is_replaced_is_not_either(later: str) -> None:
    assert holds(C, **METHOD)
    assert not holds(C + later, **METHOD)


def test_the_replacement_is_named() -> None:
    finding = found(F + "from fast import f", **PROBE)
    assert finding.detail == "f is imported at line 5: from fast import f"
    assert finding.line == 5


def test_a_value_that_is_imported_later_is_not_the_one_of_the_file() -> None:
    source = "N = 7\ndef f(a):\n    if a:\n        raise RuntimeError('x')\n    return N\n"
    assert holds(source, **PROBE)
    assert not holds(source + "from fast import N", **PROBE)
    chosen = "try:\n    from fast import N\nexcept ImportError:\n    N = 7\n" + source.partition("\n")[2]
    assert holds(chosen, **PROBE)
    assert not holds(chosen, **{**PROBE, "extract": ["f", "N"]})


@pytest.mark.parametrize("mark", ["quiet", "quiet(default=7)", "fast.quiet", "soft"])
def test_a_decorator_that_is_not_here_may_change_what_runs(mark: str) -> None:
    head = "import fast\nfrom fast import quiet\nfrom fast import quiet as soft\n"
    assert not holds(f"{head}@{mark}\n{F}", **PROBE)
    assert not holds(f"{head}@{mark}\n{C}", **METHOD)
    assert not holds(head + C.replace("    def", f"    @{mark}\n    def"), **METHOD)
    assert holds(f"{head}@{mark}\n{F}", **PROBE, decorators=["quiet", "fast.quiet"])
    helper = f"{head}@{mark}\n" + F.replace("def f", "def h") + "def f(a):\n    return h(a)"
    assert not holds(helper, **PROBE)


def test_a_decorator_that_is_known_or_is_run_itself_changes_nothing() -> None:
    assert holds(f"from torch import no_grad\n@no_grad\n{F}", **PROBE)
    assert holds(f"from functools import lru_cache\n@lru_cache\n{F}", **PROBE)
    assert holds(f"def own(g):\n    return g\n@own\n{F}", **PROBE)
    assert not holds(f"def own(g):\n    return print\n@own\n{F}", **PROBE)
    assert holds(f"from fast import quiet\n@quiet\n{F}", **PROBE, prelude="def quiet(g):\n    return g")


def test_the_decorator_and_what_allows_it_are_named() -> None:
    finding = found(f"from fast import quiet\n@quiet(1)\n{F}", **PROBE)
    assert finding.detail == (
        "f is not what runs: it stands under the decorator `quiet(1)` at line 2: "
        "name 'quiet' in the rule's `decorators` if the body still runs"
    )
    assert finding.line == 3


@pytest.mark.parametrize(
    "head",
    ["with quiet():", "with fast.quiet(a) as b:", "cm = quiet()\n    with cm:", "with open('x'), quiet():"],
)
def test_a_manager_that_is_not_here_may_end_an_error(head: str) -> None:
    body = "def f(a):\n    {}\n        if a:\n            raise RuntimeError('x')\n    return 7\n"
    source = f"import fast\nfrom fast import quiet\n{body.format(head)}".replace("open('x')", "nullcontext()")
    source = f"from contextlib import nullcontext\n{source}"
    assert not holds(source, **PROBE)
    assert holds(source, **PROBE, managers=["quiet"])
    assert "name 'quiet' in the rule's `managers`" in found(source, **PROBE).detail
    assert holds(f"from torch import no_grad\n{body.format('with no_grad():')}", **PROBE)


@pytest.mark.parametrize("wanted", ["from fast import g", "import fast.g as g", "from .fast import g"])
def test_a_function_that_goes_on_without_what_it_imports_is_another_than_upstreams(wanted: str) -> None:
    tried = f"    try:\n        {wanted}\n    except ImportError:\n        g = None\n"
    source = F.replace("def f(a):\n", f"def f(a):\n{tried}")
    finding = found(source, **PROBE)
    assert not finding.holds
    assert "f(1) goes on without fast" in finding.detail
    assert "say in the rule's `prelude` what it is" in finding.detail
    given = "import sys, types\nsys.modules['fast'] = sys.modules['fast.g'] = types.ModuleType('fast')\n"
    if "." not in wanted:
        assert holds(source, **PROBE, prelude=f"{given}sys.modules['fast'].g = 1")


def test_what_python_has_or_what_ends_a_case_is_no_doubt() -> None:
    assert holds(F.replace("def f(a):\n", "def f(a):\n    import json\n"), **PROBE)
    asked = {"kind": "probe", "extract": ["f"], "cases": [{"call": "f()", "raises": "ModuleNotFoundError"}]}
    assert holds("def f():\n    import fast", **asked)
    other = "def f(a):\n    try:\n        import winreg\n    except ImportError:\n        pass\n"
    assert holds(F.replace("def f(a):\n", other), **PROBE)
