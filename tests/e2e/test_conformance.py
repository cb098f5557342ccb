"""The conformance suite: loudmerge passes every case, and the suite holds what it promises.

Inside this process, which takes seconds; a few cases through the real command.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loudmerge
from loudmerge.conformance.cases import CHECKOUT, EITHER, MERGE, REFUSE, Case, load
from loudmerge.conformance.folder import read
from loudmerge.conformance.judge import Ended
from loudmerge.conformance.page import markdown, read_all, replaced
from loudmerge.conformance.runner import Command, run
from loudmerge.errors import REFUSAL_CODES

SUITE = load(CHECKOUT)
DOCS = Path(__file__).parents[2] / "docs" / "conformance.md"

REGIMES = {
    *(("4.57.6", peft) for peft in ("0.17.1", "0.18.1", "0.19.1")),
    *(("5.5.0", peft) for peft in ("0.18.1", "0.19.0", "0.19.1")),
    ("5.24.0", "0.21.2"),
}
"""(transformers, peft) that made an adapter of the suite, at least."""
LARGEST = 3.5e6
"""Bytes of all the suite's files."""


class Inside:
    """loudmerge.merge, called."""

    told = True

    def merge(self, case: Case, base: Path, adapter: Path, out: Path) -> Ended:
        options: dict[str, Any] = dict(case.options)
        try:
            loudmerge.merge(base, adapter, out, threads=1, **options)
        except loudmerge.MergeRefused as refusal:
            return Ended(3, str(refusal))
        return Ended(0)


@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.id)
def test_loudmerge_passes(case: Case) -> None:
    """Merged to the expected tensors, or refused with the code that the manifest names."""
    verdict = run(case, Inside())
    assert verdict.passed, f"{verdict.verdict}: {verdict.detail}\n{verdict.said}"
    if case.expect == REFUSE:
        assert verdict.verdict == "refused"
        assert verdict.said.startswith(f"{case.refusal}: ")
    if case.expect == MERGE:
        assert verdict.verdict == "right"
    if case.expect == EITHER:
        # Merging these right is possible; loudmerge says by which code it does not.
        assert verdict.said.startswith(f"{case.refusal}: ")


@pytest.mark.parametrize("name", ["qwen3_moe-unsloth-unmarked-told", "qwen3_moe-nan", "mixtral-5.5.0-0.19.0"])
def test_the_command_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: options, exit code and output directory."""
    monkeypatch.setenv("PYTHONPATH", str(Path(loudmerge.__file__).parents[1]))
    tool = Command(
        f"{shlex.quote(sys.executable)} -m loudmerge merge {{base}} {{adapter}} {{out}} {{options}}"
    )
    (case,) = SUITE.select((name,))
    verdict = run(case, tool)
    assert verdict.passed, f"{verdict.verdict}: {verdict.detail}\n{verdict.said}"
    assert verdict.code == (0 if case.expect == MERGE else 3)


def test_every_file_is_named_with_its_hash_and_nothing_is_left_over() -> None:
    assert SUITE.problems() == []
    used = {
        f"{folder.parent.name}/{folder.name}" for case in SUITE.cases for folder in (case.base, case.adapter)
    }
    used |= {f"expected/{case.expected.name}" for case in SUITE.cases if case.expected}
    # A base or adapter of which others were made counts as used; qwen3_moe's shards are made from it.
    used |= {f"adapters/{case.of}" for case in SUITE.cases}
    there = {"/".join(name.split("/")[:2]) for name in SUITE.files}
    assert there - used == set()
    assert sum((SUITE.root / name).stat().st_size for name in SUITE.files) < LARGEST


def test_there_are_cases_of_every_regime_layout_and_topic() -> None:
    assert len(SUITE.cases) >= 60
    assert len({case.id for case in SUITE.cases}) == len(SUITE.cases)
    made = {(case.made["transformers"], case.made["peft"]) for case in SUITE.cases}
    assert made >= REGIMES
    assert {case.layout for case in SUITE.cases} == set(SUITE.layouts)
    merged = [case for case in SUITE.cases if case.expect == MERGE]
    assert {case.layout for case in merged} == set(SUITE.layouts)
    topics = Counter(case.topic for case in SUITE.cases)
    assert len(topics) >= 10
    assert min(topics.values()) >= 3


def test_more_than_ten_experts_lie_apart_in_a_case_that_is_merged() -> None:
    """Experts in the order of their names as text: 0, 1, 10, 11, 2. With ten or fewer nobody notices."""
    numbers = [
        {
            int(found[1])
            for name in load_file(case.expected)
            if (found := re.search(r"\.experts\.(\d+)\.", name))
        }
        for case in SUITE.cases
        if case.expect == MERGE and case.expected
    ]
    assert max(len(found) for found in numbers) > 10


def test_what_a_merge_changes_in_the_config_is_said_where_it_adds_tensors() -> None:
    for case in SUITE.cases:
        if case.expected:
            assert bool(case.config) == bool(load_file(case.expected).keys() - read(case.base).keys()), (
                case.id
            )


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
def test_both_packings_of_unsloth_are_there(packing: str) -> None:
    """As Unsloth wrote the marker itself, in an adapter that nobody edited."""
    marked = [
        case
        for case in SUITE.cases
        if not case.edit
        and f'"lora_B_layout": "{packing}"' in (case.adapter / "adapter_config.json").read_text()
    ]
    assert marked
    assert all("unsloth_zoo" in case.made and case.expect == MERGE for case in marked)


def test_every_refusal_has_a_code() -> None:
    for case in SUITE.cases:
        assert bool(case.refusal) == (case.expect != MERGE), case.id
        assert not case.refusal or case.refusal in REFUSAL_CODES, case.id
        assert (case.expected is None) == (case.expect == REFUSE), case.id


@pytest.mark.parametrize(
    "case", [case for case in SUITE.cases if case.expected and not case.edit], ids=lambda case: case.id
)
def test_a_case_tells_the_base_from_the_merge(case: Case) -> None:
    """Every expected tensor differs from the base's by more than any tolerance; none is not finite."""
    assert case.expected is not None
    base, changed = read(case.base), load_file(case.expected)
    assert changed
    for name, tensor in changed.items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all(), name
        assert name not in base or (tensor - base[name].float()).abs().max() > 0.01, name


def test_the_page_says_what_the_scorecards_say() -> None:
    """`python -m loudmerge.conformance.page conformance/scorecards docs/conformance.md` writes it."""
    text = DOCS.read_text(encoding="utf-8")
    cards = read_all(SUITE.root / "scorecards")
    assert replaced(text, markdown(cards, SUITE)) == text
    ids = [case.id for case in SUITE.cases]
    for card in cards:
        assert [verdict.case for verdict in card.verdicts] == ids, card.tool
        assert card.versions, card.tool
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", card.date)
    own = [card for card in cards if "loudmerge" in card.versions]
    assert [card.score for card in own] == [f"{len(ids)}/{len(ids)}, 100 %"]
