"""Which calls, raises and returns of a function are reached, under which conditions, inside which `try`."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.exits import (
    BARE,
    ENDS,
    LOOPS,
    OUTSIDE,
    Frame,
    Test,
    alone,
    breaks,
    exits,
    leaves,
    matched,
    not_taken,
    swallowing,
)
from loudmerge.canary.code.nodes import For, Try, With
from loudmerge.canary.code.syntax import FUNCTIONS, Function, Module, dotted, local_assignments, parameters
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


class Walk(NamedTuple):
    """What a body reaches, and the functions it defines."""

    steps: tuple[tuple[ast.AST, Frame], ...]
    nested: Mapping[str, Function]


@dataclass
class Flow:
    """Walks a function's body, where its constants are known, and collects what is reached."""

    constants: dict[str, Any]
    steps: list[tuple[ast.AST, Frame]] = field(default_factory=list)
    nested: dict[str, Function] = field(default_factory=dict)

    def block(self, body: list[ast.stmt], at: Frame) -> bool:
        """Whether control can pass beyond a body: no return, raise or endless loop ends it."""
        for node in body:
            before = len(self.steps)
            extra, completes = self.statement(node, at)
            if not completes:
                return False
            extra += exits(node, at, self.steps[before:], extra)
            if extra:
                at = at._replace(tests=at.tests + extra)
        return True

    def statement(self, node: ast.stmt, at: Frame) -> tuple[tuple[Test, ...], bool]:
        """One statement: the conditions that hold after it, and whether control passes beyond it."""
        if isinstance(node, FUNCTIONS):
            self.nested[node.name] = node
            return (), True
        if isinstance(node, ast.If):
            return self._if(node, at)
        return self._simple(node, at) if (opened := self._compound(node, at)) is None else ((), opened)

    def _compound(self, node: ast.stmt, at: Frame) -> bool | None:
        """Whether control passes beyond a loop, try, with or match; None for any other statement."""
        if isinstance(node, ast.While):
            return self._while(node, at)
        if isinstance(node, For):
            return self._for(node, at)
        if isinstance(node, Try):
            return self._try(node, at)
        if isinstance(node, With):
            return self._with(node, at)
        return self._match(node, at) if isinstance(node, ast.Match) else None

    def _simple(self, node: ast.stmt, at: Frame) -> tuple[tuple[Test, ...], bool]:
        if isinstance(node, ast.ClassDef):
            return (), True
        self.steps.append((node, at))
        if isinstance(getattr(node, "value", None), ast.GeneratorExp):
            return (), not isinstance(node, ast.Return)
        for value in ast.iter_child_nodes(node):
            self.expression(value, at)
        if isinstance(node, ast.Assert):
            truth = constant(node.test, self.constants)
            return (Test(node.test, True, alone(at)),), truth is UNKNOWN or bool(truth)
        ends = isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            ends = ends or dotted(node.value.func) in ENDS
        return (), not ends

    def _if(self, node: ast.If, at: Frame) -> tuple[tuple[Test, ...], bool]:
        truth = constant(node.test, self.constants)
        self.steps.append((node, at))
        self.expression(node.test, at)
        before = len(self.steps)
        then = (truth is UNKNOWN or bool(truth)) and self.block(node.body, at.under(node.test, True))
        other = (truth is UNKNOWN or not truth) and self.block(node.orelse, at.under(node.test, False))
        if then is other:
            return (), then
        left = at.under(node.test, not then).tests
        inside = [one for one, frame in self.steps[before:] if frame.tests[: len(left)] == left]
        how = "" if any(leaves(one) for one in inside) else alone(at)
        return (Test(node.test, then, how),), True

    def _while(self, node: ast.While, at: Frame) -> bool:
        truth = constant(node.test, self.constants)
        self.steps.append((node, at))
        self.expression(node.test, at)
        if truth is UNKNOWN or truth:
            inside = at._replace(loops=(*at.loops, node))
            self.block(node.body, inside.under(node.test, True))
        endless = truth is not UNKNOWN and bool(truth) and not breaks(node.body)
        ended = self._unbroken(node, at.under(node.test, False))
        return not endless and (self.block(node.orelse, ended) or breaks(node.body))

    def _for(self, node: For, at: Frame) -> bool:
        self.steps.append((node, at))
        self.expression(node.iter, at)
        items = constant(node.iter, self.constants)
        if items is UNKNOWN or items:
            inside = at._replace(loops=(*at.loops, node))
            self.block(node.body, inside.under(node.iter, True, LOOPS))
        return self.block(node.orelse, self._unbroken(node, at)) or breaks(node.body)

    def _unbroken(self, node: For | ast.While, at: Frame) -> Frame:
        """What encloses the `else` of a loop: none of its breaks was reached."""
        loops = (*at.loops, node)
        broken = [one for one in self.steps if isinstance(one[0], ast.Break) and one[1].loops == loops]
        return at._replace(tests=at.tests + tuple(not_taken(node, at, frame) for _, frame in broken))

    def _try(self, node: Try, at: Frame) -> bool:
        self.steps.append((node, at))
        ended = self.block(node.body, at._replace(tries=(*at.tries, node)))
        ended = ended and self.block(node.orelse, at)
        failed = at._replace(handles=(*at.handles, node))
        handled = [self.block(one.body, failed.under(one.type or BARE, True)) for one in node.handlers]
        return self.block(node.finalbody, at) and (ended or any(handled))

    def _with(self, node: With, at: Frame) -> bool:
        for item in node.items:
            self.expression(item.context_expr, at)
        managers = tuple(item.context_expr for item in node.items)
        ended = self.block(node.body, at._replace(managers=at.managers + managers))
        return ended or any(swallowing(manager) for manager in managers)

    def _match(self, node: ast.Match, at: Frame) -> bool:
        self.expression(node.subject, at)
        ends: list[bool] = []
        for case in node.cases:
            test = matched(node.subject, case)
            if case.guard is not None:
                self.expression(case.guard, at)
            ends.append(self.block(case.body, at if test is None else at.under(test, True)))
            if test is None:
                return any(ends)
            at = at.under(test, False)
        return True

    def expression(self, node: ast.AST, at: Frame) -> None:
        """Collects the calls that an expression makes: not those of a lambda, nor behind `False and`."""
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.BoolOp):
            self._bool(node, at)
            return
        if isinstance(node, ast.IfExp):
            truth = constant(node.test, self.constants)
            self.expression(node.test, at)
            if truth is UNKNOWN or truth:
                self.expression(node.body, at.under(node.test, True))
            if truth is UNKNOWN or not truth:
                self.expression(node.orelse, at.under(node.test, False))
            return
        for one in getattr(node, "generators", ()):
            at = at.under(one.iter, True, LOOPS)
        if isinstance(node, ast.Call):
            self.steps.append((node, at))
            if isinstance(node.func, ast.Lambda):
                self.expression(node.func.body, at)
        for child in ast.iter_child_nodes(node):
            self.expression(child, at)

    def _bool(self, node: ast.BoolOp, at: Frame) -> None:
        wanted = isinstance(node.op, ast.And)
        for value in node.values:
            self.expression(value, at)
            truth = constant(value, self.constants)
            if truth is not UNKNOWN and bool(truth) is not wanted:
                return
            at = at.under(value, wanted)


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
    if function is None or _unread(function, scope):
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
            if function is not None and (problem := _unread(function, place.scope)):
                return f"{function.name}, called at line {place.line}, is not seen to run: {problem}"
    return ""


def _unread(function: Function, scope: Scope) -> str:
    """Why a call may not run a helper's body, or may keep its errors; empty where neither is so."""
    return "" if _awaited(function, scope) else wrapped(scope.module, function, scope.known)


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
