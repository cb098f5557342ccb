"""The model card that a push puts in place of OUT's README.md. Pure: report and old card in, new card out.

The old card is the base's. All of it stays: its front matter line by line but for the fields set here, and
its text below the section "Merge". Needs PyYAML, which huggingface_hub brings.

Front matter: the Hub's documentation, "Model cards", on metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from loudmerge import __version__
from loudmerge.reading.sidefiles import CARD_SECTION, split_card

TAGS = ("loudmerge", "lora")
UNREADABLE = (
    "The base's README.md begins with front matter that is no YAML mapping. It stands below as it was found, "
    "and nothing in it counts for this model."
)

_FIELD = re.compile(r"^(?=[^\s#\-])", re.MULTILINE)
_PLAIN_TAG = re.compile(r"[A-Za-z][\w.-]*")


def model_card(
    report: Mapping[str, Any],
    *,
    base: str,
    adapter: str,
    base_model: str | None = None,
    readme: str | None = None,
) -> str:
    """The text of the card.

    report: a merge_report.json of status `merged`. base, adapter: how the text names the inputs.
    base_model: the base's Hub id, None for a local one (the Hub rejects anything else in that field; the
    old card's `base_model` then stays). readme: the README.md that OUT has from the base.
    """
    front, text = split_card(readme or "")
    section = merge_section(report, base=base, adapter=adapter)
    fields = _our_fields(base_model, _tags(front))
    merged = fields + "".join(block for name, block in _blocks(front) if name not in _names(fields))
    if not _keeps(merged, front, fields):
        # Nothing of the old card may be lost or change its meaning.
        fields = _our_fields(base_model, ())
        return f"---\n{fields}---\n\n{section}\n{UNREADABLE}\n\n{readme}"
    return f"---\n{merged}---\n\n{section}" + (f"\n{text.lstrip()}" if text.strip() else "")


def merge_section(report: Mapping[str, Any], *, base: str, adapter: str) -> str:
    """The section "Merge": what was merged into what, by which layout, and how much of it."""
    counts, layout, kept = report["counts"], report["layout"] or {}, report["delta_kept"]
    rows = [
        ("Base", f"`{base}`"),
        ("Adapter", f"`{adapter}`, rank {report['adapter']['rank']}"),
        ("Layout", ", ".join(f"{value}" for key in _LAYOUT if (value := layout.get(key)))),
        *((label, _applied(counts[name])) for name, label in _COUNTED if counts[name]["attempted"]),
        ("Tensors copied unchanged", str(counts["copied"])),
        ("Adapter tensors used", "{consumed} / {total}".format_map(report["adapter_tensors"])),
        ("Update kept after rounding", _kept(kept)),
        ("Verified", "every tensor recomputed and compared" if report.get("verified") is True else "no"),
        ("Made with", f"loudmerge {report.get('loudmerge', __version__)}"),
    ]
    table = "".join(f"| {label} | {value} |\n" for label, value in rows if value)
    return f"{CARD_SECTION}\n| | |\n|---|---|\n{table}"


_LAYOUT = ("orientation", "lora_b_layout")
_COUNTED = (
    ("expert", "Expert projections merged"),
    ("dense", "Other matrices merged"),
    ("replaced", "Tensors replaced"),
)


def _applied(count: Mapping[str, int]) -> str:
    return f"{count['applied']} / {count['attempted']}"


def _kept(kept: Mapping[str, Any] | None) -> str:
    """Empty where nothing was added, and so nothing rounded away."""
    if not kept or kept["overall"] is None:
        return ""
    least = kept["least"]
    overall = f"{kept['overall']:.2%}"
    return f"{overall} (least: {least['kept']:.2%}, `{least['tensor']}`)" if least else overall


def _our_fields(base_model: str | None, old_tags: tuple[str, ...]) -> str:
    lines = [f"base_model: {base_model}", "base_model_relation: finetune"] if base_model else []
    lines += ["library_name: transformers", "tags:"]
    tags = [*TAGS, *(tag for tag in old_tags if tag not in TAGS)]
    lines += [f"- {_scalar(tag)}" for tag in tags]
    return "".join(f"{line}\n" for line in lines)


def _scalar(tag: str) -> str:
    """A tag so that every reader takes it for text, also `on` and `no`, which YAML 1.1 takes for booleans."""
    if _PLAIN_TAG.fullmatch(tag) and yaml.safe_load(tag) == tag:
        return tag
    return "'" + tag.replace("'", "''") + "'"


def _blocks(front: str) -> list[tuple[str, str]]:
    """The top-level fields of front matter with all their lines; a comment goes with the field above it."""
    parts = [part for part in _FIELD.split(front) if part]
    return [(_name(part), part if part.endswith("\n") else f"{part}\n") for part in parts]


def _name(block: str) -> str:
    return block.split(":", 1)[0].strip().strip("'\"")


def _names(front: str) -> set[str]:
    return {name for name, _ in _blocks(front)}


def _load(front: str) -> Any:
    """Front matter with every scalar as the text that stands there: YAML 1.1 would read `no` as false."""
    try:
        return yaml.load(front, Loader=yaml.BaseLoader)  # noqa: S506 - BaseLoader makes strings only
    except yaml.YAMLError:
        return None


def _tags(front: str) -> tuple[str, ...]:
    old = _load(front)
    tags = old.get("tags", ()) if isinstance(old, dict) else ()
    return (tags,) if isinstance(tags, str) and tags else tuple(str(tag) for tag in tags)


def _keeps(merged: str, front: str, fields: str) -> bool:
    """Whether the new front matter says what is set here, and of the rest what the old one said."""
    old, ours = _load(front) if front.strip() else {}, _load(fields)
    return isinstance(old, dict) and _load(merged) == {**old, **ours}
