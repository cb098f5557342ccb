"""Whether a test exists, runs and can fail."""

from __future__ import annotations

import ast

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.flow import Place, Scope, alias, places
from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.rebinding import rebinding
from loudmerge.canary.code.swallow import swallowed
from loudmerge.canary.code.syntax import (
    FUNCTIONS,
    Function,
    Module,
    dotted,
    mentions,
    own_statements,
    reachable,
    targets,
)
from loudmerge.canary.code.values import evaluate
from loudmerge.canary.code.wrapping import yields

STOPPED = frozenset({"skip", "xfail", "fixture"})
SKIPS = frozenset({"pytest.skip", "pytest.xfail", "self.skipTest"})
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


def problem(module: Module, name: str, uses: list[str], *, awaited: bool = False) -> tuple[str, int]:
    """(why a test does not guard anything, line), or ("", line of the test).

    awaited: whether async tests are run without a mark that says so.
    """
    function, owner = find_test(module, name)
    if function is None:
        why, line = rebinding(module, name)
        return why or f"there is no test {name}", line
    if not function.name.startswith("test"):
        return f"{name} is defined as {function.name}, which pytest does not collect", function.lineno
    stopped = _uncollected(module, function, owner, awaited=awaited) or _stopped(module, function, owner)
    if stopped:
        return f"{name} {stopped}", function.lineno
    reached = places(Scope(module, function, owner), 2)
    skips = [one for one in reached if _skips(one) and not any(not found.how for found in one.conditions)]
    if skips:
        return f"{name} skips itself at line {skips[0].line}", skips[0].line
    if not any(_asserts(one, module) for one in reached):
        return f"{name} asserts nothing that can fail", function.lineno
    used = set().union(*(mentions(one.node) for one in reached))
    used |= set().union(*(_imports(one, used) for one in reached))
    absent = [one for one in uses if one not in used]
    return (
        (f"{name} no longer uses {', '.join(absent)}", function.lineno) if absent else ("", function.lineno)
    )


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
        if isinstance(call, ast.Call) and _full(dotted(call.func), module.tree) == "pytest.skip":
            return f"is not run: the whole file is skipped at line {node.lineno}"
    return ""


def _own_marks(body: list[ast.stmt], module: Module) -> list[ast.expr]:
    found: list[ast.expr] = []
    for node in reachable(body, module.constants):
        if isinstance(node, (ast.Assign, ast.AugAssign)) and "pytestmark" in map(dotted, targets(node)):
            found += node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
    return found


def _mark(mark: ast.expr, module: Module) -> str:
    """What a mark or decorator does to the test: empty where it lets it run."""
    named = module.value(mark.id) if isinstance(mark, ast.Name) else None
    if named is not None and not isinstance(named, ast.Name):
        return _mark(named, module)
    call = mark if isinstance(mark, ast.Call) else None
    name = dotted(call.func if call else mark).rpartition(".")[2]
    if name in STOPPED:
        return f"is marked {name}"
    words = {word.arg: word.value for word in call.keywords} if call else {}
    if name in {"skipif", "skipIf"} and call:
        test = call.args[0] if call.args else words.get("condition")
        truth = UNKNOWN if test is None else constant(test, module.constants)
        return "is always skipped" if truth is not UNKNOWN and truth else ""
    if name == "parametrize" and call:
        items = call.args[1] if len(call.args) > 1 else words.get("argvalues")
        return "is parametrised over nothing" if items is not None and _empty(items, module) else ""
    return ""


def _empty(items: ast.expr, module: Module) -> bool:
    """Whether a list at the top of a file is known to be empty: none that anything is called on."""
    if isinstance(items, ast.Name):
        parts = [part for node in own_statements(module.tree.body) for part in ast.walk(node)]
        if any(isinstance(part, ast.Attribute) and dotted(part.value) == items.id for part in parts):
            return False
    found = evaluate(items, Scope(module, parsed("def top(): pass").body[0]), {})
    return found is not UNKNOWN and not found


def _skips(place: Place) -> bool:
    if not isinstance(place.node, ast.Call):
        return False
    name = alias(dotted(place.node.func), place.scope)
    trees = (place.scope.function, place.scope.module.tree)
    return any(_full(name, tree) in SKIPS for tree in trees)


def _full(name: str, tree: ast.Module | Function) -> str:
    """`pytest.skip` for a `skip` that was imported from pytest, under any name."""
    head, dot, rest = name.partition(".")
    for node in own_statements(tree.body):
        for one in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            if (one.asname or one.name) == head:
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                return f"{start}{one.name}{dot}{rest}"
    return name


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
