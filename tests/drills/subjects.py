"""What a guard watches: the functions and names in upstream's file that a drill takes aim at."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Subject:
    """One definition that a rule names. `path` is the dotted name, `node` its last definition in the file."""

    path: str
    node: Node
    rule: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, FUNCTIONS)


def leaves(rule: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rules inside `all` and `any`."""
    for one in rule.get("rules", ()):
        yield from leaves(one)
    if "rules" not in rule:
        yield rule


def names(rule: Mapping[str, Any]) -> list[str]:
    """What a rule names: the subject of the drill is the first, for a probe or tests every one."""
    if rule["kind"] == "probe":
        return list(rule["extract"])[:1] if "_MOE_MERGE_STATE" in rule["extract"] else list(rule["extract"])
    if rule["kind"] == "tests":
        return list(rule["names"])
    return [rule.get("function") or rule["name"]]


def subjects(rule: Mapping[str, Any], tree: ast.Module) -> list[Subject]:
    """The definitions a guard watches, each once for each rule that watches it."""
    found = []
    for leaf in leaves(rule):
        for path in names(leaf):
            node = find(tree, path)
            if node is not None:
                found.append(Subject(path, node, leaf))
    return found


def find(tree: ast.Module, path: str) -> Node | None:
    """The last definition of a dotted name."""
    body: list[ast.stmt] = tree.body
    node: ast.stmt | None = None
    for name in path.split("."):
        matching = [one for one in _flat(body) if name in _bound(one)]
        if not matching:
            return None
        node = matching[-1]
        body = getattr(node, "body", [])
    return node if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)) else None


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _flat([*node.body, *node.orelse])


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {one.id for one in targets if isinstance(one, ast.Name)}


def replace(text: str, node: Node, new: list[ast.stmt]) -> str:
    """The file with one definition written anew; all other lines stay as they are, and where they are.

    Blank lines fill up what became shorter: what did not move is not parsed again.
    """
    lines = text.split("\n")
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(one.lineno for one in decorators)]) - 1
    last = node.end_lineno or node.lineno
    code = "\n".join(ast.unparse(ast.fix_missing_locations(one)) for one in new) or "pass"
    body = [f"{' ' * node.col_offset}{line}" if line else "" for line in code.split("\n")]
    body += [""] * (last - first - len(body))
    return "\n".join([*lines[:first], *body, *lines[last:]])
