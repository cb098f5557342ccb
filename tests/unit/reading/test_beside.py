"""Weights beside an adapter's own: refused, said or passed over, by their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import loudmerge
from loudmerge.errors import MergeRefused
from loudmerge.reading.adapter import read_adapter
from tests.unit.builders import plan_of
from tests.unit.places import Place


@pytest.mark.parametrize(
    "name",
    [
        "vit.safetensors",
        "mtp_head.safetensors",
        "non_lora_trainables.bin",
        "embeddings.pt",
        "projector.pth",
        "adapter_model_2.safetensors",
        "optimizer.safetensors",
    ],
)
def test_weights_that_may_have_been_trained_with_it_are_refused(place: Place, name: str) -> None:
    """A merge would leave out what ms-swift, Unsloth and LLaVA write there."""
    (place.adapter / name).write_bytes(b"never opened")
    with pytest.raises(MergeRefused) as refused:
        loudmerge.merge(place.base, place.adapter, place.out)
    assert refused.value.code == "unconsumed-adapter-tensor"
    assert f"{place.adapter}/{name}: found weights beside adapter_model.safetensors" in str(refused.value)
    assert "the merge would lose them" in refused.value.hint
    assert not place.out.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "optimizer_1.bin", "scheduler.pt", "scaler.pt", "training_args.bin"),
        *("rng_state.pth", "rng_state_0.pth", "random_states_0.pkl", "sampler.bin", "dl_state_dict.bin"),
        *(
            "adapter_model.bin",
            "adapter_model.pt",
            "pytorch_model_fsdp.bin",
            "tokenizer.model",
            "model.safetensors.index.json",
        ),
    ],
)
def test_the_state_of_a_training_is_none_of_the_adapters_weights(place: Place, name: str) -> None:
    (place.adapter / name).write_bytes(b"never opened")
    assert read_adapter(place.adapter).unread == ()


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"),
        *("value_head.safetensors", "consolidated.00.pth", "adapter.gguf"),
    ],
)
def test_a_model_of_its_own_is_said_not_to_be_read(place: Place, name: str) -> None:
    (place.adapter / name).write_bytes(b"never opened")
    notes = plan_of(place.base, place.adapter).notes
    assert notes[-1] == f"other weights beside the adapter are not read: {name}"


def test_an_adapter_in_shards_is_refused_with_how_to_join_them(place: Place) -> None:
    """As transformers' save_pretrained saves a large one."""
    whole = place.adapter / "adapter_model.safetensors"
    for number in (1, 2):
        (place.adapter / f"adapter_model-0000{number}-of-00002.safetensors").write_bytes(whole.read_bytes())
    whole.unlink()
    with pytest.raises(MergeRefused, match=r"adapter_model-00001-of-.* in 2 files, expected one") as refused:
        read_adapter(place.adapter)
    assert refused.value.code == "unsupported-adapter"
    assert "Join them" in refused.value.hint


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("target", ["../../blobs/gone", None])
def test_a_link_to_nothing_is_corrupt(target: str | None, name: str, place: Place) -> None:
    """A cache of the Hub that lost a blob: the name is there, so that none is missing would not help."""
    (place.adapter / name).unlink()
    (place.adapter / name).symlink_to(target or name)
    with pytest.raises(MergeRefused, match=rf"{name}: found a link to .*, where nothing is") as refused:
        read_adapter(place.adapter)
    assert refused.value.code == "corrupt-file"


def test_a_directory_of_adapters_is_refused_with_their_names(place: Place) -> None:
    """PEFT saves each adapter that is not called "default" in a folder of its name."""
    for name in ("second", "first"):
        shutil.copytree(place.adapter, place.adapter.parent / "all" / name)
    with pytest.raises(MergeRefused, match=r"all: found no adapter_config\.json") as refused:
        read_adapter(place.adapter.parent / "all")
    assert refused.value.hint == "Give the folder in it of the adapter that is meant: first, second."


def test_what_lies_in_folders_is_none_of_this_adapters(place: Place) -> None:
    (place.adapter / "global_step5").mkdir()
    Path(place.adapter, "global_step5", "states.pt").write_bytes(b"")
    assert read_adapter(place.adapter).unread == ()
