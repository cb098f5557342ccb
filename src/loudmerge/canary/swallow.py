"""Whether an exception leaves the function that raises it."""

from __future__ import annotations

import ast

from loudmerge.canary.flow import OUTSIDE, Flow, Place, Scope, known_constants, swallowing
from loudmerge.canary.syntax import Module, dotted


def swallowed(place: Place, exception: str) -> str:
    """Why an exception raised at this place would not leave the function; empty where it would."""
    module = place.scope.module
    for node, scope in reversed(place.tries):
        if node.finalbody and _leaves(node.finalbody, scope):
            return f"the finally at line {node.finalbody[0].lineno} returns, which drops the exception"
        handler = next((one for one in node.handlers if _catches(one.type, exception, module)), None)
        if handler is not None and not _always_raises(handler.body, scope):
            return f"the except at line {handler.lineno} swallows it"
    for manager in place.managers:
        kinds = manager.args if swallowing(manager) and isinstance(manager, ast.Call) else []
        if any(_catches(kind, exception, module) for kind in kinds):
            return f"{ast.unparse(manager)} at line {manager.lineno} swallows it"
    return ""


def _catches(kind: ast.expr | None, exception: str, module: Module) -> bool:
    if kind is None:
        return True
    if isinstance(kind, ast.Tuple):
        return any(_catches(one, exception, module) for one in kind.elts)
    name = dotted(kind).rpartition(".")[2]
    if name in {"Exception", "BaseException"}:
        return True
    return module.is_a(exception.rpartition(".")[2], name)


def _leaves(body: list[ast.stmt], scope: Scope) -> bool:
    flow = Flow(known_constants(scope))
    flow.block(body, OUTSIDE)
    return any(isinstance(node, (ast.Return, ast.Break, ast.Continue)) for node, _ in flow.steps)


def _always_raises(body: list[ast.stmt], scope: Scope) -> bool:
    flow = Flow(known_constants(scope))
    completes = flow.block(body, OUTSIDE)
    return not completes and not any(
        isinstance(node, (ast.Return, ast.Break, ast.Continue)) for node, _ in flow.steps
    )
