"""The update of every targeted weight, in float64, from the adapter's file: a second oracle beside PEFT's
own merge.

E experts, r rank. A = lora_A.weight, B = lora_B.weight, s = alpha / r, or alpha / sqrt(r) under rslora.
Linear, and a parameter of two axes: s·B·A.
A parameter (E, d1, d2): A_e = A[e·r:(e+1)·r], B_e = B[:, e::E]; standard s·B_e·A_e, swapped s·(B_e·A_e)ᵀ.
Unsloth's experts up to unsloth_zoo 2026.9.5 read B_e = B[:, e·r:(e+1)·r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

PREFIX = "base_model.model."


class Config(NamedTuple):
    """What of adapter_config.json scales an update, the PEFT that wrote it, and how lora_B's columns are
    packed.
    """

    fields: Mapping[str, Any]
    peft: tuple[int, ...]
    grouped: bool = False

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Of the module or parameter `name`: the first pattern in order that matches its end."""
        rank = int(self._matched("rank_pattern", name, self.fields["r"]))
        alpha = float(self._matched("alpha_pattern", name, self.fields["lora_alpha"]))
        return rank, alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _matched(self, field: str, name: str, default: Any) -> Any:
        patterns = self.fields.get(field) or {}
        return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), default)

    def swapped(self, module: nn.Module) -> bool:
        """Whether this PEFT writes the module's experts swapped."""
        transposed = bool(getattr(module, "is_transposed", False))
        if self.peft < (0, 19):
            return True
        return not transposed if self.peft == (0, 19, 0) else transposed


def updates(live: PeftModel, tensors: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """(name in memory, update in float64) of every LoRA pair of `tensors`, the adapter's file, that the
    formula covers.
    """
    for name, module in live.base_model.model.named_modules():
        lora_A = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        if lora_A is None or not isinstance(module, LoraLayer):
            continue
        lora_B = tensors[f"{PREFIX}{name}.lora_B.weight"].double()
        plain = name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            parameter = f"{plain}.{module.parameter_name}"
            yield parameter, _parameter(module, parameter, lora_A.double(), lora_B, config)
        else:
            yield f"{plain}.weight", config.rank_and_scaling(plain)[1] * lora_B @ lora_A.double()


def _parameter(module: ParamWrapper, name: str, lora_A: Tensor, lora_B: Tensor, config: Config) -> Tensor:
    rank, scaling = config.rank_and_scaling(name)
    shape = module.get_param().shape
    if len(shape) == 2:
        return scaling * lora_B @ lora_A
    count = shape[0]
    columns = [
        slice(e * rank, (e + 1) * rank) if config.grouped else slice(e, None, count) for e in range(count)
    ]
    by_expert = [lora_B[:, columns[e]] @ lora_A[e * rank : (e + 1) * rank] for e in range(count)]
    inner = module
    while isinstance(inner, ParamWrapper):
        inner = inner.base_layer
    # One expert is one matrix to PEFT, whose plain path knows no orientation.
    if count > 1 and config.swapped(inner):
        by_expert = [update.T for update in by_expert]
    return scaling * torch.stack(by_expert)
