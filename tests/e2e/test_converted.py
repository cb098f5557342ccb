"""Adapters of per-expert Linears (transformers 4), as they are and as PEFT >= 0.19 fuses them on loading.

Their oracle is a float64 reference. What PEFT makes of them is none: its conversion drops or scales parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import loudmerge
from tests.support import kinds, tiny

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        kinds.TRANSFORMERS_4 or kinds.PEFT < (0, 19),
        reason=f"transformers {transformers.__version__} with peft {peft.__version__} converts no adapter",
    ),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS, EXPERTS, RANK, ALPHA = 2, 4, 4, 8

WRITTEN_BY_018: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": ALPHA,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.1",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
}
"""What PEFT 0.18.1 writes beside target_modules and use_rslora."""


class Names(NamedTuple):
    """A family's names under transformers 4.57, which are also those of its checkpoints."""

    block: str
    gate: str
    up: str
    down: str

    def modules(self, parts: str) -> list[str]:
        return [getattr(self, part) for part in parts.split()]


FAMILIES = {
    "qwen3_moe": Names("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": Names("block_sparse_moe", "w1", "w3", "w2"),
}


def write_base(folder: Path, model_type: str, **sizes: Any) -> dict[str, Tensor]:
    """A checkpoint with one tensor for each expert and projection."""
    tiny.build(model_type, experts=EXPERTS, **sizes).save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    names = FAMILIES[model_type]
    assert f"model.layers.0.{names.block}.experts.0.{names.gate}.weight" in tensors
    return tensors


def write_adapter(folder: Path, base: dict[str, Tensor], model_type: str, parts: str, **config: Any) -> Path:
    """The adapter that transformers 4.57 and PEFT 0.18.1 save: one LoRA for each Linear of each expert."""
    names = FAMILIES[model_type]
    modules = [*names.modules(parts), "q_proj"]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, weight in sorted(base.items()):
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            out, into = weight.shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.1
    assert len(tensors) == 2 * LAYERS * (EXPERTS * len(names.modules(parts)) + 1)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    values = {**WRITTEN_BY_018, "target_modules": modules, "use_rslora": False, **config}
    (adapter / CONFIG).write_text(json.dumps(values))
    return adapter


def reference(base: dict[str, Tensor], adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merge in float64."""
    config = json.loads((adapter / CONFIG).read_text())
    scaling = config["lora_alpha"] / (RANK**0.5 if config["use_rslora"] else RANK)
    factors = {name: tensor.double() for name, tensor in load_file(adapter / WEIGHTS).items()}
    for key, weight in base.items():
        prefix = "base_model.model." + key.removesuffix("weight")
        exact = weight.double()
        if f"{prefix}lora_A.weight" in factors:
            exact = exact + scaling * factors[f"{prefix}lora_B.weight"] @ factors[f"{prefix}lora_A.weight"]
        yield key, exact


def convert(folder: Path) -> PeftModel:
    """PEFT loads the adapter, which fuses it, and saves it again; gives the live model."""
    live = PeftModel.from_pretrained(kinds.load(folder / "base"), folder / "adapter")
    live.save_pretrained(folder / "converted")
    assert any("experts.lora_A" in name for name in load_file(folder / "converted" / WEIGHTS))
    return live.eval()


def lost(folder: Path) -> bool:
    """Whether the conversion lost the experts' LoRA: B as it was before training.

    Without a LoRA on down_proj, peft 0.19.1 to 0.21.2 load gate_up's under the name it has beside one.
    """
    tensors = load_file(folder / "converted" / WEIGHTS)
    return not any(tensor.any() for name, tensor in tensors.items() if "experts.lora_B" in name)


def out_tensors(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_as_it_is_it_merges_to_the_float64_reference(model_type: str, rslora: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path, model_type)
    adapter = write_adapter(tmp_path, base, model_type, "gate up down", use_rslora=rslora)
    report = loudmerge.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert report.to_json()["counts"]["expert"] == {
        "attempted": LAYERS * EXPERTS * 3,
        "applied": LAYERS * EXPERTS * 3,
    }
    found = out_tensors(tmp_path / "out")
    assert found.keys() == base.keys()
    changed = 0
    for key, exact in reference(base, adapter):
        changed += not torch.equal(found[key], base[key])
        assert (found[key].double() - exact).abs().max() <= 2e-7 * exact.abs().max(), key
    assert changed == LAYERS * (EXPERTS * 3 + 1)


@pytest.mark.parametrize("square", ["", "gate_up", "down"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_converted_by_peft_it_merges_to_the_same(model_type: str, square: str, tmp_path: Path) -> None:
    """Rank 2r and alpha 2 alpha through patterns, and a peft_version that is not that of the converter."""
    size = {"gate_up": tiny.HIDDEN // 2, "down": tiny.HIDDEN}.get(square, tiny.MOE_INTERMEDIATE)
    base = write_base(tmp_path, model_type, moe_intermediate_size=size, intermediate_size=size)
    adapter = write_adapter(tmp_path, base, model_type, "gate up down")
    live = convert(tmp_path)
    config = json.loads((tmp_path / "converted" / CONFIG).read_text())
    assert config["peft_version"] == "0.18.1"
    assert config["r"] == RANK
    assert list(config["rank_pattern"].values()) == [2 * RANK]
    loudmerge.merge(tmp_path / "base", adapter, tmp_path / "out")
    loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out2")
    first, second = out_tensors(tmp_path / "out"), out_tensors(tmp_path / "out2")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert (tensor - second[key]).abs().max() <= 2e-7 * tensor.abs().max(), key
    assert (tiny.logits(kinds.load(tmp_path / "out2")) - tiny.logits(live)).abs().max() <= 1e-5


@pytest.mark.parametrize("parts", ["gate up", "down"])
def test_one_projection_alone_converted(parts: str, tmp_path: Path) -> None:
    base = write_base(tmp_path, "qwen3_moe")
    adapter = write_adapter(tmp_path, base, "qwen3_moe", parts)
    convert(tmp_path)
    if lost(tmp_path):
        pytest.skip(f"peft {peft.__version__} loses the experts' LoRA when it converts this adapter")
    loudmerge.merge(tmp_path / "base", adapter, tmp_path / "out")
    loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out2")
    first, second = out_tensors(tmp_path / "out"), out_tensors(tmp_path / "out2")
    for key, tensor in first.items():
        assert (tensor - second[key]).abs().max() <= 2e-7 * tensor.abs().max(), key


@pytest.mark.parametrize(("parts", "intermediate"), [("gate up", 16), ("down", 32)])
def test_one_square_projection_alone_converted_is_refused(
    parts: str, intermediate: int, tmp_path: Path
) -> None:
    """peft_version 0.18.1 would say swapped, and be wrong; fields newer than 0.18 show that it is stale."""
    base = write_base(tmp_path, "qwen3_moe", moe_intermediate_size=intermediate)
    write_adapter(tmp_path, base, "qwen3_moe", parts)
    live = convert(tmp_path)
    with pytest.raises(loudmerge.MergeRefused, match="is stale") as refusal:
        loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out")
    assert refusal.value.code == "ambiguous-layout"
    assert not (tmp_path / "out").exists()
    loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out", orientation="standard")
    assert (tiny.logits(kinds.load(tmp_path / "out")) - tiny.logits(live)).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_converted_under_rslora_it_is_refused(model_type: str, tmp_path: Path) -> None:
    """PEFT's conversion doubles rank and alpha: right for alpha / r, sqrt(2) too much for alpha / sqrt(r)."""
    base = write_base(tmp_path, model_type)
    write_adapter(tmp_path, base, model_type, "gate up down", use_rslora=True)
    convert(tmp_path)
    with pytest.raises(loudmerge.MergeRefused, match=r"gate_up_proj.*rslora") as refusal:
        loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out")
    assert refusal.value.code == "unsupported-adapter"
    assert not (tmp_path / "out").exists()


def test_converted_under_rslora_and_trained_on_is_merged(tmp_path: Path) -> None:
    """Training fills the off-diagonal blocks: then the file's own scaling is what was trained."""
    base = write_base(tmp_path, "qwen3_moe")
    write_adapter(tmp_path, base, "qwen3_moe", "gate up down", use_rslora=True)
    live = PeftModel.from_pretrained(
        kinds.load(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    ).eval()
    kinds.train(live)
    live.save_pretrained(tmp_path / "converted")
    loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out")
    assert (tiny.logits(kinds.load(tmp_path / "out")) - tiny.logits(live)).abs().max() <= 1e-5


def test_fused_under_rslora_with_the_right_alpha_is_merged(tmp_path: Path) -> None:
    """The same blocks with alpha * sqrt(2), which keeps the trained scaling."""
    base = write_base(tmp_path, "qwen3_moe")
    adapter = write_adapter(tmp_path, base, "qwen3_moe", "gate up down", use_rslora=True)
    convert(tmp_path)
    config = json.loads((tmp_path / "converted" / CONFIG).read_text())
    config["alpha_pattern"] = dict.fromkeys(config["alpha_pattern"], ALPHA * 2**0.5)
    (tmp_path / "converted" / CONFIG).write_text(json.dumps(config))
    loudmerge.merge(tmp_path / "base", tmp_path / "converted", tmp_path / "out")
    found = out_tensors(tmp_path / "out")
    for key, exact in reference(base, adapter):
        assert (found[key].double() - exact).abs().max() <= 2e-7 * exact.abs().max(), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_onto_a_fused_checkpoint_it_merges_to_the_same(model_type: str, tmp_path: Path) -> None:
    """The base saved again with the experts as they are in memory, three axes to a tensor."""
    base = write_base(tmp_path, model_type)
    adapter = write_adapter(tmp_path, base, model_type, "gate up down")
    kinds.load(tmp_path / "base").save_pretrained(tmp_path / "fused", save_original_format=False)
    on_disk = out_tensors(tmp_path / "fused")
    assert on_disk["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == EXPERTS
    loudmerge.merge(tmp_path / "base", adapter, tmp_path / "apart")
    loudmerge.merge(tmp_path / "fused", adapter, tmp_path / "out")
    assert out_tensors(tmp_path / "out").keys() == on_disk.keys()
    apart, fused = kinds.load(tmp_path / "apart").state_dict(), kinds.load(tmp_path / "out").state_dict()
    assert apart.keys() == fused.keys()
    for name, tensor in apart.items():
        assert torch.equal(tensor, fused[name]), name
