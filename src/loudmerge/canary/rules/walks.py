"""Loops that follow a chain of attributes, and what keeps them from running for ever."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.flow import Place, Scope, callee, places, walked
from loudmerge.canary.code.syntax import dotted
from loudmerge.canary.code.values import evaluate
from loudmerge.errors import plural

GAINING = frozenset({"add", "append", "update"})
LOSING = frozenset({"clear", "pop", "remove", "discard", "difference_update", "intersection_update"})
"""What becomes of a set or list by these methods."""


def again(scope: Scope) -> int:
    """The line at which a function calls itself, by a helper or directly; 0 where it does not."""
    for place in places(scope):
        if isinstance(place.node, ast.Call):
            called = callee(place.node, place.scope, walked(place.scope).nested)[0]
            if called is scope.function:
                return place.line
    return 0


def follows(loop: ast.stmt, attribute: str) -> bool:
    """Whether a loop steps along `.attribute` or getattr(…, "attribute")."""
    for node in ast.walk(loop):
        value = (
            getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
            else None
        )
        if isinstance(value, ast.expr) and _reads(value, attribute):
            return True
    return False


def _reads(value: ast.expr, attribute: str) -> bool:
    for node in ast.walk(value):
        if isinstance(node, ast.Attribute) and node.attr == attribute:
            return True
        if isinstance(node, ast.Call) and dotted(node.func) == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value == attribute:
                return True
    return False


def walks(scope: Scope, attribute: str) -> Iterator[Place]:
    """The loops that follow the attribute and are entered."""
    found = places(scope)
    entered = {id(loop) for place in found for loop in place.loops}
    for place in found:
        loop = place.node
        if isinstance(loop, (ast.For, ast.While)) and id(loop) in entered and follows(loop, attribute):
            entered.remove(id(loop))
            yield place


def bound(place: Place, limit: int) -> str:
    """What bounds a loop: "at most N steps", "a set of visited objects", "a counter"; empty for none."""
    loop, scope = place.node, place.scope
    if isinstance(loop, ast.For):
        return _for_bound(loop, scope, limit)
    if not isinstance(loop, ast.While):
        return ""
    ends = [node.test for node in ast.walk(loop) if isinstance(node, ast.If) and _leaves(node)]
    stays = [(one, True) for one in _parts(loop.test, ast.And)]
    goes = [(one, False) for test in ends for one in _parts(test, ast.Or)]
    if any(_visited(one, loop, stays=stay) for one, stay in (*stays, *goes)):
        return "a set of visited objects"
    counted = any(_counted(one, loop, scope, limit, stays=stay) for one, stay in (*stays, *goes))
    return "a counter" if counted else ""


def _parts(test: ast.expr, op: type[ast.boolop]) -> list[ast.expr]:
    """A test, or the parts that `and` or `or` joins: each of which decides it by itself."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, op):
        return [part for value in test.values for part in _parts(value, op)]
    return [test]


def _for_bound(loop: ast.For, scope: Scope, limit: int) -> str:
    if not isinstance(loop.iter, ast.Call):
        return "a finite sequence" if isinstance(loop.iter, (ast.Tuple, ast.List)) else ""
    if dotted(loop.iter.func) != "range":
        return ""
    values = [evaluate(value, scope, {}) for value in loop.iter.args]
    steps = max((value for value in values if isinstance(value, int)), default=0)
    if any(value is UNKNOWN for value in values) or not 0 < steps <= limit:
        return ""
    return f"at most {plural(steps, 'step')}"


def _leaves(node: ast.If) -> bool:
    return any(isinstance(one, (ast.Break, ast.Return, ast.Raise)) for one in node.body)


def _visited(test: ast.expr, loop: ast.While, *, stays: bool) -> bool:
    """`x not in seen` where the loop stays, or the contrary where it goes, and adds x to `seen`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _visited(test.operand, loop, stays=not stays)
    wanted = ast.NotIn if stays else ast.In
    if not isinstance(test, ast.Compare) or len(test.ops) > 1 or not isinstance(test.ops[0], wanted):
        return False
    name = dotted(test.comparators[0])
    return bool(name) and _grows(name, ast.dump(test.left), loop)


def _grows(name: str, item: str, loop: ast.While) -> bool:
    """Whether a loop adds an item to a set, and never empties it or makes it anew. item: its dump."""
    added: list[ast.expr] = []
    stored = 0
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and dotted(node.func).startswith(f"{name}."):
            method = dotted(node.func).removeprefix(f"{name}.")
            if method in LOSING:
                return False
            added += node.args if method in GAINING else []
        elif isinstance(node, ast.AugAssign) and dotted(node.target) == name:
            added += [node.value] if isinstance(node.op, (ast.Add, ast.BitOr)) else []
            stored -= isinstance(node.op, (ast.Add, ast.BitOr))
        elif isinstance(node, (ast.Name, ast.Attribute)) and dotted(node) == name:
            stored += not isinstance(node.ctx, ast.Load)
    parts = [part for value in added for part in ast.walk(value)]
    return any(ast.dump(part) == item for part in parts) and not stored


def _counted(test: ast.expr, loop: ast.While, scope: Scope, limit: int, *, stays: bool) -> bool:
    """`n < 16` where the loop adds to `n`, or `n > 0` where it takes from it; the contrary before a break."""
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        return False
    sides = [test.left, test.comparators[0]]
    numbers = [evaluate(side, scope, {}) for side in sides]
    if len(test.ops) > 1 or not any(isinstance(number, int) and number <= limit for number in numbers):
        return False
    for place, side in enumerate(sides):
        below = isinstance(test.ops[0], (ast.Lt, ast.LtE)) == (place == 0)
        if isinstance(side, ast.Name) and _steps(side.id, loop, ast.Add if below is stays else ast.Sub):
            return True
    return False


def _steps(name: str, loop: ast.While, op: type[ast.operator]) -> bool:
    """Whether every round moves a counter the same way: nothing else in the loop binds it."""
    bound = [node for node in ast.walk(loop) if isinstance(node, ast.Name) and node.id == name]
    stored = [node for node in bound if not isinstance(node.ctx, ast.Load)]
    steps = [step for node in loop.body if (step := _step(node, name))]
    moves = all(
        isinstance(how, op) and isinstance(by := constant(value, {}), int) and by > 0 for how, value in steps
    )
    return bool(steps) and moves and len(stored) == len(steps)


def _step(node: ast.stmt, name: str) -> tuple[ast.operator, ast.expr] | None:
    """How `n += 1` or `n = n + 1` moves `n`; None for any other statement."""
    if isinstance(node, ast.AugAssign) and dotted(node.target) == name:
        return node.op, node.value
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.BinOp):
        return None
    names = [one.id if isinstance(one, ast.Name) else "" for one in (*node.targets, node.value.left)]
    return (node.value.op, node.value.right) if names == [name, name] else None
