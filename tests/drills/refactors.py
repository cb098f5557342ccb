"""Changes of upstream's file that keep what it does, none of which may be noticed."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from tests.drills.conditions import Mutant
from tests.drills.subjects import FUNCTIONS, Subject, replace


def refactors(text: str, subject: Subject) -> Iterator[Mutant]:
    """Every refactor of one subject that differs from the file."""
    makers = [_reformatted, _reordered]
    if subject.is_function:
        makers += [_undocumented, _annotated, _renamed_locals, _split_messages, _inverted, _moved]
        if subject.rule["kind"] != "tests":
            makers += [_aliased, _extracted]
    for maker in makers:
        yield from ((what, after) for what, after in maker(text, subject) if after != text)


def _reformatted(text: str, subject: Subject) -> Iterator[Mutant]:
    """Comments gone, quotes, blanks and line breaks as ast.unparse writes them."""
    yield "reformatted", replace(text, subject.node, [copy.deepcopy(subject.node)])
    yield (
        "a comment and a line more",
        "# a comment\n\n" + text if not text.startswith("from __future__") else text,
    )


def _reordered(text: str, subject: Subject) -> Iterator[Mutant]:
    """A function of no consequence before and after it."""
    if subject.node.col_offset == 0:
        new = ast.parse("def _unrelated():\n    return 1").body
        later = ast.parse("def _unrelated_too():\n    return 2").body
        yield "neighbours", replace(text, subject.node, [*new, copy.deepcopy(subject.node), *later])


def _function(subject: Subject) -> ast.FunctionDef | ast.AsyncFunctionDef:
    node = copy.deepcopy(subject.node)
    assert isinstance(node, FUNCTIONS)
    return node


def _undocumented(text: str, subject: Subject) -> Iterator[Mutant]:
    node = _function(subject)
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        node.body = node.body[1:]
        yield "docstring gone", replace(text, subject.node, [node])
    node = _function(subject)
    if ast.get_docstring(node) is None:
        node.body = [*ast.parse('"What it does."').body, *node.body]
        yield "docstring added", replace(text, subject.node, [node])


def _annotated(text: str, subject: Subject) -> Iterator[Mutant]:
    node = _function(subject)
    for arg in (*node.args.args, *node.args.kwonlyargs):
        arg.annotation = ast.Constant("object")
    node.returns = ast.Constant("object")
    yield "annotated", replace(text, subject.node, [node])


def _renamed_locals(text: str, subject: Subject) -> Iterator[Mutant]:
    """Every plain local variable under a new name; those that inner functions or classes see stay."""
    node = _function(subject)
    inner = [
        one
        for one in ast.walk(node)
        if one is not node and isinstance(one, (*FUNCTIONS, ast.ClassDef, ast.Lambda))
    ]
    seen = {part.id for one in inner for part in ast.walk(one) if isinstance(part, ast.Name)}
    stored = {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    args = node.args
    fixed = {
        arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg
    }
    for part in ast.walk(node):
        if isinstance(part, (ast.Global, ast.Nonlocal)):
            fixed |= set(part.names)
    names = stored - fixed - seen
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in names:
            part.id = f"{part.id}_renamed"
    yield "locals renamed", replace(text, subject.node, [node])


class _Split(ast.NodeTransformer):
    """Long messages in two pieces."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        if isinstance(node.exc, ast.Call):
            node.exc.args = [_halves(one) for one in node.exc.args]
        return node


def _halves(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 1:
        middle = len(node.value) // 2
        return ast.BinOp(ast.Constant(node.value[:middle]), ast.Add(), ast.Constant(node.value[middle:]))
    if isinstance(node, ast.JoinedStr):
        middle = len(node.values) // 2
        return ast.BinOp(ast.JoinedStr(node.values[:middle]), ast.Add(), ast.JoinedStr(node.values[middle:]))
    return node


def _split_messages(text: str, subject: Subject) -> Iterator[Mutant]:
    plain = replace(text, subject.node, [copy.deepcopy(subject.node)])
    split = replace(text, subject.node, [_Split().visit(copy.deepcopy(subject.node))])
    if split != plain:
        yield "messages split", split


class _Invert(ast.NodeTransformer):
    """`if a: b` as `if not a: pass else: b`."""

    def visit_If(self, node: ast.If) -> ast.If:
        self.generic_visit(node)
        if node.orelse:
            return node
        return ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Pass()], node.body)


def _inverted(text: str, subject: Subject) -> Iterator[Mutant]:
    plain = replace(text, subject.node, [copy.deepcopy(subject.node)])
    inverted = replace(text, subject.node, [_Invert().visit(copy.deepcopy(subject.node))])
    if inverted != plain:
        yield "conditions inverted", inverted


def _moved(text: str, subject: Subject) -> Iterator[Mutant]:
    """A top-level function moved to the end of the file, unless the file itself calls it before."""
    tree = ast.parse(text)
    body = [
        part for one in tree.body if not isinstance(one, (*FUNCTIONS, ast.ClassDef)) for part in ast.walk(one)
    ]
    if subject.node.col_offset or any(isinstance(one, ast.Name) and one.id == subject.name for one in body):
        return
    if not any(isinstance(one, FUNCTIONS) and one.name == subject.name for one in tree.body):
        return
    without = replace(text, subject.node, ast.parse("pass").body)
    yield "moved to the end", f"{without}\n\n{ast.unparse(subject.node)}\n"


def _aliased(text: str, subject: Subject) -> Iterator[Mutant]:
    node = _function(subject)
    if node.decorator_list:
        return
    node.name = f"_real_{node.name}"
    again = ast.parse(f"{subject.name} = {node.name}").body
    yield "aliased", replace(text, subject.node, [node, *again])


def _extracted(text: str, subject: Subject) -> Iterator[Mutant]:
    """The body in a helper that the function calls."""
    node = _function(subject)
    args = node.args
    inner = any(isinstance(one, (ast.Yield, ast.YieldFrom, ast.Await)) for one in ast.walk(node))
    uses = "super" in {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    if inner or uses or node.decorator_list or args.posonlyargs:
        return
    method = bool(node.col_offset or subject.node.col_offset) and "." in subject.path
    helper = copy.deepcopy(node)
    helper.name = f"_{subject.name.strip('_')}_body"
    positional = [ast.Name(arg.arg, ast.Load()) for arg in args.args[1 if method else 0 :]]
    func: ast.expr = ast.Name(helper.name, ast.Load())
    if method:
        func = ast.Attribute(ast.Name(args.args[0].arg, ast.Load()), helper.name, ast.Load())
    stars = [ast.Starred(ast.Name(args.vararg.arg, ast.Load()), ast.Load())] if args.vararg else []
    words = [ast.keyword(arg.arg, ast.Name(arg.arg, ast.Load())) for arg in args.kwonlyargs]
    words += [ast.keyword(None, ast.Name(args.kwarg.arg, ast.Load()))] if args.kwarg else []
    node.body = [ast.Return(ast.Call(func, [*positional, *stars], words))]
    yield "extracted into a helper", replace(text, subject.node, [helper, node])
