"""Code that several probes of a guard file have alike, said once: the table `[shared]` of the file.

    [shared]
    shapes = '''
    from types import SimpleNamespace
    def t(*shape):
        return SimpleNamespace(shape=shape)
    '''

    [guard.rule]
    kind = "probe"
    setup = { shared = "shapes" }

Code is a text and the reference a table, so that neither can be mistaken for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loudmerge.canary.code.syntax import RuleError

TABLE = "shared"
FIELDS = ("prelude", "setup")
"""A probe's fields that may refer to it."""


def problems(texts: Any) -> list[str]:
    """What is wrong with the table itself; empty when nothing is."""
    if not isinstance(texts, dict):
        return [f"{TABLE}: found {texts!r}, expected a table of named texts"]
    return [
        f"{TABLE}.{name}: found {text!r}, expected a text that is not empty"
        for name, text in texts.items()
        if not isinstance(text, str) or not text.strip()
    ]


def unused(texts: Mapping[str, str], rules: Iterable[Any]) -> list[str]:
    """The names that no probe of the file takes: code that nobody runs."""
    taken = [name for rule in rules for name in _names(rule)]
    return [f"{TABLE}.{name}: no probe takes it, remove it" for name in texts if name not in taken]


def _names(rule: Any) -> Iterator[str]:
    for probe in _probes(rule):
        yield from (probe[field][TABLE] for field in FIELDS if isinstance(probe.get(field), dict))


def _probes(rule: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if rule["kind"] == "probe":
        yield rule
    for one in rule.get("rules", ()):
        yield from _probes(one)


def filled(rule: Any, texts: Mapping[str, str]) -> Any:
    """The rule, and those in an `all` or `any`, with the texts in the place of their names.

    Raises RuleError for a name that the table has not. What is no rule at all is given back as it is.
    """
    if not isinstance(rule, dict):
        return rule
    found = dict(rule)
    if isinstance(rule.get("rules"), list):
        found["rules"] = [filled(one, texts) for one in rule["rules"]]
    if rule.get("kind") == "probe":
        references = {field: rule[field] for field in FIELDS if isinstance(rule.get(field), dict)}
        found |= {field: _text(field, reference, texts) for field, reference in references.items()}
    return found


def _text(field: str, reference: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    name = reference.get(TABLE)
    if set(reference) != {TABLE} or not isinstance(name, str):
        raise RuleError(f'probe.{field} is {dict(reference)!r}; it must be code, or {{ {TABLE} = "NAME" }}')
    if name not in texts:
        raise RuleError(f"probe.{field}: [{TABLE}] has no {name!r}; it has {', '.join(texts) or 'nothing'}")
    return texts[name]
