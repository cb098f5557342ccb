"""Parses a file piece by piece: a file that differs from one read before costs only its difference."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

GRID = 64
"""Lines: a piece begins at the first definition after each multiple of it, so that pieces do not shift."""
JOINED = 8
"""How many pieces in a row are tried as one, where a string or a bracket runs on into the next."""

_PATCHES = re.compile(r"(?m)^[ \t(]*(?!self\.|cls\.)\w[\w., ]*\.\w+[\w., )]*=(?!=)|setattr\(")
"""What a piece has in it where something of it may write an attribute of a class, outside of its methods."""

FILE = frozenset({"globals()", "sys.modules[__name__]", "sys.modules[__name__].__dict__"})

_DEFINITION = re.compile(r"^(?:def |class |async def |@)")


_PARSING = threading.Lock()


def parsed(code: str, mode: str = "exec") -> Any:
    """`ast.parse`, one thread at a time. Raises SyntaxError or ValueError as it does.

    In Pythons from before 2024 a thread may end another one's parsing with a SystemError, where a collection
    of garbage comes in between: https://github.com/python/cpython/issues/106905
    """
    with _PARSING:
        return ast.parse(code, mode=mode)


@dataclass(frozen=True)
class Piece:
    """Some statements of a file, their positions as in the file, and the names that functions may bind anew.

    patches: what writes `A.b`, wherever it stands, with that name; `A.*` where the attribute may be any.
    """

    body: tuple[ast.stmt, ...]
    shared: frozenset[str] = frozenset()
    patches: tuple[tuple[str, ast.stmt], ...] = ()


def pieces(text: str) -> list[Piece]:
    """The whole file. Raises SyntaxError or ValueError as `ast.parse` does.

    A piece that parses by itself ends where a statement does: nothing is open behind it. So the next one
    may be parsed by itself, too; one that does not is joined with those after it.
    """
    cut = list(_cut(text.replace("\r\n", "\n").replace("\r", "\n")))
    found: list[Piece] = []
    while cut:
        for joined in range(1, min(JOINED, len(cut)) + 1):
            piece = _piece("".join(code for _, code in cut[:joined]), cut[0][0])
            if piece is not None:
                break
        else:
            return [_whole(parsed(text))]
        found.append(piece)
        cut = cut[joined:]
    return found


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """(number of lines before it, code) of each piece."""
    lines = text.split("\n")
    start = 0
    for number, line in enumerate(lines):
        new = number // GRID > start // GRID and _DEFINITION.match(line)
        if new and not lines[number - 1].startswith("@"):
            yield start, "\n".join(lines[start:number]) + "\n"
            start = number
    yield start, "\n".join(lines[start:])


@lru_cache(maxsize=1024)
def _piece(code: str, before: int) -> Piece | None:
    """One piece that stands behind so many lines; None where it does not parse by itself."""
    try:
        tree = parsed("\n" * before + code)
    except (SyntaxError, ValueError):
        return None
    written = "global" in code or "sys.modules" in code or _PATCHES.search(code)
    return _whole(tree) if written else Piece(tuple(tree.body))


def _whole(tree: ast.Module) -> Piece:
    shared = {name for node in ast.walk(tree) for name in declared(node)}
    patches = (one for node in ast.walk(tree) for one in _patches(node))
    return Piece(tuple(tree.body), frozenset(shared), tuple(patches))


def declared(node: ast.AST) -> Iterator[str]:
    """The names of the file that code anywhere binds: `global f`, and what writes the file's namespace."""
    if isinstance(node, ast.Global):
        yield from node.names
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and _is_file(node.value):
        yield node.attr
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _is_file(node.value):
        yield from _texts(node.slice)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_file(node.func.value):
        yield from (word.arg for word in node.keywords if word.arg)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and _is_file(node.args[0]):
        yield from _texts(node.args[1])


def _is_file(node: ast.AST) -> bool:
    """Whether an expression is the file's own namespace, or its module."""
    return isinstance(node, (ast.Call, ast.Subscript, ast.Attribute)) and ast.unparse(node) in FILE


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)


def _patches(node: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """The attributes of names that a statement assigns or, by setattr, may assign."""
    if isinstance(node, ast.Assign):
        for target in (part for one in node.targets for part in (getattr(one, "elts", None) or [one])):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                yield f"{target.value.id}.{target.attr}", node
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    if call is None or not isinstance(call.func, ast.Name) or call.func.id != "setattr":
        return
    owner, name = [*call.args, call, call][:2]
    value = name.value if isinstance(name, ast.Constant) else "*"
    if isinstance(node, ast.Expr) and isinstance(owner, ast.Name):
        yield f"{owner.id}.{value!s}", node
