"""Why a probe's code may not be what upstream runs: replaced later, or under what is not here."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from loudmerge.canary.code.flow import Place, Scope
from loudmerge.canary.code.nodes import Import, With
from loudmerge.canary.code.rebinding import alternative, rebinding
from loudmerge.canary.code.swallow import doubtful
from loudmerge.canary.code.syntax import FUNCTIONS, Function, Module, local_assignments, own_statements
from loudmerge.canary.code.wrapping import wrapping

MADE = (*FUNCTIONS, ast.ClassDef)


@dataclass(frozen=True)
class Known:
    """The names of decorators and of context managers that the rule says change nothing."""

    decorators: tuple[str, ...] = ()
    managers: tuple[str, ...] = ()


NOTHING = Known()


def replaced(module: Module, name: str, methods: Collection[str], *, asked: bool) -> str:
    """What a name of the file, or one of these methods of it, becomes in the end instead; empty for nothing.

    asked: whether the rule names it. What the code asked for merely uses may be a choice of the file.
    """
    bound = module.bindings.get(name, [])
    found = module.alternatives(name)
    if any(isinstance(node, FUNCTIONS) for node in bound):
        return rebinding(module, name)[0]
    if any(isinstance(node, ast.ClassDef) for node in bound):
        return _class_replaced(module, name, methods)
    own = [node for node in bound if not isinstance(node, Import)]
    imported = [node for node in found if isinstance(node, Import)]
    if own and (imported if asked else imported == list(found)):
        return f"{name} is imported at line {imported[0].lineno}: {ast.unparse(imported[0])}"
    return ""


def _class_replaced(module: Module, name: str, methods: Collection[str]) -> str:
    node = module.define(name)
    if not isinstance(node, ast.ClassDef) or name in module.shared:
        return rebinding(module, name)[0] or f"{name} may be bound anew by a function"
    made = [method for method in sorted(methods) if isinstance(module.member(node, method), FUNCTIONS)]
    found = (rebinding(module, f"{name}.{method}")[0] for method in made)
    return alternative(module, name)[0] or next((one for one in found if one), "")


def covered(module: Module, unit: ast.stmt, absent: Collection[str], known: Known) -> str:
    """The decorator or manager in a statement that is not here (`absent`) and may change what runs."""
    for node in ast.walk(unit):
        if isinstance(node, MADE):
            marks = [one for one in node.decorator_list if _names(one) & set(absent)]
            if said := wrapping(module, marks, known.decorators):
                return f"{node.name} is not what runs: {said}"
        if isinstance(node, FUNCTIONS) and (said := _managed(module, node, absent, known)):
            return f"{node.name} is not what runs: {said}"
    return ""


def _managed(module: Module, function: Function, absent: Collection[str], known: Known) -> str:
    scope = Scope(module, function)
    for node in own_statements(function.body):
        for item in node.items if isinstance(node, With) else ():
            if set(_origins(item.context_expr, function)) & set(absent):
                place = Place(node, scope, managers=((item.context_expr, scope),))
                if said := doubtful(place, known.managers):
                    return said
    return ""


def _origins(manager: ast.expr, function: Function) -> Iterator[str]:
    """The names that a manager is written with, and those that its local names were made with."""
    for name in _names(manager):
        yield name
        for node, _ in local_assignments(function, name):
            yield from _names(node)


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
