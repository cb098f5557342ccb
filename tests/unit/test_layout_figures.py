"""The figures of docs/layouts.md are what their script writes, and what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from loudmerge.arithmetic.factors import unpack_lora_b
from loudmerge.converting.relayout import factored
from loudmerge.layout import LoraBLayout, Orientation

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def parsed(content: str) -> ET.Element:
    return ET.fromstring(content)  # noqa: S314 - the script's own output


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_layouts", DOCS / "figures" / "make_layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_figures_are_what_the_script_writes(script: ModuleType) -> None:
    written = dict(script.figures())
    assert written.keys() == {path.name for path in (DOCS / "figures").glob("layouts-*.svg")}
    for name, content in written.items():
        assert (DOCS / "figures" / name).read_text("utf-8") == content, (
            f"run docs/figures/make_layouts.py: {name}"
        )


def test_the_page_shows_every_figure_and_says_what_it_shows(script: ModuleType) -> None:
    page = (DOCS / "layouts.md").read_text("utf-8")
    shown = re.findall(r"!\[(.+?)\]\(figures/(.+?)\)", page)
    assert sorted(name for _, name in shown) == sorted(name for name, _ in script.figures())
    assert all(len(words) > 20 for words, _ in shown)


def test_every_link_inside_the_page_leads_somewhere() -> None:
    page = (DOCS / "layouts.md").read_text("utf-8")
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.+?)\)", page)) <= anchors


@pytest.mark.parametrize("layout", LoraBLayout, ids=lambda layout: layout.value)
def test_the_colours_of_b_are_the_columns_that_the_merge_takes(
    script: ModuleType, layout: LoraBLayout
) -> None:
    cells = [
        cell
        for cell in parsed(script.packing()).iter(f"{SVG}rect")
        if cell.get("data-matrix") == layout.value
    ]
    columns = np.arange(script.EXPERTS * script.RANK)[None]
    taken = unpack_lora_b(columns, script.EXPERTS, script.RANK, layout)
    coloured = [
        [int(cell.get("data-index", "")) for cell in cells if cell.get("class") == f"c k{expert}"]
        for expert in range(script.EXPERTS)
    ]
    assert coloured == taken[:, 0].tolist()


def test_the_colours_of_a_are_its_rows_grouped_by_expert(script: ModuleType) -> None:
    cells = parsed(script.packing()).iter(f"{SVG}rect")
    rows = [cell for cell in cells if cell.get("data-matrix") == "A"]
    owners = [int(cell.get("data-expert", "")) for cell in rows]
    assert owners == torch.arange(script.EXPERTS).repeat_interleave(script.RANK).tolist()


@pytest.mark.parametrize("way", Orientation, ids=lambda way: way.value)
def test_the_factors_of_an_orientation_stand_as_they_are_multiplied(
    script: ModuleType, way: Orientation
) -> None:
    d1, d2, rank = script.D1, script.D2, script.RANK
    texts = [text.text or "" for text in parsed(script.orientation()).iter(f"{SVG}text")]
    start = next(at for at, text in enumerate(texts) if text.startswith(way.value))
    cells = [text for text in texts[start:] if re.fullmatch(r"[abw]\d\d", text)]
    a = torch.randn(rank, d2 if way is Orientation.STANDARD else d1)
    b = torch.randn(d1 if way is Orientation.STANDARD else d2, rank)
    at = {"a": a, "b": b}
    held = [float(at[text[0]][int(text[1]), int(text[2])]) for text in cells[: d1 * rank + rank * d2]]
    left, right = (
        torch.tensor(held[: d1 * rank]).view(d1, rank),
        torch.tensor(held[d1 * rank :]).view(rank, d2),
    )
    expected = factored(a, b, 1, way, LoraBLayout.RANK_MAJOR)
    assert torch.equal(left, expected.up[0])
    assert torch.equal(right, expected.down[0])


def test_the_figures_can_be_read_without_colour_and_on_dark(script: ModuleType) -> None:
    for _, content in script.figures():
        root = parsed(content)
        boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") != "back"]
        words = [text for text in root.iter(f"{SVG}text") if text.get("class") == "cell"]
        assert len(boxes) == len(words)
        assert all(text.text for text in words)
        assert "prefers-color-scheme: dark" in content
