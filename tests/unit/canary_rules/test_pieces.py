"""A file that is parsed piece by piece is the file that `ast.parse` reads."""

from __future__ import annotations

import ast
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from loudmerge.canary.code.pieces import GRID, parsed, pieces
from loudmerge.canary.code.syntax import parse

LINES = chr(10)
FILLER = "".join(f"x{number} = {number}\n" for number in range(GRID))
TEMPLATE = f'TEMPLATE = """\n{FILLER}def not_a_function(:\n{FILLER}class nothing\n"""\n'
STRANGE = {
    "nothing": "",
    "no line end": f"{FILLER}def f(): pass",
    "a string that holds definitions": f"{FILLER}{TEMPLATE}def f():\n    return TEMPLATE\n",
    "brackets": f"{FILLER}y = (\n{'1 +' + LINES * GRID}2)\ndef f(): return y\n",
    "decorators": f"{FILLER}@a\n@b(\n    1,\n)\n@c\ndef f():\n    pass\n{FILLER}@d\nclass C:\n    pass\n",
    "if and else": f"if a:\n    b = 1\nelse:\n    c = 2\n{FILLER}async def f():\n    global a\n",
    "a line continued": f"{FILLER}z = 1 + \\\n2\n{FILLER}def f(): return z\n",
    "returns and line ends of Windows": f"{FILLER}def f():\n    return '''a\nb'''\n".replace("\n", "\r\n"),
    "a form feed and a line separator": f"{FILLER}\x0cdef f():\n    return 'a\u2028b'\ndef g(): pass\n",
    "a global": f"{FILLER}def f():\n    global x0\n    x0 = 2\n{FILLER}def g():\n    return x0\n",
}


def same(text: str) -> bool:
    """Whether both readings agree, positions included."""
    tree = ast.Module([node for piece in pieces(text) for node in piece.body], [])
    return ast.dump(tree, include_attributes=True) == ast.dump(ast.parse(text), include_attributes=True)


@pytest.mark.parametrize("name", STRANGE)
def test_pieces_together_are_the_file(name: str) -> None:
    assert same(STRANGE[name])


@pytest.mark.parametrize("module", [ast, inspect, safetensors.torch], ids=lambda module: module.__name__)
def test_pieces_of_a_real_file_are_the_file(module: Any) -> None:
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert len(pieces(text)) > 1
    assert same(text)


def test_what_did_not_change_is_not_parsed_again() -> None:
    before, after = f"{FILLER}def f():\n    return 1\n", f"{FILLER}def f():\n    return 2\n"
    first, second = parse(before + FILLER).tree, parse(after + FILLER).tree
    assert first.body[0] is second.body[0]
    assert first.body[GRID] is not second.body[GRID]


@pytest.mark.parametrize("broken", ["def f(:\n", '"""', "x = (\n", "\0"])
def test_a_broken_file_is_refused_as_python_refuses_it(broken: str) -> None:
    text = f"{FILLER}def f():\n    pass\n{FILLER}{broken}"
    with pytest.raises((SyntaxError, ValueError)) as expected:
        ast.parse(text)
    with pytest.raises(expected.type) as found:
        pieces(text)
    assert str(found.value) == str(expected.value)


def test_threads_parse_while_garbage_is_collected() -> None:
    text = Path(inspect.getfile(ast)).read_text()

    def collected(*_: object) -> None:
        sum(range(2000))  # long enough for another thread to have its turn

    threshold = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(500)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: len(parsed(text).body), range(24)))
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*threshold)
    assert set(found) == {len(ast.parse(text).body)}
