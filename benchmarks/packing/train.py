"""A small mixture-of-experts language model whose fused expert LoRA trains in a second, on real text.

Bytes of the standard library's documentation are embedded, mixed with the byte before, run through residual
MoE layers (top-k softmax router, gated experts) and read by a linear head; the loss is the next byte's.
The LoRA is PEFT's `ParamWrapper` in every respect that its bytes could show: lora_A (rank * experts, a) by
Kaiming's uniform, rows grouped by expert; lora_B (b, rank * experts) zero; W_e + s * B_e A_e, or its
transpose ("swapped"). Only how lora_B's columns are read differs: as PEFT does, or as Unsloth did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from loudmerge.comparing.behaviour import library_text
from loudmerge.layout import LoraBLayout

VOCABULARY = 256
SEQUENCE = 64


@dataclass(frozen=True)
class Recipe:
    """One training. base: "random" experts, or "upcycled" from one matrix. tilt: how unequal the router is.

    idle: share of experts that no token may choose. optimizer: adamw, adamw-wd (weight decay 0.1), adam8 (its
    state rounded to 8 bits, blocks of 256), sgd. dtype: what the factors are stored in.
    """

    experts: int
    rank: int
    steps: int
    optimizer: str = "adamw"
    lr: float = 1e-3
    seed: int = 0
    hidden: int = 64
    intermediate: int = 48
    layers: int = 2
    top_k: int = 2
    batch: int = 8
    idle: float = 0.0
    tilt: float = 0.0
    base: str = "random"
    orientation: str = "standard"
    dtype: str = "float32"


@dataclass(frozen=True)
class Pair:
    """The LoRA of one parameter. a: (rank * experts, a). b: (b, rank * experts)."""

    layer: int
    leaf: str
    a: Tensor
    b: Tensor


class FusedLora(nn.Module):
    """The LoRA of a parameter (experts, d1, d2), and the matrices that it makes of it."""

    def __init__(self, weight: Tensor, recipe: Recipe, packing: LoraBLayout) -> None:
        super().__init__()
        experts, d1, d2 = weight.shape
        self._shape, self._packing = (experts, recipe.rank), packing
        self._swapped = recipe.orientation == "swapped"
        a, b = (d1, d2) if self._swapped else (d2, d1)
        self.register_buffer("weight", weight)
        self.a = nn.Parameter(torch.empty(recipe.rank * experts, a))
        self.b = nn.Parameter(torch.zeros(b, recipe.rank * experts))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self._scaling = 2.0

    def forward(self) -> Tensor:
        """(experts, d1, d2)."""
        experts, rank = self._shape
        a = self.a.view(experts, rank, -1)
        if self._packing is LoraBLayout.RANK_MAJOR:
            b = self.b.view(-1, rank, experts).permute(2, 0, 1)
        else:
            b = self.b.view(-1, experts, rank).permute(1, 0, 2)
        delta = self._scaling * torch.bmm(b, a)
        return self.weight + (delta.transpose(1, 2) if self._swapped else delta)


class Layer(nn.Module):
    """A residual mixture of gated experts behind an RMS norm."""

    def __init__(self, recipe: Recipe, packing: LoraBLayout) -> None:
        super().__init__()
        sizes = {
            "gate_up_proj": (2 * recipe.intermediate, recipe.hidden),
            "down_proj": (recipe.hidden, recipe.intermediate),
        }
        self.lora = nn.ModuleDict(
            {leaf: FusedLora(_experts(recipe, *size), recipe, packing) for leaf, size in sizes.items()}
        )
        self.register_buffer("router", torch.randn(recipe.experts, recipe.hidden) * 1.5)
        bias = recipe.tilt * torch.randn(recipe.experts)
        used = max(recipe.top_k, round(recipe.experts * (1 - recipe.idle)))
        bias[torch.randperm(recipe.experts)[used:]] = -torch.inf
        self.register_buffer("bias", bias)
        self._top_k = min(recipe.top_k, recipe.experts)

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, hidden)."""
        normed = functional.rms_norm(x, x.shape[-1:])
        scores = normed @ self.router.T * x.shape[1] ** -0.5 * 2 + self.bias
        weights, chosen = scores.softmax(-1).topk(self._top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        return x + self._experts_of(normed, chosen, weights)

    def _experts_of(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert's tokens in a batch of their own, padded to the largest."""
        tokens, experts = x.shape[0], self.router.shape[0]
        order = chosen.flatten().argsort(stable=True)
        expert = chosen.flatten()[order]
        counts = torch.bincount(expert, minlength=experts)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert]
        rows = order // chosen.shape[1]
        batch = x.new_zeros(experts, int(counts.max()), x.shape[1])
        batch[expert, place] = x[rows]
        gate, up = torch.bmm(batch, self.lora["gate_up_proj"]().transpose(1, 2)).chunk(2, -1)
        out = torch.bmm(functional.silu(gate) * up, self.lora["down_proj"]().transpose(1, 2))
        weighted = out[expert, place] * weights.flatten()[order][:, None]
        return x.new_zeros(tokens, x.shape[1]).index_add(0, rows, weighted)


class Model(nn.Module):
    """Embedding of a byte and the one before, MoE layers, a linear head."""

    def __init__(self, recipe: Recipe, packing: LoraBLayout) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.randn(2, VOCABULARY, recipe.hidden))
        self.layers = nn.ModuleList(Layer(recipe, packing) for _ in range(recipe.layers))
        self.register_buffer("head", torch.randn(VOCABULARY, recipe.hidden) * recipe.hidden**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, tokens). The logits of the next byte, (batch * tokens, VOCABULARY)."""
        before = functional.pad(ids[:, :-1], (1, 0))
        x = (self.embedding[0][ids] + 0.5 * self.embedding[1][before]).flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        return functional.rms_norm(x, x.shape[-1:]) @ self.head.T


def train(recipe: Recipe, packing: LoraBLayout = LoraBLayout.RANK_MAJOR) -> list[Pair]:
    """The pairs of a trained adapter, layer by layer."""
    return dict(trajectory(recipe, packing, (recipe.steps,)))[recipe.steps]


def trajectory(
    recipe: Recipe, packing: LoraBLayout, stops: Sequence[int]
) -> Iterator[tuple[int, list[Pair]]]:
    """One training's adapter after each of these counts of steps. It does not depend on torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Model(recipe, packing)
        step = stepper(recipe.optimizer, recipe.lr, list(model.parameters()))
        text = batches(recipe)
        for done in range(1, max(stops) + 1):
            ids = next(text)
            loss = functional.cross_entropy(model(ids[:, :-1]), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            step()
            if done in stops:
                yield done, _pairs(model, recipe)


def _pairs(model: Model, recipe: Recipe) -> list[Pair]:
    dtype = getattr(torch, recipe.dtype)
    return [
        Pair(number, leaf, lora.a.detach().to(dtype, copy=True), lora.b.detach().to(dtype, copy=True))
        for number, layer in enumerate(model.layers)
        for leaf, lora in layer.lora.items()  # type: ignore[union-attr, operator]
    ]


class Stepper:
    """An optimiser over some parameters; with `bits8` Adam's two states are rounded after every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, bits8: bool) -> None:
        self._optimizer, self._bits8 = optimizer, bits8

    def __call__(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._bits8:
            for state in self._optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    _to_8_bits_(state[name], signed=name == "exp_avg")


def stepper(name: str, lr: float, parameters: list[nn.Parameter]) -> Stepper:
    """One of the study's optimisers."""
    if name == "sgd":
        # Its gradients are small: the rate of AdamW would leave zeros.
        return Stepper(torch.optim.SGD(parameters, lr=lr * 100), bits8=False)
    decay = {"adamw": 0.0, "adam8": 0.0, "adamw-wd": 0.1}[name]
    return Stepper(torch.optim.AdamW(parameters, lr=lr, weight_decay=decay), bits8=name == "adam8")


def _to_8_bits_(state: Tensor, *, signed: bool, block: int = 256) -> None:
    """Rounds to 8 bits of each block's largest element, on a square-root grid: about as 8-bit Adam does."""
    flat = functional.pad(state.flatten(), (0, -state.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = 127 if signed else 255
    root = (flat.abs() / scale).sqrt().mul(levels).round().div(levels)
    state.copy_((root.square() * scale * flat.sign()).flatten()[: state.numel()].view_as(state))


def batches(recipe: Recipe) -> Iterator[Tensor]:
    """(batch, SEQUENCE + 1) bytes of the standard library's documentation."""
    text, draw = _text(), torch.Generator().manual_seed(recipe.seed)
    while True:
        starts = torch.randint(len(text) - SEQUENCE - 1, (recipe.batch,), generator=draw)
        yield text[starts[:, None] + torch.arange(SEQUENCE + 1)]


@cache
def _text() -> Tensor:
    return torch.tensor(list(library_text(200_000).encode("ascii", "replace")))


def _experts(recipe: Recipe, d1: int, d2: int) -> Tensor:
    if recipe.base == "upcycled":
        return (torch.randn(d1, d2) * d2**-0.5).expand(recipe.experts, d1, d2).clone()
    return torch.randn(recipe.experts, d1, d2) * d2**-0.5
