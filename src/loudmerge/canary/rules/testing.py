"""Whether a test exists, runs and can fail."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.flow import Place, Scope, places
from loudmerge.canary.code.rebinding import rebinding
from loudmerge.canary.code.swallow import swallowed
from loudmerge.canary.code.syntax import (
    FUNCTIONS,
    Function,
    Module,
    dotted,
    mentions,
)
from loudmerge.canary.code.wrapping import yields
from loudmerge.canary.rules.conftests import left_out
from loudmerge.canary.rules.settings import deselected
from loudmerge.canary.rules.skipping import marks_of, skips_always, stopped
from loudmerge.canary.rules.surroundings import NOWHERE, Subject, Surroundings

PATCHING = frozenset({"patch", "object", "setattr"})
"""`mock.patch(...)`, `patch.object(...)`, `monkeypatch.setattr(...)`, by the last name."""
AWAITS = frozenset({"asyncio", "anyio", "trio"})
"""Marks under which a plugin runs an async test."""


def find_test(module: Module, name: str) -> tuple[Function | None, str]:
    """A test function by its name, at the top or in a class, and that class's name."""
    owner, _, method = name.rpartition(".")
    if owner:
        return module.method(owner, method), owner
    function = module.function(name)
    if function is not None:
        return function, ""
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            found = module.member(node, name)
            if isinstance(found, FUNCTIONS):
                return found, node.name
    return None, ""


def problem(
    rule: Mapping[str, Any], module: Module, name: str, around: Surroundings = NOWHERE
) -> tuple[str, int]:
    """(why a test of the rule does not guard anything, line), or ("", line of the test).

    around: what else its source has.
    """
    function, owner = find_test(module, name)
    if function is None:
        why, line = rebinding(module, name)
        return why or f"there is no test {name}", line
    if not function.name.startswith("test"):
        return f"{name} is defined as {function.name}, which pytest does not collect", function.lineno
    known = tuple(rule.get("decorators", ()))
    why = _uncollected(module, function, owner, awaited=bool(rule.get("awaited")))
    why = why or stopped(module, function, owner, around, known) or _left_out(module, function, owner, around)
    if why:
        return f"{name} {why}", function.lineno
    why = _untested(rule, module, function, owner, around)
    return f"{name} {why}" if why else "", function.lineno


def _untested(
    rule: Mapping[str, Any], module: Module, function: Function, owner: str, around: Surroundings
) -> str:
    """Why a test that is run guards nothing: it skips itself, cannot fail, or is of something else."""
    reached = places(Scope(module, function, owner), 2)
    if line := skips_always(reached, around):
        return f"skips itself at line {line}"
    if not any(_asserts(one, module) for one in reached):
        return "asserts nothing that can fail"
    uses = list(rule.get("uses", ()))
    patches = [*marks_of(module, function, owner), *(one.node for one in reached)]
    if found := next((one for node in patches if (one := _replaced(node, module, function)) in uses), ""):
        return f"replaces {found}, which it is to test"
    used = set().union(*(mentions(one.node) for one in reached))
    used |= set().union(*(_imports(one, used) for one in reached))
    absent = [one for one in uses if one not in used]
    return f"no longer uses {', '.join(absent)}" if absent else ""


def _replaced(node: ast.AST, module: Module, function: Function) -> str:
    """The name that a `patch` or `setattr` replaces by a function or a mock; empty for none.

    What becomes data (`{}`), something made of it or a mock that `wraps` it is tested all the same.
    """
    if not isinstance(node, ast.Call) or dotted(node.func).rpartition(".")[2] not in PATCHING:
        return ""
    said = [number for number, one in enumerate(node.args[:2]) if isinstance(one, ast.Constant)]
    if not said or any(word.arg == "wraps" for word in node.keywords):
        return ""
    new = [*node.args[said[0] + 1 :], *(word.value for word in node.keywords if word.arg == "new")]
    name = str(node.args[said[0]].value).rpartition(".")[2]  # type: ignore[attr-defined]
    return name if not new or _acts(new[0], module, function) else ""


def _acts(new: ast.expr, module: Module, function: Function) -> bool:
    """Whether a value is a function of the test's own, or a mock that wraps nothing."""
    if isinstance(new, ast.Call):
        mock = dotted(new.func).rpartition(".")[2].endswith("Mock")
        return mock and not any(word.arg == "wraps" for word in new.keywords)
    inside = {one.name for one in ast.walk(function) if isinstance(one, FUNCTIONS)}
    own = isinstance(new, ast.Name) and (new.id in inside or module.function(new.id) is not None)
    return own or isinstance(new, ast.Lambda)


def _left_out(module: Module, function: Function, owner: str, around: Surroundings) -> str:
    marks = (one.func if isinstance(one, ast.Call) else one for one in marks_of(module, function, owner))
    names = frozenset(dotted(one).rpartition(".")[2] for one in marks)
    test = Subject(function.name, owner, around.path, names)
    return left_out(test, around) or deselected(test, around)


def _imports(place: Place, used: set[str]) -> set[str]:
    """What an import in a test takes from elsewhere, as it is called there, where the test uses it."""
    names = place.node.names if isinstance(place.node, ast.ImportFrom) else []
    return {one.name for one in names if (one.asname or one.name) in used}


def _uncollected(module: Module, function: Function, owner: str, *, awaited: bool) -> str:
    """Why pytest runs nothing of a function that is called like a test; empty where it does."""
    marks = {dotted(one.func if isinstance(one, ast.Call) else one) for one in function.decorator_list}
    if any(yields(function.body)):
        return "is a generator, of which pytest runs nothing"
    marked = awaited or AWAITS & {one.rpartition(".")[2] for one in marks}
    if isinstance(function, ast.AsyncFunctionDef) and not marked:
        return "is async, and no mark says what awaits it: say `awaited = true` in the rule if pytest does"
    classes = module.lineage(owner) if owner else []
    bases = {dotted(base).rpartition(".")[2] for node in classes for base in node.bases}
    if classes and not owner.startswith("Test") and not any(one.endswith("TestCase") for one in bases):
        return f"is in the class {owner}, which pytest does not collect"
    if any(module.member(node, "__init__") is not None for node in classes):
        return f"is in the class {owner}, which pytest does not collect: it has an __init__"
    switches = [module.member(node, "__test__") for node in classes]
    switches += [module.last(f"{function.name}.__test__"), module.last("__test__")]
    values = [getattr(one, "value", None) for one in switches if one is not None]
    off = any(isinstance(value, ast.Constant) and not value.value for value in values)
    return "is not collected: __test__ is False" if off else ""


def _asserts(place: Place, module: Module) -> bool:
    """Whether this place can fail the test: an assert that is no tautology, pytest.raises, assert_…()."""
    node = place.node
    if isinstance(node, ast.Assert):
        named = isinstance(node.test, ast.Name) and module.last(node.test.id)
        fixed = isinstance(named, (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        can = constant(node.test, module.constants) is UNKNOWN and not fixed and not _tautology(node.test)
        return can and not swallowed(place, "AssertionError")
    if not isinstance(node, ast.Call):
        return False
    name = dotted(node.func).rpartition(".")[2]
    if name.lower().startswith("assert"):
        same = len(node.args) > 1 and ast.dump(node.args[0]) == ast.dump(node.args[1])
        return not same and not swallowed(place, "AssertionError")
    return name in {"raises", "warns", "fail"} and dotted(node.func).startswith(("pytest.", "self."))


def _tautology(test: ast.expr) -> bool:
    if (
        isinstance(test, ast.Compare)
        and len(test.ops) == 1
        and isinstance(test.ops[0], (ast.Eq, ast.Is, ast.GtE, ast.LtE))
    ):
        return ast.dump(test.left) == ast.dump(test.comparators[0])
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        said = {ast.dump(one) for one in test.values}
        denied = [one.operand for one in test.values if isinstance(one, ast.UnaryOp)]
        return any(_true(one) for one in test.values) or any(ast.dump(one) in said for one in denied)
    return isinstance(test, ast.Tuple) and bool(test.elts)


def _true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)
