"""A base, an adapter and an OUT on disk, for tests of what a merge leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loudmerge
from tests.unit.builders import PREFIX, Q_PROJ, lora, values, write_adapter, write_base

K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
TENSORS = {f"{Q_PROJ}.weight": values(8, 6), f"{K_PROJ}.weight": values(5, 6), "norm.weight": values(6)}
ENTRIES = [
    "LICENSE", "chat/template.jinja", "config.json", "merge_report.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
]  # fmt: skip
VARYING = {"merge_report.json"}  # it says how long the merge took


class Place:
    """BASE, ADAPTER and OUT in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.adapter, self.out = root / "base", root / "adapter", root / "out"
        self.staging = root / ".out.loudmerge-staging"

    def merge(self, out: Path | None = None, **options: Any) -> None:
        loudmerge.merge(self.base, self.adapter, out or self.out, threads=1, **{"verify": False, **options})

    def poison(self) -> None:
        """A merge of this adapter is refused while it runs: its plan reads no numbers."""
        held = lora(Q_PROJ, 8, 6)
        held[f"{PREFIX}{Q_PROJ}.lora_A.weight"][0, 0] = float("nan")
        write_adapter(self.adapter, held)


def make_place(root: Path) -> Place:
    """BASE with two shards and side files, and an adapter for one of its weights."""
    found = Place(root)
    shards = ((f"{Q_PROJ}.weight", "norm.weight"), (f"{K_PROJ}.weight",))
    write_base(found.base, TENSORS, shards=shards)
    (found.base / "chat").mkdir()
    for name in ("tokenizer.json", "LICENSE", "chat/template.jinja"):
        (found.base / name).write_text(name)
    write_adapter(found.adapter, lora(Q_PROJ, 8, 6))
    return found


def undisturbed(place: Place) -> dict[str, bytes]:
    """The files of a merge that nothing disturbed."""
    place.merge(place.root / "reference", verify=True)
    found = content(place.root / "reference")
    shutil.rmtree(place.root / "reference")
    return found


def make_old(place: Place) -> dict[str, bytes]:
    """An OUT that is there already."""
    place.out.mkdir()
    (place.out / "config.json").write_text("old")
    (place.out / "old.safetensors").write_bytes(b"old")
    return content(place.out)


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def same(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name] == wanted[name] for name in found.keys() - VARYING
    )


def nothing_left(place: Place) -> bool:
    return sorted(path.name for path in place.root.iterdir()) == ["adapter", "base"]
