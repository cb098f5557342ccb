"""COMPAT.md: an overview as GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loudmerge.compat.judging.change import MEANINGS as CHANGED
from loudmerge.compat.judging.change import SYMBOLS as CHANGES
from loudmerge.compat.judging.result import CellResult
from loudmerge.compat.rendering.overview import BAD, MEANINGS, SYMBOLS, Column, Overview, marked
from loudmerge.compat.rendering.sections import Section, sections

# A lone underscore inside a word is no markup: names stay readable in the source.
_MARKUP = re.compile(r"[\\`*|\[\]<>~]|(?<![^\W_])_|_(?![^\W_])")


def render(overview: Overview) -> str:
    """The whole file."""
    return "\n".join(_lines(overview)).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that shows as it is, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; every cell is escaped here."""
    return [_row(header), "|" + "---|" * len(header), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"


def _lines(overview: Overview) -> list[str]:
    lines = ["# Compatibility matrix", "", f"{escape(overview.counts)}.", ""]
    lines += [f"torch {escape(overview.shared('torch'))}, Python {escape(overview.shared('python'))}.", ""]
    if overview.lagging:
        lines += [f"{escape(overview.lagging)}.", ""]
    lines += [*_main(overview), ""]
    when = f"{overview.generated:%Y-%m-%d %H:%M %Z}"
    lines += [f"loudmerge {escape(overview.version)}, {when}. {BAD} behind a value: it falls short.", ""]
    lines += [*_meanings(overview), ""]
    for section in sections(overview):
        lines += [*_section(section), ""]
    return lines


def _main(overview: Overview) -> list[str]:
    header = [column.title for column in overview.columns]
    return table(header, [[_text(column, row) for column in overview.columns] for row in overview.rows])


def _text(column: Column, row: CellResult) -> str:
    text = column.text(row)
    return f"{text} {BAD}" if marked(column, row) else text


def _meanings(overview: Overview) -> list[str]:
    statuses = [f"- {SYMBOLS[status]} {status}: {escape(meaning)}" for status, meaning in MEANINGS.items()]
    columns = [f"- **{column.title}**: {escape(column.meaning)}" for column in overview.columns]
    changed = [
        f"- {CHANGES[word]} {word}: {meaning}" for word, meaning in CHANGED.items() if overview.changes
    ]
    return [
        "<details><summary>What the columns say</summary>",
        "",
        *statuses,
        *changed,
        *columns,
        "",
        "</details>",
    ]


def _section(section: Section) -> list[str]:
    if not section.rows:
        return [f"## {section.title}", "", section.nothing]
    return [f"## {section.title}", "", section.meaning, "", *table(section.header, section.rows)]
