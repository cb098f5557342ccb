"""What a Python file defines and reaches: names, functions, classes, aliases. On ast, never on text."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Union

from loudmerge.canary.code.alternatives import Alternatives
from loudmerge.canary.code.constants import UNKNOWN, constant
from loudmerge.canary.code.nodes import Import, With
from loudmerge.canary.code.pieces import pieces

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]  # noqa: UP007 (a runtime alias on Python 3.10)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
EXITS = frozenset({"sys.exit", "os._exit", "os.abort", "exit", "quit"})
"""The calls that end the process."""
MAX_ALIASES = 8
"""How many `a = b` in a row are followed."""


class RuleError(ValueError):
    """A rule cannot be evaluated: an unknown kind or field, or a source that does not parse."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute chain; the last attributes alone where the start is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def targets(node: ast.stmt) -> Iterator[ast.expr]:
    """The single targets an assignment binds, tuples taken apart."""
    found: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        found = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For, ast.AsyncFor)):
        found = [node.target]
    elif isinstance(node, With):
        found = [item.optional_vars for item in node.items if item.optional_vars is not None]
    while found:
        target = found.pop(0)
        if isinstance(target, (ast.Tuple, ast.List)):
            found = [*target.elts, *found]
        elif isinstance(target, ast.Starred):
            found.insert(0, target.value)
        else:
            yield target


@lru_cache(maxsize=16384)
def binds(node: ast.stmt) -> frozenset[str]:
    """The names a statement binds in its own scope, blocks inside it included."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)):
        return binds_directly(node)
    return binds_directly(node).union(*(binds(inner) for inner in inner_statements(node)))


def inner_statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements one level inside a compound statement."""
    for name in ("body", "orelse", "finalbody"):
        yield from (item for item in getattr(node, name, []) if isinstance(item, ast.stmt))
    for handler in getattr(node, "handlers", []):
        yield from handler.body
    for case in getattr(node, "cases", []):
        yield from case.body


@lru_cache(maxsize=16384)
def mentions(node: ast.AST) -> frozenset[str]:
    """Every name, attribute and string constant inside an expression or statement."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return frozenset(found)


def is_hollow(body: Iterable[ast.stmt]) -> bool:
    """Whether a body does nothing: docstrings, `...`, `pass`, `return`, or only NotImplementedError."""
    for node in body:
        if isinstance(node, (ast.Pass, ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Return) and (node.value is None or isinstance(node.value, ast.Constant)):
            return True
        return isinstance(node, ast.Raise) and "NotImplementedError" in mentions(node)
    return True


@dataclass
class Module:
    """One parsed file. `bindings`: the reachable statements that bind each top-level name, in order.

    shared: the names that any function declares global, which it may bind anew.
    """

    tree: ast.Module
    bindings: dict[str, list[ast.stmt]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    def last(self, name: str) -> ast.stmt | None:
        """The statement whose binding of `name` is in force at the end of the file."""
        found = self.bindings.get(name)
        return found[-1] if found else None

    def defines(self, name: str) -> bool:
        """Whether the file itself says what a top-level name is, and does not only import it."""
        node = self.last(name)
        return node is not None and not isinstance(node, Import)

    def value(self, name: str) -> ast.expr | None:
        """The expression last assigned to a top-level name."""
        node = self.last(name)
        return node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None

    def define(self, name: str) -> ast.stmt | None:
        """The statement that defines a top-level name, through `a = b`."""
        node = self.last(name)
        for _ in range(MAX_ALIASES):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Name):
                break
            node = self.last(node.value.id)
        return node

    def alternatives(self, name: str, depth: int = MAX_ALIASES) -> tuple[ast.stmt, ...]:
        """Each statement that may define a top-level name: one, unless a `try` or an `if` decides it."""
        bound = self.bindings.get(name, [])
        if len(bound) > 1:
            read = Alternatives(frozenset(map(id, bound)), self.constants, partial(_stops, self.constants))
            bound = list(read.after(self.tree.body) or bound)
        found: dict[ast.stmt, None] = {}
        for node in bound:
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            more = self.alternatives(value.id, depth - 1) if isinstance(value, ast.Name) and depth else ()
            found.update(dict.fromkeys(more or (node,)))
        return tuple(found)

    def function(self, qualified: str) -> Function | None:
        """The function or method `f` or `Class.f`, also one inherited from a class of the same file."""
        owner, _, name = qualified.rpartition(".")
        if not owner:
            node = self.define(name)
            rebound = name in self.shared or f"{name}.__code__" in self.bindings
            sure = not rebound and len(self.alternatives(name)) == 1
            return node if isinstance(node, FUNCTIONS) and sure else None
        return self.method(owner, name)

    def method(self, owner: str, name: str) -> Function | None:
        for node in self.lineage(owner):
            other = [one for one in self.alternatives(node.name) if one is not node]
            if other or {f"{node.name}.{name}", f"{node.name}.*"} & self.bindings.keys():
                return None
            found = self.member(node, name)
            if found is not None:
                return found if isinstance(found, FUNCTIONS) else None
        return None

    def member(self, owner: ast.ClassDef, name: str) -> ast.stmt | None:
        """The statement in a class's own body that last binds `name`, through `a = b`."""
        reached = [node for node in reachable(owner.body, self.constants) if name in binds(node)]
        node = reached[-1] if reached else None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id != name:
            return self.member(owner, node.value.id) or self.define(node.value.id)
        return node

    def lineage(self, name: str) -> list[ast.ClassDef]:
        """A class and its bases as far as this file defines them."""
        todo, seen = [name], []
        while todo:
            node = self.define(todo.pop(0))
            if isinstance(node, ast.ClassDef) and node not in seen:
                seen.append(node)
                todo += [dotted(base).rpartition(".")[2] for base in node.bases]
        return seen

    def is_a(self, name: str, parent: str) -> bool:
        """Whether exception or class `name` is `parent` or derives from it, by this file and Python's own."""
        names = {name} | {node.name for node in self.lineage(name)}
        for node in self.lineage(name):
            names |= {dotted(base).rpartition(".")[2] for base in node.bases}
        parent = parent.rpartition(".")[2]
        above = getattr(builtins, parent, None)
        if above is not None:
            names = {one for one in names if one not in self.bindings}
        return parent in names or any(_derives(getattr(builtins, one, None), above) for one in names)


def _derives(kind: Any, above: Any) -> bool:
    return isinstance(kind, type) and isinstance(above, type) and issubclass(kind, above)


def reachable(body: Iterable[ast.stmt], constants: dict[str, Any]) -> Iterator[ast.stmt]:
    """The statements of a module's or class's body that run, blocks opened up, dead ones left out."""
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node
            continue
        if isinstance(node, (ast.If, ast.While)):
            truth = constant(node.test, constants)
            body_runs = truth is UNKNOWN or bool(truth)
            else_runs = truth is UNKNOWN or not truth
            yield from reachable(node.body if body_runs else [], constants)
            yield from reachable(node.orelse if else_runs else [], constants)
            continue
        yield node
        yield from reachable(inner_statements(node), constants)
        if isinstance(node, ast.Raise) or _stops(constants, node):
            return


def _stops(constants: dict[str, Any], node: ast.stmt) -> bool:
    """`assert False`, `sys.exit()`."""
    if isinstance(node, ast.Assert):
        truth = constant(node.test, constants)
        return truth is not UNKNOWN and not truth
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and dotted(call.func) in EXITS


@lru_cache(maxsize=16)
def parse(text: str, path: str = "<source>") -> Module:
    """Parses one file. Raises RuleError where Python's grammar refuses it."""
    try:
        found = pieces(text)
    except (SyntaxError, ValueError) as error:
        raise RuleError(f"{path}: not readable as Python: {error}") from error
    tree = ast.Module([node for piece in found for node in piece.body], [])
    module = Module(tree)
    module.constants = _constants(tree, frozenset().union(*(piece.shared for piece in found)))
    module.shared = frozenset().union(*(piece.shared for piece in found))
    for node in reachable(tree.body, module.constants):
        _bind(module, node)
    for name, node in (patch for piece in found for patch in piece.patches):
        module.bindings.setdefault(name, []).append(node)
    return module


def _bind(module: Module, node: ast.stmt) -> None:
    """Adds what one statement binds at the top of a file: names, `Class.method`, or anything at all."""
    if isinstance(node, ast.Delete):
        for target in targets(node):
            module.bindings.pop(dotted(target), None)
        return
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in targets(node):
            if isinstance(target, ast.Attribute) and (name := dotted(target)) and "." in name:
                module.bindings.setdefault(name, []).append(node)
    names: Iterable[str] = binds_directly(node) | _walrus(node)
    if binds_anything(node):
        names = list(module.bindings)
    for name in names:
        module.bindings.setdefault(name, []).append(node)


def _walrus(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) or list(inner_statements(node)):
        return frozenset()
    return frozenset(one.target.id for one in ast.walk(node) if isinstance(one, ast.NamedExpr))


def binds_anything(node: ast.stmt) -> bool:
    """`from a import *`, `exec`, what writes `globals()` or `sys.modules[...]`; outside of functions."""
    if isinstance(node, ast.ImportFrom):
        return node.names[0].name == "*"
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) or list(inner_statements(node)):
        return False
    return any(_writes_globals(one) for one in ast.walk(node))


def _writes_globals(node: ast.AST) -> bool:
    if isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
        return _is_globals(node.value) or _is_globals(node)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr in {"update", "pop", "clear", "__setitem__"}:
        return _is_globals(node.func.value)
    name = dotted(node.func)
    return name == "exec" or (name in {"setattr", "delattr"} and any(map(_is_globals, node.args[:1])))


def _is_globals(node: ast.AST) -> bool:
    """`globals()`, `vars()`, `sys.modules[__name__]`, and the latter's `__dict__`."""
    if isinstance(node, ast.Attribute) and node.attr == "__dict__":
        return _is_globals(node.value)
    if isinstance(node, ast.Call):
        return dotted(node.func) in {"globals", "vars", "locals"}
    return isinstance(node, ast.Subscript) and dotted(node.value) == "sys.modules"


def _constants(tree: ast.Module, shared: frozenset[str]) -> dict[str, Any]:
    """Top-level names bound exactly once, to a plain constant, and none of those declared global anywhere."""
    counts: dict[str, int] = {}
    values: dict[str, Any] = {}
    for node in own_statements(tree.body):
        for name in binds(node) if not list(inner_statements(node)) else binds_directly(node):
            counts[name] = counts.get(name, 0) + 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values.update({one.id: node.value.value for one in node.targets if isinstance(one, ast.Name)})
    return {name: value for name, value in values.items() if counts.get(name) == 1 and name not in shared}


def binds_directly(node: ast.stmt) -> frozenset[str]:
    """The names a statement itself binds, blocks inside it left out."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return frozenset({node.name})
    if isinstance(node, Import):
        return frozenset(alias.asname or alias.name.split(".")[0] for alias in node.names)
    return frozenset(target.id for target in targets(node) if isinstance(target, ast.Name))


def own_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement of a body, blocks opened up, functions and classes left closed."""
    for node in body:
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield from own_statements(inner_statements(node))


@lru_cache(maxsize=4096)
def imported(node: ast.Module | Function) -> dict[str, str]:
    """Local name -> the name it was imported as, anywhere in a function or among a file's own statements."""
    inside = ast.walk(node) if isinstance(node, FUNCTIONS) else own_statements(node.body)
    found = [one for one in inside if isinstance(one, Import)]
    return {one.asname: one.name for statement in found for one in statement.names if one.asname}


Bound = list[tuple[ast.stmt, Union[int, None]]]  # noqa: UP007 (a runtime alias on Python 3.10)


@lru_cache(maxsize=4096)
def local_bindings(function: Function) -> dict[str, Bound]:
    """For each local name, the statements that bind it, with its place in the tuple that is unpacked."""
    found: dict[str, Bound] = {}
    for node in own_statements(function.body):
        if isinstance(node, ast.Assign):
            for name, place in _unpacked(node):
                found.setdefault(name, []).append((node, place))
            continue
        for name in binds_directly(node):
            found.setdefault(name, []).append((node, None))
    return found


def local_assignments(function: Function, name: str) -> Bound:
    """The statements of a function that bind a local name."""
    return local_bindings(function).get(name, [])


def _unpacked(node: ast.Assign) -> Iterator[tuple[str, int | None]]:
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, None
        elif isinstance(target, (ast.Tuple, ast.List)):
            yield from ((one.id, place) for place, one in enumerate(target.elts) if isinstance(one, ast.Name))


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters, in order."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return [arg.arg for arg in every] + [arg.arg for arg in (args.vararg, args.kwarg) if arg is not None]
