"""Which conditions lead to a place: what they are about, and whether given facts settle them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from loudmerge.canary.code.exits import LEAVES, LOOPS, RAISES
from loudmerge.canary.code.flow import Condition, Place, Scope, callee, helper, walked
from loudmerge.canary.code.nodes import For
from loudmerge.canary.code.syntax import dotted, local_assignments, mentions, parameters
from loudmerge.canary.code.values import outcome, said, told

DEPTH = 6
"""How many names, helpers and operators deep a condition is taken apart."""


def unsettled(place: Place, given: Mapping[str, Any], mentioned: Collection[str] = ()) -> str:
    """The first condition that keeps the given facts from leading to a place for certain; empty for none.

    What an error alone turns away from needs no fact: no error passes for a success. Nor does a condition on
    what is `mentioned`, unless the facts are about it, or it joins that with something else.
    """
    for one in place.conditions:
        met = outcome(one, given)
        if met or (met is None and one.how == RAISES):
            continue
        against = one if met is False else _open(one, given, frozenset(mentioned), DEPTH)
        if against is not None:
            text = f"`{said(against.test)}`" if against.wanted else f"`not ({said(against.test)})`"
            return f"the loop over {text}, which may run over nothing," if one.how == LOOPS else text
    return ""


def _open(one: Condition, given: Mapping[str, Any], about: frozenset[str], depth: int) -> Condition | None:
    """The part of a condition that neither the facts settle nor `about` excuses; None where there is none."""
    if outcome(one, given):
        return None
    itself = one.test.func if isinstance(one.test, ast.Call) else one.test
    parts = _parts(one) if depth > 0 and dotted(itself).rpartition(".")[2] not in about else []
    if not parts:
        excused = about & _sources(one.test, one.scope, 4, set()) and not told(one, given)
        return None if excused else one
    possible = [part for part in parts if outcome(part, given) is not False] if _either(one) else parts
    left = [_open(part, given, about, depth - 1) for part in possible]
    if isinstance(one.test, ast.BoolOp) and _either(one) and one.wanted and None in left:
        return None
    return next((part for part in left if part is not None), None)


def _either(one: Condition) -> bool:
    """Whether one part of a condition is enough for it to come out as it must."""
    return isinstance(one.test, ast.BoolOp) and isinstance(one.test.op, ast.Or) is one.wanted


def _parts(one: Condition) -> list[Condition]:
    """What a condition is made of, or says by a name or by a helper of one expression; empty for nothing."""
    test = one.test
    if one.how == LOOPS:
        return []
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return [one._replace(test=test.operand, wanted=not one.wanted)]
    if isinstance(test, ast.NamedExpr):
        return [one._replace(test=test.value)]
    if isinstance(test, ast.BoolOp):
        return [one._replace(test=part) for part in test.values]
    meant = _meant(test, one.scope)
    return [one._replace(test=meant[0], scope=meant[1])] if meant is not None else []


def _meant(test: ast.expr, scope: Scope) -> tuple[ast.expr, Scope] | None:
    """The expression that a name is bound to, or that a helper returns, with its scope; None for others."""
    if isinstance(test, ast.Name):
        passed = [(value, outer) for name, value, outer in scope.given if name == test.id]
        bound = local_assignments(scope.function, test.id)
        if passed or test.id in parameters(scope.function) or len(bound) != 1 or bound[0][1] is not None:
            return passed[0] if passed and not bound else None
        value = getattr(bound[0][0], "value", None)
        return (value, scope) if isinstance(value, ast.expr) else None
    inner = helper(test, scope, walked(scope).nested) if isinstance(test, ast.Call) else None
    last = inner.function.body[-1] if inner is not None else None
    if inner is None or not isinstance(last, ast.Return) or last.value is None:
        return None
    plain = all(isinstance(getattr(node, "value", None), ast.Constant) for node in inner.function.body[:-1])
    return (last.value, inner) if plain else None


def governing(place: Place) -> set[str]:
    """Every name and string in the conditions of a place, local names and helper parameters traced back."""
    found: set[str] = set()
    seen: set[tuple[int, str]] = set()
    for condition in place.conditions:
        if condition.how not in {LEAVES, LOOPS}:
            found |= _sources(condition.test, condition.scope, 4, seen)
    return found


def _sources(node: ast.AST, scope: Scope, depth: int, seen: set[tuple[int, str]]) -> set[str]:
    found = set(mentions(node))
    if depth <= 0:
        return found
    for part in _names_and_calls(node):
        if isinstance(part, ast.Name) and (id(scope.function), part.id) not in seen:
            seen.add((id(scope.function), part.id))
            for name, passed, outer in scope.given:
                found |= _sources(passed, outer, depth - 1, seen) if name == part.id else set()
            for bound, _ in local_assignments(scope.function, part.id):
                came = bound.iter if isinstance(bound, For) else getattr(bound, "value", None)
                found |= _sources(came, scope, depth - 1, seen) if came is not None else set()
        elif isinstance(part, ast.Call):
            function = callee(part, scope, {})[0]
            if function is not None and len(function.body) <= 6:
                found |= set().union(*(mentions(one) for one in function.body))
    return found


@lru_cache(maxsize=16384)
def _names_and_calls(node: ast.AST) -> tuple[ast.Name | ast.Call, ...]:
    return tuple(part for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Call)))
