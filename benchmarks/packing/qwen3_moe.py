"""A tiny Qwen3-MoE with PEFT's own fused LoRA; for Unsloth's packing PEFT is shown its lora_B regrouped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.packing.train import VOCABULARY, Pair, Recipe, batches, stepper
from loudmerge.layout import LoraBLayout

LEAVES = ("gate_up_proj", "down_proj")


class Regrouped(nn.Module):
    """Shows PEFT, which reads rank_major, a parameter whose columns are grouped by expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self._experts = experts

    def forward(self, grouped: Tensor) -> Tensor:
        return grouped.view(len(grouped), self._experts, -1).transpose(1, 2).flatten(1)


def train(recipe: Recipe, packing: LoraBLayout) -> list[Pair]:
    """The pairs of a trained adapter, layer by layer, as the packing's own tool saves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _model(recipe)
        if packing is LoraBLayout.GROUPED_BY_EXPERT:
            for _, wrapper in _wrappers(model):
                # lora_B is zero, so nothing has to be repacked before the first step.
                parametrize.register_parametrization(
                    wrapper.lora_B["default"], "weight", Regrouped(recipe.experts)
                )
        step = stepper(recipe.optimizer, recipe.lr, [p for p in model.parameters() if p.requires_grad])
        text = batches(recipe)
        for _ in range(recipe.steps):
            ids = next(text)
            logits = model(input_ids=ids[:, :-1]).logits
            cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            step()
    return [_pair(name, wrapper) for name, wrapper in _wrappers(model)]


def _model(recipe: Recipe) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        moe_intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        initializer_range=recipe.hidden**-0.5,
    )
    targets = [f"mlp.experts.{leaf}" for leaf in LEAVES]
    lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=[], target_parameters=targets)
    return get_peft_model(Qwen3MoeForCausalLM(config), lora)


def _wrappers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ParamWrapper))


def _pair(name: str, wrapper: Any) -> Pair:
    a, b = wrapper.lora_A["default"], wrapper.lora_B["default"]
    weight = b.parametrizations.weight.original if parametrize.is_parametrized(b) else b.weight
    layer = int(name.partition(".layers.")[2].partition(".")[0])
    return Pair(layer, wrapper.parameter_name, a.weight.detach().clone(), weight.detach().clone())
