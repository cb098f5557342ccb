"""The parts of the rules: what a call, an exception, a symbol and a signature look like in source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loudmerge.canary.code.constants import UNKNOWN
from loudmerge.canary.code.flow import Place, Scope, alias, places
from loudmerge.canary.code.nodes import Import
from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.rebinding import alternative
from loudmerge.canary.code.syntax import (
    FUNCTIONS,
    Module,
    binds,
    binds_anything,
    dotted,
    imported,
    is_hollow,
    local_assignments,
    mentions,
    own_statements,
    parameters,
    reachable,
    targets,
)
from loudmerge.canary.code.values import evaluate, possible

LOOKING = frozenset({"hasattr", "getattr", "setattr", "isinstance", "callable", "id"})
"""What is given a function and does not call it."""
SPOKEN = frozenset({"print", "warning", "warn", "info", "debug", "error", "log", "warning_once"})


def scope_of(module: Module, rule: Mapping[str, Any]) -> Scope | None:
    """The scope of a rule's `function` or `Class.method`; None where the file does not define it."""
    function = module.function(rule["function"])
    owner = rule["function"].rpartition(".")[0]
    known = tuple(rule.get("decorators", ()))
    return None if function is None else Scope(module, function, owner, known=known)


def call_matches(call: ast.Call, callee: str, scope: Scope) -> bool:
    """Whether a call is to `callee`: the same dotted name or its end, through local and import aliases."""
    name = dotted(call.func)
    if isinstance(call.func, ast.Attribute) and not name.partition(".")[2]:
        name = call.func.attr
    if isinstance(call.func, ast.Name) and _shadowed(name, callee, scope):
        return False
    if _ends(name, callee):
        return True
    if isinstance(call.func, ast.Name):
        return _ends(alias(name, scope), callee) or any(
            _ends(imported(node).get(name, ""), callee) for node in (scope.function, scope.module.tree)
        )
    return False


def calls(place: Place, callee: str) -> bool:
    """Whether a place is a call of `callee`."""
    return isinstance(place.node, ast.Call) and call_matches(place.node, callee, place.scope)


def dropped_result(place: Place) -> str:
    """Why what a call gives is not used; empty where it may be."""
    for node in own_statements(place.scope.function.body):
        if getattr(node, "value", None) is not place.node:
            continue
        if isinstance(node, ast.Expr):
            return "its result is dropped"
        names = {one.id if isinstance(one, ast.Name) else "" for one in targets(node)}
        parts = (one for one in ast.walk(place.scope.function) if isinstance(one, ast.Name))
        read = {one.id for one in parts if isinstance(one.ctx, ast.Load)}
        if names and "" not in names and not names & read:
            return f"its result is never read: {', '.join(sorted(names))}"
    return ""


def handed_on(callee: str, reached: Sequence[Place], calls: Sequence[Place]) -> Iterator[Place]:
    """Where `callee` is left to others to call, who may keep its errors.

    That is a call that is none of `calls`, as in a lambda, and one of what the file does not define (an
    executor) that is passed it. reached: every place that is read.
    """
    called = {id(place.node) for place in calls}
    for scope in {id(place.scope.function): place.scope for place in reached}.values():
        for node in ast.walk(scope.function):
            if not isinstance(node, ast.Call) or id(node) in called:
                continue
            name = dotted(node.func)
            own = name in LOOKING or scope.module.function(name) is not None
            passed = [] if own else [*node.args, *(word.value for word in node.keywords)]
            if any(_ends(dotted(one), callee) for one in (node.func, *passed)):
                yield Place(node, scope)


def _shadowed(name: str, callee: str, scope: Scope) -> bool:
    """Whether a function has something of its own by this name: a parameter, or what the callee is not in."""
    if name in parameters(scope.function):
        return not any(name == one for one, _, _ in scope.given)
    bound = [node for node, _ in local_assignments(scope.function, name)]
    own = [node for node in bound if not isinstance(node, (*FUNCTIONS, ast.Import, ast.ImportFrom))]
    return any(callee.rpartition(".")[2] not in _made_of(node) for node in own)


def _made_of(node: ast.stmt) -> frozenset[str]:
    """What is mentioned in what a statement binds a name to."""
    parts = [getattr(node, "value", None), getattr(node, "iter", None)]
    parts += [item.context_expr for item in getattr(node, "items", ())]
    return frozenset().union(*(mentions(part) for part in parts if isinstance(part, ast.AST)))


def _ends(name: str, callee: str) -> bool:
    return name == callee or name.endswith(f".{callee}")


def keyword_problem(rule: Mapping[str, Any], place: Place) -> str:
    """What a call lacks of the rule's `args` (names it must mention) and `keywords` (with their values)."""
    call = place.node
    if not isinstance(call, ast.Call):
        return "it is no call"
    said: set[str] = set()
    for value in [*call.args, *(word.value for word in call.keywords)]:
        said |= mentions(value)
        for part in ast.walk(value):
            if isinstance(part, ast.Name):
                for node, _ in local_assignments(place.scope.function, part.id):
                    said |= mentions(node)
    absent = set(rule.get("args", ())) - said
    if absent:
        return f"it is not passed {', '.join(sorted(absent))}"
    words = {word.arg: word.value for word in call.keywords}
    for name, wanted in rule.get("keywords", {}).items():
        passed = evaluate(words[name], place.scope, {}) if name in words else UNKNOWN
        if passed is UNKNOWN or passed != wanted:
            return f"it does not pass {name}={wanted!r}"
    return ""


def exception_of(place: Place) -> str:
    """The class that a raise raises, through a local name or a helper that makes it; empty for no raise."""
    node = place.node
    if isinstance(node, ast.Assert):
        return "AssertionError"
    if not isinstance(node, ast.Raise) or node.exc is None:
        return ""
    return _class_of(node.exc, place.scope, 4)


def _class_of(node: ast.expr, scope: Scope, depth: int) -> str:
    if depth <= 0:
        return ""
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        helper = scope.module.function(name) if "." not in name else None
        if helper is None:
            return _class_of(node.func, scope, depth - 1)
        made = [
            one.value for one in ast.walk(helper) if isinstance(one, ast.Return) and one.value is not None
        ]
        return _class_of(made[0], Scope(scope.module, helper), depth - 1) if made else ""
    if isinstance(node, ast.Name):
        bound = local_assignments(scope.function, node.id)
        if node.id in parameters(scope.function):
            return ""
        value = getattr(bound[0][0], "value", None) if len(bound) == 1 else None
        return _class_of(value, scope, depth - 1) if isinstance(value, ast.expr) else node.id
    return dotted(node)


def does_something(place: Place, does: Sequence[str]) -> str:
    """Why a governed place is no act; `does` narrows it to raise, return, assign:NAME, call:NAME or NAME."""
    node = place.node
    acts = _acts(node)
    if not does:
        idle = isinstance(node, (ast.Pass, ast.Expr)) or (isinstance(node, ast.Call) and not acts)
        return "it only speaks" if idle or not acts else ""
    return "" if acts & {*does, *(f"call:{name}" for name in does)} else f"it does not do {', '.join(does)}"


def _acts(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Raise):
        return {"raise"}
    if isinstance(node, ast.Return):
        return {"return"}
    if isinstance(node, (ast.Break, ast.Continue)):
        return {"leave"}
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        return (
            set()
            if name.rpartition(".")[2] in SPOKEN
            else {f"call:{name}", f"call:{name.rpartition('.')[2]}"}
        )
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        found = node.targets if isinstance(node, ast.Assign) else [node.target]
        flat = [
            one for target in found for one in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
        return (
            {"assign"}
            | {f"assign:{dotted(one)}" for one in flat}
            | {f"assign:{dotted(one).rpartition('.')[2]}" for one in flat}
        )
    return set()


def symbol_problem(rule: Mapping[str, Any], module: Module) -> tuple[str, int]:
    """(why a symbol is not there as the rule says, line), or ("", line)."""
    name = str(rule["name"])
    owner, _, member = name.rpartition(".")
    several = module.alternatives(owner or name)
    if len(several) < 2:
        node = module.define(name) if not owner else _member(module, owner, member)
        return _defined_problem(rule, module, node)
    if owner:
        return alternative(module, name)
    found = [_defined_problem(rule, module, node) for node in several]
    return next((one for one in found if one[0]), found[0])


def _defined_problem(rule: Mapping[str, Any], module: Module, node: ast.stmt | None) -> tuple[str, int]:
    """The same for one of the statements that may define the symbol."""
    name = str(rule["name"])
    owner = name.rpartition(".")[0]
    if node is None:
        return f"{name} is not defined where it is reached", 0
    if binds_anything(node):
        return f"{name} may be bound anew at line {node.lineno}: {ast.unparse(node)}", node.lineno
    kind = rule.get("type")
    is_function, is_class = isinstance(node, FUNCTIONS), isinstance(node, ast.ClassDef)
    fits = {
        "function": is_function,
        "method": is_function,
        "class": is_class,
        "variable": not is_function and not is_class,
    }
    if kind and not fits[kind] and not isinstance(node, Import):
        return f"{name} is no {kind} at line {node.lineno}", node.lineno
    if isinstance(node, FUNCTIONS) and idle(Scope(module, node, owner)):
        return f"{name} does nothing", node.lineno
    return _content_problem(rule, module, node)


def idle(scope: Scope) -> bool:
    """Whether nothing that a function does has an effect or a result, or all it does is to raise."""
    if is_hollow(scope.function.body):
        return True
    if any(isinstance(place.node, ast.Raise) and not _turned(place) for place in places(scope, 0)):
        return True
    return not any(_effect(place.node) for place in places(scope, 0))


def _turned(place: Place) -> bool:
    """Whether control may pass by a place: under a condition, or inside a `try`."""
    return bool(place.conditions or place.tries or place.managers)


def _effect(node: ast.AST) -> bool:
    if isinstance(node, ast.Return):
        return node.value is not None and not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Raise):
        return "NotImplementedError" not in mentions(node)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        found = node.targets if isinstance(node, ast.Assign) else [node.target]
        return not isinstance(node.value, ast.Constant) or not all(isinstance(one, ast.Name) for one in found)
    return isinstance(node, (ast.Call, ast.AugAssign, ast.Delete, ast.Assert))


def _member(module: Module, owner: str, member: str) -> ast.stmt | None:
    for node in module.lineage(owner):
        found = module.member(node, member)
        if found is not None:
            return found
        for method in node.body:
            if isinstance(method, FUNCTIONS) and method.name == "__init__":
                for statement in ast.walk(method):
                    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and f"self.{member}" in _targets(
                        statement
                    ):
                        return statement
    return None


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    return [dotted(one) for one in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def _content_problem(rule: Mapping[str, Any], module: Module, node: ast.stmt) -> tuple[str, int]:
    name, line = rule["name"], node.lineno
    value = getattr(node, "value", None)
    scope = Scope(module, parsed("def top(): pass").body[0])
    if "value" in rule:
        known = evaluate(value, scope, {}) if isinstance(value, ast.expr) else UNKNOWN
        if known is UNKNOWN or known != rule["value"]:
            return f"{name} is {known!r}, expected {rule['value']!r}", line
    if "keys" in rule:
        keys = _keys(value, scope) if isinstance(value, ast.expr) else []
        absent = [key for key in rule["keys"] if key not in keys]
        if absent:
            return f"{name} has no key {', '.join(map(repr, absent))}", line
    if "contains" in rule:
        held = possible(value, scope, None, 6) if isinstance(value, ast.expr) else set()
        held |= mentions(value) if isinstance(value, ast.expr) else set()
        absent = [one for one in rule["contains"] if one not in held]
        if absent:
            return f"{name} does not hold {', '.join(map(repr, absent))}", line
    owners = module.lineage(name) if isinstance(node, ast.ClassDef) else []
    members = {one for owner in owners for one in _members(owner, module)}
    absent = [one for one in rule.get("members", ()) if one not in members]
    return (f"{name} has no {', '.join(absent)}", line) if absent else ("", line)


def _keys(value: ast.expr, scope: Scope) -> list[Any]:
    """The keys of a dict, whatever its values are."""
    if isinstance(value, ast.Dict):
        return [one.value for one in value.keys if isinstance(one, ast.Constant)]
    known = evaluate(value, scope, {})
    return list(known) if isinstance(known, Mapping) else []


def _members(owner: ast.ClassDef, module: Module) -> set[str]:
    """The names a class binds itself, methods that do nothing left out, and those its methods set on self."""
    found: set[str] = set()
    for node in reachable(owner.body, module.constants):
        if not (isinstance(node, FUNCTIONS) and is_hollow(node.body)):
            found |= binds(node)
    for node in owner.body:
        if isinstance(node, FUNCTIONS) and not is_hollow(node.body):
            stores = (
                one
                for one in ast.walk(node)
                if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
            )
            found |= {one.attr for one in stores if dotted(one.value) == "self"}
    return found
