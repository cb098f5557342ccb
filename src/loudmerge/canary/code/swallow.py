"""Whether an exception leaves the function that raises it."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Collection, Iterator

from loudmerge.canary.code.exits import CATCHING, OUTSIDE, leaves
from loudmerge.canary.code.flow import Place, Scope, alias, known_constants, places
from loudmerge.canary.code.nodes import Import
from loudmerge.canary.code.syntax import (
    FUNCTIONS,
    Module,
    dotted,
    imported,
    local_assignments,
    parameters,
)
from loudmerge.canary.code.walk import Flow
from loudmerge.canary.code.wrapping import yields

LETTING = frozenset(
    {
        *("open", "no_grad", "inference_mode", "enable_grad", "catch_warnings", "nullcontext", "closing"),
        *("TemporaryDirectory", "NamedTemporaryFile", "redirect_stdout", "redirect_stderr", "safe_open"),
        *("Lock", "RLock", "Condition", "Semaphore", "ThreadPoolExecutor", "ProcessPoolExecutor"),
        *("autocast", "record_function", "tqdm", "trange", "FileLock", "SoftFileLock"),
        *("init_empty_weights", "main_process_first", "local_main_process_first"),
    }
)
"""Managers that let every exception pass, by their last name: of Python, torch, safetensors, tqdm, filelock
and accelerate. What is written `torch....` does, too."""
DEPTH = 4
"""How many names in a row are followed to what they stand for."""


def swallowed(place: Place, exception: str) -> str:
    """Why an exception raised at this place would not leave the function; empty where it would."""
    for node, scope in reversed(place.tries):
        if node.finalbody and _leaves(node.finalbody, scope):
            return f"the finally at line {node.finalbody[0].lineno} returns, which drops the exception"
        handler = next((one for one in node.handlers if _catches(one.type, exception, scope)), None)
        if handler is not None and not _always_raises(handler.body, scope):
            return f"the except at line {handler.lineno} swallows it"
    for manager, scope in place.managers:
        if _ends(manager, exception, scope):
            return f"{ast.unparse(manager)} at line {manager.lineno} swallows it"
    return ""


def doubtful(place: Place, known: Collection[str] = ()) -> str:
    """The manager around a place of which nothing says whether it lets an exception pass; empty for none.

    known: names of managers that the rule says let it pass.
    """
    for manager, scope in place.managers:
        name = _entered(manager, scope)[0]
        last = name.rpartition(".")[2] or ast.unparse(manager)
        if last not in known and not _own(name, scope.module) and not _letting(name, last, scope):
            said = f"`with {ast.unparse(manager)}` at line {manager.lineno} may swallow it"
            return f"{said}: name {last!r} in the rule's `managers` if it does not"
    return ""


def _catches(kind: ast.expr | None, exception: str, scope: Scope) -> bool:
    """Whether `except kind` catches it. What cannot be followed to a class does."""
    return kind is None or any(
        one in {"", "Exception", "BaseException"} or scope.module.is_a(exception.rpartition(".")[2], one)
        for one in _classes(kind, scope, DEPTH)
    )


def _classes(kind: ast.expr, scope: Scope, depth: int) -> Iterator[str]:
    """The last names of the classes an `except` means, through tuples and names; empty for one not known."""
    if isinstance(kind, (ast.Tuple, ast.List)):
        for one in kind.elts:
            yield from _classes(one.value if isinstance(one, ast.Starred) else one, scope, depth)
        return
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.Add):
        yield from (one for side in (kind.left, kind.right) for one in _classes(side, scope, depth))
        return
    name = dotted(kind) if isinstance(kind, (ast.Name, ast.Attribute)) else ""
    name = _origin(alias(name, scope), scope) if name else ""
    node = scope.module.last(name)
    value = getattr(node, "value", None)
    if isinstance(value, ast.expr) and depth > 0:
        yield from _classes(value, scope, depth - 1)
    else:
        yield _class(name, node)


def _class(name: str, node: ast.stmt | None) -> str:
    """A name's last part where it is a class's: Python's, the file's, or one written as classes are."""
    last = name.rpartition(".")[2]
    known = isinstance(node, ast.ClassDef) or isinstance(getattr(builtins, last, None), type)
    elsewhere = node is None or isinstance(node, Import)
    return last if known or (elsewhere and last[:1].isupper() and not last.isupper()) else ""


def _origin(name: str, scope: Scope) -> str:
    """A name with its first part as it was imported; itself where it was not, or under its own."""
    head, dot, rest = name.partition(".")
    origins = (imported(scope.function), imported(scope.module.tree))
    return next((found[head] for found in origins if head in found), head) + dot + rest


def _entered(manager: ast.expr, scope: Scope) -> tuple[str, list[ast.expr]]:
    """What a `with` enters: its name where it comes from, and what that was called with."""
    name = ""
    call: ast.Call | None = None
    value: ast.expr | None = manager
    for _ in range(DEPTH + 1):
        if isinstance(value, ast.Call) and call is None:
            call, value = value, value.func
        if not isinstance(value, (ast.Name, ast.Attribute)):
            break
        name = _origin(alias(dotted(value), scope), scope)
        value = _bound(name, scope)
    return name, [] if call is None else call.args


def _bound(name: str, scope: Scope) -> ast.expr | None:
    """The expression that a name stands for, where nothing else binds it."""
    local = local_assignments(scope.function, name)
    if name in parameters(scope.function) or name in scope.module.shared or len(local) > 1:
        return None
    if not local:
        return scope.module.value(name)
    node, place = local[0]
    return node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) and place is None else None


def _letting(name: str, last: str, scope: Scope) -> bool:
    """Whether a name is that of a manager of Python's or a package's, which nothing here defines."""
    local = [node for node, _ in local_assignments(scope.function, name)]
    hidden = name in parameters(scope.function) or any(not isinstance(node, Import) for node in local)
    if hidden or isinstance(scope.module.define(name), (*FUNCTIONS, ast.ClassDef)):
        return False
    of_torch = name.startswith("torch.") and not scope.module.defines("torch")
    return of_torch or last in LETTING | CATCHING


def _own(name: str, module: Module) -> bool:
    """Whether the file says what a manager does with an exception: by a generator, or an `__exit__`."""
    node = module.define(name)
    if isinstance(node, ast.ClassDef):
        return module.method(node.name, "__exit__") is not None
    return isinstance(node, FUNCTIONS) and any(yields(node.body))


def _ends(manager: ast.expr, exception: str, scope: Scope) -> bool:
    """Whether a context manager is known to end the exception."""
    name, args = _entered(manager, scope)
    node = scope.module.define(name) if _own(name, scope.module) else None
    if isinstance(node, ast.ClassDef):
        return _exit_swallows(scope.module, node.name)
    if isinstance(node, FUNCTIONS):
        inside = [one for one in places(Scope(scope.module, node), 0) if _is_yield(one)]
        return not inside or any(swallowed(one, exception) for one in inside)
    kinds = args if name.rpartition(".")[2] in CATCHING else []
    return any(_catches(kind, exception, scope) for kind in kinds)


def _is_yield(place: Place) -> bool:
    value = getattr(place.node, "value", None)
    return isinstance(place.node, (ast.Expr, ast.Assign)) and value is not None and any(yields([value]))


def _exit_swallows(module: Module, owner: str) -> bool:
    """Whether `__exit__` can return anything but None or False."""
    method = module.method(owner, "__exit__")
    if method is None:
        return True
    values = [
        one.node.value for one in places(Scope(module, method, owner), 0) if isinstance(one.node, ast.Return)
    ]
    return not all(one is None or (isinstance(one, ast.Constant) and not one.value) for one in values)


def _leaves(body: list[ast.stmt], scope: Scope) -> bool:
    flow = Flow(known_constants(scope))
    flow.block(body, OUTSIDE)
    return any(isinstance(node, (ast.Return, ast.Break, ast.Continue)) for node, _ in flow.steps)


def _always_raises(body: list[ast.stmt], scope: Scope) -> bool:
    flow = Flow(known_constants(scope))
    completes = flow.block(body, OUTSIDE)
    return not completes and not any(leaves(node) and not _fails(node) for node, _ in flow.steps)


def _fails(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and dotted(call.func) == "pytest.fail"
