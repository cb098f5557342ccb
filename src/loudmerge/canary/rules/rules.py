"""What a guard can assert of a source file: one function for each kind of rule.

    symbol        a name is defined, reachable and not hollow
    returns       a function can return given values
    calls         a call is made on a path that is reached
    raises        an exception is raised under a condition, neither dead nor swallowed
    branch        a condition is tested and what it governs does something
    bounded-walk  a loop along an attribute ends
    signature     a call, or given parameters, are admitted
    tests         tests exist, run and can fail
    fingerprint   a function does, statement for statement, what a known version did
    probe         a function, run on given inputs, gives given answers
    all, any      of several rules

A helper of the same file is read as part of the function that calls it, so that extracting one is no change.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loudmerge.canary.code.conditions import governing, unsettled
from loudmerge.canary.code.exits import LOOPS, RAISES
from loudmerge.canary.code.flow import Place, Scope, places, unread
from loudmerge.canary.code.rebinding import rebinding
from loudmerge.canary.code.swallow import doubtful, swallowed
from loudmerge.canary.code.syntax import Module, RuleError, parse
from loudmerge.canary.code.values import excluded, outcome, returned_values
from loudmerge.canary.code.wrapping import wrapped
from loudmerge.canary.probing.doubts import Known
from loudmerge.canary.probing.extract import Gone
from loudmerge.canary.probing.probe import Probe, mismatches, probe
from loudmerge.canary.rules import testing
from loudmerge.canary.rules.fingerprint import difference, digest, normal_form
from loudmerge.canary.rules.kinds import (
    calls,
    does_something,
    dropped_result,
    exception_of,
    handed_on,
    keyword_problem,
    scope_of,
    symbol_problem,
)
from loudmerge.canary.rules.schema import validate
from loudmerge.canary.rules.signatures import signature_problem
from loudmerge.canary.rules.surroundings import NOWHERE, Surroundings
from loudmerge.canary.rules.walks import again, bound, walks
from loudmerge.canary.rules.writes import late, overwritten
from loudmerge.errors import plural

__all__ = ["Finding", "RuleError", "check", "validate"]

Rule = Mapping[str, Any]
HANDED = "there others are left to call it, who may keep its errors"
UNRELATED = "no condition on"
"""How the problem of a place begins that the rule does not mean."""


@dataclass(frozen=True)
class Finding:
    """Whether a rule holds, why, and at which line of the file (0: at none)."""

    holds: bool
    detail: str
    line: int = 0


def check(rule: Rule, text: str, path: str, read: Callable[[str], str | None] = NOWHERE.read) -> Finding:
    """Evaluates a rule on a file's text. Raises RuleError where it cannot be evaluated.

    read: the text of another file of the source, None where there is none: a test has its conftest.py.
    """
    validate(rule)
    return _check(rule, parse(text, path), text, Surroundings(path, read))


def _check(rule: Rule, module: Module, text: str, around: Surroundings) -> Finding:
    kind = str(rule["kind"])
    if kind in {"all", "any"}:
        return _several(rule, module, text, around)
    if kind == "probe":
        return _probe(rule, text, around.path)
    try:
        if kind == "tests":
            return _tests(rule, module, around)
        return _unseen(rule, module) or _KINDS[kind](rule, module)
    except RecursionError as error:
        raise RuleError(f"{around.path}: nested too deeply to be read: {error}") from error


def _unseen(rule: Rule, module: Module) -> Finding | None:
    """That what a function does says nothing, as a call of it need not do it; None where it does."""
    scope = scope_of(module, rule) if "function" in rule else None
    problem = wrapped(module, scope.function, scope.known) if scope else ""
    line = scope.function.lineno if scope else 0
    return Finding(False, f"{rule['function']} is not seen to run: {problem}", line) if problem else None


def _several(rule: Rule, module: Module, text: str, around: Surroundings) -> Finding:
    every = rule["kind"] == "all"
    found: list[Finding] = []
    for one in rule["rules"]:
        finding = _check(one, module, text, around)
        found.append(finding)
        if finding.holds is not every:
            decided = finding.detail if every else "; then: ".join(item.detail for item in found)
            return Finding(finding.holds, decided, finding.line)
    return Finding(
        every, "; ".join(one.detail for one in found), found[-1].line if not every else found[0].line
    )


def _symbol(rule: Rule, module: Module) -> Finding:
    problem, line = symbol_problem(rule, module)
    return Finding(not problem, problem or f"{rule['name']} is defined", line)


def _returns(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    values, line = returned_values(scope, rule.get("position"))
    absent = [value for value in rule["values"] if not any(_equal(value, one) for one in values)]
    if absent:
        shown = ", ".join(sorted(map(repr, values))) or "nothing that can be read"
        return Finding(
            False,
            f"{rule['function']} cannot return {absent!r}; it returns {shown}",
            line or scope.function.lineno,
        )
    return Finding(True, f"{rule['function']} can return {list(rule['values'])!r}", line)


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _gone(rule: Rule, module: Module) -> Finding:
    problem, line = rebinding(module, rule["function"])
    return Finding(False, problem or f"there is no function {rule['function']} that is reached", line)


def _fits(rule: Rule, scope: Scope, place: Place) -> str:
    """Why a place is not under the condition the rule names; empty where it is."""
    absent = set(rule.get("mentions", ())) - governing(place) if rule.get("mentions") else set()
    if absent:
        return f"{UNRELATED} {', '.join(sorted(absent))} governs it"
    if empty := next(
        (one for one in place.conditions if one.how == LOOPS and outcome(one, {}) is False), None
    ):
        return f"the loop at line {empty.test.lineno} around it runs over nothing"
    if "given" in rule and (problem := _unproven(rule, scope, place)):
        return problem
    if "otherwise" in rule and not excluded(place, rule["otherwise"]):
        return f"it is reached, too, where {dict(rule['otherwise'])!r}"
    if rule.get("always") and (place.conditions or place.loops):
        return "it is not reached on every path"
    return ""


def _unproven(rule: Rule, scope: Scope, place: Place) -> str:
    """Why the given facts need not hold at a place, or need not lead to it; empty where they must."""
    against = unsettled(place, rule["given"], rule.get("mentions", ()))
    if against:
        advice = "add to the rule's `given` what decides it, if that may be taken for granted"
        return f"{against} is not settled where {dict(rule['given'])!r}: {advice}"
    return overwritten(rule, scope, place)


def _first(rule: Rule, what: str, found: list[tuple[Place, str]], scope: Scope) -> Finding:
    """Holds where one place has no problem; else says the problem of the last."""
    good = next((place for place, problem in found if not problem), None)
    if good is not None:
        return Finding(True, f"{rule['function']} {what}", good.line)
    if not found:
        return _never(rule, f"never {what} on a path that is reached", scope)
    near = [one for one in found if not one[1].startswith(UNRELATED)] or found
    place, problem = near[-1]
    return Finding(False, f"{rule['function']} {what} at line {place.line}, but {problem}", place.line)


def _never(rule: Rule, what: str, scope: Scope) -> Finding:
    """That nothing of the kind is found, with the helper that may have it where one is not read."""
    helper = unread(scope, rule.get("depth", 2))
    unseen = f"; but its helper {helper}" if helper else ""
    return Finding(False, f"{rule['function']} {what}{unseen}", scope.function.lineno)


def _calls(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    reached = places(scope, rule.get("depth", 2))
    found = [
        (place, keyword_problem(rule, place) or _fits(rule, scope, place) or _made(rule, scope, place))
        for place in reached
        if calls(place, rule["callee"])
    ]
    kept = [(place, why) for place, _ in found if (why := _kept(rule, place))]
    if rule.get("lets_out") and not kept:
        kept = [(place, HANDED) for place in handed_on(rule["callee"], reached, [one for one, _ in found])]
    return _first(rule, f"calls {rule['callee']}", kept or found, scope)


def _kept(rule: Rule, place: Place) -> str:
    """Which of the errors that a rule `lets_out` does not leave the function from a call; empty for none.

    It holds for every call: an error that one of several keeps is lost.
    """
    for name in rule.get("lets_out", ()):
        if why := swallowed(place, name) or doubtful(place, rule.get("managers", ())):
            return f"its {name} does not get out: {why}"
    return ""


def _made(rule: Rule, scope: Scope, place: Place) -> str:
    """Why a call that is reached is not as the rule wants it; empty where it is.

    That it is made after an error only, a rule has to say.
    """
    if place.handles and not rule.get("mentions"):
        return f"only after an error, in the try at line {place.handles[-1].lineno}"
    if rule.get("used") and (dropped := dropped_result(place)):
        return dropped
    return late(rule, scope, place) if "before" in rule else ""


def _raises(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    found = []
    for place in places(scope, rule.get("depth", 2)):
        name = exception_of(place)
        unwritten = name == "NotImplementedError" != rule["exception"]
        if name and not unwritten and module.is_a(name, rule["exception"]):
            kept = swallowed(place, name) or doubtful(place, rule.get("managers", ()))
            found.append((place, _fits(rule, scope, place) or _unhandled(rule, scope, place) or kept))
    return _first(rule, f"raises {rule['exception']}", found, scope)


def _unhandled(rule: Rule, scope: Scope, place: Place) -> str:
    """Why a raise is not what becomes of an error of the call that the rule names in `handles`."""
    if "handles" not in rule:
        return ""
    why = f"it does not handle an error of {rule['handles']}"
    for one in places(scope, rule.get("depth", 2)):
        around = [node for node, _ in one.tries]
        handler = next((node for node in place.handles if node in around), None)
        if handler is not None and calls(one, rule["handles"]):
            inside = one._replace(
                tries=one.tries[around.index(handler) + 1 :], managers=one.managers[len(place.managers) :]
            )
            if not (kept := swallowed(inside, "Exception")):
                return ""
            why = f"{why}: {kept}"
    return why


def _branch(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    found = []
    for place in places(scope, rule.get("depth", 2)):
        if not isinstance(place.node, (ast.If, ast.While, ast.Assert)) and not _governed(place):
            problem = _fits(rule, scope, place) or does_something(place, rule.get("does", ()))
            found.append((place, problem))
    good = next((place for place, problem in found if not problem), None)
    if good is not None:
        return Finding(True, f"{rule['function']} acts on {', '.join(rule['mentions'])}", good.line)
    does = f" that does {', '.join(rule['does'])}" if rule.get("does") else ""
    return _never(rule, f"has no reached branch on {', '.join(rule['mentions'])}{does}", scope)


def _governed(place: Place) -> bool:
    """Whether no condition governs a place at all."""
    return not any(one.how in {"", RAISES} for one in place.conditions)


def _bounded_walk(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    loops = list(walks(scope, rule["follows"]))
    if not loops:
        return _never(rule, f"no longer follows {rule['follows']} in a loop", scope)
    for place in loops:
        if not bound(place, rule.get("limit", 10_000)):
            return Finding(
                False, f"the walk along {rule['follows']} at line {place.line} has no bound", place.line
            )
    if line := again(scope):
        return Finding(False, f"{rule['function']} calls itself at line {line}: no loop bounds that", line)
    return Finding(
        True, f"the walk is bounded by {bound(loops[0], rule.get('limit', 10_000))}", loops[0].line
    )


def _signature(rule: Rule, module: Module) -> Finding:
    problem, line = signature_problem(rule, module)
    return Finding(not problem, problem or f"{rule['name']} admits the call", line)


def _tests(rule: Rule, module: Module, around: Surroundings) -> Finding:
    line = 0
    for name in rule["names"]:
        problem, at = testing.problem(rule, module, name, around)
        if problem:
            return Finding(False, problem, at)
        line = line or at
    tests = plural(len(rule["names"]), "test exists, runs and asserts", "tests exist, run and assert")
    return Finding(True, tests, line)


def _fingerprint(rule: Rule, module: Module) -> Finding:
    scope = scope_of(module, rule)
    if scope is None:
        return _gone(rule, module)
    form = normal_form(scope.function, rule.get("focus", ()))
    known = [str(one).strip("\n") for one in rule["known"]]
    if form in known or digest(form) in known:
        return Finding(True, f"{rule['function']} is as known ({digest(form)})", scope.function.lineno)
    texts = [one for one in known if "\n" in one]
    shown = f"\n{difference(texts[-1], form)}" if texts else ""
    return Finding(
        False, f"{rule['function']} has changed (now {digest(form)}){shown}", scope.function.lineno
    )


def _probe(rule: Rule, text: str, path: str) -> Finding:
    job = Probe(
        tuple(rule["extract"]),
        tuple(rule["cases"]),
        str(rule.get("prelude", "")),
        str(rule.get("setup", "")),
        tuple(rule.get("libraries", ())),
        known=Known(tuple(rule.get("decorators", ())), tuple(rule.get("managers", ()))),
        **{name: rule[name] for name in ("cpu_s", "memory_bytes") if name in rule},
    )
    line = _line(parse(text, path), job.extract[0])
    try:
        answers, ended = probe(text, path, job)
    except Gone as error:
        return Finding(False, str(error), line)
    if ended:
        return Finding(False, f"running {', '.join(job.extract)}: {ended}", line)
    wrong = mismatches(job.cases, answers)
    if wrong:
        return Finding(
            False, "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""), line
        )
    of = f"of {', '.join(job.extract)}"
    found = plural(len(answers), f"answer {of} is as expected", f"answers {of} are as expected")
    return Finding(True, found, line)


def _line(module: Module, name: str) -> int:
    node = module.function(name) or module.define(name.partition(".")[0])
    return getattr(node, "lineno", 0)


_KINDS: Mapping[str, Callable[[Rule, Module], Finding]] = {
    "symbol": _symbol,
    "returns": _returns,
    "calls": _calls,
    "raises": _raises,
    "branch": _branch,
    "bounded-walk": _bounded_walk,
    "signature": _signature,
    "fingerprint": _fingerprint,
}
