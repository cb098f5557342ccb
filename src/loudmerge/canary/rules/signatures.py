"""Which calls a function, or the constructor of a class, admits."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.rebinding import alternative, rebinding
from loudmerge.canary.code.syntax import FUNCTIONS, Function, Module, dotted, reachable
from loudmerge.canary.code.wrapping import origin, wrapping

READ = frozenset({"property", "cached_property", "setter"})
"""Decorators under which there is nothing left to call with these parameters."""
FIELDS = frozenset({"NamedTuple", "BaseModel"})
"""Bases of Python and pydantic that make a constructor of a class's annotations, as `dataclass` does."""
KEYWORD, EMPTY = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
NOTHING = inspect.Signature()


@dataclass(frozen=True)
class Takes:
    """What one function is called with, or why that cannot be told."""

    signature: inspect.Signature = NOTHING
    problem: str = ""
    passes: bool = False
    """Whether names that it does not have itself are fine where it has `**anything`."""


def signature_problem(rule: Mapping[str, Any], module: Module) -> tuple[str, int]:
    """(why a function, or a class's constructor, does not admit the call, line), or ("", line)."""
    name, known = str(rule["name"]), tuple(rule.get("decorators", ()))
    function = module.function(name)
    node = module.define(name) if function is None else function
    problem, line = alternative(module, name)
    if problem or (function is None and not isinstance(node, ast.ClassDef)):
        problem, line = (problem, line) if problem else rebinding(module, name)
        return problem or f"{name} is not defined where it is reached", line
    found = [_called(function, module, known, skip=0)] if function is not None else []
    if isinstance(function, ast.AsyncFunctionDef) and not rule.get("awaited"):
        found = [Takes(problem="it is async: say `awaited = true` in the rule if our call is awaited")]
    if isinstance(node, ast.ClassDef):
        found = list(_constructors(module, node, known))
    problems = (_refused(rule, one) for one in found)
    return next((one for one in problems if one), ""), getattr(node, "lineno", 0)


def _refused(rule: Mapping[str, Any], takes: Takes) -> str:
    """Why a function is not seen to admit what a rule asks; empty where it does."""
    name, found = rule["name"], takes.signature
    if takes.problem:
        return f"{name} is not seen to take these parameters: {takes.problem}"
    every = takes.passes and any(one.kind is one.VAR_KEYWORD for one in found.parameters.values())
    absent = [one for one in rule.get("accepts", ()) if one not in found.parameters and not every]
    if absent:
        return f"{name} has no parameter {', '.join(absent)}"
    if "call" not in rule:
        return ""
    call = parsed(str(rule["call"]), "eval").body
    try:
        found.bind(*call.args, **{word.arg: word.value for word in call.keywords})
    except TypeError as error:
        return f"{name}{found} does not admit {rule['call']}: {error}"
    return ""


def _called(function: Function, module: Module, known: tuple[str, ...], *, skip: int) -> Takes:
    """What a call of a function is given to, unless a decorator may take something else."""
    read = next((one for one in function.decorator_list if origin(one, module) in READ), None)
    problem = f"it is a {ast.unparse(read)} at line {read.lineno}" if read is not None else ""
    problem = problem or wrapping(module, function.decorator_list, known)
    return Takes(_signature(function, skip=skip), problem)


def _constructors(module: Module, owner: ast.ClassDef, known: tuple[str, ...]) -> Iterator[Takes]:
    """What a class is called with: its `__new__`, where it has one, and what else makes it."""
    marks = [one for one in owner.decorator_list if not _makes_fields(one, module)]
    yield Takes(_anything(), wrapping(module, marks, known), passes=True)
    yield _made(module, owner, known)
    for node in module.lineage(owner.name):
        new = module.member(node, "__new__")
        if new is not None:
            takes = _called(new, module, known, skip=1) if isinstance(new, FUNCTIONS) else _unread(new)
            yield Takes(takes.signature, takes.problem, passes=True)
            return


def _made(module: Module, owner: ast.ClassDef, known: tuple[str, ...]) -> Takes:
    """An `__init__`, or what makes one of annotations, of the first class in the line that has either."""
    for node in module.lineage(owner.name):
        if several := alternative(module, node.name)[0]:
            return Takes(problem=several)
        init = module.last(f"{node.name}.__init__") or module.member(node, "__init__")
        if isinstance(init, FUNCTIONS):
            return _called(init, module, known, skip=1)
        if init is not None:
            return _unread(init)
        if _has_fields(node, module):
            return Takes(inspect.Signature(list(_fields(module, node).values())))
    elsewhere = {base for node in module.lineage(owner.name) for base in _bases(node)} - {"object"}
    elsewhere -= {node.name for node in module.lineage(owner.name)}
    if elsewhere:
        return Takes(problem=f"its constructor is that of {', '.join(sorted(elsewhere))}, of another file")
    return Takes()


def _unread(node: ast.stmt) -> Takes:
    return Takes(problem=f"line {node.lineno} says `{ast.unparse(node).splitlines()[0]}`")


def _anything() -> inspect.Signature:
    kinds = {"args": inspect.Parameter.VAR_POSITIONAL, "kwargs": inspect.Parameter.VAR_KEYWORD}
    return inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds.items()])


def _bases(node: ast.ClassDef) -> list[str]:
    return [dotted(base).rpartition(".")[2] for base in node.bases]


def _makes_fields(decorator: ast.expr, module: Module) -> bool:
    """Whether a decorator is Python's `dataclass`, or one of a package by that name."""
    name = dotted(decorator.func if isinstance(decorator, ast.Call) else decorator)
    return origin(decorator, module) == "dataclass" and not module.defines(name.partition(".")[0])


def _has_fields(node: ast.ClassDef, module: Module) -> bool:
    """Whether a class's own annotations make its constructor."""
    marks = [one for one in node.decorator_list if _makes_fields(one, module)]
    words = [word for one in marks if isinstance(one, ast.Call) for word in one.keywords]
    said = [word.value for word in words if word.arg == "init"]
    kept = all(isinstance(value, ast.Constant) and value.value for value in said)
    return (bool(marks) and kept) or bool(FIELDS & set(_bases(node)))


def _fields(module: Module, node: ast.ClassDef) -> dict[str, inspect.Parameter]:
    """The fields of a class and of its bases in this file: as keywords, since other bases may have more."""
    found: dict[str, inspect.Parameter] = {}
    for owner in reversed(module.lineage(node.name)):
        marked = any(_makes_fields(one, module) for one in owner.decorator_list)
        if marked or FIELDS & set(_bases(owner)):
            made = (_field(one) for one in reachable(owner.body, module.constants))
            found.update({one.name: one for one in made if one is not None})
    return found


def _field(node: ast.stmt) -> inspect.Parameter | None:
    """What an annotation adds to the constructor; None for nothing."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return None
    if any(word in ast.unparse(node.annotation) for word in ("ClassVar", "KW_ONLY")):
        return None
    call = node.value if isinstance(node.value, ast.Call) else None
    made = call is not None and dotted(call.func).rpartition(".")[2] in {"field", "Field"}
    words = {word.arg: word.value for word in call.keywords} if call is not None and made else {}
    init = words.get("init")
    if isinstance(init, ast.Constant) and not init.value:
        return None
    filled = call is not None and (call.args or {"default", "default_factory"} & words.keys())
    required = node.value is None or (made and not filled)
    default = EMPTY if required else ...
    return inspect.Parameter(node.target.id, KEYWORD, default=default)


def _signature(function: Function, *, skip: int) -> inspect.Signature:
    args, made = function.args, []
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for place, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = (
            inspect.Parameter.POSITIONAL_ONLY
            if place < len(args.posonlyargs)
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        made.append(
            inspect.Parameter(arg.arg, kind, default=inspect.Parameter.empty if default is None else ...)
        )
    made = made[skip:]
    if args.vararg:
        made.append(inspect.Parameter(args.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        default_value = inspect.Parameter.empty if value is None else ...
        made.append(inspect.Parameter(arg.arg, inspect.Parameter.KEYWORD_ONLY, default=default_value))
    if args.kwarg:
        made.append(inspect.Parameter(args.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(made)
