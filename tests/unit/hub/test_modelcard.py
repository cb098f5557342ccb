"""The model card: what a merge reports stands in it, and nothing of the base's card is lost."""

from __future__ import annotations

from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")

from loudmerge.hub.modelcard import UNREADABLE, model_card  # noqa: E402
from loudmerge.reading.sidefiles import CARD_SECTION, is_card_of  # noqa: E402

REPORT: dict[str, Any] = {
    "loudmerge": "0.1.0",
    "verified": True,
    "adapter": {"path": "a", "peft_version": "0.19.1", "rank": 32},
    "layout": {"orientation": "swapped", "lora_b_layout": "rank_major", "evidence": []},
    "counts": {
        "expert": {"attempted": 18432, "applied": 18432},
        "dense": {"attempted": 192, "applied": 192},
        "replaced": {"attempted": 0, "applied": 0},
        "copied": 241,
    },
    "adapter_tensors": {"total": 576, "consumed": 576},
    "delta_kept": {"overall": 0.99812, "least": {"tensor": "lm_head.weight", "kept": 0.97}},
}

README = """---
# the licence of the base
license: apache-2.0
language:
- en
- no
tags:
- moe
- "on"
library_name: other
model-index:
- name: base
  results:
  - task: {type: text}
    metrics:
    - type: accuracy
      value: 0.50
base_model: someone/older
---

# The base

--- a line that looks like one

Its text.
"""


def card(readme: str | None = None, base_model: str | None = "owner/base", **changes: Any) -> str:
    return model_card(
        {**REPORT, **changes},
        base="owner/base",
        adapter="owner/adapter",
        base_model=base_model,
        readme=readme,
    )


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    loaded = yaml.load(matter, Loader=yaml.BaseLoader)
    assert isinstance(loaded, dict)
    return loaded


def test_the_section_says_what_was_merged() -> None:
    text = card()
    for line in (
        "## Merge",
        "| Base | `owner/base` |",
        "| Adapter | `owner/adapter`, rank 32 |",
        "| Layout | swapped, rank_major |",
        "| Expert projections merged | 18432 / 18432 |",
        "| Other matrices merged | 192 / 192 |",
        "| Tensors copied unchanged | 241 |",
        "| Adapter tensors used | 576 / 576 |",
        "| Update kept after rounding | 99.81% (least: 97.00%, `lm_head.weight`) |",
        "| Verified | every tensor recomputed and compared |",
        "| Made with | loudmerge 0.1.0 |",
    ):
        assert f"{line}\n" in text
    assert "replaced" not in text


def test_an_unverified_merge_does_not_claim_to_be() -> None:
    assert "| Verified | no |" in card(verified=False)


@pytest.mark.parametrize("kept", [None, {"overall": None, "least": None}])
def test_a_merge_that_added_nothing_has_no_line_on_rounding(kept: dict[str, None] | None) -> None:
    assert "rounding" not in card(delta_kept=kept, layout={"orientation": None, "lora_b_layout": None})


def test_the_front_matter_names_the_base() -> None:
    assert front(card()) == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["loudmerge", "lora"],
    }


def test_a_local_base_is_not_named_in_the_front_matter() -> None:
    assert "base_model" not in front(card(base_model=None))


def test_fields_of_the_base_stay_line_by_line_but_for_those_set_here() -> None:
    text = card(README)
    kept = README.split("---\n")[1]
    before, after = kept.split("tags:\n")
    assert before in text
    assert after.split("library_name: other\n")[1].split("base_model:")[0] in text
    old, new = front(README), front(text)
    assert new == {
        **old,
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["loudmerge", "lora", "moe", "on"],
    }


@pytest.mark.parametrize("tag", ["on", "no", "null", "it's", "a: b", "en", "region:us"])
def test_a_tag_is_text_to_every_reader(tag: str) -> None:
    readme = f"---\ntags:\n- {tag!r}\n---\n"
    assert yaml.safe_load(card(readme).split("---\n")[1])["tags"] == ["loudmerge", "lora", tag]


def test_the_text_of_the_base_stands_below_the_section() -> None:
    text = card(README)
    assert text.endswith(README.split("---\n", 2)[2].lstrip())
    assert text.index("## Merge") < text.index("# The base")


def test_a_local_base_keeps_the_base_model_of_its_own_card() -> None:
    assert front(card(README, base_model=None))["base_model"] == "someone/older"


def test_a_card_without_front_matter_is_kept() -> None:
    assert card("# Only text\n").endswith("\n# Only text\n")


@pytest.mark.parametrize(
    "readme",
    [
        "---\nlicense: [apache\n---\n# Text\n",
        "---\n- a\n- list\n---\n# Text\n",
        "---\ndescription: |\n  one\n\ntags: [a]\n? [tags, b]\n: x\n---\n# Text\n",
    ],
)
def test_front_matter_that_cannot_be_kept_is_shown_as_it_was(readme: str) -> None:
    text = card(readme)
    assert text.endswith(f"{UNREADABLE}\n\n{readme}")
    assert front(text)["base_model"] == "owner/base"


def test_windows_line_ends_do_not_hide_the_front_matter() -> None:
    assert front(card(README.replace("\n", "\r\n")))["license"] == "apache-2.0"


def test_the_card_of_a_card_keeps_both() -> None:
    text = card(card(README))
    assert text.count("## Merge\n") == 2
    assert front(text)["tags"] == ["loudmerge", "lora", "moe", "on"]


@pytest.mark.parametrize(
    ("card", "ok"),
    [
        (f"---\ntags: [lora]\n---\n\n{CARD_SECTION}\n| | |\n|---|---|\n\n# Base\n", True),
        (f"{CARD_SECTION}\n# Base\n", True),
        (f"{CARD_SECTION}\n# Another\n", False),
        (f"# Mine\n{CARD_SECTION}\n# Base\n", False),
        ("# Base\n# Base\n", False),
    ],
)
def test_a_card_is_known_by_its_section_and_the_base_s_text(card: str, ok: bool) -> None:
    readme = b"---\r\nlicense: mit\r\n---\r\n# Base\r\n"
    assert is_card_of(card.encode(), readme) == ok
    assert not is_card_of(readme, readme)
