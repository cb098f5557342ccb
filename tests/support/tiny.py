"""Tiny random models of every mixture-of-experts family that the installed transformers can build.

A model is made of its real config class, shrunk by rules (`tiny_overrides.SIZES`) through all nested
configs, and of its real model class; `tiny_overrides.OVERRIDES` holds what the rules cannot know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.support.tiny_overrides import (
    EXPERT_COUNTS,
    EXPERT_INTERMEDIATE,
    FAMILIES,
    NEVER_NONE,
    OVERRIDES,
    SIZES,
    TEXT_INTERMEDIATE,
)

HIDDEN = 32
MOE_INTERMEDIATE = 20
INTERMEDIATE = 28
VOCABULARY = 96

_CLASS_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_COMPOSITE_MAPPINGS = (*_CLASS_MAPPINGS[1:3], *_CLASS_MAPPINGS[:1], *_CLASS_MAPPINGS[3:])
_MLA_DERIVED = ("head_dim", "qk_head_dim")
_ROUTED = re.compile(r"\.((gate_up|gate|up|down)_proj|fc[12]\.weight|(in|out)put_linear\.weight)$")
_NOT_ROUTED = re.compile(r"shared_experts|vision_tower")
_TOWER = re.compile(r"vision|visual|audio|projector|resampler|patch_merg|talker|code2wav")


def model_class(model_type: str) -> type[PreTrainedModel] | None:
    """The class that a user's Auto class would give for this model type, None where there is none."""
    if model_type not in CONFIG_MAPPING_NAMES:
        return None
    composite = "text_config" in CONFIG_MAPPING[model_type].sub_configs
    for mapping in _COMPOSITE_MAPPINGS if composite else _CLASS_MAPPINGS:
        name = getattr(modeling_auto, mapping, {}).get(model_type)
        if name is not None:
            name = name if isinstance(name, str) else name[0]
            found: type[PreTrainedModel] = getattr(transformers, name)
            return found
    return None


BUILDABLE: tuple[str, ...] = tuple(name for name in FAMILIES if model_class(name) is not None)
"""The families that the installed transformers registers."""


def config(
    model_type: str,
    *,
    experts: int = 4,
    hidden_size: int = HIDDEN,
    moe_intermediate_size: int = MOE_INTERMEDIATE,
    intermediate_size: int = INTERMEDIATE,
    **more: int,
) -> PretrainedConfig:
    """The family's own config, shrunk. `more` is further sizes by field name."""
    sizes = {**SIZES, "hidden_size": hidden_size, **more}
    sizes |= dict.fromkeys(EXPERT_INTERMEDIATE, moe_intermediate_size)
    sizes |= dict.fromkeys(TEXT_INTERMEDIATE, intermediate_size) | dict.fromkeys(EXPERT_COUNTS, experts)
    default = AutoConfig.for_model(model_type)
    shrunk = _shrink(default.to_dict(), sizes, iter(range(VOCABULARY - 1, 0, -1)))
    _merge(shrunk, OVERRIDES.get(model_type, {}))
    return AutoConfig.for_model(model_type, **shrunk)


def _shrink(values: Mapping[str, Any], sizes: Mapping[str, Any], token_ids: Iterator[int]) -> dict[str, Any]:
    shrunk: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "per_layer_config":
            shrunk[key] = _shrink(value, sizes, token_ids)
            if value.get("model_type"):
                shrunk[key]["model_type"] = value["model_type"]
                _merge(shrunk[key], OVERRIDES.get(value["model_type"], {}))
        elif isinstance(value, bool) or (value is None and key not in NEVER_NONE):
            continue
        elif key in _MLA_DERIVED and "kv_lora_rank" in values:
            continue  # the config computes them of the parts
        elif key in sizes:
            shrunk[key] = sizes[key]
        elif isinstance(value, int) and value >= VOCABULARY and re.search(r"(_id|token_index)$", key):
            shrunk[key] = next(token_ids)
    return shrunk


def _merge(into: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict) and key.endswith("_config"):
            _merge(into[key], value)
        elif value is ...:
            into.pop(key, None)
        else:
            into[key] = value


def build(
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts: int = 4,
    **sizes: int,
) -> PreTrainedModel:
    """A random tiny model of `model_type`, in evaluation mode. `sizes` as in `config`."""
    cls = model_class(model_type)
    if cls is None:
        raise LookupError(f"transformers {transformers.__version__} has no model of type {model_type!r}")
    torch.manual_seed(seed)
    model = cls(config(model_type, experts=experts, **sizes))
    fill(model, seed)
    _cast(model, dtype)
    return model.eval()


def fill(model: nn.Module, seed: int) -> None:
    """Random values in every floating parameter and persistent buffer: no two equal, none zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
            if tensor.is_floating_point():
                around = 1.0 if tensor.ndim == 1 and "norm" in name else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + around)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Not `model.to`: it would also cast complex buffers, which are not saved."""
    for _, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def build_square(model_type: str, *, which: str, **options: Any) -> PreTrainedModel:
    """A tiny model whose expert matrices are square: `which` is "gate_up" (2I = H) or "down" (I = H)."""
    size = {"gate_up": HIDDEN // 2, "down": HIDDEN}[which]
    options |= {"moe_intermediate_size": size, "intermediate_size": size, "moe_hidden_size": HIDDEN}
    return build(model_type, **options)


def expert_parameters(model: nn.Module) -> list[str]:
    """The full names of the routed experts' three-axis parameters, in the model's order."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and _ROUTED.search(name) and not _NOT_ROUTED.search(name)
    ]


def text_linears(model: nn.Module) -> list[str]:
    """The full names of the text part's Linears, the head left out."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not _TOWER.search(name) and not name.endswith("lm_head")
    ]


def tower_linears(model: nn.Module) -> list[str]:
    """The full names of the Linears that `text_linears` leaves to the vision and audio parts."""
    return [
        name for name, module in model.named_modules() if type(module) is nn.Linear and _TOWER.search(name)
    ]


def router_parameters(model: nn.Module) -> list[str]:
    """The full names of router weights whose module is no Linear, as `target_parameters` takes them."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and re.search(r"(gate|router)\.weight$", name)
        and not _TOWER.search(name)
        and type(model.get_submodule(name.rpartition(".")[0])) is not nn.Linear
    ]


def load(path: Path, cls: type[PreTrainedModel], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in `path`, in evaluation mode."""
    with _without_first_values():
        loaded = cls.from_pretrained(path, dtype=dtype).eval()
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _draw_nothing(_: nn.Module) -> None:
    pass


@contextmanager
def _without_first_values() -> Iterator[None]:
    """Inside, torch's modules draw no values as they are made: from_pretrained makes them without memory.

    Drawing nothing, on the device "meta", is a fifth of the time. What a checkpoint lacks, transformers
    fills in afterwards, by other means.
    """
    with ExitStack() as stack:
        for module in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            stack.enter_context(mock.patch.object(module, "reset_parameters", _draw_nothing))
        yield


def logits(model: nn.Module) -> Tensor:
    """What a model (or its PeftModel) says of a fixed text without images: (1, tokens, vocabulary)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = getattr(inner, "thinker", inner)
    ids = torch.arange(3, 15)[None]
    kwargs = {"decoder_input_ids": ids} if getattr(inner.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        output = inner(input_ids=ids, **kwargs)
    found: Tensor = output["logits"] if "logits" in output else output[0]
    return found.float()


def attach_random_lora(
    model: PreTrainedModel,
    *,
    target_parameters: Sequence[str] = (),
    target_modules: Sequence[str] = (),
    r: int = 4,
    alpha: int = 8,
    seed: int = 0,
    save_to: Path | None = None,
    **kwargs: Any,
) -> PeftModel:
    """The installed PEFT's LoRA on `model`, with random A and B (float32), saved where `save_to` says."""
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        target_parameters=list(target_parameters) or None,
        **kwargs,
    )
    peft_model = get_peft_model(model, lora)
    assert isinstance(peft_model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if save_to is not None:
        # No test reads the card, which is three quarters of the time.
        with mock.patch.object(PeftModel, "create_or_update_model_card"):
            peft_model.save_pretrained(save_to)
    return peft_model.eval()
