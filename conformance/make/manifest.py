"""Writes manifest.json: every case as data, and the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from conformance.make.edited import EDITED
from conformance.make.edits import OF_BASE
from conformance.make.made import MADE
from conformance.make.packed import PACKED
from conformance.make.recipes import BASES, LAYOUTS, Made, Packed

FILES = ("bases", "adapters", "expected")
RECIPES: tuple[Made | Packed, ...] = (*MADE, *PACKED)
LAYOUT_OF = {base.name: base.layout for base in BASES}


def write(data: Path) -> int:
    """The manifest of what lies in `data`; gives the number of cases."""
    cases = sorted([*_made(data), *_edited()], key=lambda case: str(case["id"]))
    files = {
        file.relative_to(data).as_posix(): {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
        }
        for folder in FILES
        for file in sorted((data / folder).rglob("*"))
        if file.is_file()
    }
    for case in cases:
        case["made"] = case["made"] or _note(data, str(case["of"]))
    document = {"schema": 1, "layouts": dict(LAYOUTS), "cases": cases, "files": files}
    (data / "manifest.json").write_text(
        json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return len(cases)


def _note(data: Path, name: str) -> dict[str, str]:
    note: dict[str, str] = json.loads((data / "notes" / f"{name}.json").read_text())
    return note


def _made(data: Path) -> list[dict[str, Any]]:
    return [_case(recipe, data) for recipe in RECIPES]


def _case(recipe: Made | Packed, data: Path) -> dict[str, Any]:
    of = recipe.of if isinstance(recipe, Made) else ""
    return {
        "id": recipe.id,
        "topic": recipe.topic
        if isinstance(recipe, Made)
        else "packing"
        if recipe.expect == "merge"
        else "cannot be told",
        "why": recipe.why,
        "base": recipe.base,
        "adapter": recipe.id,
        "layout": LAYOUT_OF[recipe.base],
        "expect": recipe.expect,
        "expected": None if recipe.expect == "refuse" else of or recipe.id,
        "refusal": recipe.refusal,
        "options": dict(recipe.options) if isinstance(recipe, Made) else {},
        "config": dict(recipe.config) if isinstance(recipe, Made) else {},
        "made": _note(data, recipe.id),
        "of": of,
        "edit": "",
    }


def _edited() -> list[dict[str, Any]]:
    parents = {recipe.id: recipe for recipe in RECIPES}
    return [
        {
            "id": case.id,
            "topic": case.topic,
            "why": case.why,
            "base": case.id if case.edit in OF_BASE else parents[case.of].base,
            "adapter": case.of if not case.edit or case.edit in OF_BASE else case.id,
            "layout": LAYOUT_OF[parents[case.of].base],
            "expect": case.expect,
            "expected": None if case.expect == "refuse" else case.of,
            "refusal": case.refusal,
            "options": dict(case.options),
            "config": {},
            "made": {},
            "of": case.of,
            "edit": case.edit,
        }
        for case in EDITED
    ]
