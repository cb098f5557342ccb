"""The README's table: generated between two markers, and checked against results without flapping.

It has the cells of the lane `released`, and of `crossed` their adapters: the others are whatever the index
serves, and which host answers, that day. A check compares
what a commit decides: the cells, versions, path, status, counts; and a KL by its order of magnitude, since
its digits differ between processors. It does not compare torch, which an environment variable may replace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loudmerge.compat.judging.cells import RELEASED
from loudmerge.compat.rendering.markdown import table
from loudmerge.compat.rendering.overview import COLUMNS, Column, Overview

START, END = "<!-- matrix:start -->", "<!-- matrix:end -->"

FACTOR = 10.0
"""The KL of two runs may differ by less than this."""
FLOOR = 1e-8
"""Nats a token. A KL below it is float32's own rounding: any two are alike."""

KLS = ("KL base‖trained", "KL trained‖merged", "KL float32 merge", "KL in bfloat16")
TITLES = ("transformers", "peft", "trl", "path", "merged", *KLS, "samples", "families", "crossed", "status")
_BY_TITLE: Mapping[str, Column] = {column.title: column for column in COLUMNS}


class ReadmeError(ValueError):
    """The README has no place for the table, or no table in it."""


@dataclass(frozen=True)
class Difference:
    """One thing that README and results do not agree on. cell: its versions."""

    cell: str
    what: str
    readme: str
    results: str

    def __str__(self) -> str:
        return f"{self.cell}: {self.what}: README has {self.readme}, the results have {self.results}"


def section(overview: Overview) -> str:
    """What stands between the markers."""
    said = (
        f"Generated on {overview.generated:%Y-%m-%d} from what `nox -s matrix` left, with"
        f" torch {overview.shared('torch')}. KL in nats a token, in float32 arithmetic but for `in bfloat16`."
    )
    return "\n".join((said, "", *_table(overview)))


def replaced(readme: str, overview: Overview) -> str:
    """The README with the section in its place. Raises ReadmeError unless each marker is there once."""
    before, _, after = _split(readme)
    return f"{before}{START}\n\n{section(overview)}\n\n{END}{after}"


def differences(readme: str, overview: Overview) -> tuple[Difference, ...]:
    """How the README's table differs from the results. Raises ReadmeError where it has none."""
    found, expected = _read(_split(readme)[1]), _read("\n".join(_table(overview)))
    return tuple(each for cell in {**expected, **found} for each in _compare(cell, found, expected))


def _table(overview: Overview) -> list[str]:
    released = [row for row in overview.rows if row.lane == RELEASED]
    names = {row.cell for row in released}
    shown = [
        replace(row, crossed={name: said for name, said in row.crossed.items() if name in names})
        for row in released
    ]
    return table(TITLES, [[_BY_TITLE[title].text(row) for title in TITLES] for row in shown])


def _split(readme: str) -> tuple[str, str, str]:
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(START):
        raise ReadmeError(
            f"found no one place for the matrix, expected one line {START} and below it one line {END}"
        )
    before, _, rest = readme.partition(START)
    between, _, after = rest.partition(END)
    return before, between, after


def _read(text: str) -> dict[str, dict[str, str]]:
    """The table's rows by the cell's versions: column -> text. A second row of the same is counted, too."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, *rows = [_cells(line) for line in lines[:1] + lines[2:]] or [()]
    if header != TITLES:
        raise ReadmeError(f"found a table of {list(header)}, expected one of {list(TITLES)}")
    wrong = [row for row in rows if len(row) != len(TITLES)]
    if wrong:
        raise ReadmeError(f"found a row {list(wrong[0])}, expected {len(TITLES)} cells")
    named = [dict(zip(TITLES, row, strict=True)) for row in rows]
    found: dict[str, dict[str, str]] = {}
    for row in named:
        name = f"transformers {row['transformers']}, peft {row['peft']}, trl {row['trl']}"
        times = 1 + sum(other.partition(" (")[0] == name for other in found)
        found[f"{name} ({times})" if times > 1 else name] = row
    return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | "))


def _compare(
    cell: str, readme: Mapping[str, Mapping[str, str]], results: Mapping[str, Mapping[str, str]]
) -> Iterator[Difference]:
    if cell not in readme or cell not in results:
        yield Difference(
            cell, "the row", *("a row" if cell in each else "none" for each in (readme, results))
        )
        return
    for title, found, expected in ((title, readme[cell][title], results[cell][title]) for title in TITLES):
        if not (alike(found, expected) if title in KLS else found == expected):
            yield Difference(cell, title, found, expected)


def alike(a: str, b: str) -> bool:
    """Whether two shown KLs are less than a factor of ten apart, or both under the floor."""
    if a == b:
        return True
    try:
        x, y = abs(float(a)), abs(float(b))
    except ValueError:
        return False
    if not (math.isfinite(x) and math.isfinite(y)):
        return False
    low, high = sorted((max(x, FLOOR), max(y, FLOOR)))
    return high < low * FACTOR
