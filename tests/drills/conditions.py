"""Ways to change under which condition a guarantee holds, and what becomes of an error around it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator

from loudmerge.canary.rules.rules import check
from tests.drills.subjects import FUNCTIONS, Subject, replace

Mutant = tuple[str, str]
"""(operator and what was done, the file's text after it)."""
SAID = ("mentions", "given", "otherwise")
"""The fields of a rule that say under which condition."""


def conditions(text: str, subject: Subject) -> Iterator[Mutant]:
    """The `if` around what the rule found turned round, and joined with a switch."""
    if not any(name in subject.rule for name in SAID):
        return
    line = check(subject.rule, text, subject.path).line
    around = [one for one in ast.walk(subject.node) if isinstance(one, ast.If) and _holds(one, line)]
    if not around:
        return
    inner = max(around, key=lambda one: one.lineno)
    then = any(one.lineno <= line <= (one.end_lineno or 0) for one in inner.body)
    switch = ast.parse("os.environ.get('STRICT')", mode="eval").body
    join: ast.boolop = ast.And() if then else ast.Or()
    changes: dict[str, Callable[[ast.expr], ast.expr]] = {
        "invert: condition": lambda test: ast.UnaryOp(ast.Not(), test),
        "weaken: condition joined with a switch": lambda test: ast.BoolOp(join, [test, switch]),
    }
    for what, change in changes.items():
        node = copy.deepcopy(subject.node)
        for one in ast.walk(node):
            if isinstance(one, ast.If) and one.lineno == inner.lineno:
                one.test = change(one.test)
        yield what, replace(text, subject.node, [node])


def _holds(node: ast.If, line: int) -> bool:
    """Whether a line is in what an `if` governs."""
    return any(one.lineno <= line <= (one.end_lineno or 0) for one in (*node.body, *node.orelse))


def callers(text: str, subject: Subject) -> Iterator[Mutant]:
    """Every error of the calls that must let theirs out, kept on the spot or by the whole function."""
    if "lets_out" not in subject.rule:
        return
    node = copy.deepcopy(subject.node)
    assert isinstance(node, FUNCTIONS)
    yield "swallow: by the caller", replace(text, subject.node, [_Kept(subject.rule["callee"]).visit(node)])
    node = copy.deepcopy(subject.node)
    assert isinstance(node, FUNCTIONS)
    node.body = [_kept(node.body)]
    yield "swallow: body of the caller", replace(text, subject.node, [node])
    node = copy.deepcopy(subject.node)
    assert isinstance(node, FUNCTIONS)
    node.body = [*node.body[:1], *ast.parse(f"pool.submit({subject.rule['callee']}, 0)").body, *node.body[1:]]
    yield "swallow: call left to an executor", replace(text, subject.node, [node])


class _Kept(ast.NodeTransformer):
    """Puts each plain statement, or `if`, that calls a function into a `try` that goes on."""

    def __init__(self, callee: str) -> None:
        self.callee = callee

    def _wrap(self, node: ast.stmt) -> ast.stmt:
        test: ast.AST = node.test if isinstance(node, ast.If) else node
        calls = (one for one in ast.walk(test) if isinstance(one, ast.Call))
        if any(isinstance(one.func, ast.Name) and one.func.id == self.callee for one in calls):
            return _kept([node])
        return self.generic_visit(node)  # type: ignore[return-value]

    visit_Assign = visit_Expr = visit_If = visit_Return = _wrap  # noqa: N815 (ast's own names)


def _kept(body: list[ast.stmt]) -> ast.stmt:
    found = ast.parse("try:\n    pass\nexcept Exception as error:\n    print(error)").body[0]
    assert isinstance(found, ast.Try)
    found.body = body
    return found
