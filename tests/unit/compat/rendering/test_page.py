"""compat.html: it needs nothing else, shows everything, and says in words what it says in colours."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import combinations

import pytest

from loudmerge.compat import table
from loudmerge.compat.judging.change import MEANINGS as CHANGES
from loudmerge.compat.rendering import page
from loudmerge.compat.rendering.overview import COLUMNS, MEANINGS, SYMBOLS, Overview
from loudmerge.compat.rendering.sections import sections
from tests.unit.compat import rows
from tests.unit.compat.colours import FILLED, contrast, luminance, style

APART = 0.03
"""Of relative luminance, 0 to 1: colours that are at least so far apart are told apart in greyscale."""
VOID = {"meta", "wbr"}


class Reader(HTMLParser):
    """Follows the open elements; gathers text, attributes, and the table rows as (columns, texts)."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[tuple[int, list[str]]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append((0, []))
        elif tag in ("td", "th"):
            columns, texts = self.tables[-1][-1]
            self.tables[-1][-1] = (columns + int(dict(attrs).get("colspan") or 1), [*texts, ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][1][-1] += data


def read(overview: Overview) -> Reader:
    reader = Reader()
    reader.feed(page.render(overview))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def overview() -> Overview:
    return table.survey(rows.ALL, rows.OLDER, lag=rows.LAG, generated=rows.GENERATED)


@pytest.fixture(scope="module")
def reader(overview: Overview) -> Reader:
    return read(overview)


def test_it_needs_no_network_and_runs_no_script(overview: Overview, reader: Reader) -> None:
    loads = {"src", "href", "srcset", "data", "action", "style"}
    assert {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object", "base"} == set()
    assert [attributes for _, attributes in reader.tags if loads & attributes.keys()] == []
    style_sheet = page.render(overview).split("<style>")[1].split("</style>")[0]
    assert [word for word in ("url(", "@import", "http") if word in style_sheet] == []


def test_every_row_of_a_table_has_all_its_columns(reader: Reader) -> None:
    for lines in reader.tables:
        assert len({columns for columns, _ in lines}) == 1, lines


def test_the_first_table_has_a_row_for_each_cell_in_order(overview: Overview, reader: Reader) -> None:
    body = reader.tables[0][2:]
    assert [texts[0] for _, texts in body] == [row.cell for row in overview.rows]
    assert [texts[1] for _, texts in body] == [f"{SYMBOLS[row.status]} {row.status}" for row in overview.rows]
    assert [texts[2] for _, texts in body] == [overview.changes[row.cell].text for row in overview.rows]


def test_a_row_shows_every_figure(overview: Overview, reader: Reader) -> None:
    texts = reader.tables[0][2][1]
    assert texts == [column.text(overview.rows[0]) for column in overview.columns]


def test_a_row_without_figures_says_why(reader: Reader) -> None:
    by_cell = {texts[0]: texts for _, texts in reader.tables[0]}
    assert by_cell[rows.UNINSTALLED.cell][-1] == rows.UNINSTALLED.detail
    assert by_cell["dev"][-1] == rows.DEV.detail


def test_what_falls_short_is_marked_by_a_symbol(reader: Reader) -> None:
    texts = next(texts for _, texts in reader.tables[0] if texts[0] == rows.BROKEN.cell)
    assert [text for text in texts[3:] if text.endswith("✗")] == [
        *("191/192 ✗", "0.0312 ✗", "0.0309 ✗", "1/3 ✗", "1201 / 2 / 17 ✗", "24/26, 1 refused ✗", "1/2 ✗"),
    ]


def test_every_section_is_there_with_every_text(overview: Overview, reader: Reader) -> None:
    shown = [[texts for _, texts in lines] for lines in reader.tables[1:]]
    expected = [
        [list(line) for line in (each.header, *each.rows)] for each in sections(overview) if each.rows
    ]
    assert shown == expected


def test_everything_is_escaped(reader: Reader) -> None:
    """The rows have <script>, <b>, & and | in what pip, pytest and a family said."""
    assert {tag for tag, _ in reader.tags} & {"script", "b", "mamba_ssm"} == set()
    assert "<script>alert(1)</script>" in "".join(reader.text)


def test_the_date_the_version_and_the_lag_are_there(overview: Overview, reader: Reader) -> None:
    text = "".join(reader.text)
    assert f"Generated 2026-11-25 01:30 UTC by loudmerge {overview.version}." in text
    assert "torch 2.13.0, Python 3.12.7" in text
    assert "Released since, and in no cell yet: transformers 5.25.0, peft 0.22.0." in text


def test_each_column_status_and_change_is_explained(reader: Reader) -> None:
    text = "".join(reader.text)
    meanings = [column.meaning for column in COLUMNS] + list(MEANINGS.values()) + list(CHANGES.values())
    assert [meaning for meaning in meanings if meaning not in text] == []


def test_symbols_and_words_differ_where_colours_do() -> None:
    assert len(set(SYMBOLS.values())) == len(SYMBOLS) == len(MEANINGS)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read_and_are_told_apart_in_greyscale(dark: bool) -> None:
    colours = style(dark=dark)
    texts = [(name, f"{name}-text") for name in FILLED]
    texts += [(ground, text) for ground in ("page", "head") for text in ("text", "faint")]
    assert [pair for pair in texts if contrast(colours[pair[0]], colours[pair[1]]) < 4.5] == []
    shades = {name: luminance(colours[name]) for name in (*FILLED, "page")}
    assert [pair for pair in combinations(shades, 2) if abs(shades[pair[0]] - shades[pair[1]]) < APART] == []


def test_an_overview_without_rows_is_a_page() -> None:
    assert "no cells" in "".join(read(table.survey([], generated=rows.GENERATED)).text)
