"""What an expression can be: its value under given facts, and the set of values a function can return."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from loudmerge.canary.code.constants import UNKNOWN, compare
from loudmerge.canary.code.exits import LOOPS
from loudmerge.canary.code.flow import Condition, Place, Scope, alias, callee, places, within
from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.syntax import Module, dotted, local_assignments, local_bindings, parameters

DEPTH = 12
"""How many names, calls and operators deep an expression is followed."""

COPIES = frozenset({"copy", "deepcopy"})
EMPTY = frozenset({"list", "tuple", "set", "frozenset"})
"""What makes something empty where it is called with nothing."""


def evaluate(node: ast.expr, scope: Scope, given: Mapping[str, Any], depth: int = DEPTH) -> Any:
    """The value of an expression where `given` (text -> value) and the code settle it, else UNKNOWN."""
    if depth <= 0:
        return UNKNOWN
    if given and (fact := _fact(node, scope, given)):
        return given[fact]
    handler = _EVALUATORS.get(type(node))
    return UNKNOWN if handler is None else handler(node, scope, given, depth - 1)


def _fact(node: ast.expr, scope: Scope, given: Mapping[str, Any]) -> str:
    """The fact about an expression: its text, or for a call `NAME()`, whatever is passed; empty for none."""
    text = _spelled(node, scope)
    if text in given or not isinstance(node, ast.Call):
        return text if text in given else ""
    name = alias(dotted(node.func), scope)
    calls = [one for one in given if one.endswith("()")]
    return next((one for one in calls if f".{name}".endswith(f".{one[:-2]}")), "")


class _Words(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, words: Mapping[str, ast.expr]) -> None:
        self.words = words

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.words.get(node.id, node)


def _spelled(node: ast.expr, scope: Scope) -> str:
    """The text of an expression in the words of the rule's function; empty where a helper's own say it."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if scope.inner else set()
    own = names & {*parameters(scope.function), *local_bindings(scope.function)}
    if not own:
        return said(node)
    words: dict[str, ast.expr] = {}
    for name, value, outer in scope.given:
        text = _spelled(value, outer) if name in own else ""
        if text:
            words[name] = parsed(text, "eval").body
    return said(_Words(words).visit(copy.deepcopy(node))) if own == words.keys() else ""


@lru_cache(maxsize=16384)
def said(node: ast.expr) -> str:
    """An expression's text."""
    return ast.unparse(node)


def _name(node: ast.Name, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    for name, value, outer in scope.given:
        if name == node.id:
            return evaluate(value, outer, given, depth)
    bound = local_assignments(scope.function, node.id)
    if node.id in parameters(scope.function):
        return UNKNOWN
    if bound:
        first = _assigned(*bound[0], scope, given, depth)
        same = first is not UNKNOWN and all(
            _adds_nothing(one, scope, given, depth) or _assigned(one, place, scope, given, depth) == first
            for one, place in bound[1:]
        )
        return first if same else UNKNOWN
    if node.id in scope.module.constants:
        return scope.module.constants[node.id]
    assigned = scope.module.value(node.id)
    return UNKNOWN if assigned is None else evaluate(assigned, scope, given, depth)


def _assigned(node: ast.stmt, place: int | None, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return UNKNOWN
    value = evaluate(node.value, scope, given, depth)
    if place is None or value is UNKNOWN:
        return value
    return value[place] if isinstance(value, (list, tuple)) and place < len(value) else UNKNOWN


def _adds_nothing(node: ast.stmt, scope: Scope, given: Mapping[str, Any], depth: int) -> bool:
    """Whether a statement adds 0 to what it binds, however often a loop runs it."""
    if not isinstance(node, ast.AugAssign) or not isinstance(node.op, ast.Add):
        return False
    value = evaluate(node.value, scope, given, depth)
    return type(value) is int and value == 0


def _subscript(node: ast.Subscript, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    value, key = evaluate(node.value, scope, given, depth), evaluate(node.slice, scope, given, depth)
    if value is UNKNOWN or key is UNKNOWN:
        return UNKNOWN
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return UNKNOWN


def _attribute(node: ast.Attribute, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    value = evaluate(node.value, scope, given, depth)
    return value.get(node.attr, UNKNOWN) if isinstance(value, Mapping) else UNKNOWN


def _bool(node: ast.BoolOp, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    stops = isinstance(node.op, ast.Or)
    values = [evaluate(value, scope, given, depth) for value in node.values]
    known = [value for value in values if value is not UNKNOWN]
    decisive = [value for value in known if bool(value) is stops]
    if decisive:
        return decisive[0] if len(known) == len(values) else stops
    return UNKNOWN if len(known) < len(values) else known[-1]


def _unary(node: ast.UnaryOp, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    value = evaluate(node.operand, scope, given, depth)
    if value is UNKNOWN:
        return UNKNOWN
    if isinstance(node.op, ast.Not):
        return not value
    return -value if isinstance(node.op, ast.USub) and isinstance(value, (int, float)) else UNKNOWN


def _compare(node: ast.Compare, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    values = [evaluate(value, scope, given, depth) for value in (node.left, *node.comparators)]
    results = [
        UNKNOWN if left is UNKNOWN or right is UNKNOWN else compare(op, left, right)
        for op, left, right in zip(node.ops, values, values[1:], strict=False)
    ]
    if any(result is not UNKNOWN and not result for result in results):
        return False
    return UNKNOWN if any(result is UNKNOWN for result in results) else True


def _ifexp(node: ast.IfExp, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    test = evaluate(node.test, scope, given, depth)
    if test is UNKNOWN:
        return UNKNOWN
    return evaluate(node.body if test else node.orelse, scope, given, depth)


def _binop(node: ast.BinOp, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    left, right = evaluate(node.left, scope, given, depth), evaluate(node.right, scope, given, depth)
    if not all(isinstance(value, (int, float)) for value in (left, right)):
        return UNKNOWN
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else UNKNOWN


def _sequence(
    node: ast.Tuple | ast.List | ast.Set, scope: Scope, given: Mapping[str, Any], depth: int
) -> Any:
    values = [evaluate(value, scope, given, depth) for value in node.elts]
    return UNKNOWN if any(value is UNKNOWN for value in values) else values


def _dict(node: ast.Dict, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    if any(key is None for key in node.keys):
        return UNKNOWN
    keys = [evaluate(key, scope, given, depth) for key in node.keys if key is not None]
    values = [evaluate(value, scope, given, depth) for value in node.values]
    return UNKNOWN if any(one is UNKNOWN for one in keys) else dict(zip(keys, values, strict=False))


def _call(  # noqa: PLR0911 - one for each kind
    node: ast.Call, scope: Scope, given: Mapping[str, Any], depth: int
) -> Any:
    name = dotted(node.func)
    if name in scope.module.bindings:
        return _returned(node, scope, given, depth)
    if name == "dict" or name.rpartition(".")[2] in COPIES:
        return _copied(node, scope, given, depth)
    if name in EMPTY | {"range"} and not node.keywords:
        return _filled(node, name, scope, given, depth)
    kind = {"int": int, "bool": bool, "len": len, "float": float, "str": str}.get(name)
    gets = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and bool(node.args)
    named = name == "getattr" and len(node.args) >= 2
    if not (gets or named or (kind is not None and len(node.args) == 1)):
        return _returned(node, scope, given, depth)
    args = [evaluate(value, scope, given, depth) for value in node.args]
    if kind is not None:
        return UNKNOWN if args[0] is UNKNOWN else _convert(kind, args[0])
    if isinstance(node.func, ast.Attribute) and gets:
        value = evaluate(node.func.value, scope, given, depth)
        if isinstance(value, Mapping) and args[0] is not UNKNOWN:
            return value.get(args[0], args[1] if len(args) > 1 else None)
        return UNKNOWN
    if isinstance(args[1], str) and args[1].isidentifier():
        return evaluate(ast.Attribute(node.args[0], args[1], ast.Load()), scope, given, depth)
    return _returned(node, scope, given, depth)


def _copied(node: ast.Call, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    """What dict(...), copy(...), deepcopy(...) and X.copy() give."""
    of = [node.func.value] if isinstance(node.func, ast.Attribute) and not node.args else node.args
    start = evaluate(of[0], scope, given, depth) if len(of) == 1 else UNKNOWN if of else {}
    words = {word.arg: evaluate(word.value, scope, given, depth) for word in node.keywords}
    if not node.keywords or None in words or UNKNOWN in words.values():
        return start if not node.keywords else UNKNOWN
    return {**start, **words} if isinstance(start, Mapping) else UNKNOWN


def _filled(node: ast.Call, name: str, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    """What range(...), or list() and its like of nothing, run over."""
    values = [evaluate(value, scope, given, depth) for value in node.args]
    if name != "range":
        return UNKNOWN if values else []
    return range(*values) if values and all(type(one) is int for one in values) else UNKNOWN


def _convert(kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        return UNKNOWN


def _returned(node: ast.Call, scope: Scope, given: Mapping[str, Any], depth: int) -> Any:
    """The value of a call to a function of the same file that returns one expression."""
    function, owner, skip = callee(node, scope, {})
    if function is None or depth <= 2:
        return UNKNOWN
    inner = within(node, scope, function, owner, skip)
    found = [
        one.node.value for one in places(inner, 0) if isinstance(one.node, ast.Return) and one.node.value
    ]
    return evaluate(found[0], inner, given, depth - 2) if len(found) == 1 else UNKNOWN


def _comprehension(
    node: ast.ListComp | ast.SetComp | ast.GeneratorExp, scope: Scope, given: Mapping[str, Any], depth: int
) -> Any:
    over = [evaluate(one.iter, scope, given, depth) for one in node.generators]
    return [] if any(value is not UNKNOWN and not value for value in over) else UNKNOWN


_EVALUATORS: Mapping[type, Any] = {
    ast.Constant: lambda node, *_: node.value,
    ast.Name: _name,
    ast.NamedExpr: lambda node, *rest: evaluate(node.value, *rest),
    ast.Subscript: _subscript,
    ast.Attribute: _attribute,
    ast.BoolOp: _bool,
    ast.UnaryOp: _unary,
    ast.Compare: _compare,
    ast.IfExp: _ifexp,
    ast.BinOp: _binop,
    ast.Tuple: _sequence,
    ast.List: _sequence,
    ast.Set: _sequence,
    ast.Dict: _dict,
    ast.Call: _call,
    ast.ListComp: _comprehension,
    ast.SetComp: _comprehension,
    ast.GeneratorExp: _comprehension,
}


def outcome(condition: Condition, given: Mapping[str, Any]) -> bool | None:
    """Whether a condition is met under the given facts; None where they do not settle it."""
    test = condition.test
    written = test.elts if condition.how == LOOPS and isinstance(test, (ast.Tuple, ast.List)) else []
    if any(not isinstance(one, ast.Starred) for one in written):
        return condition.wanted
    value = evaluate(test, condition.scope, given)
    return None if value is UNKNOWN else bool(value) is condition.wanted


def excluded(place: Place, given: Mapping[str, Any]) -> bool:
    """Whether the given facts themselves keep a place from being reached."""
    return any(outcome(one, given) is False and told(one, given) for one in place.conditions)


def told(condition: Condition, given: Mapping[str, Any]) -> bool:
    """Whether any part of a condition is known by the facts, and not without them."""
    withheld = dict.fromkeys(given, UNKNOWN)
    return any(
        evaluate(part, condition.scope, given) is not UNKNOWN
        and evaluate(part, condition.scope, withheld) is UNKNOWN
        for part in ast.walk(condition.test)
        if isinstance(part, ast.expr)
    )


def returned_values(scope: Scope, position: int | None, depth: int = DEPTH) -> tuple[set[Any], int]:
    """The constants a function can return (at one place of a tuple), and the line of the first return."""
    found: set[Any] = set()
    line = 0
    for place in places(scope, 0):
        if isinstance(place.node, ast.Return) and place.node.value is not None:
            line = line or place.line
            found |= possible(place.node.value, scope, position, depth)
    return found, line


def possible(  # noqa: PLR0911 - one for each kind
    node: ast.expr, scope: Scope, position: int | None, depth: int
) -> set[Any]:
    """The constants an expression can be, through names, branches, dicts, tuples and calls."""
    if depth <= 0:
        return set()
    go = depth - 1
    if isinstance(node, ast.Constant):
        return {node.value} if position is None else set()
    if isinstance(node, (ast.Tuple, ast.List)):
        if position is not None:
            return possible(node.elts[position], scope, None, go) if position < len(node.elts) else set()
        return set().union(*(possible(one, scope, None, go) for one in node.elts)) if node.elts else set()
    if isinstance(node, ast.IfExp):
        truth = evaluate(node.test, scope, {})
        yes = possible(node.body, scope, position, go) if truth is UNKNOWN or truth else set()
        return yes | (possible(node.orelse, scope, position, go) if truth is UNKNOWN or not truth else set())
    if isinstance(node, ast.BoolOp):
        return set().union(*(possible(one, scope, position, go) for one in node.values))
    if isinstance(node, ast.Dict):
        return (
            set().union(*(possible(one, scope, position, go) for one in node.values))
            if node.values
            else set()
        )
    if isinstance(node, ast.Subscript):
        return possible(node.value, scope, position, go)
    if isinstance(node, ast.Name):
        return _possible_name(node, scope, position, go)
    return _possible_call(node, scope, position, go) if isinstance(node, ast.Call) else set()


def _possible_name(node: ast.Name, scope: Scope, position: int | None, depth: int) -> set[Any]:
    found: set[Any] = set()
    live = {id(place.node) for place in places(scope, 0)}
    bound = local_assignments(scope.function, node.id)
    for one, place in bound:
        value = getattr(one, "value", None)
        if id(one) in live and isinstance(value, ast.expr):
            found |= possible(value, scope, position if place is None else place, depth)
    if not bound:
        for one in scope.module.bindings.get(node.id, []):
            value = getattr(one, "value", None)
            found |= possible(value, scope, position, depth) if isinstance(value, ast.expr) else set()
    return found


def _is_tuple(name: str, module: Module) -> bool:
    """Whether a name is a tuple type of the file: `namedtuple(...)`, or a class that is a `NamedTuple`."""
    made, kind = module.value(name), module.define(name)
    called = dotted(made.func) if isinstance(made, ast.Call) else ""
    bases = kind.bases if isinstance(kind, ast.ClassDef) else []
    return any(
        one.rpartition(".")[2] in {"namedtuple", "NamedTuple"} for one in (called, *map(dotted, bases))
    )


def _possible_call(node: ast.Call, scope: Scope, position: int | None, depth: int) -> set[Any]:
    if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return possible(node.func.value, scope, position, depth)
    function, owner, _ = callee(node, scope, {})
    if function is None and position is not None and _is_tuple(dotted(node.func), scope.module):
        return possible(node.args[position], scope, None, depth) if position < len(node.args) else set()
    if function is None or function is scope.function:
        return set()
    return returned_values(Scope(scope.module, function, owner), position, depth)[0]
