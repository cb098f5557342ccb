"""What runs inside a cell is named by what decides what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

import loudmerge
from loudmerge.compat.inside.cell import source
from tests.unit.compat import checkout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return checkout.make(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("tests/unit/test_tiny.py", True),
        ("tests/unit/trained/one.safetensors", True),
        ("tests/support/tiny.py", True),
        ("tests/e2e/test_families.py", True),
        ("tests/e2e/conftest.py", True),
        ("tests/conftest.py", True),
        ("pyproject.toml", True),
        ("tests/e2e/test_cli.py", False),
        ("tests/unit/compat/rendering/test_page.py", False),
        ("tests/unit/__pycache__/test_tiny.pyc", False),
        ("README.md", False),
    ],
)
def test_the_source_is_of_what_a_cell_runs(root: Path, file: str, counts: bool) -> None:
    before = source(root)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("edited", "utf-8")
    assert (source(root) != before) == counts


def test_the_source_is_of_the_recipe_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the modules of the matrix, and says what a cell trains."""
    package = tmp_path / "loudmerge"
    for room in ("compat/inside", "arithmetic", "canary/rules"):
        (package / room).mkdir(parents=True)
    monkeypatch.setattr(loudmerge, "__file__", str(package / "__init__.py"))
    found = []
    for module in ("layout.py", "arithmetic/delta.py", "compat/inside/journey.py", "canary/rules/rules.py"):
        found.append(source(root))
        (package / module).write_text("edited", "utf-8")
    assert len({*found, source(root)}) == 4
