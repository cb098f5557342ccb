"""The pages for users: examples print what they say, tables are the code's, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

import loudmerge
from loudmerge import cli
from loudmerge.errors import REFUSAL_CODES
from loudmerge.reading.families import FAMILIES
from tests.support.command import run_inside

CHECKOUT = Path(__file__).parents[2]
PAGES = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("benchmarks/*/*.md")]
README, REFUSALS = ((CHECKOUT / name).read_text("utf-8") for name in ("README.md", "docs/refusals.md"))


def cells(page: str, head: str) -> list[str]:
    """The first column of the table with this head."""
    lines = page.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    rows = lines[first : lines.index("", first)]
    return [re.split(r"(?<!\\)\|", row)[1].strip().replace("\\|", "|") for row in rows]


def options(name: str) -> dict[str, click.Parameter]:
    """Of a command."""
    return {option: one for one in cli.commands.commands[name].params for option in one.opts}


def words(option: click.Parameter) -> list[str]:
    assert isinstance(option.type, click.Choice)
    return list(option.type.choices)


def measured(text: str) -> str:
    """What may differ from run to run, and how lines wrap, left out."""
    return " ".join(re.sub(r"\d+\.\d+ (s|GiB)", r"N \1", text).split())


def test_the_examples_of_the_readme_print_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conformance").symlink_to(CHECKOUT / "conformance")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"(?ms)^```console\n(\$ loudmerge merge conformance/.*?)^```$", README)
    shown = [part.partition("\n") for part in block.split("$ loudmerge ")[1:]]
    codes = []
    for line, _, wanted in shown:
        ended = run_inside(capsys, *shlex.split(line))
        codes.append(ended.code)
        assert measured(ended.stdout or ended.stderr) == measured(wanted)
    assert codes == [0, 3]


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the live model's line, for which a function stands in."""
    for name, place in (("base", "bases/qwen3_moe"), ("adapter", "adapters/qwen3_moe-fused-0.18.1")):
        (tmp_path / name).symlink_to(CHECKOUT / "conformance" / place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loudmerge, "save_pretrained_merged", lambda *given: given, raising=False)
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", README)
    names: dict[str, Any] = {"model": "a model", "tokenizer": "its tokenizer"}
    exec(code, names)  # noqa: S102 - the page's own
    assert names["report"] == ("a model", "live", "its tokenizer")
    assert isinstance(names["plan"], loudmerge.MergePlan)
    assert isinstance(names["verified"], loudmerge.Verification)
    assert names["verified"].ok


def test_the_readme_has_every_option_of_merge() -> None:
    there = options("merge")
    rows = [option for row in cells(README, "option") for option in re.findall(r"`(--[^`]+)`", row)]
    found = dict(row.partition(" ")[::2] for row in rows)
    own = {name for name in there if name.startswith("--")} - {"--json", "--quiet"}
    assert found.keys() == own
    choices = {name: text.split("|") for name, text in found.items() if "|" in text and name != "--device"}
    assert choices == {name: words(there[name]) for name in choices}
    assert len(choices) == 4


def test_the_readme_has_every_layout_of_convert() -> None:
    assert [row.strip("`") for row in cells(README, "LAYOUT")] == words(options("convert")["--to"])


def test_every_refusal_code_is_explained_and_no_other_is_named() -> None:
    codes = {row.strip("`") for row in cells(REFUSALS, "code")}
    assert codes == REFUSAL_CODES
    by_name = re.findall(r"(?m)^\| .* \| .* \| `([\w-]+)` \|$", REFUSALS)
    assert len(by_name) > 20
    assert {*by_name} <= codes
    assert all(f"| `{name}` |" in REFUSALS for name, family in FAMILIES.items() if family.refused)


def test_what_is_counted_is_there() -> None:
    manifest = json.loads((CHECKOUT / "conformance" / "manifest.json").read_text("utf-8"))
    for page in (README, (CHECKOUT / "docs" / "conformance.md").read_text("utf-8")):
        assert re.findall(r"\b(\d+) small", page) == [str(len(manifest["cases"]))]
    assert f"All {sum(family.known for family in FAMILIES.values())} MoE model types" in README


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_every_link_inside_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
