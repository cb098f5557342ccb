"""compat.html: an overview as one page that needs nothing else: no script, no network. Its style is page.css.

A symbol or a word stands wherever there is a colour. Under 48 rem the main table's rows become cards; every
other table that is too wide scrolls inside its own box, so that the page itself never does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from loudmerge.compat.judging.change import MEANINGS as CHANGED
from loudmerge.compat.judging.change import SYMBOLS as CHANGES
from loudmerge.compat.judging.result import CellResult
from loudmerge.compat.rendering.overview import (
    ABSENT,
    BAD,
    COMBINATION,
    GOOD,
    MEANINGS,
    SYMBOLS,
    WITHHELD,
    Column,
    Overview,
    marked,
    why,
)
from loudmerge.compat.rendering.sections import Section, sections

TITLE = "loudmerge: compatibility matrix"

_OUTCOMES: Mapping[str, str] = {GOOD: "good", BAD: "bad", WITHHELD: "refused", ABSENT: "none"}


def render(overview: Overview) -> str:
    """The whole file."""
    return "\n".join(_lines(overview)) + "\n"


def _lines(overview: Overview) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en">'
    yield "<head>"
    yield '<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{escape(TITLE)}</title>"
    yield f"<style>\n{_style()}</style>"
    yield "</head>"
    yield "<body>"
    yield from _head(overview)
    yield "<main>"
    yield from _main(overview)
    for section in sections(overview):
        yield from _section(section)
    yield from _meanings(overview)
    yield "</main>"
    yield "</body>"
    yield "</html>"


def _style() -> str:
    return files("loudmerge.compat.rendering").joinpath("page.css").read_text("utf-8")


def _head(overview: Overview) -> Iterator[str]:
    yield "<header>"
    yield f"<h1>{escape(TITLE)}</h1>"
    yield f'<p class="counts">{escape(overview.counts)}.</p>'
    when = f"{overview.generated:%Y-%m-%d %H:%M %Z}"
    installed = f"torch {overview.shared('torch')}, Python {overview.shared('python')}"
    yield f"<p>{escape(installed)}. Generated {escape(when)} by loudmerge {escape(overview.version)}.</p>"
    if overview.lagging:
        yield f'<p class="lag">{escape(overview.lagging)}.</p>'
    yield "</header>"


def _main(overview: Overview) -> Iterator[str]:
    yield '<div class="box"><table class="cells">'
    groups = [
        (group, len(list(of))) for group, of in groupby(overview.columns, key=lambda column: column.group)
    ]
    spans = (f'<th scope="colgroup" colspan="{span}">{escape(group)}</th>' for group, span in groups)
    titles = (f'<th scope="col">{_title(column)}</th>' for column in overview.columns)
    yield f"<thead><tr>{''.join(spans)}</tr><tr>{''.join(titles)}</tr></thead>"
    yield "<tbody>"
    for row in overview.rows:
        yield f'<tr class="{row.status}">{"".join(_cells(row, overview))}</tr>'
    yield "</tbody></table></div>"


def _title(column: Column) -> str:
    """The title without what the group above it says: `base‖trained` under `KL, nats a token`."""
    return escape(column.title.removeprefix("KL ")).replace("‖", "‖<wbr>")


def _cells(row: CellResult, overview: Overview) -> Iterator[str]:
    """The row's cells; where nothing ran, one that says why stands for all that would be empty."""
    ran = row.figures or row.tests or row.families
    columns = overview.columns
    shown = columns if ran else [column for column in columns if column.group in ("", COMBINATION)]
    yield from (_cell(column, row, overview) for column in shown)
    if not ran:
        yield f'<td class="why" colspan="{len(columns) - len(shown)}">{escape(why(row))}</td>'


def _cell(column: Column, row: CellResult, overview: Overview) -> str:
    text = escape(column.text(row))
    label = f'data-label="{escape(column.title)}"'
    if column.title == "cell":
        return f'<th scope="row" class="name">{text}</th>'
    if column.title == "status":
        return f'<td class="status"><span class="mark {row.status}">{text}</span></td>'
    if column.title == "change":
        return f'<td {label}><span class="mark {overview.changes[row.cell].word}">{text}</span></td>'
    if marked(column, row):
        return f'<td {label}><span class="mark failed">{text} {BAD}</span></td>'
    wrapped = ' class="wrapped"' if column.group == COMBINATION else ""
    return f"<td {label}{wrapped}>{text}</td>"


def _meanings(overview: Overview) -> Iterator[str]:
    yield '<section class="meanings"><h2>What the columns say</h2>'
    yield f"<p>{BAD} behind a value: it falls short.</p><dl>"
    marks = [(SYMBOLS[status], status, meaning) for status, meaning in MEANINGS.items()]
    if overview.changes:
        marks += [(CHANGES[word], word, meaning) for word, meaning in CHANGED.items()]
    for symbol, word, meaning in marks:
        yield _meaning(f'<span class="mark {word}">{symbol} {word}</span>', meaning)
    for column in overview.columns:
        yield _meaning(escape(column.title), column.meaning)
    yield "</dl></section>"


def _meaning(term: str, meaning: str) -> str:
    return f"<div><dt>{term}</dt><dd>{escape(meaning)}</dd></div>"


def _section(section: Section) -> Iterator[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    if section.rows:
        yield f"<p>{escape(section.meaning)}</p>"
        yield f'<div class="box"><table class="{"grid" if section.grid else "list"}">'
        titles = (f'<th scope="col">{escape(title)}</th>' for title in section.header)
        yield f"<thead><tr>{''.join(titles)}</tr></thead><tbody>"
        yield from (_section_row(section, row) for row in section.rows)
        yield "</tbody></table></div>"
    else:
        yield f"<p>{escape(section.nothing)}</p>"
    yield "</section>"


def _section_row(section: Section, row: Sequence[str]) -> str:
    first, *others = row
    cells = (
        f'<td class="{_OUTCOMES[text]}">{text}</td>' if section.grid else f"<td>{_breakable(text)}</td>"
        for text in others
    )
    return f'<tr><th scope="row">{_breakable(first)}</th>{"".join(cells)}</tr>'


def _breakable(text: str) -> str:
    """Escaped; node ids and names may break behind `_`, `/` and `::` on a narrow screen."""
    return re.sub(r"(_+|/|::)", r"\1<wbr>", escape(text))
