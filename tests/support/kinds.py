"""Kinds of adapter, each with a tiny real model: how to make the base and the live PeftModel.

The kinds themselves are rows of `kinds_linear` (Linears, experts, biases) and `kinds_vocabulary`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.support import tiny

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])

Options = Mapping[str, Any]

UNTIED: Options = {"tie_word_embeddings": False}
TIED: Options = {"tie_word_embeddings": True}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    model: its model_type. lora: LoraConfig's options, or a function of the live model that gives them.
    config: fields set in the model's config. keys: expressions that keys of the adapter's file must match.
    parted: the live model parts two weights that the base ties, which PEFT's own merge forgets.
    stored_twice: the base's file holds the matrix that embedding and head share under both names.
    resize: the vocabulary's new size. save: options of PeftModel.save_pretrained.
    needs_peft: the least PEFT. in_memory: "fused" or "apart", where the experts must be so in memory.
    refused: the code with which loudmerge refuses it. bug: what is wrong today; empty when nothing is.
    """

    name: str
    model: str
    lora: Options | Callable[[PreTrainedModel], Options]
    keys: tuple[str, ...]
    config: Options = dataclasses.field(default_factory=dict)
    parted: bool = False
    stored_twice: bool = False
    experts: int = 4
    resize: int = 0
    save: Options = dataclasses.field(default_factory=dict)
    needs_peft: tuple[int, int] = (0, 17)
    in_memory: str = ""
    refused: str = ""
    bug: str = ""

    def why_not(self) -> str:
        """Why the installed libraries cannot make it; empty when they can."""
        if self.needs_peft > PEFT:
            return f"peft {peft.__version__} cannot make it"
        if self.in_memory not in ("", "apart" if TRANSFORMERS_4 else "fused"):
            return (
                f"{self.model}'s experts are not {self.in_memory} in transformers {transformers.__version__}"
            )
        return ""


def build(kind: Kind, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The kind's base: a random tiny model."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind.model == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=tiny.VOCABULARY)
        config.update({"bos_token_id": 1, "eos_token_id": 2, **kind.config})
        model = GPT2LMHeadModel(config)
    else:
        config = tiny.config(kind.model, experts=kind.experts)
        config.update(dict(kind.config))
        cls = tiny.model_class(kind.model)
        assert cls is not None
        model = cls(config)
    tiny.fill(model, 0)
    return model.to(dtype).eval()


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in `path`; refuses keys that the class does not know or would have to invent."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def attach(model: PreTrainedModel, kind: Kind, *, seed: int = 0) -> PeftModel:
    """The kind's adapter on the live model, every trained value random."""
    if kind.resize:
        model.resize_token_embeddings(kind.resize, mean_resizing=False)
    options = kind.lora(model) if callable(kind.lora) else kind.lora
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, **options}))
    assert isinstance(peft_model, PeftModel)
    train(peft_model, seed)
    return peft_model.eval()


def train(peft_model: nn.Module, seed: int = 0) -> None:
    """Random values in everything that is trained. LoRA's factors anew; the rest moves a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if "magnitude" in name:
                parameter.mul_(1 + noise)
            elif re.search(r"\.lora_(embedding_)?[AB]\.", name) and not name.endswith(".bias"):
                parameter.copy_(noise)
            else:
                parameter.add_(noise)


def trained_logits(model: nn.Module) -> Tensor:
    """As `tiny.logits`; finite, and different from token to token."""
    logits = tiny.logits(model)
    assert torch.isfinite(logits).all()
    assert logits[0].std(dim=0).min() > 0
    return logits
