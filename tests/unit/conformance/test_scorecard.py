"""Scorecards: sums, JSON and back, Markdown, and the page that holds it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from loudmerge.conformance import page
from loudmerge.conformance.cases import Suite
from loudmerge.conformance.judge import Verdict
from loudmerge.conformance.scorecard import Scorecard, read_scorecard, show

OWN, OTHER = {"peft": "0.19.1", "transformers": "5.5.0"}, {"peft": "0.18.1", "transformers": "5.5.0"}
VERDICTS = (
    Verdict("plain", "plain", "right", made=OWN, code=0),
    Verdict("told", "plain", "wrong-silently", "w: 1 of its | update away", 0, "line\n" * 3, OWN),
    Verdict("nan", "plain", "refused", code=3, said="no", made=OTHER),
    Verdict("pickle", "others", "crashed", "<boom>", 1, "boom", OTHER),
)
CARD = Scorecard("tool", "2026-11-25T07:00:00+00:00", "tool {base} {adapter} {out}", VERDICTS, OWN)


def test_sums_are_of_what_passed() -> None:
    assert (CARD.passed, CARD.score, CARD.ok) == (2, "2/4, 50 %", False)
    assert CARD.topics() == {"others": (0, 1), "plain": (2, 3)}
    assert {name: count for name, count in CARD.counts().items() if count} == {
        "right": 1,
        "refused": 1,
        "wrong-silently": 1,
        "crashed": 1,
    }


def test_no_case_is_no_success() -> None:
    assert not Scorecard("tool", "", "", ()).ok


def test_a_percentage_is_not_rounded_up() -> None:
    verdicts = (*(VERDICTS[:1] * 199), VERDICTS[1])
    assert Scorecard("tool", "", "", verdicts).score == "199/200, 99 %"


def test_json_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps(CARD.to_json()))
    assert read_scorecard(file) == CARD
    assert all(verdict["said"] == "" for verdict in CARD.to_json(brief=True)["verdicts"])


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match=r"found schema 9, expected 1"):
        read_scorecard(tmp_path / "card.json")


def test_the_terminal_shows_what_failed_and_the_score() -> None:
    stream = io.StringIO()
    show(CARD, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "wrong-silently  told: w: 1 of its | update away" in text
    assert "tool: 2/4, 50 % (1 right, 1 refused, 1 wrong-silently, 1 crashed)" in text
    assert "plain: " not in text.partition("topic")[0]


def test_markdown_names_each_failure_with_its_base_and_adapter(suite: Suite) -> None:
    text = page.markdown([CARD], suite)
    assert "| tool | peft 0.19.1, transformers 5.5.0 | 2026-11-25 | 2/4, 50 % | 1/2 | 1 | 1 | 1 |" in text
    found = r"peft 0.19.1, transformers 5.5.0 | w: 1 of its \| update away |"
    assert f"| wrong-silently | `told` | `b` | `plain` | {found}" in text
    assert r"- crashed: \<boom>: `pickle`" in text
    assert "`nan`" not in text
    unversioned = page.markdown([replace(CARD, versions={})], suite)
    assert "\n| tool | 0/1 | 2/3 |\n" in unversioned
    assert "\n### tool\n" in unversioned


def test_several_tools_stand_beside_each_other(suite: Suite) -> None:
    """Each in a column, but for one that passes everywhere; a case that a tool did not run is empty."""
    newer = replace(CARD, versions={"peft": "0.21.2"}, verdicts=(replace(VERDICTS[0], verdict="crashed"),))
    perfect = replace(CARD, tool="ours", verdicts=VERDICTS[:1])
    lines = page.markdown([CARD, newer, perfect], suite).splitlines()
    assert "| case | expected | about | tool, 0.19.1 / 5.5.0 | tool, 0.21.2 |" in lines
    rows = {line.split("|")[1].strip(" `"): line.split("|")[4:-1] for line in lines if line.startswith("| `")}
    assert rows.keys() == {case.id for case in suite.cases}
    assert rows["plain"] == [" ✓ ", " crashed "]
    assert rows["told"] == [" wrong-silently ", "  "]
    assert "update away" not in "".join(lines)


def test_the_page_is_written_between_its_marks(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "default_directory", lambda _: suite.root)
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "one.json").write_text(json.dumps(CARD.to_json()))
    file = tmp_path / "page.md"
    file.write_text(f"# Before\n\n{page.BEGINS}\nstale\n{page.ENDS}\n\nAfter\n")
    assert CliRunner().invoke(page.main, [str(cards), str(file)]).exit_code == 0
    text = file.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith(f"{page.ENDS}\n\nAfter\n")
    assert "stale" not in text
    assert page.replaced(text, page.markdown([CARD], suite)) == text


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found no <!-- scorecards: begins -->"):
        page.replaced("# Page\n", "table")
