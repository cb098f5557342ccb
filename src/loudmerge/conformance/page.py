"""Scorecards as Markdown, and the table in docs/conformance.md.

    python -m loudmerge.conformance.page conformance/scorecards docs/conformance.md

writes what lies between the two marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from loudmerge.conformance.cases import Case, Suite, default_directory, load
from loudmerge.conformance.judge import MOOT, OTHER_FORM, VERDICTS, WRONG, Verdict
from loudmerge.conformance.scorecard import Scorecard, read_scorecard
from loudmerge.errors import plural

BEGINS, ENDS = "<!-- scorecards: begins -->", "<!-- scorecards: ends -->"
PASSES = "✓"
WIDTH, WORDS = 120, 48
"""Characters of a detail in a table, and of a message by which failures are put together."""


def markdown(cards: Sequence[Scorecard], suite: Suite) -> str:
    """Counts and topics. Of one tool every failure, and what was found; of several each case's verdicts."""
    cases = {case.id: case for case in suite.cases}
    lines = [*_counts(cards, cases), "", *_topics(cards)]
    lines += _failures(cards[0], cases) if len(cards) == 1 else ["", *_verdicts(cards, suite)]
    return "\n".join(lines) + "\n"


def _counts(cards: Sequence[Scorecard], cases: Mapping[str, Case]) -> Iterator[str]:
    yield "| tool | with | run on | score | its own adapters | " + " | ".join(VERDICTS) + " |"
    yield "|---|---|---|---|---|" + "---|" * len(VERDICTS)
    for card in cards:
        numbers = " | ".join(str(count) if count else "" for count in card.counts().values())
        facts = (card.tool, _versions(card), card.date[:10], card.score, _own(card, cases), numbers)
        yield f"| {' | '.join(facts)} |"


def _own(card: Scorecard, cases: Mapping[str, Case]) -> str:
    """`passed/all` of the adapters that the same PEFT and transformers made, and nobody edited."""
    names = ("peft", "transformers")
    mine = [
        verdict.passed
        for verdict in card.verdicts
        if not cases[verdict.case].edit
        and all(name in card.versions and verdict.made.get(name) == card.versions[name] for name in names)
    ]
    return f"{sum(mine)}/{len(mine)}" if mine else "–"


def _versions(card: Scorecard) -> str:
    return ", ".join(f"{name} {version}" for name, version in card.versions.items())


def _topics(cards: Sequence[Scorecard]) -> Iterator[str]:
    names = sorted({topic for card in cards for topic in card.topics()})
    yield "| tool | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for card in cards:
        found = [card.topics().get(name, (0, 0)) for name in names]
        yield f"| {_head(card)} | " + " | ".join(f"{passed}/{total}" for passed, total in found) + " |"


def _head(card: Scorecard) -> str:
    return ", ".join(filter(None, (card.tool, " / ".join(card.versions.values()))))


def _verdicts(cards: Sequence[Scorecard], suite: Suite) -> Iterator[str]:
    """A row for each case, a column for each tool that fails on one."""
    shown = {_head(card): {one.case: one for one in card.verdicts} for card in cards if not card.ok}
    yield from (f"<details><summary>All {len(suite.cases)} cases, and where each tool fails</summary>", "")
    yield f"| case | expected | about | {' | '.join(shown)} |"
    yield "|---|---|---|" + "---|" * len(shown)
    for case in suite.cases:
        verdicts = [found.get(case.id) for found in shown.values()]
        words = ["" if one is None else PASSES if one.passed else one.verdict for one in verdicts]
        yield f"| `{case.id}` | {case.expect} | {_cell(case.why, len(case.why))} | {' | '.join(words)} |"
    yield from ("", "</details>")


def _failures(card: Scorecard, cases: Mapping[str, Case]) -> Iterator[str]:
    wrong = card.with_verdict(WRONG, OTHER_FORM)
    rest = [verdict for verdict in card.verdicts if not verdict.passed and verdict not in wrong]
    if not wrong and not rest:
        return
    yield from ("", f"### {_head(card)}", "", f"Run as `{card.command}`.")
    if wrong:
        yield from ("", f"<details><summary>{plural(len(wrong), 'case')} with exit code 0</summary>", "")
        yield from _table(wrong, cases)
        yield from ("", "</details>")
    if rest:
        yield from ("", f"<details><summary>{plural(len(rest), 'failure')} aloud</summary>", "")
        yield from _by_message(rest)
        yield from ("", "</details>")


def _by_message(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Cases that fail with the same words, together."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        detail = "" if verdict.verdict == MOOT else f": {_cell(verdict.detail, WORDS)}"
        found.setdefault(f"{verdict.verdict}{detail}", []).append(f"`{verdict.case}`")
    for message, names in found.items():
        yield f"- {message}: {', '.join(names)}"


def _table(verdicts: Sequence[Verdict], cases: Mapping[str, Case]) -> Iterator[str]:
    yield "| verdict | case | base | adapter | made with | found |"
    yield "|---|---|---|---|---|---|"
    for verdict in verdicts:
        case = cases[verdict.case]
        places = f"`{case.base.name}` | `{case.adapter.name}`"
        yield f"| {verdict.verdict} | `{case.id}` | {places} | {_made(verdict)} | {_cell(verdict.detail)} |"


def _made(verdict: Verdict) -> str:
    names = ("unsloth_zoo", "peft", "transformers")
    return ", ".join(f"{name} {verdict.made[name]}" for name in names if name in verdict.made)


def _cell(text: str, width: int = WIDTH) -> str:
    """Text inside a table, on one line."""
    line = " ".join(text.split())
    line = line if len(line) <= width else line[: width - 1] + "…"
    for character in "\\|<*_`[":
        line = line.replace(character, f"\\{character}")
    return line


def read_all(folder: Path) -> list[Scorecard]:
    """The scorecards of a directory, in the order of their names; loudmerge's own first."""
    cards = [read_scorecard(file) for file in sorted(folder.glob("*.json"))]
    return sorted(cards, key=lambda card: "loudmerge" not in card.tool)


def replaced(page: str, table: str) -> str:
    """The page with the table between its marks. Raises ValueError where it has none."""
    before, begins, rest = page.partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not begins or not ends:
        raise ValueError(f"found no {BEGINS} and {ENDS}, expected both")
    return f"{before}{BEGINS}\n{table}{ENDS}{after}"


@click.command()
@click.argument("scorecards", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(*, scorecards: Path, page: Path) -> None:
    """Put the scorecards into the page."""
    table = markdown(read_all(scorecards), load(default_directory(Path())))
    page.write_text(replaced(page.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m loudmerge.conformance.page")
