"""Which statements of a body may be those that say last what a name stands for: one, or alternatives."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.nodes import For, Try, With

LOOPS = For | ast.While

Found = tuple[ast.stmt, ...]


@dataclass(frozen=True)
class Alternatives:
    """binders: the ids of the statements that bind the name. stops: whether one ends the program."""

    binders: frozenset[int]
    constants: dict[str, Any]
    stops: Callable[[ast.stmt], bool]

    def after(self, body: list[ast.stmt], before: Found = ()) -> Found | None:
        """The bindings of which each may be in force behind a body; None where control ends inside."""
        found = before
        for node in body:
            if id(node) in self.binders:
                found = (node,)
            inside = self._compound(node, found)
            if inside is None or isinstance(node, ast.Raise) or self.stops(node):
                return None
            found = inside
        return found

    def _compound(self, node: ast.stmt, before: Found) -> Found | None:
        if isinstance(node, ast.If):
            truth = constant(node.test, self.constants)
            then = self.after(node.body, before) if truth is UNKNOWN or truth else None
            other = self.after(node.orelse, before) if truth is UNKNOWN or not truth else None
            return _either(then, other)
        if isinstance(node, LOOPS):
            return _either(before, self.after(node.body, before), self.after(node.orelse, before))
        if isinstance(node, Try):
            return self._try(node, before)
        if isinstance(node, With):
            return self.after(node.body, before)
        if isinstance(node, ast.Match):
            return _either(before, *(self.after(case.body, before) for case in node.cases))
        return before

    def _try(self, node: Try, before: Found) -> Found | None:
        """A handler comes from anywhere in the body: what it leaves is as before, or as the body has it."""
        whole = self.after(node.body, before)
        ended = self.after(node.orelse, whole) if whole is not None else None
        failed = _either(before, *(self.after([one], before) for one in node.body)) or ()
        handled = [self.after(one.body, failed) for one in node.handlers]
        left = _either(ended, *handled)
        return None if left is None else self.after(node.finalbody, left)


def _either(*ways: Found | None) -> Found | None:
    """What any of the ways leaves that end; None where none does."""
    ended = [way for way in ways if way is not None]
    return tuple(dict.fromkeys(one for way in ended for one in way)) if ended else None
