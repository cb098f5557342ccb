"""What encloses a piece of code within its function, and by which exits control never comes to it."""

from __future__ import annotations

import ast
from typing import NamedTuple

from loudmerge.canary.code.nodes import For, Try, With
from loudmerge.canary.code.syntax import EXITS, FUNCTIONS, dotted

BARE = ast.Name("BaseException", ast.Load())
"""What `except:` catches. What a handler catches is a condition of all that it does."""
DEBUG = ast.Name("__debug__", ast.Load())
"""What Python runs asserts under: false with `-O`."""
RAISES = "raises"
"""The other way out of the test is an error that leaves the function."""
LEAVES = "leaves"
"""The other way out is a return, break or continue in a block before the place."""
LOOPS = "loops"
"""The test is what a loop around the place runs over: an empty one never comes to it."""
ENDS = EXITS | {"pytest.skip", "pytest.fail", "pytest.xfail", "self.skipTest"}
"""The calls that do not come back."""
CATCHING = frozenset({"suppress", "raises", "assertRaises"})
"""Managers of Python, pytest and unittest, by their last name, that end the exceptions they are given."""


class Test(NamedTuple):
    """A test that must come out as `wanted`. how: `RAISES`, `LEAVES`, `LOOPS`, or empty."""

    test: ast.expr
    wanted: bool
    how: str = ""


class Frame(NamedTuple):
    """What encloses a node within its own function: tests and how they come out, tries, managers, loops."""

    tests: tuple[Test, ...] = ()
    tries: tuple[Try, ...] = ()
    managers: tuple[ast.expr, ...] = ()
    loops: tuple[ast.stmt, ...] = ()
    handles: tuple[Try, ...] = ()

    def under(self, test: ast.expr, wanted: bool, how: str = "") -> Frame:  # noqa: FBT001 (how it comes out)
        return self._replace(tests=(*self.tests, Test(test, wanted, how)))


OUTSIDE = Frame()


def leaves(node: ast.AST) -> bool:
    """Whether a statement ends the block it stands in, and no error says so: SystemExit may be a success."""
    if isinstance(node, ast.Raise):
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return error is not None and dotted(error) == "SystemExit"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return dotted(node.value.func) in ENDS
    return isinstance(node, (ast.Return, ast.Break, ast.Continue))


def alone(at: Frame) -> str:
    """RAISES where an error leaves the function from here: nothing around it can end it."""
    return "" if at.tries or at.managers else RAISES


def exits(
    node: ast.stmt, at: Frame, inside: list[tuple[ast.AST, Frame]], known: tuple[Test, ...]
) -> tuple[Test, ...]:
    """What must not have come about inside a statement for control to pass beyond it, but for `known`."""
    turned = [(one.test, not one.wanted) for one in known]
    found: dict[Test, None] = {}
    for step, frame in inside:
        if step is node or not leaves(step):
            continue
        if isinstance(step, (ast.Break, ast.Continue)) and frame.loops != at.loops:
            continue
        if any((one.test, one.wanted) in turned for one in frame.tests[len(at.tests) :][:1]):
            continue
        found[not_taken(node, at, frame)] = None
    return tuple(found)


def not_taken(node: ast.stmt, at: Frame, frame: Frame) -> Test:
    """That an exit inside a statement is not reached: not all that leads to it holds."""
    inner = [one for one in frame.tests[len(at.tests) :] if not one.how]
    if not inner:
        return _way_in(node)
    parts = [one.test if one.wanted else ast.UnaryOp(ast.Not(), one.test) for one in inner]
    return Test(parts[0] if len(parts) == 1 else ast.BoolOp(ast.And(), parts), wanted=False, how=LEAVES)


def _way_in(node: ast.stmt) -> Test:
    """How control passes beyond a statement with an exit inside that no test governs."""
    if isinstance(node, For):
        return Test(node.iter, wanted=False, how=LEAVES)
    if isinstance(node, With):
        return Test(node.items[0].context_expr, wanted=False, how=LEAVES)
    kind = node.handlers[0].type if isinstance(node, Try) and node.handlers else None
    return Test(kind or BARE, wanted=True, how=LEAVES)


def matched(subject: ast.expr, case: ast.match_case) -> ast.expr | None:
    """The test of a `case`; None where it takes anything."""
    tests = [one for one in (_pattern(subject, case.pattern), case.guard) if one is not None]
    return ast.BoolOp(ast.And(), tests) if len(tests) > 1 else next(iter(tests), None)


def _pattern(subject: ast.expr, pattern: ast.pattern) -> ast.expr | None:
    """The test of a pattern; None for one that takes anything. One that is no value is a call of nothing."""
    if isinstance(pattern, ast.MatchAs):
        return None if pattern.pattern is None else _pattern(subject, pattern.pattern)
    if isinstance(pattern, ast.MatchValue):
        return ast.Compare(subject, [ast.Eq()], [pattern.value])
    if isinstance(pattern, ast.MatchSingleton):
        return ast.Compare(subject, [ast.Is()], [ast.Constant(pattern.value)])
    if isinstance(pattern, ast.MatchOr):
        found = [_pattern(subject, one) for one in pattern.patterns]
        tests = [one for one in found if one is not None]
        return ast.BoolOp(ast.Or(), tests) if len(tests) == len(found) else None
    named = [part for part in ast.walk(pattern) if isinstance(part, (ast.Name, ast.Constant))]
    return ast.Call(ast.Name("match", ast.Load()), [subject, *named], [])


def swallowing(manager: ast.expr) -> bool:
    """Whether a context manager ends an exception: `suppress(...)`, `pytest.raises(...)`."""
    return isinstance(manager, ast.Call) and dotted(manager.func).rpartition(".")[2] in CATCHING


def breaks(body: list[ast.stmt]) -> bool:
    """Whether a `break` of this loop, not of one inside it, stands in the body."""
    for node in body:
        if isinstance(node, ast.Break):
            return True
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While, *FUNCTIONS, ast.ClassDef)):
            if breaks(getattr(node, "orelse", [])):
                return True
            continue
        parts = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        parts += [handler.body for handler in getattr(node, "handlers", [])]
        parts += [case.body for case in getattr(node, "cases", [])]
        if any(breaks(part) for part in parts):
            return True
    return False
