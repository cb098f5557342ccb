"""What binds a function's name to something that is not the function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from loudmerge.canary.code.nodes import Import
from loudmerge.canary.code.pieces import declared
from loudmerge.canary.code.syntax import FUNCTIONS, Module, binds_anything


def rebinding(module: Module, qualified: str) -> tuple[str, int]:
    """(what stands in the way of reading `f` or `Class.f` as a function, line), or ("", 0) for nothing."""
    for node in _binders(module, qualified):
        if node is None or isinstance(node, FUNCTIONS):
            continue
        taken = isinstance(node, Import) and not binds_anything(node)
        how = "is imported" if taken else "may be bound anew"
        text = ast.unparse(node).splitlines()[0]
        return f"{qualified} {how} at line {node.lineno}: {text}", node.lineno
    return alternative(module, qualified)


def alternative(module: Module, qualified: str) -> tuple[str, int]:
    """(which definitions a `try` or an `if` chooses a function or its class from, line), or ("", 0)."""
    owner = qualified.partition(".")[0]
    names = [owner, *(node.name for node in module.lineage(owner))] if owner != qualified else [owner]
    for name in names:
        found = module.alternatives(name)
        if len(found) > 1:
            shown = sorted(found, key=lambda one: not isinstance(one, Import))
            texts = (f"`{ast.unparse(one).splitlines()[0]}` at line {one.lineno}" for one in shown)
            return f"{name} may be one of several: {'; '.join(texts)}", shown[0].lineno
    return "", 0


def _binders(module: Module, qualified: str) -> Iterator[Any]:
    """The statements that say last what a name stands for, in the file, in its class and in functions."""
    owner, _, name = qualified.rpartition(".")
    classes = module.lineage(owner) if owner else []
    for node in classes:
        yield module.last(f"{node.name}.{name}")
        yield module.last(f"{node.name}.*")
        yield module.member(node, name)
    if not classes:
        yield module.define(owner or name) or module.last(owner or name)
        yield module.last(f"{name}.__code__")
        yield from _declared(module, owner or name)


def _declared(module: Module, name: str) -> Iterator[ast.AST]:
    """Each `global name` of a function, and what writes the name into the file's namespace."""
    if name in module.shared:
        yield from (node for node in ast.walk(module.tree) if name in declared(node))
