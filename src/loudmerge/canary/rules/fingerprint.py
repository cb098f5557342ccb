"""The normalised form of a function: what it does, whatever its wording, local names and annotations."""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
from collections.abc import Iterable

from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.syntax import FUNCTIONS, Function, dotted, inner_statements, mentions, parameters
from loudmerge.errors import plural

SPEAKING = frozenset(
    {"print", "warn", "warning", "info", "debug", "error", "warning_once", "exception", "log"}
)
"""Calls whose arguments are words for people: their text does not count."""

SHOWN = 40
"""Lines of a difference."""


class Normaliser(ast.NodeTransformer):
    """Drops docstrings, annotations and messages, and numbers local names as they are first bound."""

    def __init__(self, kept: Iterable[str]) -> None:
        self.kept = set(kept)
        self.names: dict[str, str] = {}

    def rename(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.kept:
                self.names.setdefault(name, f"v{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self.names.get(node.arg, node.arg))

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.name = self.names.get(node.name or "", node.name)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        assigned: ast.AST = self.visit(ast.Assign([node.target], node.value))
        return assigned

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        node.cause = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call) and dotted(node.value.func).rpartition(".")[2] in SPEAKING:
            return None
        return self.generic_visit(node)

    def visit_Pass(self, _: ast.Pass) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.name = self.names.get(node.name, node.name)
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815 (ast's own name)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_For = visit_While = visit_With = visit_Try = visit_If  # type: ignore[assignment]  # noqa: N815


def normal_form(function: Function, focus: Iterable[str] = ()) -> str:
    """The normalised source of a function. With `focus`, only the statements that mention one of these names.

    Parameters and everything not local keep their names: callers see those.
    """
    node = copy.deepcopy(function)
    node.decorator_list = []
    node.body = _alive(node.body)
    focus = frozenset(focus)
    if focus:
        node.body = _focused(node.body, focus) or [ast.Pass()]
    normaliser = Normaliser(parameters(node))
    normaliser.rename(_bound_in_order(node))
    normaliser.visit(node)
    return ast.unparse(ast.fix_missing_locations(node))


def _alive(body: list[ast.stmt]) -> list[ast.stmt]:
    """A body without what never runs: behind a constant test, or after a return or raise."""
    kept: list[ast.stmt] = []
    for node in body:
        truth = constant(node.test, {}) if isinstance(node, ast.If) else UNKNOWN
        if isinstance(node, ast.If) and truth is not UNKNOWN:
            kept += _alive(node.body if truth else node.orelse)
        else:
            for name in ("body", "orelse", "finalbody"):
                if getattr(node, name, None):
                    setattr(node, name, _alive(getattr(node, name)))
            kept.append(node)
        if kept and isinstance(kept[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            break
    return kept


def _focused(body: list[ast.stmt], focus: frozenset[str]) -> list[ast.stmt]:
    """The statements that mention a name of `focus`; a block keeps its head where something in it is kept."""
    kept: list[ast.stmt] = []
    for node in body:
        inner = [*inner_statements(node)]
        if not inner or isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            kept += [node] if focus & mentions(node) else []
            continue
        head = [value for value in ast.iter_child_nodes(node) if isinstance(value, ast.expr)]
        in_head = any(focus & mentions(value) for value in head)
        for name in ("body", "orelse", "finalbody"):
            if not in_head and getattr(node, name, None):
                setattr(node, name, _focused(getattr(node, name), focus))
        if in_head or any(_nonempty(node)):
            if not getattr(node, "body", [1]):
                node.body = [ast.Pass()]  # type: ignore[attr-defined]
            kept.append(node)
    return kept


def _nonempty(node: ast.stmt) -> list[bool]:
    return [bool(getattr(node, name, None)) for name in ("body", "orelse", "finalbody")]


def _bound_in_order(function: Function) -> list[str]:
    """Local names in the order they are bound, those of handlers and inner functions included."""
    found: list[str] = []
    shared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    for node in _in_order(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, FUNCTIONS) and node is not function
        ):
            found.append(str(node.name))
        elif isinstance(node, ast.Lambda):
            found += [arg.arg for arg in node.args.args]
    return [name for name in dict.fromkeys(found) if name not in shared]


def _in_order(node: ast.AST) -> Iterable[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def digest(form: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a normal form."""
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def difference(before: str, after: str) -> str:
    """The unified diff of two normal forms, at most SHOWN lines of it."""
    lines = list(
        difflib.unified_diff(before.splitlines(), after.splitlines(), "known", "read", lineterm="", n=1)
    )
    more = [f"… {plural(len(lines) - SHOWN, 'more line')}"] if len(lines) > SHOWN else []
    return "\n".join(lines[:SHOWN] + more)
