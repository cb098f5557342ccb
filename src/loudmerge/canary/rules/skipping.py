"""What keeps a test from being run, or from failing: marks, decorators, fixtures and setups that skip it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.exits import OUTSIDE
from loudmerge.canary.code.flow import Condition, Place, Scope, alias, places
from loudmerge.canary.code.nodes import Import
from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.swallow import swallowed
from loudmerge.canary.code.syntax import (
    FUNCTIONS,
    Function,
    Module,
    dotted,
    mentions,
    own_statements,
    parameters,
    reachable,
    targets,
)
from loudmerge.canary.code.values import evaluate, outcome
from loudmerge.canary.code.walk import Flow
from loudmerge.canary.rules.surroundings import NOWHERE, Surroundings

STOPPED = frozenset({"skip", "xfail", "fixture", "expectedFailure"})
SKIPS = frozenset({"pytest.skip", "pytest.xfail", "self.skipTest"})
SKIPPED = frozenset({"SkipTest", "unittest.SkipTest", "pytest.skip.Exception", "pytest.xfail.Exception"})
"""The exceptions that skip what raises them."""
WANTING = frozenset({"pytest.importorskip"})
ADDING = frozenset({"pytestmark.append", "pytestmark.extend", "pytestmark.insert"})
RUNNING = frozenset(
    {"pytest", "unittest", "mock", "hypothesis", "parameterized", "functools", "staticmethod", "classmethod"}
)
"""The modules whose decorators are known: what they skip, `kept_by` tells."""
SETUPS = ("setup_module", "setUpModule")
SETUPS_OF_FUNCTIONS = ("setup_function",)
SETUPS_OF_CLASSES = ("setup_class", "setUpClass", "setup_method", "setUp", "asyncSetUp")
"""What pytest and unittest run before a test, wherever it stands, at the top of a file, or in a class."""
DEPTH = 4
"""How many fixtures, names and decorators in a row are followed."""


def stopped(
    module: Module,
    function: Function,
    owner: str,
    around: Surroundings = NOWHERE,
    known: Collection[str] = (),
) -> str:
    """Why a test that pytest collects is not run, or may fail; empty where nothing keeps it.

    around: the fixtures of its conftest.py files, and which modules its source has.
    known: names of decorators that the rule says let it run.
    """
    marks = marks_of(module, function, owner)
    for mark in marks:
        reason = kept_by(mark, module) or _decorated(mark, module) or _foreign(mark, module, known)
        if reason:
            return reason
    if line := skips_always(at_top(module), around):
        return f"is not run: the whole file is skipped at line {line}"
    for where, before, its_owner, said in _before(module, function, owner, marks, around):
        if line := skips_always(places(Scope(where, before, its_owner), 2), around):
            of = "" if where is module else " of its conftest.py"
            return f"is not run: {said} {before.name}{of} skips it at line {line}"
    return ""


def marks_of(module: Module, function: Function, owner: str) -> list[ast.expr]:
    """The decorators and marks of a test, its class and its file."""
    marks = list(function.decorator_list)
    for node in module.lineage(owner) if owner else []:
        marks += [*node.decorator_list, *_own_marks(node.body, module)]
    return marks + _own_marks(module.tree.body, module)


def skips_always(reached: Iterable[Place], around: Surroundings = NOWHERE) -> int:
    """The line of the first of these places that skips under no condition; 0 where none does."""
    sure = (one for one in reached if not any(map(turns, one.conditions)))
    return next((one.line for one in sure if skips(one) or _wants(one, around)), 0)


def _wants(place: Place, around: Surroundings) -> bool:
    """Whether a place skips where a module cannot be imported which the source no longer has."""
    node = place.node
    if not isinstance(node, ast.Call) or not _called(node.func, place.scope, WANTING) or not node.args:
        return False
    name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    return isinstance(name, str) and around.lacks(name)


def turns(condition: Condition) -> bool:
    """Whether a condition, which is no loop nor exit, may come out the other way."""
    return not condition.how and outcome(condition, {}) is not True


def skips(place: Place) -> bool:
    """Whether a place skips the test that comes to it."""
    node = place.node
    if isinstance(node, ast.Raise) and node.exc is not None:
        node, wanted = node.exc.func if isinstance(node.exc, ast.Call) else node.exc, SKIPPED
    elif isinstance(node, ast.Call):
        node, wanted = node.func, SKIPS
    else:
        return False
    return _called(node, place.scope, wanted)


def _called(node: ast.expr, scope: Scope, wanted: Collection[str]) -> bool:
    """Whether an expression is the name of one of these, where it comes from."""
    name = alias(dotted(node), scope)
    return any(_full(name, tree) in wanted for tree in (scope.function, scope.module.tree))


def at_top(module: Module) -> list[Place]:
    """What the top of a file reaches, whatever the platform and what is installed."""
    flow = Flow(module.constants)
    flow.block(module.tree.body, OUTSIDE)
    top = Scope(module, parsed("def top(): pass").body[0])
    return [
        Place(node, top, tuple(Condition(one.test, one.wanted, top) for one in at.tests))
        for node, at in flow.steps
    ]


def _before(
    module: Module, function: Function, owner: str, marks: list[ast.expr], around: Surroundings
) -> Iterator[tuple[Module, Function, str, str]]:
    """(file, function, its class, what it is) of all that runs before a test: setups, and its fixtures."""
    for name in (*SETUPS, *(() if owner else SETUPS_OF_FUNCTIONS)):
        node = module.function(name)
        if node is not None:
            yield module, node, "", "the setup"
    for name in SETUPS_OF_CLASSES if owner else ():
        node = module.method(owner, name)
        if node is not None:
            yield module, node, owner, "the setup"
    known = {
        name: (where, *found)
        for where, its_owner in (*((one, "") for _, one in around.conftests()), (module, owner))
        for name, found in _fixtures(where, its_owner)
    }
    wanted = [name for name, (_, _, _, always) in known.items() if always] + parameters(function)
    for mark in marks:
        if isinstance(mark, ast.Call) and dotted(mark.func).rpartition(".")[2] == "usefixtures":
            wanted += [str(one.value) for one in mark.args if isinstance(one, ast.Constant)]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop(0)
        if name in known and name not in seen:
            where, node, its_owner, _ = known[name]
            wanted += parameters(node)
            yield where, node, its_owner, "the fixture"
        seen.add(name)


def _fixtures(module: Module, owner: str) -> Iterator[tuple[str, tuple[Function, str, bool]]]:
    """(name, (function, its class, whether each test has it)) of the file's fixtures, and of a class's."""
    bodies = [(module.tree.body, ""), *((node.body, node.name) for node in module.lineage(owner) if owner)]
    for body, its_owner in bodies:
        for node in reachable(body, module.constants):
            for mark in node.decorator_list if isinstance(node, FUNCTIONS) else ():
                call = mark if isinstance(mark, ast.Call) else None
                if dotted(call.func if call else mark).rpartition(".")[2] == "fixture":
                    words = {word.arg: word.value for word in call.keywords} if call else {}
                    told = {name: constant(value, module.constants) for name, value in words.items()}
                    name = told.get("name")
                    always = told.get("autouse") is True
                    assert isinstance(node, FUNCTIONS)  # noqa: S101 (for the type checker)
                    yield name if isinstance(name, str) else node.name, (node, its_owner, always)


def _own_marks(body: list[ast.stmt], module: Module) -> list[ast.expr]:
    """The marks that `pytestmark` gives to all tests of a file or class, however it is put together."""
    found: list[ast.expr] = []
    for node in reachable(body, module.constants):
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            if "pytestmark" in map(dotted, targets(node)) and isinstance(value, ast.expr):
                found += _flat(value, module, DEPTH)
        elif isinstance(value, ast.Call) and dotted(value.func) in ADDING:
            found += [one for arg in value.args for one in _flat(arg, module, DEPTH)]
    return found


def _flat(value: ast.expr, module: Module, depth: int) -> list[ast.expr]:
    """The items of a list, through sums, stars and names; an expression that is no list is one item."""
    if isinstance(value, (ast.List, ast.Tuple)):
        return [one for part in value.elts for one in _flat(part, module, depth)]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _flat(value.left, module, depth) + _flat(value.right, module, depth)
    if isinstance(value, ast.Starred):
        return _flat(value.value, module, depth)
    named = module.value(value.id) if isinstance(value, ast.Name) and depth > 0 else None
    return [value] if named is None else _flat(named, module, depth - 1)


def kept_by(mark: ast.expr, module: Module) -> str:
    """What a mark or decorator does to the test: empty where it lets it run."""
    named = module.value(mark.id) if isinstance(mark, ast.Name) else None
    if named is not None and not isinstance(named, ast.Name):
        return kept_by(named, module)
    call = mark if isinstance(mark, ast.Call) else None
    if call is not None and isinstance(call.func, ast.Call):
        return kept_by(call.func, module)
    name = dotted(call.func if call else mark).rpartition(".")[2]
    if name in STOPPED:
        return f"is marked {name}"
    words = {word.arg: word.value for word in call.keywords} if call else {}
    if name in {"skipif", "skipIf"} and call:
        test = call.args[0] if call.args else words.get("condition")
        return "is always skipped" if test is not None and _certain(test, module) else ""
    if name == "parametrize" and call:
        return _parametrised(call.args[1] if len(call.args) > 1 else words.get("argvalues"), module)
    return ""


def _parametrised(items: ast.expr | None, module: Module) -> str:
    """What keeps a test from being run with any of its parameters; empty for nothing."""
    if items is not None and _empty(items, module):
        return "is parametrised over nothing"
    each = items.elts if isinstance(items, (ast.List, ast.Tuple)) else []
    return "has each of its parameters skipped" if each and all(_off(one, module) for one in each) else ""


def _off(one: ast.expr, module: Module) -> bool:
    """Whether a `pytest.param(...)` is marked so that the test is not run with it, or may fail."""
    words = one.keywords if isinstance(one, ast.Call) else []
    marks = [mark for word in words if word.arg == "marks" for mark in _flat(word.value, module, DEPTH)]
    return any(kept_by(mark, module) for mark in marks)


def _certain(test: ast.expr, module: Module) -> bool:
    """Whether a skip's condition is known to be met. One that is a string is read as code, as pytest does."""
    truth = constant(test, module.constants)
    if isinstance(truth, str):
        try:
            truth = constant(parsed(truth.strip(), "eval").body, module.constants)
        except SyntaxError:
            return False
    return truth is not UNKNOWN and bool(truth)


def _decorated(mark: ast.expr, module: Module) -> str:
    """What a decorator of the same file makes of a test that does not run it; empty where it may run."""
    called = mark.func if isinstance(mark, ast.Call) else mark
    maker = module.function(called.id) if isinstance(called, ast.Name) else None
    if maker is not None and isinstance(mark, ast.Call):
        inner = _nested(maker, _given_back(maker, module))
        maker = inner if inner is not None and parameters(inner) else None
    value = _given_back(maker, module) if maker is not None else None
    if maker is None or value is None:
        return ""
    where = f"the decorator {dotted(called)}"
    if reason := kept_by(value, module):
        return f"{reason} by {where}"
    inner = _nested(maker, value)
    body: ast.AST | None = inner if inner is not None else value if isinstance(value, ast.Lambda) else None
    if body is not None and not set(parameters(maker)) & mentions(body):
        return f"is not run: {where} gives back something else"
    reached = places(Scope(module, inner), 1) if inner is not None else []
    if line := skips_always(reached):
        return f"is not run: {where} skips it at line {line}"
    kept = [swallowed(one, "AssertionError") for one in reached if _runs(one, parameters(maker))]
    return f"cannot fail: in {where}, {kept[0]}" if kept and all(kept) else ""


def _foreign(mark: ast.expr, module: Module, known: Collection[str]) -> str:
    """That nothing here says what a decorator does to the test; empty where it is known, or of the file."""
    called = mark.func if isinstance(mark, ast.Call) else mark
    name = dotted(called) or ast.unparse(called)
    value = module.value(name)
    if value is not None and name not in known:
        return _foreign(value, module, known)
    full = _full(name, module.tree)
    own = module.defines(name.partition(".")[0])
    if name in known or own or full.partition(".")[0] in RUNNING or isinstance(mark, ast.Constant):
        return ""
    return f"may not be run: name {name!r} in the rule's `decorators` if the test still runs under it"


def _runs(place: Place, names: Collection[str]) -> bool:
    """Whether a place calls what one of these names stands for."""
    return isinstance(place.node, ast.Call) and dotted(place.node.func) in names


def _given_back(function: Function, module: Module) -> ast.expr | None:
    """What a function returns, where it returns one thing, under no condition."""
    found = [one for one in places(Scope(module, function), 0) if isinstance(one.node, ast.Return)]
    sole = len(found) == 1 and not found[0].conditions
    return found[0].node.value if sole and isinstance(found[0].node, ast.Return) else None


def _nested(function: Function, value: ast.expr | None) -> Function | None:
    """The function inside another that a name in it stands for."""
    name = value.id if isinstance(value, ast.Name) else ""
    inside = (node for node in function.body if isinstance(node, FUNCTIONS))
    return next((node for node in inside if node.name == name), None)


def _empty(items: ast.expr, module: Module) -> bool:
    """Whether a list at the top of a file is known to be empty: none that anything is called on."""
    if isinstance(items, ast.Name):
        parts = [part for node in own_statements(module.tree.body) for part in ast.walk(node)]
        if any(isinstance(part, ast.Attribute) and dotted(part.value) == items.id for part in parts):
            return False
    found = evaluate(items, Scope(module, parsed("def top(): pass").body[0]), {})
    return found is not UNKNOWN and not found


def _full(name: str, tree: ast.Module | Function) -> str:
    """`pytest.skip` for a `skip` that was imported from pytest, under any name."""
    head, dot, rest = name.partition(".")
    for node in own_statements(tree.body):
        for one in node.names if isinstance(node, Import) else []:
            if (one.asname or one.name) == head:
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                return f"{start}{one.name}{dot}{rest}"
    return name
