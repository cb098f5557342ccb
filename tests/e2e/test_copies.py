"""Encoders whose files hold the tied matrix twice, as many on the Hub do: rows trained on it are in OUT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import loudmerge
from tests.support import kinds

pytestmark = pytest.mark.filterwarnings("default")

IDS = torch.arange(5, 25)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES))


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SIZES))


def esm() -> PreTrainedModel:
    return EsmForMaskedLM(EsmConfig(**SIZES, pad_token_id=1, mask_token_id=2))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_decoder_layers=1, num_heads=4)
    )


CASES = [
    (bert, "query", "bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
    (roberta, "query", "roberta.embeddings.word_embeddings.weight", ["lm_head.decoder.weight"]),
    (t5, "q", "shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
]


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


def with_rows(cls: type[PreTrainedModel], base: Path, target: str, embedding: str) -> PeftModel:
    config = LoraConfig(r=3, target_modules=[target], trainable_token_indices={embedding: [6, 7]})
    live = get_peft_model(cls.from_pretrained(base).eval(), config)
    assert isinstance(live, PeftModel)
    kinds.train(live)
    return live.eval()


@pytest.mark.parametrize(("build", "target", "embedding", "copies"), CASES)
def test_rows_of_a_tied_embedding_are_in_all_its_copies(
    build: Callable[[], PreTrainedModel], target: str, embedding: str, copies: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    held = load_file(file)
    save_file({**held, **{copy: held[embedding].clone() for copy in copies}}, file, {"format": "pt"})
    said = tmp_path / "base" / "config.json"  # transformers 4 leaves out what its class has by default
    said.write_text(json.dumps({**json.loads(said.read_text()), "tie_word_embeddings": True}))
    live = with_rows(type(model), tmp_path / "base", target, embedding.split(".")[-2])
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out, folders = tmp_path / "out", (tmp_path / "base", tmp_path / "adapter")
    loudmerge.merge(*folders, out)
    merged = load_file(out / "model.safetensors")
    assert all(torch.equal(merged[embedding], merged[copy]) for copy in copies)
    assert loudmerge.verify(out, *folders).ok
    wanted = type(model).from_pretrained(tmp_path / "base").eval()
    assert (logits(live) - logits(wanted)).abs().max() > 1e-3
    torch.testing.assert_close(logits(type(model).from_pretrained(out).eval()), logits(live))


def test_rows_of_t5_that_stores_its_head_apart_are_refused(tmp_path: Path) -> None:
    """As T5 1.1 and FLAN-T5 do: whether PEFT gave the head the rows, the release of transformers decided."""
    t5_with_a_head_of_its_own(tmp_path / "base")
    head = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    live = with_rows(T5ForConditionalGeneration, tmp_path / "base", "q", "shared")
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(loudmerge.MergeRefused, match="the same rows under transformers 5, not under 4"):
        loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = live.merge_and_unload().lm_head.weight
    assert torch.equal(merged[6:8], head[6:8]) is kinds.TRANSFORMERS_4


def t5_with_a_head_of_its_own(base: Path) -> None:
    torch.manual_seed(0)
    t5().save_pretrained(base)
    file, config = (base / name for name in ("model.safetensors", "config.json"))
    save_file({**load_file(file), "lm_head.weight": torch.randn(99, 32)}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))


ON_SHARED: list[dict[str, Any]] = [
    {"target_modules": ["q", "shared"]},
    {"target_modules": ["q"], "modules_to_save": ["shared"]},
]


@pytest.mark.parametrize("lora", ON_SHARED, ids=["LoRA", "copy"])
def test_what_no_forward_of_t5_calls_is_refused_once_it_changes_the_base(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT's live model computes the same whatever stands on `shared`; training never moves it."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    t5_with_a_head_of_its_own(base)
    live = get_peft_model(T5ForConditionalGeneration.from_pretrained(base).eval(), LoraConfig(r=3, **lora))
    trained = [(name, value) for name, value in live.named_parameters() if value.requires_grad]
    with torch.no_grad():
        for name, value in trained:
            if ".q." in name:
                value.add_(torch.randn_like(value))
    live.save_pretrained(adapter, save_embedding_layers=False)
    wanted = logits(live)
    loudmerge.merge(base, adapter, out)
    merged = T5ForConditionalGeneration.from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for name, value in trained:
            if "shared" in name:
                value.add_(torch.randn_like(value))
    assert torch.equal(logits(live), wanted)
    live.save_pretrained(adapter, save_embedding_layers=False)
    with pytest.raises(loudmerge.MergeRefused, match="a change of shared, which no forward calls") as refused:
        loudmerge.merge(base, adapter, tmp_path / "second")
    assert refused.value.code == "unsupported-adapter"


def with_a_bias(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("build", "bias"), [(bert, "cls.predictions.bias"), (roberta, "lm_head.bias"), (esm, "")]
)
def test_rows_that_reach_a_head_with_a_bias_are_refused(
    build: Callable[[], PreTrainedModel], bias: str, tmp_path: Path
) -> None:
    """PEFT computes the head without it, and leaves it in its own merge. ESM's is added behind the head."""
    torch.manual_seed(0)
    model = with_a_bias(build())
    model.save_pretrained(tmp_path / "base")
    live = with_rows(type(model), tmp_path / "base", "query", "word_embeddings")
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted, folders = logits(live), (tmp_path / "base", tmp_path / "adapter")
    if bias:
        with pytest.raises(loudmerge.MergeRefused, match=f"{bias} .* that PEFT leaves out"):
            loudmerge.merge(*folders, tmp_path / "out")
        with pytest.raises(loudmerge.MergeRefused, match=f"{bias} .* that PEFT leaves out"):
            loudmerge.save_pretrained_merged(live, tmp_path / "live")
        lost = (logits(live.merge_and_unload()) - wanted).abs().max()
        torch.testing.assert_close(lost, load_file(folders[0] / "model.safetensors")[bias].abs().max())
        return
    loudmerge.merge(*folders, tmp_path / "out")
    loudmerge.save_pretrained_merged(live, tmp_path / "live")
    for out in ("out", "live"):
        torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / out).eval()), wanted)


@pytest.mark.parametrize(("build", "bias"), [(bert, "cls.predictions.bias"), (roberta, "lm_head.bias")])
def test_a_tied_bias_that_peft_saves_under_both_of_its_names_is_merged(
    build: Callable[[], PreTrainedModel], bias: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = with_a_bias(build())
    model.save_pretrained(tmp_path / "base")
    live = get_peft_model(
        type(model).from_pretrained(tmp_path / "base").eval(),
        LoraConfig(r=3, target_modules=["query"], bias="all"),
    )
    assert isinstance(live, PeftModel)
    kinds.train(live)
    live.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    both = [f"base_model.model.{name}" for name in (bias, bias.replace(".bias", ".decoder.bias"))]
    assert torch.equal(*(held[name] for name in both))
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(
        logits(type(model).from_pretrained(tmp_path / "out").eval()), logits(live), rtol=1e-4, atol=1e-5
    )
    save_file({**held, both[0]: held[both[0]] + 1}, file, {"format": "pt"})
    with pytest.raises(loudmerge.MergeRefused, match=r"found other values than .* expected the same bytes"):
        loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "apart")
