"""Fused expert LoRA on the first layers of SmolLM2, upcycled: every expert is a copy of the layer's own MLP.

A token's experts come from a random softmax router over the real hidden states. The copies share one matrix
in memory, so any number of experts fits; with lora_B zero the model is SmolLM2's first layers and its head.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.packing.train import Pair, Recipe, stepper
from loudmerge.comparing.behaviour import library_text
from loudmerge.layout import LoraBLayout
from tests.support import smollm2

TOKENS = 256


class Upcycled(nn.Module):
    """An MLP's mixture of equal experts, with fused LoRA on gate_up and down in standard orientation."""

    def __init__(self, mlp: Any, recipe: Recipe, packing: LoraBLayout) -> None:
        super().__init__()
        self._mlp = [mlp]
        self._recipe, self._packing = recipe, packing
        intermediate, hidden = mlp.gate_proj.weight.shape
        rows = recipe.experts * recipe.rank
        self.lora = nn.ParameterDict()
        for leaf, (out, into) in {
            "gate_up_proj": (2 * intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }.items():
            self.lora[f"{leaf}_a"] = nn.Parameter(torch.empty(rows, into))
            self.lora[f"{leaf}_b"] = nn.Parameter(torch.zeros(out, rows))
            nn.init.kaiming_uniform_(self.lora[f"{leaf}_a"], a=math.sqrt(5))
        self.register_buffer("router", torch.randn(recipe.experts, hidden))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (batch, tokens, hidden)."""
        mlp, recipe = self._mlp[0], self._recipe
        x = hidden_states.flatten(0, 1)
        scores = x @ self.router.T * (2 / x.norm(dim=1, keepdim=True))
        weights, chosen = scores.softmax(-1).topk(min(recipe.top_k, recipe.experts))
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        expert, rows = chosen.flatten()[order], order // chosen.shape[1]
        counts = torch.bincount(expert, minlength=recipe.experts)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert]
        slots = expert, place, (recipe.experts, int(counts.max()))
        gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)[rows]
        gate, up = (gate_up + self._delta("gate_up_proj", x[rows], slots)).chunk(2, -1)
        inner = mlp.act_fn(gate) * up
        out = mlp.down_proj(inner) + self._delta("down_proj", inner, slots)
        out = x.new_zeros(x.shape).index_add(0, rows, out * weights.flatten()[order][:, None])
        return out.view_as(hidden_states)

    def _delta(self, leaf: str, x: Tensor, slots: tuple[Tensor, Tensor, tuple[int, int]]) -> Tensor:
        """2 * B_e A_e x, each row by its own expert."""
        expert, place, size = slots
        experts, rank = self._recipe.experts, self._recipe.rank
        a = self.lora[f"{leaf}_a"].view(experts, rank, -1)
        b = self.lora[f"{leaf}_b"]
        if self._packing is LoraBLayout.RANK_MAJOR:
            b = b.view(-1, rank, experts).permute(2, 1, 0)
        else:
            b = b.view(-1, experts, rank).permute(1, 2, 0)
        padded = x.new_zeros(*size, x.shape[1])
        padded[expert, place] = x
        return 2 * torch.bmm(torch.bmm(padded, a.transpose(1, 2)), b)[expert, place]


class SmolLM2:
    """The dense model and its text; `train` leaves both as they were."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            dense = smollm2.load_dense(Path(scratch))
        self.model = dense.model.requires_grad_(False)
        self._mlps = [layer.mlp for layer in self.model.model.layers]
        found = dense.tokenizer(library_text(20_000), return_tensors="pt", add_special_tokens=False)
        self._ids: Tensor = found["input_ids"][0]

    def train(self, recipe: Recipe, packing: LoraBLayout = LoraBLayout.RANK_MAJOR) -> list[Pair]:
        """The pairs of an adapter trained on the first `recipe.layers` layers."""
        inner = self.model.model
        layers = inner.layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            inner.layers = layers[: recipe.layers]
            mixtures = []
            for layer, mlp in zip(inner.layers, self._mlps, strict=False):
                layer.mlp = Upcycled(mlp, recipe, packing)
                mixtures.append(layer.mlp)
            step = stepper(recipe.optimizer, recipe.lr, [p for m in mixtures for p in m.parameters()])
            for _ in range(recipe.steps):
                start = int(torch.randint(len(self._ids) - TOKENS, ()))
                ids = self._ids[start : start + TOKENS][None]
                logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits, ids[0, 1:]).backward()  # type: ignore[no-untyped-call]
                step()
        for layer, mlp in zip(inner.layers, self._mlps, strict=False):
            layer.mlp = mlp
        inner.layers = layers
        return [
            Pair(number, leaf, mixture.lora[f"{leaf}_a"].detach(), mixture.lora[f"{leaf}_b"].detach())
            for number, mixture in enumerate(mixtures)
            for leaf in ("gate_up_proj", "down_proj")
        ]
