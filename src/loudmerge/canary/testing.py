"""Whether a test exists, runs and can fail."""

from __future__ import annotations

import ast

from loudmerge.canary.constants import UNKNOWN, constant
from loudmerge.canary.flow import Place, Scope, places
from loudmerge.canary.swallow import swallowed
from loudmerge.canary.syntax import FUNCTIONS, Function, Module, dotted, mentions, reachable

STOPPED = frozenset({"skip", "xfail"})


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


def problem(module: Module, name: str, uses: list[str]) -> tuple[str, int]:
    """(why a test does not guard anything, line), or ("", line of the test)."""
    function, owner = find_test(module, name)
    if function is None:
        return f"there is no test {name}", 0
    if not function.name.startswith("test"):
        return f"{name} is defined as {function.name}, which pytest does not collect", function.lineno
    stopped = _stopped(module, function, owner)
    if stopped:
        return f"{name} {stopped}", function.lineno
    reached = places(Scope(module, function, owner), 2)
    skips = [one for one in reached if _skips(one) and not any(not found.how for found in one.conditions)]
    if skips:
        return f"{name} skips itself at line {skips[0].line}", skips[0].line
    if not any(_asserts(one, module) for one in reached):
        return f"{name} asserts nothing that can fail", function.lineno
    used = set().union(*(mentions(one.node) | _called(one) for one in reached)) if reached else set()
    absent = [one for one in uses if one not in used]
    return (
        (f"{name} no longer uses {', '.join(absent)}", function.lineno) if absent else ("", function.lineno)
    )


def _called(place: Place) -> set[str]:
    return {alias.name for alias in place.node.names} if isinstance(place.node, ast.ImportFrom) else set()


def _stopped(module: Module, function: Function, owner: str) -> str:
    marks = list(function.decorator_list)
    if owner:
        classes = module.lineage(owner)
        marks += [mark for node in classes for mark in node.decorator_list]
        marks += [value for node in classes for value in _own_marks(node.body, module)]
    marks += _own_marks(module.tree.body, module)
    for mark in marks:
        reason = _mark(mark, module)
        if reason:
            return reason
    for node in reachable(module.tree.body, module.constants):
        call = node.value if isinstance(node, ast.Expr) and node in module.tree.body else None
        if isinstance(call, ast.Call) and dotted(call.func) == "pytest.skip":
            return f"is not run: the whole file is skipped at line {node.lineno}"
    if "__test__" in module.constants and not module.constants["__test__"]:
        return "is not collected: __test__ is False"
    return ""


def _own_marks(body: list[ast.stmt], module: Module) -> list[ast.expr]:
    found: list[ast.expr] = []
    for node in reachable(body, module.constants):
        if isinstance(node, ast.Assign) and any(dotted(one) == "pytestmark" for one in node.targets):
            found += node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
    return found


def _mark(mark: ast.expr, module: Module) -> str:
    """What a mark or decorator does to the test: empty where it lets it run."""
    call = mark if isinstance(mark, ast.Call) else None
    name = dotted(call.func if call else mark).rpartition(".")[2]
    if name in STOPPED:
        return f"is marked {name}"
    if name in {"skipif", "skipIf"} and call and call.args:
        truth = constant(call.args[0], module.constants)
        return "is always skipped" if truth is not UNKNOWN and truth else ""
    if name == "parametrize" and call and len(call.args) > 1:
        items = constant(call.args[1], module.constants)
        return "is parametrised over nothing" if items is not UNKNOWN and not items else ""
    return ""


def _skips(place: Place) -> bool:
    return isinstance(place.node, ast.Call) and dotted(place.node.func) in {
        "pytest.skip",
        "pytest.xfail",
        "self.skipTest",
    }


def _asserts(place: Place, module: Module) -> bool:
    """Whether this place can fail the test: an assert that is no tautology, pytest.raises, assert_…()."""
    node = place.node
    if isinstance(node, ast.Assert):
        can = constant(node.test, module.constants) is UNKNOWN and not _tautology(node.test)
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
    return (
        isinstance(test, ast.BoolOp)
        and isinstance(test.op, ast.Or)
        and any(_true(one) for one in test.values)
    )


def _true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)
