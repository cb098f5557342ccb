"""Converted adapters, read by the installed PEFT: the same logits as the adapter that was trained."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

import loudmerge
from loudmerge.converting.convert import convert
from loudmerge.converting.rewrite import GROUPED, PEFT_018, PEFT_019, PER_EXPERT
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("default")

FUSED = not transformers.__version__.startswith("4.")
PEFT = tuple(map(int, version("peft").split(".")[:3]))
READS = PEFT_019 if PEFT >= (0, 19, 1) else PEFT_018
"""The fused layout that the installed PEFT reads."""
BOUND = 1e-5


def by_peft(base: Path, adapter: Path, model_type: str) -> Tensor:
    cls = tiny.model_class(model_type)
    assert cls is not None
    return tiny.logits(PeftModel.from_pretrained(tiny.load(base, cls), adapter).eval())


def trained(model_type: str, root: Path) -> Tensor:
    """A base, a random adapter on its experts and attention, and what the live model says."""
    model = tiny.build(model_type, dtype=torch.float32)
    model.save_pretrained(root / "base")
    leaves = ("q_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    linears = [name for name in tiny.text_linears(model) if name.rpartition(".")[2] in leaves]
    experts = tiny.expert_parameters(model)
    names = [name for name in linears if not experts or name.endswith("q_proj")]
    cls = tiny.model_class(model_type)
    assert cls is not None
    live = tiny.attach_random_lora(
        tiny.load(root / "base", cls),
        target_modules=names,
        target_parameters=experts,
        save_to=root / "adapter",
    )
    said = tiny.logits(live)
    assert (said - tiny.logits(model)).abs().max() > 100 * BOUND * said.abs().max()
    return said


@pytest.mark.skipif(not FUSED, reason="transformers 4 has no fused experts")
@pytest.mark.parametrize("detour", [PEFT_018, GROUPED, PER_EXPERT])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe"])
def test_peft_reads_a_fused_adapter_that_came_back(detour: str, model_type: str, tmp_path: Path) -> None:
    said = trained(model_type, tmp_path)
    convert(tmp_path / "adapter", tmp_path / "there", detour, base=tmp_path / "base")
    told = "swapped" if detour == PEFT_018 else "auto"
    convert(tmp_path / "there", tmp_path / "back", READS, base=tmp_path / "base", orientation=told)
    before, after = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "back" / "adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    found = by_peft(tmp_path / "base", tmp_path / "back", model_type)
    assert (found - said).abs().max() <= BOUND * said.abs().max()


# In memory their layers have another name than in the checkpoint.
RENAMED = (
    *("deepseek_ocr2", "dots3_note", "kimi_k25", "minimax_m3_vl", "mistral_large4", "nemotron_h"),
    *("qwen3_omni_moe", "qwen3_omni_moe_thinker", "unlimited_ocr"),
)
TEXT_ONLY = ("qwen3_5_moe", "qwen4_exp", "dots3_note")
"""Of these transformers has a text-only class that loads the whole model's checkpoint."""


def loader(model_type: str, *, text_only: bool = False) -> type[PreTrainedModel]:
    """The class that has the experts of this family fused in memory; skips where there is none."""
    if model_type not in tiny.BUILDABLE:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if not FUSED:
        pytest.skip("transformers 4 has no fused experts")
    if text_only:
        found: type[PreTrainedModel] | None
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(tiny.config(model_type)), None)
        broken = (model_type, transformers.__version__) == ("qwen3_5_moe", "5.5.0")
        if found is None or found is tiny.model_class(model_type) or broken:
            pytest.skip(
                f"transformers {transformers.__version__} has no text class that loads a {model_type}"
            )
        return found
    cls = tiny.model_class(model_type)
    assert cls is not None
    return cls


def check_there_and_back(model_type: str, cls: type[PreTrainedModel], leaf: str, root: Path) -> None:
    """Taken apart, a merge has the same logits; back again, PEFT has, by the same tensors."""
    base, adapter, apart, back = (root / name for name in ("base", "adapter", "apart", "back"))
    tiny.build(model_type).save_pretrained(base)
    model = tiny.load(base, cls)
    without = tiny.logits(model)
    names = [name for name in tiny.text_linears(model) if leaf and name.endswith(leaf)]
    assert bool(names) == bool(leaf)
    live = tiny.attach_random_lora(
        model,
        target_modules=names,
        target_parameters=tiny.expert_parameters(model),
        save_to=adapter,
    )
    said = tiny.logits(live)
    assert (said - without).abs().max() > 100 * BOUND * said.abs().max()
    convert(adapter, apart, PER_EXPERT, base=base)
    loudmerge.merge(base, apart, root / "out", dtype="float32", verify=False)
    merged = tiny.logits(tiny.load(root / "out", cls))
    assert (merged - said).abs().max() <= BOUND * said.abs().max()
    convert(apart, back, READS, base=base)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # What PEFT reads of the adapter as it was trained: of some families that is not all.
    wanted = tiny.logits(PeftModel.from_pretrained(tiny.load(base, cls), adapter).eval())
    found = tiny.logits(PeftModel.from_pretrained(tiny.load(base, cls), back).eval())
    assert (found - wanted).abs().max() <= BOUND * wanted.abs().max()


@pytest.mark.parametrize("leaf", ["o_proj", ""], ids=["attention, too", "experts alone"])
@pytest.mark.parametrize("model_type", RENAMED)
def test_experts_come_back_under_the_name_that_memory_has(model_type: str, leaf: str, tmp_path: Path) -> None:
    check_there_and_back(model_type, loader(model_type), leaf, tmp_path)


@pytest.mark.parametrize("leaf", ["o_proj", ""], ids=["attention, too", "experts alone"])
@pytest.mark.parametrize("model_type", TEXT_ONLY)
def test_experts_of_a_text_only_class_come_back_under_its_name(
    model_type: str, leaf: str, tmp_path: Path
) -> None:
    check_there_and_back(model_type, loader(model_type, text_only=True), leaf, tmp_path)


@pytest.mark.skipif(FUSED, reason="transformers 5 has no experts that are Linears")
@pytest.mark.parametrize("to", [PEFT_018, PEFT_019, GROUPED])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_peft_reads_a_per_expert_adapter_that_came_back(to: str, model_type: str, tmp_path: Path) -> None:
    """Fused, its rank is that of gate and up together; apart again it computes the same."""
    said = trained(model_type, tmp_path)
    convert(tmp_path / "adapter", tmp_path / "there", to, base=tmp_path / "base")
    told = "swapped" if to == PEFT_018 else "auto"
    loudmerge.merge(
        tmp_path / "base", tmp_path / "there", tmp_path / "out", dtype="float32", orientation=told
    )
    cls = tiny.model_class(model_type)
    assert cls is not None
    merged = tiny.logits(tiny.load(tmp_path / "out", cls))
    assert (merged - said).abs().max() <= BOUND * said.abs().max()
    convert(tmp_path / "there", tmp_path / "back", PER_EXPERT, base=tmp_path / "base", orientation=told)
    found = by_peft(tmp_path / "base", tmp_path / "back", model_type)
    assert (found - said).abs().max() <= BOUND * said.abs().max()
