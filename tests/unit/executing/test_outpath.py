"""An OUT that exists is not replaced where files of an input lie in it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from loudmerge.converting.convert import convert
from loudmerge.errors import MergeRefused
from loudmerge.executing.outpath import make_parents, refuse_inputs
from tests.unit.builders import EXPERTS, fused_lora, write_adapter
from tests.unit.places import Place, content


def link_into_out(place: Place, file: Path) -> None:
    """The file itself lies in OUT then; what was there is a link to it."""
    place.out.mkdir(exist_ok=True)
    (place.out / file.name).write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(place.out / file.name)


@pytest.mark.parametrize(
    "name",
    [
        *("model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
        *("chat/template.jinja", "../adapter/adapter_model.safetensors", "../adapter/adapter_config.json"),
    ],
)
def test_an_out_that_holds_what_an_input_links_to_is_not_replaced(name: str, place: Place) -> None:
    link_into_out(place, place.base / name)
    before = content(place.root)
    with pytest.raises(MergeRefused, match=r"^out-exists: ") as refusal:
        place.merge(overwrite=True)
    found = f"found {place.out / Path(name).name}, which BASE or ADAPTER links to, expected a directory apart"
    assert found in str(refusal.value)
    assert content(place.root) == before


def test_nor_is_an_adapter_converted_into_it(place: Place) -> None:
    write_adapter(place.adapter, fused_lora(EXPERTS, [(6, 4)], experts=2))
    link_into_out(place, place.adapter / "adapter_model.safetensors")
    before = content(place.root)
    with pytest.raises(MergeRefused, match="which BASE or ADAPTER links to"):
        convert(place.adapter, place.out, "peft-0.18", orientation="standard", overwrite=True)
    assert content(place.root) == before


def test_an_out_that_is_a_file_which_an_input_links_to_is_not_replaced(place: Place) -> None:
    (place.base / "LICENSE").rename(place.out)
    (place.base / "LICENSE").symlink_to(place.out)
    with pytest.raises(MergeRefused, match="which BASE or ADAPTER links to"):
        place.merge(overwrite=True)
    assert place.out.read_text() == "LICENSE"


def test_links_to_elsewhere_to_nothing_and_to_themselves_touch_no_out(place: Place) -> None:
    place.out.mkdir()
    (place.adapter / "loop").symlink_to(place.adapter / "loop")
    (place.adapter / "gone").symlink_to(place.out / "gone")
    (place.adapter / "merged").symlink_to(place.out)
    (place.adapter / "above").symlink_to(place.root)
    refuse_inputs(place.out, [place.base, place.adapter])
    place.merge(overwrite=True)
    assert (place.out / "config.json").is_file()


def test_parents_that_cannot_all_be_made_are_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def full(self: Path, *args: Any, **options: Any) -> None:
        if self.name == "c":
            mkdir(self.parent, parents=True)
            raise OSError(errno.ENOSPC, "full")
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="full"):
        make_parents(tmp_path / "a" / "b" / "c" / "d" / "out")
    assert list(tmp_path.iterdir()) == []
