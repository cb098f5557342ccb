"""Base and adapter that change while they are merged: a part of each would be in OUT."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loudmerge.errors import MergeRefused
from loudmerge.executing.writer import Staging
from loudmerge.planning.plan import MergePlan
from loudmerge.planning.planner import make_plan
from tests.unit.builders import Q_PROJ, lora, write_adapter
from tests.unit.places import Place, content, nothing_left, same

BASE = "model-00002-of-00002.safetensors"


def write_in_place(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)


def replace(file: Path) -> None:
    draft = file.with_name("draft")
    draft.write_bytes(file.read_bytes())
    draft.replace(file)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("change", [write_in_place, replace, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        *(f"base/{BASE}", "base/config.json", "base/tokenizer.json"),
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
    ],
)
def test_an_input_that_changes_during_the_merge_is_refused(
    name: str, change: Callable[[Path], object], verify: bool, place: Place
) -> None:
    def changing(stage: str, done: int, total: int) -> None:
        if stage == "merge" and done == total:
            change(place.root / name)

    with pytest.raises(MergeRefused) as refusal:
        place.merge(verify=verify, progress=changing)
    assert [problem.where for problem in refusal.value.problems] == [str(place.root / name)]
    assert str(refusal.value) == (
        f"corrupt-file: {place.root / name}: found another file, or another size or time of change, than "
        "when the merge began, expected a file that stays as it is while it is read. Something replaced or "
        "changed it: merge again once that has ended."
    )
    assert nothing_left(place)


@pytest.mark.parametrize("name", [f"base/{BASE}", "base/config.json", "base/chat/template.jinja"])
def test_an_input_that_is_replaced_as_soon_as_it_is_planned_with_is_refused(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors may lie elsewhere in the new file, which has another config, or another tokenizer."""

    def replacing(*given: Any) -> MergePlan:
        found = make_plan(*given)
        replace(place.root / name)
        return found

    monkeypatch.setattr("loudmerge.merging.merge.make_plan", replacing)
    with pytest.raises(MergeRefused, match="corrupt-file") as refusal:
        place.merge(verify=False)
    assert refusal.value.where == str(place.root / name)
    assert nothing_left(place)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    verify: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Staging.copy_file

    def copying(self: Staging, source: Path, name: str) -> None:
        copied(self, source, name)
        if name == "LICENSE":
            source.write_text("the rest of it")

    monkeypatch.setattr(Staging, "copy_file", copying)
    with pytest.raises(MergeRefused, match=r"^corrupt-file: .*/LICENSE: found another file"):
        place.merge(verify=verify)
    assert nothing_left(place)


def test_what_is_left_out_may_change(place: Place, reference: dict[str, bytes]) -> None:
    (place.base / "pytorch_model.bin").write_bytes(b"1")
    (place.base / "consolidated.pth").symlink_to("nothing")

    def changing(*_: object) -> None:
        write_in_place(place.base / "pytorch_model.bin")

    place.merge(progress=changing, verify=True)
    assert same(content(place.out), reference)


def test_an_adapter_that_is_trained_on_during_the_verification_is_refused(place: Place) -> None:
    """That OUT is not its merge would be true as well, and help nobody."""

    def training(stage: str, *_: int) -> None:
        if stage == "verify":
            write_adapter(place.adapter, lora(Q_PROJ, 8, 6, seed=5))

    with pytest.raises(MergeRefused, match=r"corrupt-file: .*/adapter_"):
        place.merge(verify=True, progress=training)
    assert nothing_left(place)


def test_a_link_that_is_made_to_an_input_meanwhile_changes_nothing(
    place: Place, reference: dict[str, bytes]
) -> None:
    def linking(stage: str, done: int, total: int) -> None:
        if stage == "merge" and done == total:
            os.link(place.base / BASE, place.root / "link")

    place.merge(progress=linking, verify=True)
    assert same(content(place.out), reference)
