"""Dense models whose checkpoints have other names than the classes of transformers, against PEFT itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import loudmerge
from tests.support import kinds, tiny
from tests.support.bfloat16 import assert_rounded_alike

# The libraries' own deprecations; those that loudmerge itself raises are checked by the other tests.
pytestmark = pytest.mark.filterwarnings("default")

NAMES = (
    *("cosmos3_edge", "cosmos3_omni", "exaone", "gte", "hrm_text", "jina_embeddings_v3", "nomic_bert"),
    "qianfan_ocr",
)
JOINED = ("gte", "hrm_text", "jina_embeddings_v3", "nomic_bert", "qianfan_ocr", "sarvam_moe")
"""Families with Linears of which several are one tensor on disk."""


def linears(model: PreTrainedModel) -> list[str]:
    """All but a head."""
    named = model.named_modules()
    return [name for name, module in named if type(module) is nn.Linear and not name.endswith("lm_head")]


def save_base(model_type: str, path: Path, dtype: torch.dtype) -> type[PreTrainedModel]:
    if tiny.model_class(model_type) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = tiny.build(model_type, dtype=dtype)
    model.save_pretrained(path)
    return type(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", NAMES)
def test_out_is_what_peft_makes_of_the_live_model(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """All Linears, also those that are rows of one tensor on disk: the same weights, reloaded."""
    cls = save_base(model_type, tmp_path / "base", dtype)
    live = tiny.load(tmp_path / "base", cls, dtype)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    named = linears(live)
    peft_model = tiny.attach_random_lora(live, target_modules=named, save_to=tmp_path / "adapter")
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="peft", verify=True)
    wanted = peft_model.merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out", cls, dtype).state_dict()
    assert all(not torch.equal(found[f"{name}.weight"], before[f"{name}.weight"]) for name in named)
    if dtype is torch.bfloat16:
        assert_rounded_alike(found, wanted)
    else:
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert (tensor - found[name]).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.parametrize("model_type", ["exaone", "hrm_text"])
def test_the_merged_model_says_what_the_trained_one_says(model_type: str, tmp_path: Path) -> None:
    cls = save_base(model_type, tmp_path / "base", torch.float32)
    live = tiny.load(tmp_path / "base", cls)
    untrained = tiny.logits(live)
    named = linears(live)
    peft_model = tiny.attach_random_lora(live, target_modules=named, save_to=tmp_path / "adapter")
    trained = tiny.logits(peft_model)
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="nearest")
    merged = tiny.logits(tiny.load(tmp_path / "out", cls))
    bound = 5e-5 * float(trained.abs().max())
    assert (merged - trained).abs().max() <= bound
    assert (untrained - trained).abs().max() > 100 * bound


@pytest.mark.parametrize("model_type", JOINED)
def test_a_part_of_a_tensor_that_the_adapter_lacks_is_missing(model_type: str, tmp_path: Path) -> None:
    """In one layer, or in all: values are the last rows, keys and what the config does not name stay."""
    cls = save_base(model_type, tmp_path / "base", torch.float32)
    live = tiny.load(tmp_path / "base", cls)
    queries = [name for name in linears(live) if name.endswith(".q_proj")]
    values = [name.replace(".q_proj", ".v_proj") for name in queries]
    adapter = tmp_path / "adapter"
    tiny.attach_random_lora(live, target_modules=["q_proj", "v_proj"], save_to=adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    for lost in (values[-1:], values):
        kept = {key: held[key] for key in held if not any(f".{name}." in key for name in lost)}
        save_file(kept, adapter / "adapter_model.safetensors")
        with pytest.raises(loudmerge.MergeRefused) as refusal:
            loudmerge.merge(tmp_path / "base", adapter, tmp_path / "out")
        assert {problem.code for problem in refusal.value.problems} == {"missing-adapter-tensor"}
        assert refusal.value.where.endswith(".v_proj")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"use_dora": True}, "unsupported-adapter"),
        ({"bias": "all"}, "missing-base-tensor"),
        ({"lora_bias": True}, "missing-base-tensor"),
    ],
)
def test_what_is_no_plain_lora_on_a_part_of_a_tensor_is_refused(
    options: Mapping[str, Any], code: str, tmp_path: Path
) -> None:
    cls = save_base("jina_embeddings_v3", tmp_path / "base", torch.float32)
    live = tiny.load(tmp_path / "base", cls)
    tiny.attach_random_lora(live, target_modules=["q_proj"], save_to=tmp_path / "adapter", **options)
    with pytest.raises(loudmerge.MergeRefused, match="a part of another tensor") as refusal:
        loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert refusal.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    ],
    ids=["embedding", "head", "saved head", "token rows", "one layer"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_of_exaone(tied: bool, options: Mapping[str, Any], tmp_path: Path) -> None:
    """transformer.wte is an embedding that a head is tied to: where training parts them it gets its own."""
    if tiny.model_class("exaone") is None:
        pytest.skip(f"transformers {transformers.__version__} has no exaone")
    kind = kinds.Kind("", "exaone", options, (), config={"tie_word_embeddings": tied})
    model = kinds.build(kind)
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    assert ("lm_head.weight" in load_file(tmp_path / "base" / "model.safetensors")) is not tied
    live = kinds.attach(kinds.load(tmp_path / "base"), kind)
    live.save_pretrained(tmp_path / "adapter")
    trained = tiny.logits(live)
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="nearest")
    merged = tiny.logits(kinds.load(tmp_path / "out"))
    assert (merged - trained).abs().max() <= 5e-5 * trained.abs().max()


def test_an_exaone_adapter_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    """What the config targets and the base has is known through the renames."""
    cls = save_base("exaone", tmp_path / "base", torch.float32)
    live = tiny.load(tmp_path / "base", cls)
    tiny.attach_random_lora(live, target_modules=["o_proj"], save_to=tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if ".layers.0." in key}, file)
    with pytest.raises(loudmerge.MergeRefused, match=r"layers\.1\.self_attn\.o_proj") as refusal:
        loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert refusal.value.code == "missing-adapter-tensor"
