"""Which calls, raises and returns of a function are reached, under which conditions, inside which `try`."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from loudmerge.canary.code.exits import OUTSIDE, Frame
from loudmerge.canary.code.nodes import Try, With
from loudmerge.canary.code.syntax import Function, Module, dotted, local_assignments, parameters
from loudmerge.canary.code.walk import Flow, Walk
from loudmerge.canary.code.wrapping import wrapped, yields

HELPER_DEPTH = 2
"""How many calls deep a helper of the same file still counts as part of the function."""


@dataclass(frozen=True)
class Scope:
    """A function, the class it is a method of, and what the caller looked at gives its parameters.

    known: names of decorators under which the body of a helper runs, too. inner: it is such a helper.
    """

    module: Module
    function: Function
    owner: str = ""
    given: tuple[tuple[str, ast.expr, Scope], ...] = ()
    known: tuple[str, ...] = ()
    inner: bool = False


class Condition(NamedTuple):
    """A test that must come out as `wanted` for the place to be reached; `how` as in `Test`."""

    test: ast.expr
    wanted: bool
    scope: Scope
    how: str = ""


class Place(NamedTuple):
    """A reached call, raise, assert, return, assignment or `if`, with what encloses it.

    tries: those whose body it is in. handles: those one of whose `except` blocks it is in.
    """

    node: ast.AST
    scope: Scope
    conditions: tuple[Condition, ...] = ()
    tries: tuple[tuple[Try, Scope], ...] = ()
    managers: tuple[tuple[ast.expr, Scope], ...] = ()
    loops: tuple[ast.stmt, ...] = ()
    handles: tuple[Try, ...] = ()

    @property
    def line(self) -> int:
        return getattr(self.node, "lineno", 0)


def known_constants(scope: Scope) -> dict[str, Any]:
    """The names that are constants within a function: the module's, unless hidden, and its own."""
    stored, plain = _stored(scope.function)
    hidden = stored.union(parameters(scope.function))
    return {name: value for name, value in scope.module.constants.items() if name not in hidden} | plain


@lru_cache(maxsize=4096)
def _stored(function: Function) -> tuple[frozenset[str], dict[str, Any]]:
    """The names a function binds, and those among them bound once, to a plain constant."""
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    stores = Counter(node.id for node in names if isinstance(node.ctx, (ast.Store, ast.Del)))
    stored = frozenset(node.id for node in names if isinstance(node.ctx, ast.Store))
    plain: dict[str, Any] = {}
    for name in stored - set(parameters(function)):
        bound = local_assignments(function, name)
        node = bound[0][0] if len(bound) == 1 and stores[name] == 1 and bound[0][1] is None else None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            plain[name] = node.value.value
    return stored, plain


def walked(scope: Scope) -> Walk:
    """What a function reaches by itself. The same function under the same constants is walked once."""
    used = _read(scope.function)
    known = {name: value for name, value in known_constants(scope).items() if name in used}
    return _walked(scope.function, tuple((name, type(value), value) for name, value in sorted(known.items())))


@lru_cache(maxsize=4096)
def _read(function: Function) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(function) if isinstance(node, ast.Name))


@lru_cache(maxsize=4096)
def _walked(function: Function, known: tuple[tuple[str, type, Any], ...]) -> Walk:
    flow = Flow({name: value for name, _, value in known})
    flow.block(function.body, OUTSIDE)
    return Walk(tuple(flow.steps), MappingProxyType(flow.nested))


def places(
    scope: Scope, depth: int = HELPER_DEPTH, start: Place | None = None, seen: tuple[Function, ...] = ()
) -> list[Place]:
    """Every reached place of a function and of the helpers of the same file it calls, `depth` calls deep."""
    walk = walked(scope)
    found = _bound(walk, scope, start or Place(scope.function, scope))
    if depth <= 0:
        return found
    for place in list(found):
        if isinstance(place.node, ast.Call):
            inner = helper(place.node, scope, walk.nested)
            if inner is not None and inner.function not in (*seen, scope.function):
                found += places(inner, depth - 1, place, (*seen, scope.function))
    return found


def in_order(scope: Scope, depth: int = HELPER_DEPTH) -> Iterator[tuple[Place, Place]]:
    """(its place, place): each of a function's own with itself, then with those of the helper it calls."""
    walk = walked(scope)
    for place in _bound(walk, scope, Place(scope.function, scope)):
        yield place, place
        inner = helper(place.node, scope, walk.nested) if isinstance(place.node, ast.Call) else None
        if inner is not None and inner.function is not scope.function and depth > 0:
            yield from ((place, one) for one in places(inner, depth - 1, place, (scope.function,)))


def _bound(walk: Walk, scope: Scope, start: Place) -> list[Place]:
    """The places of a walk that began at `start`."""
    found: list[Place] = []
    last, inside = OUTSIDE, start._replace(scope=scope)
    for node, frame in walk.steps:
        if frame is not last:
            last, inside = frame, _within(frame, scope, start)
        found.append(Place(node, *inside[1:]))
    return found


def _within(frame: Frame, scope: Scope, start: Place) -> Place:
    return Place(
        start.node,
        scope,
        start.conditions + tuple(Condition(one.test, one.wanted, scope, one.how) for one in frame.tests),
        start.tries + tuple((one, scope) for one in frame.tries),
        start.managers + tuple((one, scope) for one in frame.managers),
        start.loops + frame.loops,
        start.handles + frame.handles,
    )


def helper(call: ast.Call, scope: Scope, nested: Mapping[str, Function]) -> Scope | None:
    """The function of the same file that a call runs, with its parameters bound to the call's arguments."""
    function, owner, skip = callee(call, scope, nested)
    if function is None or _unread(call, function, scope):
        return None
    return within(call, scope, function, owner, skip)


def within(call: ast.Call, scope: Scope, function: Function, owner: str, skip: int) -> Scope:
    """The scope of a function that a call runs. skip: how many first parameters the call does not pass."""
    names = parameters(function)
    self = [call.func.value] * skip if isinstance(call.func, ast.Attribute) else []
    starred = next((at for at, one in enumerate(call.args) if isinstance(one, ast.Starred)), None)
    bound = [(name, value, scope) for name, value in zip(names, (*self, *call.args[:starred]), strict=False)]
    bound += [(word.arg, word.value, scope) for word in call.keywords if word.arg]
    return Scope(scope.module, function, owner, tuple(bound), scope.known, inner=True)


def unread(scope: Scope, depth: int = HELPER_DEPTH) -> str:
    """The first helper that is not read as part of a function, and why; empty where each is."""
    for place in places(scope, depth - 1) if depth > 0 else ():
        if isinstance(place.node, ast.Call):
            function = callee(place.node, place.scope, walked(place.scope).nested)[0]
            if function is not None and (problem := _unread(place.node, function, place.scope)):
                return f"{function.name}, called at line {place.line}, is not seen to run: {problem}"
    return ""


def _unread(call: ast.Call, function: Function, scope: Scope) -> str:
    """Why a call may not run a helper's body, or may keep its errors; empty where neither is so."""
    if any(yields(function.body)) and id(call) not in _entered(scope.function):
        return f"{function.name} is a generator at line {function.lineno}: calling it runs nothing"
    return "" if _awaited(function, scope) else wrapped(scope.module, function, scope.known)


@lru_cache(maxsize=4096)
def _entered(function: Function) -> frozenset[int]:
    """The ids of the calls whose value a `with`, or an `enter_context`, enters."""
    found: list[ast.expr] = []
    for node in ast.walk(function):
        if isinstance(node, With):
            found += [item.context_expr for item in node.items]
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("enter_context"):
            found += node.args
    return frozenset(map(id, found))


def _awaited(function: Function, scope: Scope) -> bool:
    """Whether both are async, with nothing else about the one that is called."""
    both = isinstance(function, ast.AsyncFunctionDef) and isinstance(scope.function, ast.AsyncFunctionDef)
    return both and not function.decorator_list and not any(yields(function.body))


def callee(call: ast.Call, scope: Scope, nested: Mapping[str, Function]) -> tuple[Function | None, str, int]:
    """(function, its class, how many first parameters the call does not pass) of a call into this file."""
    name = dotted(call.func)
    if name in nested:
        return nested[name], scope.owner, 0
    owner, _, method = name.rpartition(".")
    if owner in {"self", "cls"} and scope.owner:
        return scope.module.method(scope.owner, method), scope.owner, 1
    if owner:
        return scope.module.method(owner, method), owner, 0
    return scope.module.function(alias(name, scope)), "", 0


def alias(name: str, scope: Scope) -> str:
    """The name a local `a = b` stands for; the name itself where it is none."""
    for _ in range(4):
        bound = local_assignments(scope.function, name)
        if len(bound) != 1 or bound[0][1] is not None:
            return name
        value = getattr(bound[0][0], "value", None)
        target = dotted(value) if isinstance(value, (ast.Name, ast.Attribute)) else ""
        if not target or target == name:
            return name
        name = target
    return name
