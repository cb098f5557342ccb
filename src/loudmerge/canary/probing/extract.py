"""Cuts named functions, with all they need from their file, out of upstream's source."""

from __future__ import annotations

import ast
import builtins
import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from loudmerge.canary.code.syntax import FUNCTIONS, Module, binds, dotted, parse
from loudmerge.canary.probing.doubts import NOTHING, Known, covered, replaced


class Gone(Exception):
    """A function, class or method that was asked for is not in the file, or not what its name stands for."""


@dataclass(frozen=True)
class Extract:
    """`code` defines the names asked for; `stubs` are names it takes from libraries that are absent."""

    code: str
    stubs: tuple[str, ...]


class _Asked(ast.NodeTransformer):
    """`X is None` as `X == None`, where X is a stand-in: which it is, is tried both ways."""

    def __init__(self, stubs: AbstractSet[str]) -> None:
        self.stubs = stubs

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        of_stub = dotted(node.left).partition(".")[0] in self.stubs
        if of_stub and len(node.ops) == 1 and isinstance(node.comparators[0], ast.Constant):
            same = {ast.Is: ast.Eq, ast.IsNot: ast.NotEq}
            node.ops = [same.get(type(one), type(one))() for one in node.ops]
        return node


class _Bare(ast.NodeTransformer):
    """Drops annotations, which would ask for names that the probe does not need."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815 (ast's own name)


def extract(
    text: str,
    path: str,
    names: Sequence[str],
    libraries: Sequence[str] = (),
    *,
    prelude: str = "",
    known: Known = NOTHING,
) -> Extract:
    """The program that defines `names` (`f`, `Class`, `Class.f`). Raises Gone where one is missing.

    prelude: what is run before it, so that the names which that binds are no stand-ins.
    """
    module = parse(text, path)
    wanted = _methods(names)
    defined: dict[str, list[ast.stmt]] = {}
    for unit in module.tree.body:
        for name in _names(unit):
            defined.setdefault(name, []).append(unit)
    stubs: set[str] = set()
    todo, units = list(wanted), {}
    while todo:
        name = todo.pop()
        found = defined.get(name, [])
        if not found and name in wanted:
            raise Gone(f"{path} defines no {name}")
        if problem := replaced(module, name, wanted.get(name, ()), asked=name in wanted):
            raise Gone(problem)
        for unit in found:
            if id(unit) in units:
                continue
            if _foreign(unit, libraries):
                stubs |= binds(unit)
                continue
            kept = _Bare().visit(_pruned(copy.deepcopy(unit), wanted, module))
            units[id(unit)] = kept
            todo += [free for free in _free(kept) if not hasattr(builtins, free)]
    absent = stubs - _bound(prelude)
    _sure(module, units.values(), absent, known)
    ordered = [_Asked(absent).visit(units[id(unit)]) for unit in module.tree.body if id(unit) in units]
    code = ast.unparse(ast.fix_missing_locations(ast.Module(ordered, [])))
    return Extract("from __future__ import annotations\n" + code, tuple(sorted(stubs)))


def _sure(module: Module, units: Iterable[ast.stmt], absent: AbstractSet[str], known: Known) -> None:
    for unit in units:
        if problem := covered(module, unit, absent, known):
            raise Gone(problem)


def _bound(prelude: str) -> AbstractSet[str]:
    return frozenset().union(*(binds(node) for node in parse(prelude, "prelude").tree.body))


def _methods(names: Sequence[str]) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = {}
    for name in names:
        owner, _, method = name.partition(".")
        wanted.setdefault(owner, set()).update({method} if method else set())
    return wanted


def _names(unit: ast.stmt) -> AbstractSet[str]:
    if isinstance(unit, ast.Expr) and isinstance(unit.value, ast.Call):
        return frozenset()
    return binds(unit) | _mutated(unit)


def _mutated(unit: ast.stmt) -> set[str]:
    """`X[...] = …` and `X.a = …` at the top of a file belong to X."""
    if not isinstance(unit, (ast.Assign, ast.AugAssign)):
        return set()
    found = unit.targets if isinstance(unit, ast.Assign) else [unit.target]
    bases = [one.value for one in found if isinstance(one, (ast.Subscript, ast.Attribute))]
    return {base.id for base in bases if isinstance(base, ast.Name)}


def _foreign(unit: ast.stmt, libraries: Sequence[str]) -> bool:
    """Whether a statement imports something that is neither Python's own nor one of `libraries`."""
    if isinstance(unit, ast.ImportFrom):
        roots = [(unit.module or "").partition(".")[0]] if not unit.level else [""]
    elif isinstance(unit, ast.Import):
        roots = [alias.name.partition(".")[0] for alias in unit.names]
    else:
        return False
    return any(root not in sys.stdlib_module_names and root not in libraries for root in roots)


def _pruned(unit: ast.stmt, wanted: dict[str, set[str]], module: Module) -> ast.stmt:
    """A class with only the methods asked for and those they call; its bases go, where methods were named."""
    if not isinstance(unit, ast.ClassDef) or not wanted.get(unit.name):
        return unit
    keep = _closure(unit, wanted[unit.name])
    missing = [name for name in wanted[unit.name] if module.member(unit, name) is None]
    if missing:
        raise Gone(f"class {unit.name} has no method {', '.join(sorted(missing))}")
    unit.bases = [base for base in unit.bases if isinstance(base, ast.Name) and base.id in wanted]
    unit.keywords = []
    unit.body = [node for node in unit.body if not isinstance(node, FUNCTIONS) or node.name in keep]
    unit.body = [node for node in unit.body if not isinstance(node, ast.AnnAssign) or node.value is not None]
    unit.body = unit.body or [ast.Pass()]
    return unit


def _closure(unit: ast.ClassDef, names: set[str]) -> set[str]:
    methods = {node.name: node for node in ast.walk(unit) if isinstance(node, FUNCTIONS)}
    aliases = {name: node for node in unit.body if isinstance(node, ast.Assign) for name in binds(node)}
    keep, todo = set(), list(names)
    while todo:
        name = todo.pop()
        node = methods.get(name) or aliases.get(name)
        if name in keep or node is None:
            continue
        keep.add(name)
        todo += [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
        todo += [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and name in aliases]
    return keep


def _free(node: ast.AST) -> Iterator[str]:
    """Every name that is read anywhere inside (a little more than what is free: harmless)."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
