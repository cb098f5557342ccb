"""Which fields each kind of rule has, and of which type."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from loudmerge.canary.code.pieces import parsed
from loudmerge.canary.code.syntax import RuleError, dotted

_PLACE: Mapping[str, tuple[type, bool]] = {
    "mentions": (list, False),
    "given": (dict, False),
    "otherwise": (dict, False),
    "always": (bool, False),
    "depth": (int, False),
    "after": (str, False),
}
_BODY: Mapping[str, tuple[type, bool]] = {"function": (str, True), "decorators": (list, False)}
FIELDS: Mapping[str, Mapping[str, tuple[type, bool]]] = {
    "symbol": {
        "name": (str, True),
        "type": (str, False),
        "keys": (list, False),
        "members": (list, False),
        "value": (object, False),
        "contains": (list, False),
    },
    "returns": {**_BODY, "values": (list, True), "position": (int, False)},
    "calls": {
        **_BODY,
        "callee": (str, True),
        "args": (list, False),
        "keywords": (dict, False),
        "lets_out": (list, False),
        "before": (str, False),
        "used": (bool, False),
        "managers": (list, False),
        **_PLACE,
    },
    "raises": {
        **_BODY,
        "exception": (str, True),
        "handles": (str, False),
        "managers": (list, False),
        **_PLACE,
    },
    "branch": {**_BODY, "does": (list, False), **_PLACE, "mentions": (list, True)},
    "bounded-walk": {**_BODY, "follows": (str, True), "limit": (int, False)},
    "signature": {
        "name": (str, True),
        "accepts": (list, False),
        "call": (str, False),
        "decorators": (list, False),
        "awaited": (bool, False),
    },
    "tests": {
        "names": (list, True),
        "uses": (list, False),
        "awaited": (bool, False),
        "decorators": (list, False),
    },
    "fingerprint": {**_BODY, "known": (list, True), "focus": (list, False)},
    "probe": {
        "extract": (list, True),
        "cases": (list, True),
        "setup": (str, False),
        "prelude": (str, False),
        "libraries": (list, False),
        "decorators": (list, False),
        "managers": (list, False),
        "cpu_s": (int, False),
        "memory_bytes": (int, False),
    },
    "all": {"rules": (list, True)},
    "any": {"rules": (list, True)},
}
TEXTS = frozenset(
    {
        *("decorators", "args", "lets_out", "managers", "mentions", "does", "accepts", "members"),
        *("names", "uses", "known", "focus", "extract", "libraries"),
    }
)
"""The lists that hold texts."""
PLAIN = frozenset({"keys", "contains", "values"})
CASES = ({"call", "equals"}, {"call", "raises"}, {"call", "none"})
TYPES = frozenset({"function", "class", "variable", "method"})


def validate(rule: Mapping[str, Any]) -> None:
    """Raises RuleError naming the field that is unknown, missing, empty or of the wrong type."""
    kind = rule.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise RuleError(f"rule.kind is {kind!r}; it must be one of {', '.join(FIELDS)}")
    fields = FIELDS[kind]
    for name in rule.keys() - {"kind"}:
        if name not in fields:
            raise RuleError(f"a {kind} rule has no field {name!r}; it has {', '.join(fields)}")
    for name, (wanted, required) in fields.items():
        if name not in rule:
            if required:
                raise RuleError(f"a {kind} rule needs the field {name!r}")
            continue
        _field(kind, name, rule[name], wanted)
    _inside(kind, rule)


def _field(kind: str, name: str, value: Any, wanted: type) -> None:
    fits = (
        isinstance(value, Sequence) and not isinstance(value, str)
        if wanted is list
        else isinstance(value, wanted)
    )
    if wanted is dict:
        fits = isinstance(value, Mapping)
    if not fits or (wanted is int and isinstance(value, bool)):
        raise RuleError(f"{kind}.{name} is {value!r}, which is not a {wanted.__name__}")
    if not value and wanted in {str, list}:
        raise RuleError(f"{kind}.{name} is empty")
    for one in value if name in TEXTS | PLAIN else ():
        if name in TEXTS and not (isinstance(one, str) and one):
            raise RuleError(f"{kind}.{name} holds {one!r}, expected a text that is not empty")
        if isinstance(one, (Mapping, list)):
            raise RuleError(f"{kind}.{name} holds {one!r}, expected a text, a number or a truth value")


def _inside(kind: str, rule: Mapping[str, Any]) -> None:
    """What the types of the fields alone do not say."""
    if kind in {"all", "any"}:
        for one in rule["rules"]:
            if not isinstance(one, Mapping):
                raise RuleError(f"{kind}.rules holds {one!r}, which is not a rule")
            validate(one)
    if kind == "symbol" and rule.get("type", "function") not in TYPES:
        raise RuleError(f"symbol.type is {rule['type']!r}; it must be one of {', '.join(sorted(TYPES))}")
    if kind == "raises" and not _narrow(rule):
        fields = "`mentions`, `given`, `otherwise`, `handles` or `always`"
        raise RuleError(f"a raises rule needs {fields}: any other {rule['exception']} would do")
    if kind == "signature":
        _signature(rule)
    if kind == "probe":
        for case in rule["cases"]:
            if not isinstance(case, Mapping) or set(case) not in CASES:
                raise RuleError(
                    f"a probe's case is {{call, equals}}, {{call, raises}} or {{call, none}}, not {case!r}"
                )


def _signature(rule: Mapping[str, Any]) -> None:
    if "accepts" not in rule and "call" not in rule:
        raise RuleError("a signature rule needs `call`, or names in `accepts`")
    try:
        call = parsed(str(rule.get("call", "f()")), "eval").body
    except (SyntaxError, ValueError):
        call = None
    plain = (
        isinstance(call, ast.Call)
        and dotted(call.func) in {"f", rule["name"]}
        and not any(isinstance(one, ast.Starred) for one in call.args)
        and all(word.arg for word in call.keywords)
    )
    if not plain:
        said = f"signature.call is {rule['call']!r}"
        raise RuleError(f"{said}, not a call of f with plain arguments, as f(1, b=2)")


def _narrow(rule: Mapping[str, Any]) -> bool:
    """Whether a rule says which of the raises of one exception it means."""
    return "given" in rule or any(rule.get(name) for name in ("mentions", "otherwise", "handles", "always"))
