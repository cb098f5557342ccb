"""The value of an expression that no input can change."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any


class Unknown:
    """The value that static reading cannot tell."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = Unknown()


def constant(node: ast.AST | None, constants: dict[str, Any]) -> Any:  # noqa: PLR0911 - one for each kind
    """The value of an expression made of constants, or UNKNOWN. It decides only what no input can change."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id, False if node.id == "TYPE_CHECKING" else UNKNOWN)
    if isinstance(node, ast.Attribute):
        return False if node.attr == "TYPE_CHECKING" else UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = constant(node.operand, constants)
        return UNKNOWN if inner is UNKNOWN else not inner
    if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
        return [] if not (node.keys if isinstance(node, ast.Dict) else node.elts) else UNKNOWN
    if isinstance(node, ast.BoolOp):
        return _constant_bool(node, constants)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _constant_compare(node, constants)
    return UNKNOWN


def _constant_bool(node: ast.BoolOp, constants: dict[str, Any]) -> Any:
    stops = isinstance(node.op, ast.Or)
    values = [constant(value, constants) for value in node.values]
    if any(value is not UNKNOWN and bool(value) is stops for value in values):
        return stops
    return UNKNOWN if UNKNOWN in values else not stops


def _constant_compare(node: ast.Compare, constants: dict[str, Any]) -> Any:
    left, right = constant(node.left, constants), constant(node.comparators[0], constants)
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    return compare(node.ops[0], left, right)


def compare(op: ast.cmpop, left: Any, right: Any) -> Any:
    """`left op right`, UNKNOWN where Python would raise TypeError."""
    table: dict[type[ast.cmpop], Callable[[], Any]] = {
        ast.Eq: lambda: left == right,
        ast.NotEq: lambda: left != right,
        ast.Lt: lambda: left < right,
        ast.LtE: lambda: left <= right,
        ast.Gt: lambda: left > right,
        ast.GtE: lambda: left >= right,
        ast.Is: lambda: left is right,
        ast.IsNot: lambda: left is not right,
        ast.In: lambda: left in right,
        ast.NotIn: lambda: left not in right,
    }
    try:
        return table[type(op)]()
    except TypeError:
        return UNKNOWN
