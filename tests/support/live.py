"""Live PeftModels for the tests of `save_pretrained_merged`, and what merging one must leave as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import loudmerge
from tests.support import kinds, tiny
from tests.support.kinds import UNTIED, Kind

LOGITS_BOUND = 1e-5
TRAINED = 100 * LOGITS_BOUND

LLAMA = Kind("Llama", "llama", {"target_modules": ["q_proj", "down_proj"]}, (), config=UNTIED)


def live_model(kind: Kind = LLAMA, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A live model whose base was never on disk."""
    return kinds.attach(kinds.build(kind, dtype), kind)


def snapshot(model: PeftModel) -> dict[str, Any]:
    """Everything about a live model that saving it must not change."""
    base = model.get_base_model()
    generation = getattr(base, "generation_config", None)  # a model that only classifies has none
    return {
        "modules": {
            name: (
                type(module),
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                getattr(module, "active_adapters", None),
                getattr(module, "merged_adapters", None),
            )
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (id(parameter), parameter.requires_grad, parameter.device, parameter.dtype)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "configs": (id(base.config), base.config.to_dict(), id(generation)),
        "generation": generation and generation.to_dict(),
        "adapters": {name: (id(found), found.to_dict()) for name, found in model.peft_config.items()},
        "active": list(model.active_adapters),
        "threads": torch.get_num_threads(),
    }


def assert_logits(out: Path, wanted: Tensor) -> None:
    assert (tiny.logits(kinds.load(out)) - wanted).abs().max() <= LOGITS_BOUND


def unchanged(folder: Path, model: PeftModel, code: str, **options: Any) -> str:
    """Refused with this code; the model, and what lies beside OUT, are as before. Returns the message."""
    before, beside = snapshot(model), sorted(folder.rglob("*"))
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.save_pretrained_merged(model, folder / "out", **options)
    assert refusal.value.code == code, str(refusal.value)
    assert snapshot(model) == before
    assert sorted(folder.rglob("*")) == beside
    return str(refusal.value)
