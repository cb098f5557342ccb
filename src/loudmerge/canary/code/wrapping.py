"""What stands between a call of a function and its body: decorators, and that some calls run nothing yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from loudmerge.canary.code.syntax import FUNCTIONS, Function, Module, dotted, imported

TRANSPARENT = frozenset(
    {
        *("staticmethod", "classmethod", "property", "cached_property", "setter", "abstractmethod"),
        *("override", "final", "wraps", "lru_cache", "cache", "contextmanager"),
        *("no_grad", "inference_mode", "enable_grad"),
    }
)
"""Decorators of Python and torch, by their last name, under which the body runs and its errors come out."""


def wrapped(module: Module, function: Function, known: tuple[str, ...] = ()) -> str:
    """Why a call may not run the body, or may keep its errors; empty where neither is so.

    known: names of decorators that the rule says are no matter.
    """
    if isinstance(function, ast.AsyncFunctionDef):
        return f"{function.name} is async at line {function.lineno}: calling it runs nothing"
    marks = [_names(one, module) for one in function.decorator_list]
    if any(yields(function.body)) and not any("contextmanager" in names for names in marks):
        return f"{function.name} is a generator at line {function.lineno}: calling it runs nothing"
    return wrapping(module, function.decorator_list, known)


def wrapping(module: Module, decorators: Sequence[ast.expr], known: tuple[str, ...] = ()) -> str:
    """The first of these decorators under which the body may not run; empty where there is none."""
    for node in decorators:
        names = _names(node, module)
        own = module.defines(names[0].partition(".")[0])
        if not set(names) & set(known) and (own or names[-1] not in TRANSPARENT):
            return (
                f"it stands under the decorator `{ast.unparse(node)}` at line {node.lineno}: "
                f"name {names[0]!r} in the rule's `decorators` if the body still runs"
            )
    return ""


def origin(decorator: ast.expr, module: Module) -> str:
    """The last name of a decorator where it comes from."""
    return _names(decorator, module)[1]


def _names(decorator: ast.expr, module: Module) -> tuple[str, str]:
    """The name of a decorator as it is written (its text for none), and its last part where it comes from."""
    name = dotted(decorator.func if isinstance(decorator, ast.Call) else decorator) or ast.unparse(decorator)
    return name, imported(module.tree).get(name, name).rpartition(".")[2]


def yields(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """The `yield` of a function itself, not of those inside it."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            yield node
        if not isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)
