from __future__ import annotations

import ast

import pytest

from loudmerge.canary.rules.fingerprint import normal_form
from tests.unit.canary_rules.code import found, holds

KNOWN = """
def swap(self, shape):
    transposed = getattr(self, "is_transposed", False)
    if len(shape) == 3 and not transposed:
        self.a, self.b = self.b, self.a
"""


def form(source: str, *focus: str) -> str:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return normal_form(node, focus)


@pytest.mark.parametrize(
    "same",
    [
        KNOWN.replace("transposed =", "turned =").replace("not transposed", "not turned"),
        KNOWN.replace("(self, shape)", "(self, shape: tuple[int, ...]) -> None"),
        KNOWN.replace("    transposed", '    """Swaps."""\n    transposed: bool', 1).replace(
            "bool = g", "bool = g"
        ),
        KNOWN.replace("    if len", "    # why\n    print('hello')\n    if len"),
        KNOWN + "    if False:\n        return 1\n",
    ],
)
def test_wording_names_annotations_and_dead_code_do_not_count(same: str) -> None:
    assert same != KNOWN
    assert form(same) == form(KNOWN)


@pytest.mark.parametrize(
    "changed",
    [
        KNOWN.replace("not transposed", "transposed"),
        KNOWN.replace("== 3", "== 2"),
        KNOWN.replace("self.b, self.a", "self.a, self.b"),
        KNOWN.replace("    transposed", "    return\n    transposed", 1),
        KNOWN.replace("shape)", "size)").replace("len(shape", "len(size"),
    ],
)
def test_a_change_of_what_it_does_counts(changed: str) -> None:
    assert form(changed) != form(KNOWN)
    finding = found(changed, kind="fingerprint", function="swap", known=[form(KNOWN)])
    assert not finding.holds
    assert "--- known" in finding.detail


def test_a_focus_leaves_out_what_does_not_mention_it() -> None:
    more = KNOWN.replace("    if len", "    self.count = 1\n    if len")
    assert form(more) != form(KNOWN)
    assert form(more, "is_transposed", "a") == form(KNOWN, "is_transposed", "a")
    assert holds(more, kind="fingerprint", function="swap", focus=["a"], known=[form(KNOWN, "a")])
