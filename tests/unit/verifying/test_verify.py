"""verify recomputes every element of OUT: a right OUT passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loudmerge.layout import LoraBLayout
from loudmerge.reading.checkpoint import open_checkpoint
from tests.unit.reference import rounded
from tests.unit.verifying.verify_world import (
    ATTENTION,
    EXPERTS,
    FUSED,
    HIDDEN,
    INNER,
    SHARDS,
    WORDS,
    E,
    World,
    make,
    moved,
    wide,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """Each world once: its OUT is to be copied before it is changed."""

    @cache
    def once(dtype: str, rounding: str = "nearest", size: float = 0.1) -> World:
        return make(tmp_path_factory.mktemp("world"), dtype, rounding, size)

    return once


@pytest.fixture
def world(made: Callable[..., World], tmp_path: Path) -> World:
    return made("bfloat16").copied(tmp_path)


# --- a right OUT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "peft", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_right_out_passes(made: Callable[..., World], dtype: str, rounding: str, size: float) -> None:
    world = made(dtype, rounding, size)
    found = world.verify()
    assert found.ok, found.summary()
    assert found.tensors == len(world.plan.outputs) == 3 * E + 12
    assert found.files == 5  # two shards, index, config and generation_config
    assert found.delta_kept is not None
    assert abs(found.delta_kept - 1.0) < (0.2 if size < 1 else 0.01)


@pytest.mark.parametrize("elements", [1, 50, 200])
def test_the_size_of_the_blocks_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Patches that start, end and step across the blocks' borders, and elements judged in several goes."""
    whole = world.verify()
    monkeypatch.setattr("loudmerge.verifying.judge.BLOCK", elements)
    monkeypatch.setattr("loudmerge.verifying.judge._JUDGED_AT_ONCE", 3)
    found = world.verify()
    assert found.ok, found.summary()
    assert found.delta_kept == pytest.approx(whole.delta_kept)
    for key in (f"{FUSED}.gate_up_proj", f"{FUSED}.half_proj"):
        world.edit(key, lambda t: t.flip(1))
    world.edit(f"{ATTENTION}.c_attn.weight", lambda t: moved(t, (HIDDEN - 1, 3), 2))
    in_blocks = world.verify().mismatches
    monkeypatch.undo()
    in_one = world.verify().mismatches
    assert len(in_blocks) == len(in_one) == 3
    for a, b in zip(in_blocks, in_one, strict=True):
        assert (a.key, a.wrong, a.index, a.experts) == (b.key, b.wrong, b.index, b.experts)
        assert a.max_ulp == pytest.approx(b.max_ulp)


def test_delta_kept_is_the_share_of_the_update_that_the_file_holds(tmp_path: Path) -> None:
    case = wide(tmp_path, "float32")
    weight = load_file(case.world.plan.base.path / SHARDS[0])["w"].double().numpy()
    for share in (1.0, 0.5, 0.0, -1.0):
        case.write(rounded(weight + share * (case.exact - weight), "float32"))
        found = case.world.verify(rounding="nearest")
        assert found.ok == (share == 1.0)
        assert found.delta_kept == pytest.approx(share, abs=1e-6)


def test_without_an_update_there_is_no_delta_kept(world: World) -> None:
    copies = tuple(o for o in world.plan.outputs if o.key in {"model.norm.weight", "model.steps"})
    assert world.verify(outputs=copies).delta_kept is None


def test_the_json_and_the_summary_say_the_same(world: World) -> None:
    world.edit("model.norm.weight", lambda t: t * 2)
    found = world.verify()
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["mismatches"][0]["key"] == "model.norm.weight"
    assert not json.loads(text)["ok"]
    assert found.summary().startswith("NOT verified: ")
    assert "bytes: model.norm.weight in model-0000" in found.summary()


# --- damage to values ----------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "peft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("steps", [2, -2])
def test_one_element_of_one_expert_off_by_two_units_is_found(
    made: Callable[..., World], tmp_path: Path, dtype: str, rounding: str, steps: int
) -> None:
    world = made(dtype, rounding, 0.01).copied(tmp_path)
    key = f"{EXPERTS}.2.up_proj.weight"
    world.edit(key, lambda t: moved(t, (5, 9), steps))
    found = world.only()
    assert (found.key, found.what, found.wrong, found.index) == (key, "value", 1, (5, 9))
    assert (found.expert, found.projection) == (2, "up_proj")
    assert found.max_ulp is not None
    assert 1.4 < found.max_ulp < 2.6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_unit_is_enough(made: Callable[..., World], tmp_path: Path, dtype: str) -> None:
    world = made(dtype).copied(tmp_path)
    world.edit(f"{FUSED}.down_proj", lambda t: moved(t, (3, 1, 2), 1))
    found = world.only()
    assert (found.index, found.expert, found.experts, found.wrong) == ((3, 1, 2), 3, (3,), 1)
    assert found.projection == "down_proj"
    assert "1 of 4 experts wrong" in found.detail


def test_an_expert_without_its_delta_is_found(world: World) -> None:
    key = f"{FUSED}.gate_up_proj"
    base = load_file(next(o.source.file for o in world.plan.outputs if o.key == key))[key]

    def undo(t: torch.Tensor) -> torch.Tensor:
        t[1] = base[1]
        return t

    world.edit(key, undo)
    found = world.only()
    assert (found.key, found.what, found.expert, found.experts) == (key, "value", 1, (1,))
    assert found.wrong > HIDDEN * INNER


def test_two_swapped_experts_are_found_and_both_named(world: World) -> None:
    key = f"{FUSED}.down_proj"
    world.edit(key, lambda t: t[[0, 2, 1, 3]])
    assert world.only().experts == (1, 2)


def test_two_swapped_expert_files_are_found(world: World) -> None:
    first, second = (f"{EXPERTS}.{e}.gate_proj.weight" for e in (0, 3))
    merged = {
        key: load_file(world.out / output.shard)[key]
        for output in world.plan.outputs
        if (key := output.key) in {first, second}
    }
    world.edit(first, lambda _: merged[second])
    world.edit(second, lambda _: merged[first])
    found = world.verify().mismatches
    assert [(m.key, m.expert) for m in found] == [(first, 0), (second, 3)]


def test_another_scaling_is_found_in_every_tensor(world: World) -> None:
    sites = tuple(replace(site, scaling=1.01 * site.scaling) for site in world.plan.sites)
    found = world.verify(sites=sites)
    assert {m.key for m in found.mismatches} == {output.key for output in world.plan.outputs if output.terms}
    assert {m.what for m in found.mismatches} == {"value"}


def test_another_packing_is_found_in_every_tensor_of_its_site(world: World) -> None:
    sites = list(world.plan.sites)
    sites[0] = replace(sites[0], lora_b_layout=LoraBLayout.GROUPED_BY_EXPERT)
    found = world.verify(sites=tuple(sites))
    touched = {o.key for o in world.plan.outputs if any(term.site == 0 for term in o.terms)}
    assert {m.key for m in found.mismatches} == touched
    assert all(len(m.experts) == E for m in found.mismatches if m.key.startswith(FUSED))


def test_the_untrained_half_of_a_matrix_has_to_be_the_base(world: World) -> None:
    key = f"{FUSED}.half_proj"
    world.edit(key, lambda t: moved(t, (2, INNER - 1, 0), 1))
    found = world.only()
    assert (found.index, found.wrong) == ((2, INNER - 1, 0), 1)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (f"{ATTENTION}.q_proj.weight", (0, 0)),
        (f"{ATTENTION}.q_proj.bias", (5,)),
        (f"{ATTENTION}.v_proj.weight", (3, 4)),
        (f"{ATTENTION}.c_attn.weight", (4, 3)),
        ("model.words.weight", (10, 15)),
        ("model.embed_tokens.weight", (9, 1)),
        ("model.embed_tokens.weight", (0, 1)),
        ("lm_head.weight", (1, 1)),
    ],
)
def test_every_kind_of_merged_tensor_is_compared(world: World, key: str, place: tuple[int, ...]) -> None:
    world.edit(key, lambda t: moved(t, place, 2))
    found = world.only()
    assert (found.key, found.what, found.index) == (key, "value", place)
    assert found.expert is None
    assert found.projection is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_found(world: World, value: float) -> None:
    def spoil(t: torch.Tensor) -> torch.Tensor:
        t[4, 4] = value
        return t

    world.edit(f"{EXPERTS}.0.down_proj.weight", spoil)
    found = world.only()
    assert (found.wrong, found.index, found.max_ulp) == (1, (4, 4), math.inf)
    json.dumps(found.to_json(), allow_nan=False)


def test_an_overflow_is_no_right_rounding(tmp_path: Path) -> None:
    """float16 has nothing beyond 65504; a merge that writes infinity there has to refuse instead."""
    world = make(tmp_path, "float16", size=400.0)
    found = world.verify()
    assert not found.ok
    assert all(m.max_ulp == math.inf for m in found.mismatches if m.what == "value")


def test_one_flipped_bit_of_a_copy_is_found(world: World) -> None:
    world.edit("model.norm.weight", lambda t: moved(t, (6,), 1))
    found = world.only()
    assert (found.key, found.what, found.index) == ("model.norm.weight", "bytes", (6,))
    world.edit("model.norm.weight", lambda t: moved(t, (6,), -1))
    world.edit("model.steps", lambda t: t + 256)
    found = world.only()
    assert (found.key, found.what, found.index) == ("model.steps", "bytes", ())


def test_a_replaced_tensor_left_at_the_base_is_found(world: World) -> None:
    base = open_checkpoint(world.plan.base.path).entries["lm_head.weight"]
    world.edit("lm_head.weight", lambda _: load_file(base.file)["lm_head.weight"])
    assert (world.only().key, world.only().wrong > 100) == ("lm_head.weight", True)


# --- damage to files -----------------------------------------------------------------------------


def test_a_missing_key_is_found(world: World) -> None:
    world.edit(f"{EXPERTS}.1.gate_proj.weight", lambda _: None)
    found = {m.key: m.what for m in world.verify().mismatches}
    assert found[f"{EXPERTS}.1.gate_proj.weight"] == "missing"
    assert found == {f"{EXPERTS}.1.gate_proj.weight": "missing", "model.safetensors.index.json": "index"}


def test_an_extra_key_is_found(world: World) -> None:
    tensors = load_file(world.out / SHARDS[0])
    save_file(tensors | {"more": torch.zeros(1)}, world.out / SHARDS[0], metadata={"format": "pt"})
    found = {m.key: (m.what, m.shard) for m in world.verify().mismatches}
    assert found["more"] == ("extra", SHARDS[0])


def test_another_dtype_and_another_shape_are_found(world: World) -> None:
    world.edit("lm_head.weight", lambda t: t.to(torch.float16))
    found = world.only()
    assert (found.key, found.what, found.detail) == ("lm_head.weight", "dtype", "found F16, expected BF16")
    world.edit("lm_head.weight", lambda t: t.T.to(torch.bfloat16))
    found = world.only()
    assert (found.what, found.detail) == ("shape", f"found [{HIDDEN}, {WORDS}], expected [{WORDS}, {HIDDEN}]")


def test_a_tensor_in_another_shard_is_found(world: World) -> None:
    first, second = (load_file(world.out / shard) for shard in SHARDS)
    key = next(iter(first))
    second[key] = first.pop(key)
    for shard, held in zip(SHARDS, (first, second), strict=True):
        save_file(held, world.out / shard, metadata={"format": "pt"})
    assert {(m.key, m.shard, m.what) for m in world.verify().mismatches} == {
        (key, SHARDS[0], "missing"),
        (key, SHARDS[1], "extra"),
    }


def test_an_index_that_lies_is_found(world: World) -> None:
    file = world.out / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "model-00009-of-00002.safetensors"
    file.write_text(json.dumps(index))
    found = world.only()
    assert (found.key, found.what) == (key, "index")
    assert "found model-00009-of-00002.safetensors, expected" in found.detail
    index["weight_map"][key] = SHARDS[0]
    index["metadata"]["total_size"] += 1
    file.write_text(json.dumps(index))
    assert "total_size" in world.only().detail
    file.unlink()
    assert (world.only().key, world.only().what) == (file.name, "missing")


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer"])
def test_a_changed_side_file_is_found(world: World, damage: str) -> None:
    file = world.out / "generation_config.json"
    text = file.read_text()
    changed = {"changed": text.replace("true", "null"), "shorter": text[:-3], "longer": text + "\n"}
    file.write_text(changed[damage])
    place = {"changed": text.index("true"), "shorter": len(text) - 3, "longer": len(text)}
    found = world.only()
    assert (found.key, found.what) == ("generation_config.json", "bytes")
    assert f"from byte {place[damage]} on" in found.detail


def test_a_missing_side_file_is_found(world: World) -> None:
    (world.out / "generation_config.json").unlink()
    assert (world.only().key, world.only().what) == ("generation_config.json", "missing")


def test_the_config_is_the_base_s_with_the_plan_s_edits(world: World) -> None:
    file = world.out / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["hidden_size"] = 17
    file.write_text(json.dumps(config))
    found = world.only()
    assert (found.key, found.what) == ("config.json", "config")
    assert "'hidden_size': 17" in found.detail
    assert world.verify(config_edits={"text_config.hidden_size": 17}).ok
    assert not world.verify(config_edits={"text_config.hidden_size": 17, "tie_word_embeddings": False}).ok


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.gguf", "model.safetensors", "old/model.pt", "pytorch_model.bin.index.json"],
)
def test_weights_that_are_no_part_of_the_merge_are_found(world: World, name: str) -> None:
    (world.out / name).parent.mkdir(exist_ok=True)
    (world.out / name).write_bytes(b"x")
    assert (world.only().key, world.only().what) == (name, "extra")


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "modeling_x.py",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "config_sentence_transformers.json",
        "params.json",
        "vocab.txt",
        "tekken.json",
        "tokenizer.model.v3",
        "source.spm",
        "bpe.codes",
        "dict.txt",
        "sentencepiece.bpe",
        "spiece.vocab",
        "0_Transformer/dict.txt",
    ],
)
def test_files_that_loaders_read_and_the_merge_did_not_write_are_found(world: World, name: str) -> None:
    (world.out / name).parent.mkdir(exist_ok=True)
    (world.out / name).write_bytes(b"x")
    found = world.only()
    assert (found.key, found.what) == (name, "extra")
    assert found.detail == "read by loaders, and no part of the merge"


def test_a_folder_that_is_linked_into_out_is_found(world: World, tmp_path: Path) -> None:
    (world.out / "additional_chat_templates").symlink_to(tmp_path)
    assert (world.only().key, world.only().what) == ("additional_chat_templates", "extra")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", ".gitattributes", "eval_results.json"])
def test_files_that_no_loader_reads_may_lie_in_out(world: World, name: str) -> None:
    (world.out / name).write_bytes(b"x")
    assert world.verify().ok


def test_a_shard_without_the_format_is_found(world: World) -> None:
    """transformers does not load a shard whose metadata has no format."""
    save_file(load_file(world.out / SHARDS[1]), world.out / SHARDS[1])
    assert (world.only().key, world.only().what) == (SHARDS[1], "metadata")


def test_a_truncated_shard_and_a_missing_one_are_found(world: World) -> None:
    file = world.out / SHARDS[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert {m.what for m in world.verify().mismatches if m.key == SHARDS[0]} == {"unreadable"}
    file.unlink()
    assert {m.what for m in world.verify().mismatches if m.key == SHARDS[0]} == {"missing"}


def test_an_empty_directory_lacks_everything(world: World) -> None:
    shutil.rmtree(world.out)
    found = world.verify()
    assert found.tensors == 0
    assert {m.what for m in found.mismatches} == {"missing"}
