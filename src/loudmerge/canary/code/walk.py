"""Walks one body: which of its statements and calls are reached, and what encloses each."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.exits import (
    BARE,
    DEBUG,
    ENDS,
    LOOPS,
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
from loudmerge.canary.code.syntax import FUNCTIONS, Function, dotted, own_statements

ENDING = (ast.Return, ast.Break, ast.Continue)
"""What in a `finally` drops an error."""


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
        if isinstance(node, ast.Assert):
            return self._assert(node, at)
        for value in ast.iter_child_nodes(node):
            self.expression(value, at)
        ends = isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            ends = ends or dotted(node.value.func) in ENDS
        return (), not ends

    def _assert(self, node: ast.Assert, at: Frame) -> tuple[tuple[Test, ...], bool]:
        """What it calls is not called under `python -O`, and its message is made where it fails."""
        self.expression(node.test, at.under(DEBUG, True))
        if node.msg is not None:
            self.expression(node.msg, at.under(node.test, False))
        truth = constant(node.test, self.constants)
        return (Test(node.test, True, alone(at)),), truth is UNKNOWN or bool(truth)

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
        outside = at
        if any(isinstance(one, ENDING) for one in own_statements(node.finalbody)):
            # What the handlers raise goes through the `finally` as well.
            at = at._replace(tries=(*at.tries, ast.Try([], [], [], node.finalbody)))
        ended = ended and self.block(node.orelse, at)
        failed = at._replace(handles=(*at.handles, node))
        handled = [self.block(one.body, failed.under(one.type or BARE, True)) for one in node.handlers]
        return self.block(node.finalbody, outside) and (ended or any(handled))

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
