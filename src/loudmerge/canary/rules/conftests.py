"""What a conftest.py keeps from being run: by its hooks, and by the files that it leaves out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath

from loudmerge.canary.code.flow import Place, Scope, places
from loudmerge.canary.code.syntax import Function, Module, dotted, local_assignments, targets
from loudmerge.canary.rules.skipping import at_top, kept_by, skips, turns
from loudmerge.canary.rules.surroundings import Subject, Surroundings

HOOKS = ("pytest_runtest_setup", "pytest_runtest_call", "pytest_pyfunc_call", "pytest_itemcollected")
"""The hooks that see each test by itself."""
COLLECTED = "pytest_collection_modifyitems"
IGNORING = "pytest_ignore_collect"
IGNORED = frozenset({"collect_ignore", "collect_ignore_glob"})
MARKING = ("add_marker", "own_markers.append")


def left_out(test: Subject, around: Surroundings) -> str:
    """Why a conftest keeps a test from being run, or lets it fail; empty where none does.

    One that does so under a condition which is not about this test may let it run.
    """
    for folder, module in around.conftests():
        where = f"{folder / 'conftest.py'} at line"
        inside = PurePosixPath(test.path).relative_to(folder)
        if line := _ignored(module, str(inside)):
            return f"is not run: its file is left out by {where} {line}"
        for place in _hooked(module, (*HOOKS, COLLECTED)):
            if (skips(place) or _marks(place)) and _meant(place, test):
                return f"is skipped by {where} {place.line}"
        for place in _hooked(module, (IGNORING,)):
            if isinstance(place.node, ast.Return) and place.node.value and _meant(place, test):
                value = place.node.value
                if test.said([value], module) or (isinstance(value, ast.Constant) and value.value):
                    return f"is not run: its file is left out by {where} {place.line}"
        function = module.function(COLLECTED)
        if function is not None and (line := _removed(function, module, test)):
            return f"is taken out by {where} {line}"
    return ""


def _hooked(module: Module, hooks: tuple[str, ...]) -> Iterator[Place]:
    """What some hooks of a conftest do."""
    for name in hooks:
        function = module.function(name)
        if function is not None:
            yield from places(Scope(module, function), 2)


def _meant(place: Place, test: Subject) -> bool:
    """Whether a place is reached for a test: under no condition, or under one that is about it."""
    open_ = [one for one in place.conditions if turns(one)]
    nodes = [node for one in open_ for node in (one.test, *_local(one.test, one.scope))]
    return not open_ or test.said(nodes, place.scope.module)


def _local(node: ast.expr, scope: Scope) -> Iterator[ast.AST]:
    """What the local names in an expression are bound to."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield from (bound for bound, _ in local_assignments(scope.function, part.id))


def _marks(place: Place) -> bool:
    """Whether a place gives a test a mark that skips it, or expects it to fail."""
    node, scope = place.node, place.scope
    if not isinstance(node, ast.Call) or not dotted(node.func).endswith(MARKING) or not node.args:
        return False
    mark: ast.expr | None = node.args[0]
    if isinstance(mark, ast.Name):
        bound = local_assignments(scope.function, mark.id)
        mark = getattr(bound[-1][0], "value", None) if bound else mark
    if isinstance(mark, ast.Constant):
        return mark.value in {"skip", "xfail"}
    return mark is not None and bool(kept_by(mark, scope.module))


def _removed(function: Function, module: Module, test: Subject) -> int:
    """The line at which a hook takes a test, or all of them, out of the list; 0 for nowhere."""
    for place in places(Scope(module, function), 1):
        node = place.node
        value = getattr(node, "value", None)
        written = isinstance(node, (ast.Assign, ast.Delete)) and any(
            isinstance(one, ast.Subscript) and dotted(one.value) == "items" for one in targets(node)
        )
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        every = called == "items.clear" or (written and (not value or ast.unparse(value) == "[]"))
        taken = written or called in {"items.clear", "items.remove", "items.pop"}
        if taken and ((every and _meant(place, test)) or test.said([function], module)):
            return place.line
    return 0


def _ignored(module: Module, inside: str) -> int:
    """The line at which the top of a conftest leaves a file, as its folder names it, out; 0 for nowhere."""
    for place in at_top(module):
        node = place.node
        bound = [dotted(one) for one in targets(node)] if isinstance(node, ast.stmt) else []
        called = dotted(node.func).partition(".")[0] if isinstance(node, ast.Call) else ""
        if not IGNORED & {*bound, called} or any(map(turns, place.conditions)):
            continue
        for part in ast.walk(node):
            text = part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else ""
            if text and (fnmatch(inside, text) or inside.startswith(f"{text.rstrip('/')}/")):
                return place.line
    return 0
