"""Ways to take a guard out of upstream's file, each of which must be noticed."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator

from tests.drills.conditions import Mutant, callers, conditions
from tests.drills.subjects import FUNCTIONS, Subject, replace

OPERATORS = ("remove", "rename", "hollow", "bypass", "swallow", "disguise", "invert", "weaken")


def mutants(text: str, subject: Subject) -> Iterator[Mutant]:
    """Every mutant of one subject that differs from the file."""
    makers: list[Callable[[str, Subject], Iterator[Mutant]]] = [_definition]
    if subject.is_function:
        makers += [_bodies, _KIND.get(subject.rule["kind"], _none), conditions, callers]
    else:
        makers += [_values]
    same = {text, replace(text, subject.node, [copy.deepcopy(subject.node)])}
    for maker in makers:
        yield from ((what, after) for what, after in maker(text, subject) if after not in same)


def _none(_: str, __: Subject) -> Iterator[Mutant]:
    yield from ()


def _statements(code: str) -> list[ast.stmt]:
    return ast.parse(code).body


def _definition(text: str, subject: Subject) -> Iterator[Mutant]:
    """Removed, renamed, dead, and bound to something else afterwards."""
    yield "remove: definition", replace(text, subject.node, _statements("pass"))
    node = copy.deepcopy(subject.node)
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        node.name = f"{node.name}_gone"
    else:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id == subject.name:
                part.id = f"{part.id}_gone"
    yield "rename: definition", replace(text, subject.node, [node])
    dead = ast.If(ast.Constant(False), [copy.deepcopy(subject.node)], [])
    yield "bypass: definition under if False", replace(text, subject.node, [dead])
    if subject.is_function:
        stub = _statements(f"{subject.name} = lambda *a, **k: None")
        yield "disguise: bound to a lambda", replace(text, subject.node, [copy.deepcopy(subject.node), *stub])


def _with_body(subject: Subject, text: str, body: list[ast.stmt]) -> str:
    node = copy.deepcopy(subject.node)
    assert isinstance(node, FUNCTIONS)
    node.body = body
    return replace(text, subject.node, [node])


def _bodies(text: str, subject: Subject) -> Iterator[Mutant]:
    """Hollowed, left at once, never entered, moved into a function that nobody calls."""
    assert isinstance(subject.node, FUNCTIONS)
    body = copy.deepcopy(subject.node.body)
    if subject.rule["kind"] != "signature":
        yield "hollow: body", _with_body(subject, text, [ast.Pass()])
        yield "hollow: returns a constant", _with_body(subject, text, _statements("return 0"))
        yield "bypass: early return", _with_body(subject, text, [*_statements("return None"), *body])
        yield (
            "bypass: early return under if True",
            _with_body(subject, text, [*_statements("if True:\n    return None"), *body]),
        )
        yield (
            "bypass: body under if False",
            _with_body(subject, text, [ast.If(ast.Constant(False), body, [])]),
        )
        yield "bypass: body under while 0", _with_body(subject, text, [ast.While(ast.Constant(0), body, [])])
        inner = _statements("def _never():\n    pass")
        inner[0].body = body  # type: ignore[attr-defined]
        yield "disguise: body in a function never called", _with_body(subject, text, inner)
        off = [*_statements("_enabled = False"), ast.If(ast.Name("_enabled", ast.Load()), body, [])]
        yield "disguise: body under a false flag", _with_body(subject, text, off)
        raises = [*_statements("raise NotImplementedError"), *body]
        yield "disguise: raises at once", _with_body(subject, text, raises)
    if subject.rule["kind"] == "probe":
        switch = _statements("if elsewhere.SOFT:\n    return None")
        yield (
            "weaken: early return by a switch that is imported",
            _with_import(subject, text, [*switch, *body]),
        )
    if "." in subject.path:
        yield "disguise: bound anew by a function", f"{text}\ndef _patch():\n    {subject.path} = None\n"


def _with_import(subject: Subject, text: str, body: list[ast.stmt]) -> str:
    """With this body, and an import at the end of the file: lines stay where they are."""
    return f"{_with_body(subject, text, body)}\nimport elsewhere\n"


class _Calls(ast.NodeTransformer):
    """Does something to every call of one name."""

    def __init__(self, callee: str, change: Callable[[ast.Call], ast.expr]) -> None:
        self.last, self.change = callee.rpartition(".")[2], change

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return self.change(node) if name == self.last else node


def _call_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """The watched call removed, made dead, moved into a lambda, made of another function."""
    callee = subject.rule["callee"]
    changes: dict[str, Callable[[ast.Call], ast.expr]] = {
        "remove: call": lambda _: ast.Constant(None),
        "bypass: call behind `False and`": lambda call: ast.BoolOp(ast.And(), [ast.Constant(False), call]),
        "bypass: call in a dead branch of if-else": lambda call: ast.IfExp(
            ast.Constant(True), ast.Constant(None), call
        ),
        "disguise: call in a lambda": lambda call: ast.Lambda(_no_arguments(), call),
        "rename: another function called": lambda call: ast.Call(
            ast.Name("print", ast.Load()), call.args, call.keywords
        ),
        "disguise: function named, not called": lambda call: call.func,
    }
    if subject.rule.get("keywords"):
        changes["remove: keywords"] = lambda call: ast.Call(call.func, call.args, [])
    for what, change in changes.items():
        node = copy.deepcopy(subject.node)
        yield what, replace(text, subject.node, [_Calls(callee, change).visit(node)])


def _no_arguments() -> ast.arguments:
    return ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])


class _Raises(ast.NodeTransformer):
    """Does something to every raise of a function, handlers left alone."""

    def __init__(self, change: Callable[[ast.Raise], ast.stmt | list[ast.stmt]]) -> None:
        self.change = change

    def visit_Raise(self, node: ast.Raise) -> ast.stmt | list[ast.stmt]:
        return self.change(node) if node.exc is not None else node


def _raise_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """The raise removed, only spoken, made dead, swallowed on the spot or by the whole function."""
    changes: dict[str, Callable[[ast.Raise], ast.stmt | list[ast.stmt]]] = {
        "remove: raise": lambda _: ast.Pass(),
        "hollow: raise replaced by print": lambda _: _statements("print('failed')")[0],
        "hollow: raise replaced by return": lambda _: _statements("return None")[0],
        "bypass: raise under if False": lambda node: ast.If(ast.Constant(False), [node], []),
        "swallow: raise at once": lambda node: _guarded([node], "Exception"),
        "swallow: raise by a bare except": lambda node: _guarded([node], ""),
        "swallow: raise suppressed": _suppressed,
        "rename: another exception raised": lambda _: _statements("raise StopIteration")[0],
    }
    for what, change in changes.items():
        yield what, replace(text, subject.node, [_Raises(change).visit(copy.deepcopy(subject.node))])
    assert isinstance(subject.node, FUNCTIONS)
    yield (
        "swallow: body",
        _with_body(subject, text, [_guarded(copy.deepcopy(subject.node.body), "Exception")]),
    )
    ended = ast.Try(copy.deepcopy(subject.node.body), [], [], _statements("return None"))
    yield "swallow: body ended by finally", _with_body(subject, text, [ended])


def _guarded(body: list[ast.stmt], kind: str) -> ast.stmt:
    found = _statements(f"try:\n    pass\nexcept {kind}:\n    pass")[0]
    assert isinstance(found, ast.Try)
    found.body = body
    return found


def _suppressed(node: ast.stmt) -> ast.stmt:
    found = _statements("with contextlib.suppress(Exception):\n    pass")[0]
    assert isinstance(found, ast.With)
    found.body = [node]
    return found


def _return_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """One value after the other no longer returned."""
    for value in subject.rule["values"]:
        node = copy.deepcopy(subject.node)
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and part.value == value:
                part.value = "other"
        text_without = text.replace(f'"{value}"', '"other"') if _elsewhere(text, value) else text
        yield (
            f"remove: {value!r} never returned",
            text_without if text_without != text else replace(text, subject.node, [node]),
        )


def _elsewhere(text: str, value: object) -> bool:
    return f'else "{value}"' in text or f'"{value}" if' in text


def _walk_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """The bound taken off: no range, no set of visited objects, or a range without end."""

    class Unbounded(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> ast.stmt:
            self.generic_visit(node)
            return ast.While(
                ast.Constant(True), [one for one in node.body if "seen" not in ast.unparse(one)], []
            )

    class Endless(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> ast.stmt:
            if "range" in ast.unparse(node.iter):
                node.iter = ast.parse("range(10 ** 9)", mode="eval").body
                node.body = [one for one in node.body if "seen" not in ast.unparse(one)]
            return node

    class Counting(Unbounded):
        def visit_For(self, node: ast.For) -> ast.stmt:
            loop = super().visit_For(node)
            assert isinstance(loop, ast.While)
            node.body = loop.body
            if "range" in ast.unparse(node.iter):
                node.iter = ast.parse("itertools.count()", mode="eval").body
            return node

    for what, maker in (
        ("remove: bound, while True", Unbounded),
        ("hollow: bound, range(10**9)", Endless),
        ("disguise: bound, itertools.count()", Counting),
    ):
        yield what, replace(text, subject.node, [maker().visit(copy.deepcopy(subject.node))])


def _signature_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """Each keyword of the call no longer a parameter; one more parameter without a default."""
    assert isinstance(subject.node, FUNCTIONS)
    call = ast.parse(subject.rule.get("call", "f()"), mode="eval").body
    words = [word.arg for word in getattr(call, "keywords", [])] + list(subject.rule.get("accepts", ()))
    for word in words:
        node = copy.deepcopy(subject.node)
        for arg in (*node.args.args, *node.args.kwonlyargs):
            arg.arg = f"{arg.arg}_gone" if arg.arg == word else arg.arg
        node.args.kwarg = None
        yield f"remove: parameter {word}", replace(text, subject.node, [node])
    node = copy.deepcopy(subject.node)
    node.args.kwonlyargs.append(ast.arg("needed"))
    node.args.kw_defaults.append(None)
    if "call" in subject.rule:
        yield "disguise: a new parameter without a default", replace(text, subject.node, [node])


class _Asserts(ast.NodeTransformer):
    """Empties assertions, written as statements or as calls."""

    def __init__(self, new: str) -> None:
        self.new = new

    def visit_Assert(self, _: ast.Assert) -> ast.stmt:
        return _statements(self.new)[0]

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        said = ast.unparse(node)
        return _statements(self.new)[0] if "assert_close(" in said or "assert_equal(" in said else node

    def visit_With(self, node: ast.With) -> ast.stmt:
        self.generic_visit(node)
        said = ast.unparse(node.items[0])
        return ast.If(ast.Constant(True), node.body, []) if "raises(" in said else node


def _test_kind(text: str, subject: Subject) -> Iterator[Mutant]:
    """Skipped, expected to fail, without assertions, with ones that cannot fail, swallowed, not collected."""
    assert isinstance(subject.node, FUNCTIONS)
    for mark in (
        "skip",
        "skip(reason='flaky')",
        "xfail",
        "skipif(True, reason='flaky')",
        "parametrize('nothing', [])",
    ):
        node = copy.deepcopy(subject.node)
        node.decorator_list.append(ast.parse(f"pytest.mark.{mark}", mode="eval").body)
        yield f"bypass: marked {mark}", replace(text, subject.node, [node])
    for new in ("pass", "assert True", "assert 1 == 1"):
        yield (
            f"hollow: assertions become {new}",
            replace(text, subject.node, [_Asserts(new).visit(copy.deepcopy(subject.node))]),
        )
    body = copy.deepcopy(subject.node.body)
    yield "bypass: skips itself", _with_body(subject, text, [*_statements("pytest.skip('later')"), *body])
    yield "swallow: body", _with_body(subject, text, [_guarded(body, "Exception")])
    yield "swallow: AssertionError", _with_body(subject, text, [_guarded(body, "AssertionError")])
    node = copy.deepcopy(subject.node)
    node.name = f"_{node.name}"
    yield "rename: not collected", replace(text, subject.node, [node])
    yield "bypass: whole file skipped", f"{text}\npytestmark = pytest.mark.skip\n"


def _rename(node: ast.AST, name: str) -> None:
    """Every name, key, attribute, parameter and inner function called `name` gets another."""
    fields = {
        ast.Constant: "value",
        ast.Name: "id",
        ast.Attribute: "attr",
        ast.arg: "arg",
        ast.FunctionDef: "name",
    }
    for part in ast.walk(node):
        attribute = fields.get(type(part), "")
        if attribute and getattr(part, attribute) == name:
            setattr(part, attribute, f"{name}_gone")


def _values(text: str, subject: Subject) -> Iterator[Mutant]:
    """A variable, class or field: emptied; without one of the keys, members or values the rule asks for."""
    rule = subject.rule
    node = copy.deepcopy(subject.node)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        node.value = ast.Constant(None)
        yield "hollow: bound to None", replace(text, subject.node, [node])
    wanted = [
        *rule.get("keys", ()),
        *rule.get("contains", ()),
        *rule.get("members", ()),
        *rule.get("accepts", ()),
    ]
    if isinstance(subject.node, ast.ClassDef) and rule["kind"] in {"signature", "symbol"}:
        emptied = copy.deepcopy(subject.node)
        emptied.body = [ast.Pass()]
        if wanted:
            yield "hollow: class emptied", replace(text, subject.node, [emptied])
    for one in wanted:
        node = copy.deepcopy(subject.node)
        _rename(node, one)
        yield f"remove: {one}", replace(text, subject.node, [node])


_KIND: dict[str, Callable[[str, Subject], Iterator[Mutant]]] = {
    "calls": _call_kind,
    "raises": _raise_kind,
    "returns": _return_kind,
    "bounded-walk": _walk_kind,
    "signature": _signature_kind,
    "tests": _test_kind,
}
