"""A checkpoint directory is opened as a whole, or refused: index, shards, formats, side files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loudmerge.errors import MergeRefused
from loudmerge.reading.checkpoint import Checkpoint, open_checkpoint
from loudmerge.reading.sidefiles import WEIGHT_SUFFIXES
from loudmerge.system.jsonfile import read_json
from loudmerge.system.tensorfile import read_header
from tests.unit.builders import values, write_base

INDEX = "model.safetensors.index.json"
TENSORS = {"a.weight": values(3, 2), "b.weight": values(4), "c.weight": values(2, 2)}
SHARDS = (("a.weight",), ("b.weight", "c.weight"))
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", TENSORS)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", TENSORS, shards=SHARDS)


def refused(path: Path) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        open_checkpoint(path)
    return caught.value


def edit_index(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index)
    (path / INDEX).write_text(json.dumps(index))


def set_config(path: Path, **fields: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return path


def names(checkpoint: Checkpoint) -> dict[str, str]:
    return {key: entry.file.name for key, entry in checkpoint.entries.items()}


# --- what is there -------------------------------------------------------------------------------


def test_a_single_file_has_no_index(single: Path) -> None:
    found = open_checkpoint(single)
    assert names(found) == dict.fromkeys(TENSORS, "model.safetensors")
    assert (found.index, found.shards, found.model_type) == (
        None,
        (single / "model.safetensors",),
        "qwen3_moe",
    )
    assert found.metadata == {single / "model.safetensors": {"format": "pt"}}


def test_shards_are_opened_in_the_order_of_their_names(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    assert found.shards == (sharded / FIRST, sharded / SECOND)
    assert names(found) == {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND}
    assert found.index is not None
    assert set(found.index["weight_map"]) == set(TENSORS)
    entry = found.entries["c.weight"]
    assert (entry.shape, entry.dtype, entry.nbytes) == ((2, 2), "F32", 16)


def test_a_stale_index_beside_a_single_file_is_neither_read_nor_kept(single: Path) -> None:
    """transformers takes the single file first."""
    (single / INDEX).write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')
    found = open_checkpoint(single)
    assert found.index is None
    assert INDEX not in found.side_files


def test_an_index_that_names_the_single_file_and_others_is_kept_with_them(single: Path) -> None:
    """transformers loads the single file; the layers beside it are for multi-token prediction elsewhere."""
    save_file({"mtp.weight": values(2)}, single / "mtp.safetensors")
    weight_map = dict.fromkeys(TENSORS, "model.safetensors") | {"mtp.weight": "mtp.safetensors"}
    (single / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = open_checkpoint(single)
    assert names(found) == weight_map
    assert found.index is not None
    assert (found.side_files, found.left_out) == ((), ())


def test_an_index_of_the_single_file_alone_is_not_kept(single: Path) -> None:
    (single / INDEX).write_text(json.dumps({"weight_map": {"gone.weight": "model.safetensors"}}))
    found = open_checkpoint(single)
    assert (found.index, found.left_out) == (None, (INDEX,))


def test_files_may_be_links_as_in_a_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../blobs") / str(number))
    found = open_checkpoint(snapshot)
    assert names(found)["b.weight"] == SECOND
    assert found.side_files == ("tokenizer.json",)


def test_config_values_are_found_at_any_depth(single: Path) -> None:
    found = open_checkpoint(set_config(single, num_experts=4, text_config={"num_experts": 8, "x": {"n": 1}}))
    assert sorted(found.config_values("num_experts", "n")) == [1, 4, 8]


def test_a_config_without_a_model_type_has_none(single: Path) -> None:
    (single / "config.json").write_text("{}")
    assert open_checkpoint(single).model_type == ""


# --- side files ----------------------------------------------------------------------------------


def test_files_without_weights_are_kept_with_their_folders(single: Path) -> None:
    kept = [
        "LICENSE",
        "README.md",
        "generation_config.json",
        "modeling_x.py",
        "tokenizer.json",
        "original/params.json",
    ]
    (single / "original").mkdir()
    for name in kept:
        (single / name).write_text("{}")
    assert sorted(open_checkpoint(single).side_files) == sorted(kept)


@pytest.mark.parametrize(
    "name",
    [
        *(f"weights{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)),
        "pytorch_model.bin.index.json",
        "merge_report.json",
        "adapter_config.json",
        ".gitattributes",
        ".cache/huggingface/x.lock",
        "__pycache__/modeling_x.cpython-311.pyc",
        "onnx/model.onnx",
    ],
)
def test_other_weights_and_litter_are_dropped(name: str, single: Path) -> None:
    (single / name).parent.mkdir(parents=True, exist_ok=True)
    (single / name).write_bytes(b"x")
    assert open_checkpoint(single).side_files == ()


def test_what_is_left_out_is_known_but_for_litter(single: Path) -> None:
    left_out = ["2_Dense/model.safetensors", "PYTORCH_MODEL.BIN", "adapter_config.json", "x.bin.index.json"]
    (single / "2_Dense").mkdir()
    for name in (*left_out, "merge_report.json", ".x.bin"):
        (single / name).write_text("x")
    assert open_checkpoint(single).left_out == tuple(left_out)


def test_weights_of_other_modules_are_kept(single: Path) -> None:
    """sentence-transformers puts modules after the model; qwen2_5_omni has its voices beside it."""
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (single / "modules.json").write_text(json.dumps(modules))
    kept = ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "modules.json", "spk_dict.pt"]
    for name in ("2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "0_Transformer/model.safetensors"):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_bytes(b"x")
    (single / "spk_dict.pt").write_bytes(b"x")
    found = open_checkpoint(single)
    assert (list(found.side_files), found.left_out) == (kept, ("0_Transformer/model.safetensors",))


@pytest.mark.parametrize(
    "modules", ["[]", "{}", "null", '["x", {"type": "y"}, {"path": ""}, {"path": "./"}, {"path": 3}]']
)
def test_a_list_of_modules_without_folders_keeps_no_weights(modules: str, single: Path) -> None:
    (single / "modules.json").write_text(modules)
    (single / "onnx").mkdir()
    (single / "onnx" / "model.safetensors").write_bytes(b"x")
    assert open_checkpoint(single).side_files == ("modules.json",)


def test_a_list_of_modules_that_is_no_json_is_corrupt(single: Path) -> None:
    (single / "modules.json").write_text("[")
    assert str(refused(single)).startswith(f"corrupt-file: {single / 'modules.json'}: found no JSON (")


def test_a_list_of_modules_that_is_nested_without_end_is_corrupt(single: Path) -> None:
    (single / "modules.json").write_text("[" * 5000 + "]" * 5000)
    assert str(refused(single)).startswith(f"corrupt-file: {single / 'modules.json'}: found no JSON (nested")


def test_a_link_to_itself_leads_to_nothing(single: Path) -> None:
    (single / "tokenizer.json").symlink_to("tokenizer.json")
    assert "found a link to tokenizer.json, where nothing is" in str(refused(single))


def test_what_a_file_system_has_at_its_root_is_no_part_of_the_base(single: Path) -> None:
    """Only root may read it."""
    (single / "lost+found").mkdir()
    (single / "lost+found" / "#1").write_text("")
    assert "lost+found/#1" not in open_checkpoint(single).side_files


def test_a_link_to_nothing_is_refused_with_its_target(single: Path) -> None:
    """A cache of the Hub that lost a blob."""
    (single / "tokenizer.json").symlink_to("../../blobs/gone")
    (single / "original").symlink_to("config.json/x")
    error = refused(single)
    assert str(error).startswith(
        f"corrupt-file: {single / 'original'}: found a link to config.json/x, where nothing is, expected a"
    )
    assert f"{single / 'tokenizer.json'}: found a link to ../../blobs/gone, where nothing is" in str(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_loading_begins_with_is_corrupt_as_a_link_to_nothing(name: str, single: Path) -> None:
    (single / name).unlink()
    (single / name).symlink_to("../../blobs/gone")
    assert str(refused(single)).startswith(f"corrupt-file: {single / name}: found a link to ../../blobs/gone")


def test_an_index_that_is_a_link_to_nothing_is_corrupt(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.unlink()
    index.symlink_to("../../blobs/gone")
    assert str(refused(sharded)).startswith(f"corrupt-file: {index}: found a link to ../../blobs/gone")


def test_a_link_to_a_folder_is_refused(single: Path, tmp_path: Path) -> None:
    """It may lead anywhere: what it holds is neither copied nor lost in silence."""
    (tmp_path / "templates").mkdir()
    (single / "additional_chat_templates").symlink_to(tmp_path / "templates")
    error = refused(single)
    assert error.code == "unsafe-file"
    assert f"additional_chat_templates: found a link to the folder {tmp_path / 'templates'}" in str(error)
    assert "Put a copy of that folder in the link's place" in error.hint


def test_a_pipe_is_no_file(single: Path) -> None:
    os.mkfifo(single / "tokenizer.json")
    assert "tokenizer.json: found a device, a pipe or a socket, expected a file" in str(refused(single))


def test_a_folder_that_cannot_be_read_is_an_error(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who can read every folder."""
    closed = single / "assets"
    closed.mkdir()
    scandir = os.scandir

    def scan(path: str) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", scan)
    with pytest.raises(PermissionError, match="assets"):
        open_checkpoint(single)


# --- what is refused -----------------------------------------------------------------------------


def test_a_directory_without_a_config_is_no_checkpoint(single: Path) -> None:
    (single / "config.json").unlink()
    error = refused(single)
    assert str(error).startswith(
        f"unsupported-base: {single}: found no config.json, expected a checkpoint directory"
    )
    assert "Give the directory that holds config.json" in error.hint


@pytest.mark.parametrize(
    ("text", "found"), [("{", "no JSON ("), ("[1]", "a JSON list"), ('"x"', "a JSON str")]
)
def test_a_config_that_is_no_json_object_is_corrupt(text: str, found: str, single: Path) -> None:
    (single / "config.json").write_text(text)
    assert str(refused(single)).startswith(f"corrupt-file: {single / 'config.json'}: found {found}")


def test_a_missing_json_file_has_the_code_it_is_asked_with(tmp_path: Path) -> None:
    with pytest.raises(MergeRefused, match=r"^corrupt-file: .*: found no x\.json"):
        read_json(tmp_path / "x.json", "corrupt-file", "a file")


def test_a_directory_without_weights_is_no_checkpoint(single: Path) -> None:
    (single / "model.safetensors").unlink()
    error = refused(single)
    assert error.code == "unsupported-base"
    assert f"found neither model.safetensors nor {INDEX}, expected a safetensors checkpoint." in str(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_alone_are_unsafe(name: str, single: Path) -> None:
    (single / "model.safetensors").rename(single / name)
    error = refused(single)
    assert error.code == "unsafe-file"
    assert f"{name}: found only pickled weights, which can run code when they are loaded" in str(error)
    assert "save_pretrained them as safetensors" in error.hint


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_corrupt(weight_map: object, sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    error = refused(sharded)
    assert str(error).startswith(f"corrupt-file: {sharded / INDEX}: found no weight_map, expected a map")


@pytest.mark.parametrize(("metadata", "kind"), [([1], "list"), ("x", "str")])
def test_an_index_whose_metadata_are_no_map_is_corrupt(metadata: object, kind: str, sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(metadata=metadata))
    assert f"{INDEX}: found a {kind} as metadata, expected a map, or none" in str(refused(sharded))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "sub/evil.safetensors",
        "..",
        ".",
        "",
        "a\\evil.safetensors",
    ],
)
def test_a_shard_outside_the_directory_is_unsafe(name: str, sharded: Path, tmp_path: Path) -> None:
    save_file({"a.weight": values(3, 2)}, tmp_path / "evil.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"a.weight": name}))
    error = refused(sharded)
    assert error.code == "unsafe-file"
    assert f"found the shard name {name!r}, expected a plain file name beside the index." in str(error)
    assert "before you know who wrote that index" in error.hint


@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-00001-of-00002.SAFETENSORS", "rest.bin"])
def test_a_shard_that_loaders_would_unpickle_is_refused(name: str, sharded: Path) -> None:
    (sharded / FIRST).rename(sharded / name)
    edit_index(sharded, lambda index: index["weight_map"].update({"a.weight": name}))
    error = refused(sharded)
    assert error.code == "unsupported-base"
    assert f"found the shard name {name!r}, expected a name that ends in .safetensors" in str(error)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    error = refused(sharded)
    assert f"corrupt-file: weight_map in {sharded / INDEX}: found no file {SECOND}" in str(error)
    assert error.hint == "Download the missing shard."


def test_fewer_shards_than_their_names_say_are_refused(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(weight_map={"a.weight": FIRST}))
    error = refused(sharded)
    assert error.code == "corrupt-file"
    assert "found 1 shard, expected 2, as their names say." in str(error)


def test_shards_that_are_not_numbered_are_not_counted(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", TENSORS, shards=SHARDS)
    (path / FIRST).rename(path / "attention.safetensors")
    edit_index(path, lambda index: index["weight_map"].update({"a.weight": "attention.safetensors"}))
    (path / SECOND).rename(path / "rest.safetensors")
    edit_index(
        path, lambda i: i["weight_map"].update(dict.fromkeys(("b.weight", "c.weight"), "rest.safetensors"))
    )
    assert len(open_checkpoint(path).shards) == 2


def test_a_file_beside_the_numbered_shards_is_not_counted(sharded: Path) -> None:
    save_file({"mtp.weight": values(2)}, sharded / "mtp.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"mtp.weight": "mtp.safetensors"}))
    assert len(open_checkpoint(sharded).shards) == 3
    edit_index(sharded, lambda index: index["weight_map"].pop("a.weight"))
    assert "found 1 shard, expected 2, as their names say." in str(refused(sharded))


def test_a_key_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a.weight": values(3, 2), "b.weight": values(4)}, sharded / FIRST)
    error = refused(sharded)
    assert error.code == "corrupt-file"
    assert (
        f"b.weight [4] F32 in {SECOND}: found the same key in {FIRST}, expected every key in one shard"
        in str(error)
    )


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m.update({"gone.weight": FIRST}), f"no such tensor in any shard, expected it in {FIRST}."),
        (lambda m: m.update({"c.weight": FIRST}), f"found it in {SECOND}, expected it in {FIRST}."),
        (lambda m: m.pop("c.weight"), f"{SECOND}: found a tensor that the index does not name"),
    ],
    ids=["a tensor that is not there", "the wrong shard", "a tensor it does not name"],
)  # fmt: skip
def test_an_index_that_disagrees_with_its_shards_is_corrupt(
    edit: Callable[[dict[str, Any]], Any], says: str, sharded: Path
) -> None:
    edit_index(sharded, lambda index: edit(index["weight_map"]))
    error = refused(sharded)
    assert error.code == "corrupt-file"
    assert says in str(error)


@pytest.mark.parametrize("size", [0, 5, 8, 60, 200])
def test_a_shard_cut_short_is_corrupt(size: int, single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    error = refused(single)
    assert str(error).startswith(f"corrupt-file: {file}: found a file that safetensors cannot open")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 67\n"


def test_a_git_lfs_pointer_in_a_shards_place_is_called_so(single: Path) -> None:
    (single / "model.safetensors").write_text(POINTER)
    assert "found a Git LFS pointer in place of the file" in str(refused(single))
    assert refused(single).hint == "Get the file itself: git lfs pull."


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "vocab.txt", "chat/template.jinja"])
def test_a_git_lfs_pointer_in_the_place_of_what_loaders_read_is_called_so(name: str, single: Path) -> None:
    """As of a clone for which git-lfs got the weights alone."""
    (single / name).parent.mkdir(exist_ok=True)
    (single / name).write_text(POINTER)
    error = refused(single)
    assert str(error).startswith(
        f"corrupt-file: {single / name}: found a Git LFS pointer in place of the file"
    )
    assert error.hint == "Get the file itself: git lfs pull."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found no JSON (Expecting value"),
        (b'{"eos_token_id": [1, 2],', "found no JSON (Expecting property name"),
        (b"[]", "found a JSON list, expected a JSON object"),
        (b"\xff{}", "found no JSON ('utf-8' codec can't decode"),
    ],
    ids=["empty", "cut short", "a list", "no text"],
)
def test_a_generation_config_has_to_be_an_object(content: bytes, says: str, single: Path) -> None:
    """transformers passes over one that is none, without a word."""
    (single / "generation_config.json").write_bytes(content)
    error = refused(single)
    assert str(error).startswith(f"corrupt-file: {single / 'generation_config.json'}: {says}")


def test_other_files_may_be_empty_and_hold_anything(single: Path) -> None:
    """Of a broken tokenizer transformers says so itself; and no loader reads a pointer to an image."""
    held = {"LICENSE": "", "tokenizer.json": "{", "vocab.txt": "", "plot.png": POINTER}
    for name, content in held.items():
        (single / name).write_text(content)
    assert held.keys() <= {*open_checkpoint(single).side_files}


@pytest.mark.parametrize("where", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_says_quantised_is_refused(where: str, nested: bool, single: Path) -> None:
    fields: dict[str, Any] = {where: {"quant_method": "awq"}}
    error = refused(set_config(single, **({"text_config": fields} if nested else fields)))
    assert error.code == "unsupported-base"
    assert (
        f"{where} in {single / 'config.json'}: found weights quantised with awq, expected unquantised"
        in str(error)
    )
    assert error.hint == "Merge into the unquantised checkpoint, then quantise the result."


@pytest.mark.parametrize(("value", "name"), [({"bits": 4}, "an unnamed method"), ("mxfp4", "mxfp4")])
def test_a_quantisation_without_a_name_is_one(value: object, name: str, single: Path) -> None:
    assert f"found weights quantised with {name}" in str(
        refused(set_config(single, quantization_config=value))
    )


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantisation_is_none(value: object, single: Path) -> None:
    assert len(open_checkpoint(set_config(single, quantization_config=value)).entries) == 3


@pytest.mark.parametrize(
    "name",
    [
        "x.experts.gate_up_proj_blocks",  # MXFP4 of gpt_oss
        "x.experts.gate_up_proj_scales",
        "x.q_proj.qweight",  # GPTQ, AWQ
        "x.q_proj.qzeros",
        "x.q_proj.weight_scale",  # compressed-tensors
        "x.q_proj.weight_scale_inv",  # DeepSeek's FP8
        "x.q_proj.SCB",  # bitsandbytes, 8 bits
        "x.q_proj.weight_packed",  # compressed-tensors, 4 bits
        "x.q_proj.weight.quant_state.bitsandbytes__nf4",  # bitsandbytes, 4 bits
    ],
)
def test_a_tensor_of_a_quantised_format_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", {"a.weight": values(2, 2), name: torch.zeros(4, dtype=torch.uint8)})
    error = refused(path)
    assert error.code == "unsupported-base"
    assert f"{name} [4] U8 in model.safetensors: found a quantised tensor (U8)" in str(error)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_tensor_of_eight_bits_is_refused_by_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", {"a.weight": values(2, 2).to(dtype)})
    assert "found a quantised tensor (F8_E" in str(refused(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vision.layer_scales", "x.num_blocks", "x.absmax", "x.weight_scale"])
def test_floats_of_such_a_name_are_no_quantised_weights(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"x.weight": values(2, 2), name: values(4, dtype=dtype)}
    assert name in open_checkpoint(write_base(tmp_path / "base", tensors)).entries


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("x.q_proj.weight", "x.q_proj.weight_scale"),  # compressed-tensors, 8 bits
        ("x.q_proj.weight", "x.q_proj.SCB"),  # bitsandbytes, 8 bits
        ("x.q_proj.weight", "x.q_proj.weight.absmax"),  # bitsandbytes, 4 bits
        ("x.q_proj.weight", "x.q_proj.weight.quant_map"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_scales_in_floats_of_a_packed_weight_are_refused(
    weight: str, scale: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {weight: torch.zeros(2, 2, dtype=dtype), scale: values(2)}
    error = refused(write_base(tmp_path / "base", tensors))
    assert error.code == "unsupported-base"
    assert f"{scale} [2] F32 in model.safetensors: found a quantised tensor (F32)" in str(error)


@pytest.mark.parametrize("name", ["w.safetensors", INDEX, "pytorch_model.bin", 3])
def test_a_config_that_has_other_weights_loaded_is_refused(name: object, single: Path) -> None:
    """transformers 5 would look for that file in OUT."""
    error = refused(set_config(single, transformers_weights=name))
    assert error.code == "unsupported-base"
    assert f"transformers_weights in {single / 'config.json'}: found {name!r}, expected model.safet" in str(
        error
    )


def test_a_config_may_name_what_is_merged(single: Path, tmp_path: Path) -> None:
    assert open_checkpoint(set_config(single, transformers_weights="model.safetensors")).index is None
    sharded = write_base(tmp_path / "sharded", TENSORS, shards=SHARDS, transformers_weights=INDEX)
    assert len(open_checkpoint(sharded).shards) == 2


def test_problems_of_one_checkpoint_are_reported_together(sharded: Path) -> None:
    set_config(sharded, quantization_config={"quant_method": "gptq"})
    edit_index(sharded, lambda index: index["weight_map"].update({"gone.weight": FIRST}))
    assert [problem.code for problem in refused(sharded).problems] == ["corrupt-file", "unsupported-base"]


def test_a_file_that_cannot_be_opened_has_the_reason_of_the_operating_system(tmp_path: Path) -> None:
    """safetensors says of any such file, also of one that may not be read, that there is none."""
    file = tmp_path / "model.safetensors"
    file.symlink_to(file)
    with pytest.raises(OSError, match="symbolic link") as caught:
        read_header(file)
    assert caught.value.errno == errno.ELOOP
