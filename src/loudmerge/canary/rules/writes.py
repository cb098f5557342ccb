"""Whether what a rule takes as given is written anew before the place that acts on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from loudmerge.canary.code.constants import UNKNOWN
from loudmerge.canary.code.flow import Place, Scope, in_order
from loudmerge.canary.code.syntax import dotted, targets
from loudmerge.canary.code.values import evaluate, excluded
from loudmerge.canary.rules.kinds import calls

MUTATING = frozenset({"update", "clear", "pop", "popitem", "setdefault", "__setitem__", "__delitem__"})
"""What changes a dict."""

SETTING = frozenset({"setattr", "object.__setattr__"})
LEAVING = frozenset({"copy", "deepcopy", "replace"})
"""What gives back something with the same attributes, but for those that it is told."""

Step = tuple[Place, Place]


def overwritten(rule: Mapping[str, Any], function: Scope, place: Place) -> str:
    """What writes the rule's `given` facts before a place of the function is reached; empty for nothing.

    A rule names in `after` the call that makes the facts: then only what comes behind it counts, and what
    stands beside it in a loop, or in it: its next round undoes what the last one made. Counting up (`+=`) is
    how facts come about, and no write.
    """
    before: list[Step] = []
    for step in in_order(function, rule.get("depth", 2)):
        if step[1].node is place.node:
            break
        before.append(step)
    if "after" in rule:
        makers = [top for top, one in before if calls(one, rule["after"])]
        if not makers:
            return f"no call of {rule['after']} comes before it"
        before = _behind(makers[-1], before, place)
    for _, one in before:
        said = _written(one, rule.get("given", {}))
        if said and not excluded(one, rule["given"]):
            return f"line {one.line} writes {said} before it is reached"
    return ""


def late(rule: Mapping[str, Any], function: Scope, place: Place) -> str:
    """Why a call does not come before the one that the rule names in `before`; empty where it does."""
    steps = [one for _, one in in_order(function, rule.get("depth", 2))]
    at = next((number for number, one in enumerate(steps) if one.node is place.node), len(steps))
    if any(calls(one, rule["before"]) for one in steps[:at]):
        return f"it comes after a call of {rule['before']}"
    behind = any(calls(one, rule["before"]) for one in steps[at:])
    return "" if behind else f"no call of {rule['before']} comes after it"


def _behind(maker: Place, before: list[Step], place: Place) -> list[Step]:
    """The steps after a call, or in and after the outermost loop around it that the place is not in."""
    loop = next((one for one in maker.loops if one not in place.loops), None)
    first = next(
        number
        for number, (top, _) in enumerate(before)
        if top.node is maker.node or (loop is not None and loop in top.loops)
    )
    return [step for step in before[first:] if loop is not None or step[0].node is not maker.node]


def _written(place: Place, given: Mapping[str, Any]) -> str:
    """What of the facts a place sets to something else, or to what cannot be told; empty for nothing."""
    node = place.node
    for said, value in _attributes(node):
        new = evaluate(value, place.scope, given) if said in given else UNKNOWN
        if new is not UNKNOWN and new != given[said]:
            return said
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
        said = ast.unparse(node.func.value)
        return said if isinstance(given.get(said), Mapping) else ""
    if said := _made_anew(node, place, given):
        return said
    found = list(node.targets) if isinstance(node, ast.Delete) else []
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        found = list(targets(node))
    for target in found:
        said = ast.unparse(target)
        if said in given and _other(node, place.scope, given, given[said]):
            return said
        if isinstance(target, (ast.Subscript, ast.Attribute)) and _within(target, place, given):
            return said
    return ""


def _made_anew(node: ast.AST, place: Place, given: Mapping[str, Any]) -> str:
    """The fact about an attribute of what a call is given and gives back another of: `cfg = clean(cfg)`."""
    if not isinstance(node, ast.Assign) or not isinstance(call := node.value, ast.Call):
        return ""
    if dotted(call.func).rpartition(".")[2] in LEAVING:
        return ""
    passed = [*call.args, *(word.value for word in call.keywords)]
    passed += [call.func.value] if isinstance(call.func, ast.Attribute) else []
    made = {ast.unparse(one) for one in targets(node)} & {ast.unparse(one) for one in passed}
    new = evaluate(call, place.scope, given)
    for fact in given:
        owner, _, name = fact.rpartition(".")
        same = isinstance(new, Mapping) and new.get(name, UNKNOWN) == given[fact]
        if owner in made and not same:
            return fact
    return ""


def _object(node: ast.AST) -> str:
    """What `vars(a)` and `a.__dict__` are the attributes of; empty for anything else."""
    if isinstance(node, ast.Attribute) and node.attr == "__dict__":
        return ast.unparse(node.value)
    named = isinstance(node, ast.Call) and dotted(node.func) == "vars" and len(node.args) == 1
    return ast.unparse(node.args[0]) if named and isinstance(node, ast.Call) else ""


def _attributes(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The attributes that `setattr(a, "b", c)` and the like set, and `a = replace(a, b=c)` says."""
    if isinstance(node, ast.Assign):
        parts = [one for one in targets(node) if isinstance(one, ast.Subscript) and _object(one.value)]
        yield from ((f"{_object(one.value)}.{_text(one.slice)}", node.value) for one in parts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _object(node.func.value):
        owner = _object(node.func.value)
        yield from ((f"{owner}.{word.arg}", word.value) for word in node.keywords)
    if isinstance(node, ast.Call) and dotted(node.func) in SETTING and len(node.args) == 3:
        yield f"{ast.unparse(node.args[0])}.{_text(node.args[1])}", node.args[2]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        words = [word for word in node.value.keywords if word.arg]
        yield from ((f"{ast.unparse(one)}.{word.arg}", word.value) for one in node.targets for word in words)


def _text(node: ast.AST) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _within(target: ast.Subscript | ast.Attribute, place: Place, given: Mapping[str, Any]) -> bool:
    """Whether an item or attribute of what is given becomes anything but what is given."""
    held = given.get(ast.unparse(target.value))
    key = target.attr if isinstance(target, ast.Attribute) else evaluate(target.slice, place.scope, given)
    if not isinstance(held, Mapping) or (key is not UNKNOWN and key not in held):
        return False
    if isinstance(place.node, ast.AugAssign):
        return not isinstance(place.node.op, ast.Add)
    value = getattr(place.node, "value", None)
    return value is None or key is UNKNOWN or evaluate(value, place.scope, given) != held[key]


def _other(node: ast.AST, scope: Scope, given: Mapping[str, Any], held: Any) -> bool:
    """Whether a statement is known to bind anything but the value that is given."""
    value = getattr(node, "value", None)
    if value is None or isinstance(node, ast.AugAssign):
        return isinstance(node, ast.Delete)
    new = evaluate(value, scope, given)
    if new is UNKNOWN and isinstance(held, Mapping) and isinstance(node, ast.stmt):
        return any(isinstance(target, ast.Name) and _global(target.id, scope) for target in targets(node))
    return new is not UNKNOWN and new != held


def _global(name: str, scope: Scope) -> bool:
    """Whether a function says that a name is the file's: what it binds it to is no longer what was given."""
    found = (node for node in ast.walk(scope.function) if isinstance(node, ast.Global))
    return any(name in node.names for node in found)
