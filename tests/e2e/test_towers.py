"""Vision models, alone and as parts of others, against PEFT itself.

A part trained alone has the names of its own class; on disk it lies under a part of the whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import loudmerge
from tests.support import tiny

# The libraries' own deprecations; those that loudmerge itself raises are checked by the other tests.
pytestmark = pytest.mark.filterwarnings("default")

LINEARS = ["q_proj", "v_proj", "fc1"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {**SMALL, "hidden_size": 16}
IMAGES = {"image_size": 16, "patch_size": 8, **SMALL}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 2, "num_heads": [2, 2]}
SEGFORMER = {"hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
HALVES = {"num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ALONE: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("ViTForImageClassification", "DeiTForImageClassification"), IMAGES),
    **dict.fromkeys(("BeitForImageClassification", "IJepaForImageClassification"), IMAGES),
    **dict.fromkeys(("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"), IMAGES),
    "ViTModel": IMAGES,
    "ViTMAEForPreTraining": {**IMAGES, **{f"decoder_{name}": size for name, size in DECODER.items()}},
    "VivitForVideoClassification": {**IMAGES, "num_frames": 4},
    "ASTForAudioClassification": {**SMALL, "num_mel_bins": 16, "max_length": 32},
    "SwinForImageClassification": {**SWIN, "depths": [2, 1]},
    "SegformerForImageClassification": {**SEGFORMER, **HALVES, "depths": [2, 1]},
}
"""Vision models whose layers have other names on disk than in memory, from transformers 5 on."""
BOUND = 1e-6
"""The largest difference of a float32 weight."""


def save_base(name: str, path: Path, vision: dict[str, int]) -> Path:
    """A tiny SigLIP or CLIP, saved whole."""
    text = {"vocab_size": 96, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
    images = {"image_size": 16, "patch_size": 8, **vision}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=images)
    model = getattr(transformers, f"{name}Model")(config)
    tiny.fill(model, 0)
    model.save_pretrained(path)
    return path


def train_alone(cls: str, base: Path, adapter: Path, *, says_class: bool = True) -> PeftModel:
    """A random adapter of one part, loaded from the whole model's checkpoint. `says_class`: in its config."""
    model: PreTrainedModel = getattr(transformers, cls).from_pretrained(base)
    peft_model = tiny.attach_random_lora(model, target_modules=LINEARS, save_to=adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == cls
    if not says_class:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    return peft_model


def changed(base: Path, out: Path) -> set[str]:
    """The first parts of the names of the tensors that the merge changed."""
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    return {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}


def assert_same(out: Path, cls: type[Any], peft_model: PeftModel) -> None:
    wanted, found = peft_model.merge_and_unload().state_dict(), cls.from_pretrained(out).state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert (tensor - found[name]).abs().max() <= BOUND, name


@pytest.mark.parametrize("part", ["Vision", "Text"])
@pytest.mark.parametrize("name", ["Siglip", "CLIP"])
def test_a_part_trained_alone_is_merged_into_that_part(name: str, part: str, tmp_path: Path) -> None:
    """The towers have the same names and shapes; the class that PEFT writes into the config tells them."""
    base = save_base(name, tmp_path / "base", SMALL)
    peft_model = train_alone(f"{name}{part}Model", base, tmp_path / "adapter")
    loudmerge.merge(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    assert changed(base, tmp_path / "out") == {f"{part.lower()}_model"}
    assert_same(tmp_path / "out", getattr(transformers, f"{name}{part}Model"), peft_model)


@pytest.mark.parametrize("part", ["Vision", "Text"])
def test_shapes_tell_the_part_where_no_class_is_said(part: str, tmp_path: Path) -> None:
    base = save_base("Siglip", tmp_path / "base", NARROW)
    peft_model = train_alone(f"Siglip{part}Model", base, tmp_path / "adapter", says_class=False)
    loudmerge.merge(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    assert changed(base, tmp_path / "out") == {f"{part.lower()}_model"}
    assert_same(tmp_path / "out", getattr(transformers, f"Siglip{part}Model"), peft_model)


@pytest.mark.parametrize("part", ["Vision", "Text"])
def test_a_part_that_nothing_tells_is_refused(part: str, tmp_path: Path) -> None:
    base = save_base("CLIP", tmp_path / "base", SMALL)
    peft_model = train_alone(f"CLIP{part}Model", base, tmp_path / "adapter", says_class=False)
    if f"{part.lower()}_model.encoder" in "\n".join(peft_model.state_dict()):
        pytest.skip(f"transformers {transformers.__version__} names the part in memory")
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert refusal.value.code == "ambiguous-layout"
    for tower in ("text_model", "vision_model"):
        assert f"{tower}.encoder.layers.0.mlp.fc1" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_vision_model_whose_own_file_has_the_older_names(tmp_path: Path) -> None:
    """Saved by transformers 4 it has `vision_model.` before all names."""
    base = save_base("Siglip", tmp_path / "whole", SMALL)
    model = transformers.SiglipVisionModel.from_pretrained(base)
    model.save_pretrained(tmp_path / "base")
    _rename(tmp_path / "base", [(r"^(?!vision_model\.)", "vision_model.")])
    peft_model = train_alone("SiglipVisionModel", tmp_path / "base", tmp_path / "adapter")
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert_same(tmp_path / "out", transformers.SiglipVisionModel, peft_model)


@pytest.mark.parametrize(
    "model_type", ["gemma3", "llava", "llava_onevision", "paligemma", "deepseek_vl", "lfm2_vl"]
)
def test_a_tower_in_a_file_with_the_older_names(model_type: str, tmp_path: Path) -> None:
    """transformers 4 saves `vision_tower.vision_model.…`, which transformers 5 has without `vision_model.`"""
    model = tiny.build(model_type)
    model.save_pretrained(tmp_path / "base")
    _rename(
        tmp_path / "base",
        [(r"\b(vision_tower|(?<=^model\.)vision_model)\.(?!vision_model\.)", r"\1.vision_model.")],
    )
    keys = load_file(tmp_path / "base" / "model.safetensors")
    assert any(".vision_model.encoder." in key for key in keys)
    live = tiny.load(tmp_path / "base", type(model))
    towers = [name for name in tiny.tower_linears(live) if ".encoder." in name]
    peft_model = tiny.attach_random_lora(live, target_modules=towers, save_to=tmp_path / "adapter")
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert_same(tmp_path / "out", type(model), peft_model)
    # The base as transformers 5 writes it, and as it was: the adapter goes with both.
    model.save_pretrained(tmp_path / "newer")
    loudmerge.merge(tmp_path / "newer", tmp_path / "adapter", tmp_path / "also", verify=True)
    assert_same(tmp_path / "also", type(model), peft_model)


@pytest.mark.parametrize("name", ALONE)
def test_a_vision_model_with_other_names_on_disk(name: str, tmp_path: Path) -> None:
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**ALONE[name]))
    tiny.fill(model, 0)
    model.save_pretrained(tmp_path / "base")
    live = tiny.load(tmp_path / "base", cls)
    linears = [where for where, module in live.named_modules() if type(module) is torch.nn.Linear]
    peft_model = tiny.attach_random_lora(live, target_modules=linears, save_to=tmp_path / "adapter")
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert_same(tmp_path / "out", cls, peft_model)


def _rename(path: Path, renames: Iterable[tuple[str, str]]) -> None:
    """Renames the tensors of a checkpoint, as another release of transformers has them."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for pattern, replacement in renames:
        tensors = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
