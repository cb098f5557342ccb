"""Adapters that nobody trained, or whose columns are alike for another reason than their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.packing.train import Recipe, train
from loudmerge.layout import LoraBLayout

OUT, INTO, SITES = 96, 64, 4

Expert = tuple[Tensor, Tensor]
"""A (experts, rank, into) and B (experts, out, rank); or B as it lies in the file, (out, experts * rank)."""


@dataclass(frozen=True)
class Fake:
    """Some pairs of one kind."""

    kind: str
    rank: int
    pairs: list[Expert]

    def packed(self, pair: Expert, packing: LoraBLayout) -> Expert:
        """lora_A and lora_B as they lie in a file."""
        a, b = pair
        if b.dim() == 3:
            order = (1, 2, 0) if packing is LoraBLayout.RANK_MAJOR else (1, 0, 2)
            b = b.permute(order).flatten(1)
        return a.flatten(0, 1), b


def fakes(experts: int, rank: int, seed: int) -> Iterator[Fake]:
    """One of each kind."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    def fresh(count: int = experts) -> Tensor:
        """lora_A as PEFT makes it: Kaiming's uniform."""
        return (torch.rand(count, rank, INTO, generator=draw) * 2 - 1) * INTO**-0.5

    def many(kind: str, make: Callable[[], Expert]) -> Fake:
        return Fake(kind, rank, [make() for _ in range(SITES)])

    place = torch.linspace(2, 0.5, rank)
    yield many("random", lambda: (fresh(), normal(experts, OUT, rank)))
    yield many("equal norms", lambda: (fresh(), _unit(normal(experts, OUT, rank))))
    yield many("random norms", lambda: (fresh(), normal(experts, OUT, rank) * normal(experts, 1, rank).exp()))
    yield many("zero", lambda: (fresh(), torch.zeros(experts, OUT, rank)))
    yield many(
        "few columns", lambda: (fresh(), normal(experts, OUT, rank) * (normal(experts, 1, rank) > 1.6))
    )
    yield many(
        "low rank", lambda: (fresh(), torch.einsum("ok,ker->eor", normal(OUT, 3), normal(3, experts, rank)))
    )
    yield many("places: norms", lambda: (fresh(), normal(experts, OUT, rank) * place))
    yield many("places: directions", lambda: (fresh(), normal(1, OUT, rank) + normal(experts, OUT, rank)))
    yield many(
        "dense LoRA copied",
        lambda: (fresh(1) + 0.1 * fresh(), normal(1, OUT, rank) + 0.1 * normal(experts, OUT, rank)),
    )
    yield many(
        "trend in the file",
        lambda: (fresh(), normal(OUT, experts * rank) * torch.linspace(0.5, 2, experts * rank)),
    )
    yield many("drift in the file", lambda: (fresh(), normal(OUT, experts * rank).cumsum(1)))
    yield many(
        "groups of experts",
        lambda: (fresh(), _grouped(normal, experts) @ normal(experts, 8, rank) + normal(experts, OUT, rank)),
    )
    if rank <= min(OUT, INTO):
        yield many(
            "SVD of noise", lambda: _svd(normal(experts, OUT, INTO) * normal(experts, 1, 1).exp(), rank)
        )
    yield from _derived(experts, rank, seed, normal)


def _derived(experts: int, rank: int, seed: int, normal: Callable[..., Tensor]) -> Iterator[Fake]:
    """From adapters that were trained."""
    first, second = (
        [
            _apart(pair.a, pair.b, experts, rank)
            for pair in train(Recipe(experts, rank, 20, seed=2 * seed + n))
        ]
        for n in range(2)
    )
    if rank <= 48:
        noise = [(b @ a, a.shape) for a, b in first]
        yield Fake("SVD of trained", rank, [_svd(w + 1e-4 * normal(*w.shape), rank) for w, _ in noise])
    mean = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in zip(first, second, strict=True)]
    yield Fake("mean of two trained", rank, mean)
    blocks = [_blocks(*pairs) for pairs in zip(first[::2], second[::2], strict=True)]
    yield Fake("gate and up fused", 2 * rank, blocks)
    shuffled = [
        (a, b[torch.randperm(experts, generator=torch.Generator().manual_seed(seed))]) for a, b in first
    ]
    yield Fake("A and B of other experts", rank, shuffled)


def _apart(a: Tensor, b: Tensor, experts: int, rank: int) -> Expert:
    return a.view(experts, rank, -1), b.view(-1, rank, experts).permute(2, 0, 1)


def _blocks(gate: Expert, up: Expert) -> Expert:
    """The upper half of one pair and the lower half of another, fused as PEFT fuses gate and up."""
    half = gate[1].shape[1] // 2
    idle = torch.zeros_like(gate[1][:, :half])
    upper = torch.cat([gate[1][:, :half], idle], 2)
    lower = torch.cat([idle, up[1][:, half:]], 2)
    return torch.cat([gate[0], up[0]], 1), torch.cat([upper, lower], 1)


def _svd(weight: Tensor, rank: int) -> Expert:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:, :rank].sqrt()
    a = torch.zeros(len(weight), rank, weight.shape[2])
    b = torch.zeros(len(weight), weight.shape[1], rank)
    kept = root.shape[1]
    a[:, :kept] = root[:, :, None] * right[:, :rank]
    b[:, :, :kept] = left[:, :, :rank] * root[:, None]
    return a, b


def _unit(b: Tensor) -> Tensor:
    return b / b.norm(dim=1, keepdim=True)


def _grouped(normal: Callable[..., Tensor], experts: int) -> Tensor:
    """(experts, OUT, 8): equal for experts of one group, as group-limited routing could make them."""
    group = torch.arange(experts) // max(1, experts // 8)
    return normal(int(group.max()) + 1, OUT, 8)[group]
