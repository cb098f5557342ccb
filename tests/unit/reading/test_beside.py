"""Weights beside an adapter's own: refused, said or passed over, by their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import loudmerge
from loudmerge.errors import MergeRefused
from loudmerge.reading.adapter import read_adapter
from loudmerge.reading.adapter_config import WEIGHTS
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
        *(
            "value_head.safetensors",
            "v_head.safetensors",
            "v_head.bin",
            "consolidated.00.pth",
            "adapter.gguf",
        ),
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


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin"])
def test_the_state_of_a_training_is_not_taken_for_a_pickled_adapter(place: Place, name: str) -> None:
    (place.adapter / WEIGHTS).unlink()
    (place.adapter / name).write_bytes(b"never opened")
    with pytest.raises(MergeRefused, match=r"found no adapter_model\.safetensors, expected") as refused:
        read_adapter(place.adapter)
    assert refused.value.code == "unsupported-adapter"


def test_a_pickled_adapter_is_named_whatever_else_is_pickled(place: Place) -> None:
    (place.adapter / WEIGHTS).unlink()
    for name in ("a.bin", "adapter_model.bin", "training_args.bin"):
        (place.adapter / name).write_bytes(b"never opened")
    with pytest.raises(MergeRefused, match=r"unsafe-file: .*adapter_model\.bin: found a pickle"):
        read_adapter(place.adapter)


@pytest.mark.parametrize("folder", ["pytorch_model_fsdp_0", "global_step120"])
def test_weights_that_lie_in_a_trainings_parts_are_to_be_gathered(place: Place, folder: str) -> None:
    (place.adapter / WEIGHTS).unlink()
    (place.adapter / folder).mkdir()
    (place.adapter / "training_args.bin").write_bytes(b"never opened")
    with pytest.raises(MergeRefused, match=f"a training's weights in parts, in {folder}") as refused:
        read_adapter(place.adapter)
    assert "FULL_STATE_DICT" in refused.value.hint


@pytest.mark.parametrize("folder", ["pytorch_model_fsdp_0", "global_step120"])
def test_such_parts_beside_the_whole_adapter_are_its_trainings(place: Place, folder: str) -> None:
    (place.adapter / folder).mkdir()
    assert read_adapter(place.adapter).unread == ()


def test_a_restarted_adapter_is_refused_for_the_base_it_was_added_to(place: Place) -> None:
    """Source: axolotl's ReLoRA. Merged into the original base, what the earlier LoRAs learned is lost."""
    (place.adapter / "relora").mkdir()
    with pytest.raises(MergeRefused) as refused:
        loudmerge.merge(place.base, place.adapter, place.out)
    assert refused.value.code == "unsupported-adapter"
    assert "relora, a base that ReLoRA added this training's earlier LoRAs to" in str(refused.value)
    assert "axolotl saves at the end of training" in refused.value.hint


def test_so_is_the_adapter_of_a_restart(place: Place) -> None:
    folder = place.adapter.parent / "checkpoint-8" / "adapter"
    shutil.copytree(place.adapter, folder)
    (folder.parent / "relora").mkdir()
    with pytest.raises(MergeRefused, match="ReLoRA added this training's earlier"):
        read_adapter(folder)


def test_a_whole_model_is_no_adapter(place: Place) -> None:
    """As when it was merged by its trainer, or where BASE and ADAPTER are in each other's place."""
    with pytest.raises(MergeRefused, match=r"but the config\.json of a whole model") as refused:
        read_adapter(place.base)
    assert "there is nothing to merge" in refused.value.hint
    assert "BASE, then ADAPTER" in refused.value.hint


def test_an_adapter_is_no_base(place: Place) -> None:
    with pytest.raises(MergeRefused, match=r"but the adapter_config\.json of an adapter") as refused:
        loudmerge.merge(place.adapter, place.adapter, place.out)
    assert refused.value.code == "unsupported-base"
    assert "Name the base first" in refused.value.hint
