"""What each tensor of an adapter directory is; what is not understood is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.errors import MergeRefused
from loudmerge.reading.adapter import Adapter, read_adapter
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    fused_lora,
    lora,
    values,
    write_adapter,
)

HEAD = "lm_head"


def read(path: Path, tensors: Tensors, **fields: Any) -> Adapter:
    return read_adapter(write_adapter(path / "adapter", tensors, **fields))


def refused(path: Path, tensors: Tensors, **fields: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        read(path, tensors, **fields)
    return caught.value


def full(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {PREFIX + name: values(*shape)}


# --- pairs ---------------------------------------------------------------------------------------


def test_a_pair_is_named_by_its_module_without_pefts_prefix(tmp_path: Path) -> None:
    (pair,) = read(tmp_path, lora(Q_PROJ, 6, 4)).pairs
    assert (pair.module, pair.depth, pair.embedding) == (Q_PROJ, 0, False)
    assert (pair.a.shape, pair.b.shape) == ((2, 4), (6, 2))
    assert [entry.name for entry in pair.entries] == [
        f"{PREFIX}{Q_PROJ}.lora_A.weight",
        f"{PREFIX}{Q_PROJ}.lora_B.weight",
    ]


def test_the_depth_of_a_pair_is_the_number_of_base_layers_in_its_key(tmp_path: Path) -> None:
    tensors = fused_lora(EXPERTS, [(6, 4), (8, 6), (5, 5)], experts=2)
    pairs = read(tmp_path, tensors).pairs
    assert {(pair.module, pair.depth, pair.b.shape[0]) for pair in pairs} == {
        (EXPERTS, 0, 6),
        (EXPERTS, 1, 8),
        (EXPERTS, 2, 5),
    }


def test_a_lora_of_an_embedding_is_one(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, 9),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(4, 2),
    }
    (pair,) = read(tmp_path, held).pairs
    assert (pair.module, pair.embedding, pair.a.shape, pair.b.shape) == (EMBED, True, (2, 9), (4, 2))


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_magnitude_belongs_to_its_pair_under_either_name(key: str, tmp_path: Path) -> None:
    held = {**lora(Q_PROJ, 6, 4), f"{PREFIX}{Q_PROJ}.{key}": values(6)}
    (pair,) = read(tmp_path, held, use_dora=True).pairs
    assert pair.magnitude is not None
    assert (pair.magnitude.shape, len(pair.entries)) == ((6,), 3)


def test_a_bias_belongs_to_its_pair(tmp_path: Path) -> None:
    held = {**lora(Q_PROJ, 6, 4), f"{PREFIX}{Q_PROJ}.lora_B.bias": values(6)}
    (pair,) = read(tmp_path, held, lora_bias=True).pairs
    assert pair.bias is not None
    assert pair.bias.shape == (6,)


def test_what_velora_compressed_activations_by_is_read_by_nothing_but_a_training(tmp_path: Path) -> None:
    held = {**lora(Q_PROJ, 6, 4), f"{PREFIX}{Q_PROJ}.lora_velora_embed": values(2)}
    adapter = read(tmp_path, held, velora_config={"num_groups": 2})
    assert [entry.name for entry in adapter.originals] == [f"{PREFIX}{Q_PROJ}.lora_velora_embed"]
    assert len(adapter.pairs[0].entries) == 2


def test_what_velora_compressed_activations_by_alone_is_no_pair(tmp_path: Path) -> None:
    held = full(f"{Q_PROJ}.lora_velora_embed", 2)
    error = refused(tmp_path, held, velora_config={"num_groups": 2})
    assert error.code == "missing-adapter-tensor"


@pytest.mark.parametrize(("kept", "missing"), [("A", "lora_B"), ("B", "lora_A")])
def test_half_a_pair_is_refused(kept: str, missing: str, tmp_path: Path) -> None:
    held = {key: value for key, value in lora(Q_PROJ, 6, 4).items() if f"lora_{kept}" in key}
    error = refused(tmp_path, held)
    assert error.code == "missing-adapter-tensor"
    assert f"lora_{kept}.weight" in error.where
    assert f"found no {missing} beside it, expected both halves of the pair." in str(error)


def test_a_bias_alone_is_half_a_pair(tmp_path: Path) -> None:
    error = refused(tmp_path, full(f"{Q_PROJ}.lora_B.bias", 6), lora_bias=True)
    assert "lora_B.bias [6] F32 in adapter_model.safetensors: found no lora_A beside it" in str(error)


@pytest.mark.parametrize(
    ("extra", "fields", "code", "says"),
    [
        ("lora_B.bias", {}, "unconsumed-adapter-tensor", "found a LoRA bias, expected none"),
        ("", {"lora_bias": True}, "missing-adapter-tensor", "found no bias beside it, expected lora_bias's"),
        (
            "lora_velora_embed", {}, "unconsumed-adapter-tensor",
            "found what VeLoRA compresses activations by, expected none: the config has no velora_config",
        ),
        (
            "lora_magnitude_vector", {}, "unconsumed-adapter-tensor",
            "found a DoRA magnitude, expected what use_dora false in the config says",
        ),
        (
            "", {"use_dora": True}, "missing-adapter-tensor",
            "found no lora_magnitude_vector beside it, expected what use_dora true in the config says",
        ),
    ],
)  # fmt: skip
def test_a_pair_has_the_parts_that_the_config_says(
    extra: str, fields: dict[str, Any], code: str, says: str, tmp_path: Path
) -> None:
    held = lora(Q_PROJ, 6, 4) | (full(f"{Q_PROJ}.{extra}", 6) if extra else {})
    error = refused(tmp_path, held, **fields)
    assert error.code == code
    assert says in str(error)


def test_an_embedding_has_no_lora_bias(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, 9),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(4, 2),
    }
    assert read(tmp_path, held, lora_bias=True).pairs[0].bias is None


def test_factors_that_are_not_matrices_are_refused(tmp_path: Path) -> None:
    """A LoRA of a convolution."""
    held = {
        f"{PREFIX}conv.lora_A.weight": values(2, 3, 1, 1),
        f"{PREFIX}conv.lora_B.weight": values(4, 2, 1, 1),
    }
    error = refused(tmp_path, held)
    assert error.code == "unsupported-adapter"
    assert "conv.lora_A.weight [2, 3, 1, 1] F32" in error.where
    assert "factors that are not matrices" in str(error)


def test_two_magnitudes_for_one_pair_are_refused(tmp_path: Path) -> None:
    """PEFT wrote the one name, then the other: both in one file would leave one unused."""
    held = lora(Q_PROJ, 6, 4) | full(f"{Q_PROJ}.lora_magnitude_vector", 6)
    held |= full(f"{Q_PROJ}.lora_magnitude_vector.weight", 6)
    assert refused(tmp_path, held, use_dora=True).code == "unconsumed-adapter-tensor"


# --- other tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "fields", "name", "saved"),
    [
        ("lm_head.weight", {"modules_to_save": ["lm_head"]}, "lm_head.weight", True),
        ("lm_head.modules_to_save.weight", {"modules_to_save": ["lm_head"]}, "lm_head.weight", True),
        (
            "model.layers.0.mlp.gate.weight",
            {"modules_to_save": ["gate"]},
            "model.layers.0.mlp.gate.weight",
            True,
        ),
        ("model.norm.weight", {"modules_to_save": ["orm"]}, "model.norm.weight", True),
        ("score.dense.weight", {"modules_to_save": ["score"]}, "score.dense.weight", True),
        ("lm_head.weight", {}, "lm_head.weight", False),
        ("lm_head.base_layer.weight", {}, "lm_head.weight", False),
        (f"{EMBED}.weight", {}, f"{EMBED}.weight", False),
        (f"{Q_PROJ}.bias", {"bias": "all"}, f"{Q_PROJ}.bias", False),
        (f"{Q_PROJ}.base_layer.bias", {"bias": "lora_only"}, f"{Q_PROJ}.bias", False),
    ],
)
def test_a_full_tensor_is_named_as_the_models(
    key: str, fields: dict[str, Any], name: str, saved: bool, tmp_path: Path
) -> None:
    (tensor,) = read(tmp_path, full(key, 5, 4), **fields).full
    assert (tensor.name, tensor.saved_module, tensor.entry.name) == (name, saved, PREFIX + key)


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        (f"{Q_PROJ}.weight", {}),
        (f"{Q_PROJ}.bias", {}),
        (f"{Q_PROJ}.bias", {"bias": "none"}),
        ("lm_head.bias", {}),
        ("model.layers.0.mlp.gate.weight", {"modules_to_save": ["lm_head"]}),
        ("model.layers.0.mlp.gate.weight", {"modules_to_save": ["gat"]}),
    ],
)
def test_a_full_tensor_that_the_config_does_not_name_is_refused(
    key: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    error = refused(tmp_path, full(key, 5, 4), **fields)
    assert error.code == "unconsumed-adapter-tensor"
    assert f"{PREFIX}{key} [5, 4] F32 in adapter_model.safetensors: found a full tensor" in str(error)
    assert "one of modules_to_save, a trained bias, or a saved embedding" in str(error)


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}{Q_PROJ}.lora_A.default.weight",
        f"{PREFIX}{Q_PROJ}.lora_C.weight",
        f"{PREFIX}{Q_PROJ}.lora_A.bias",
        f"{Q_PROJ}.lora_A.weight",
        "lm_head.weight",
    ],
)
def test_a_name_that_peft_does_not_write_is_refused(key: str, tmp_path: Path) -> None:
    error = refused(tmp_path, {key: values(2, 4)}, modules_to_save=["lm_head"])
    assert error.code == "unconsumed-adapter-tensor"
    assert "a tensor that no known part of LoRA is named like" in str(error)
    assert "convert the adapter to PEFT's names first" in error.hint


@pytest.mark.parametrize("middle", ["", "base_layer."])
def test_a_heads_bias_is_saved_beside_its_weight(middle: str, tmp_path: Path) -> None:
    """PEFT saves the whole module: with LoRA on it, or a resized vocabulary."""
    held = full(f"lm_head.{middle}weight", 5, 4) | full(f"lm_head.{middle}bias", 5)
    names = [(tensor.name, tensor.saved_module) for tensor in read(tmp_path, held).full]
    assert sorted(names) == [("lm_head.bias", False), ("lm_head.weight", False)]


def test_two_full_tensors_for_one_weight_are_refused(tmp_path: Path) -> None:
    """Only one of them can be written; the other would be dropped in silence."""
    held = full(f"{EMBED}.weight", 5, 4) | full(f"{EMBED}.base_layer.weight", 5, 4)
    error = refused(tmp_path, held)
    assert error.code == "unconsumed-adapter-tensor"
    assert f"found a second tensor for {EMBED}.weight, expected one." in str(error)


def test_a_module_that_peft_saved_three_times_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    """With a resized vocabulary: the plain name, an equal copy of it, and the base's own weight."""
    names = ("lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.original_module.weight")
    held = {key: value for name in names for key, value in full(name, 5, 4).items()}
    adapter = read(tmp_path, held, modules_to_save=["lm_head"])
    assert [tensor.entry.name for tensor in adapter.full] == [PREFIX + names[0]]
    assert [(a.name, b.name) for a, b in adapter.copies] == [(PREFIX + names[0], PREFIX + names[1])]
    assert [entry.name for entry in adapter.originals] == [PREFIX + names[2]]


def test_a_bases_own_weight_alone_is_no_full_tensor(tmp_path: Path) -> None:
    error = refused(tmp_path, full("lm_head.original_module.weight", 5, 4), modules_to_save=["lm_head"])
    assert "original_module.weight [5, 4] F32 in adapter_model.safetensors: found a full tensor" in str(error)


ROWS = f"{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    "indices", [[3, 1], {"embed_tokens": [3, 1]}, {EMBED: [3, 1]}, {"lm_head": [0], EMBED: [3, 1]}]
)
def test_token_rows_replace_the_rows_that_the_config_lists(indices: object, tmp_path: Path) -> None:
    (rows,) = read(tmp_path, full(ROWS, 2, 4), trainable_token_indices=indices).rows
    assert (rows.module, rows.indices, rows.entry.shape) == (EMBED, (3, 1), (2, 4))


@pytest.mark.parametrize("indices", [None, {"lm_head": [1, 2]}, {"tokens": [1, 2]}])
def test_token_rows_without_indices_are_refused(indices: object, tmp_path: Path) -> None:
    error = refused(tmp_path, full(ROWS, 2, 4), trainable_token_indices=indices)
    assert error.code == "unconsumed-adapter-tensor"
    assert "found trained token rows, expected trainable_token_indices in the config" in str(error)


HEAD_ROWS = f"{HEAD}.token_adapter.trainable_tokens_delta"


def test_rows_that_the_config_does_not_name_are_a_copy_of_those_that_it_names(tmp_path: Path) -> None:
    """Where PEFT saves a tied embedding and head whole, it saves the embedding's rows for both."""
    adapter = read(
        tmp_path, full(ROWS, 2, 4) | full(HEAD_ROWS, 2, 4), trainable_token_indices={"embed_tokens": [3, 1]}
    )
    assert [rows.module for rows in adapter.rows] == [EMBED]
    assert [(a.name, b.name) for a, b in adapter.copies] == [(PREFIX + ROWS, PREFIX + HEAD_ROWS)]


def test_rows_that_the_config_does_not_name_and_of_another_shape_are_refused(tmp_path: Path) -> None:
    held = full(ROWS, 2, 4) | full(HEAD_ROWS, 3, 4)
    error = refused(tmp_path, held, trainable_token_indices={"embed_tokens": [3, 1]})
    assert f"{HEAD_ROWS} [3, 4] F32 in adapter_model.safetensors: found trained token rows" in str(error)


def test_rows_for_one_index_twice_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, full(ROWS, 2, 4), trainable_token_indices=[1, 1])
    assert error.code == "unsupported-adapter"
    assert "found rows for the indices [1, 1], one of them twice, expected each index once." in str(error)


@pytest.mark.parametrize(
    ("indices", "shape"),
    [([1, 2, 3], (2, 4)), ([1], (2, 4)), ([1, 2], (2, 4, 1)), ([1, 2], (2,))],
)
def test_token_rows_need_one_index_each(indices: list[int], shape: Sequence[int], tmp_path: Path) -> None:
    error = refused(tmp_path, full(ROWS, *shape), trainable_token_indices=indices)
    assert error.code == "shape-mismatch"
    assert f"found {list(shape)}, expected {len(indices)} row" in str(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_is_no_plain_float_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    held = {key: value.to(dtype) for key, value in lora(Q_PROJ, 6, 4).items()}
    error = refused(tmp_path, held)
    assert error.code == "unsupported-adapter"
    assert "expected one of F64, F32, F16, BF16." in str(error)
    assert "A BatchNorm's counter is for merge_and_unload." in error.hint
    assert len(error.problems) == 2


# --- files ---------------------------------------------------------------------------------------


def test_every_tensor_is_in_exactly_one_part(tmp_path: Path) -> None:
    held = {
        **lora(Q_PROJ, 6, 4),
        **fused_lora(EXPERTS, [(6, 4), (8, 6)], experts=2),
        **full("lm_head.weight", 9, 4),
        **full(ROWS, 1, 4),
    }
    adapter = read(tmp_path, held, trainable_token_indices=[2])
    used = [entry.name for pair in adapter.pairs for entry in pair.entries]
    used += [tensor.entry.name for tensor in adapter.full] + [rows.entry.name for rows in adapter.rows]
    assert sorted(used) == sorted(held) == sorted(adapter.entries)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    held = {**full(f"{Q_PROJ}.weight", 5, 4), **full(ROWS, 2, 4), **full(f"{Q_PROJ}.lora_A.weight", 2, 4)}
    assert len(refused(tmp_path, held).problems) == 3


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, {})
    assert error.code == "missing-adapter-tensor"
    assert "found no tensor at all, expected a trained adapter's tensors" in str(error)


def test_a_pickled_adapter_is_unsafe(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", lora(Q_PROJ, 6, 4))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(
        MergeRefused, match=r"adapter_model\.bin: found a pickle, which can run code"
    ) as caught:
        read_adapter(path)
    assert caught.value.code == "unsafe-file"
    assert "safe_serialization=True" in caught.value.hint


def test_a_pickle_beside_safe_weights_is_not_read(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", lora(Q_PROJ, 6, 4))
    (path / "adapter_model.bin").write_bytes(b"never opened")
    assert len(read_adapter(path).pairs) == 1


def test_a_config_without_weights_is_no_adapter(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", lora(Q_PROJ, 6, 4))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeRefused, match=r"^unsupported-adapter: .*: found no adapter_model\.safetensors"):
        read_adapter(path)


@pytest.mark.parametrize("names", [["self_attn", "q_proj"], ["attn", "model.layers.0.self_attn.q_proj"]])
def test_a_module_to_save_within_another_is_refused(names: list[str], tmp_path: Path) -> None:
    """PEFT wraps the inner one where no forward goes, and saves that."""
    held = full("model.layers.0.self_attn.q_proj.weight", 4, 4)
    error = refused(tmp_path, held, modules_to_save=names)
    assert error.code == "unsupported-adapter"
    assert "PEFT saves a copy that is not used" in str(error)
    outer = {**held, **full("model.layers.0.self_attn.k_proj.weight", 4, 4)}
    assert len(read(tmp_path, outer, modules_to_save=["self_attn"]).full) == 2


def test_a_classifier_of_peft_up_to_0_10_saved_its_head_without_a_word(tmp_path: Path) -> None:
    held = full("score.weight", 3, 4)
    (found,) = read(tmp_path, held, task_type="SEQ_CLS", modules_to_save=None).full
    assert (found.name, found.saved_module) == ("score.weight", True)
    for fields in ({"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS", "modules_to_save": ["norm"]}):
        assert refused(tmp_path, held, **fields).code == "unconsumed-adapter-tensor"


def test_half_a_lora_of_an_embedding_and_half_of_a_linear_are_no_pair(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}model.embed.lora_embedding_A": values(2, 5),
        f"{PREFIX}model.embed.lora_B.weight": values(4, 2),
    }
    error = refused(tmp_path, held)
    assert error.code == "missing-adapter-tensor"
    assert "half a LoRA of a Linear, and half of an embedding, on model.embed" in str(error)
