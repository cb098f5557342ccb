"""The layouts an adapter of expert LoRA can have, and the way from one to another. Pure.

All ways go through the same form, the factors of each expert's update in the axes of the parameter in
memory: up (experts, d1, rank) and down (experts, rank, d2), so that dW_e = s * up_e @ down_e. Between the
fused layouts every step is a permutation of elements: no bit changes. loudmerge.layout has the packing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from loudmerge.layout import LoraBLayout, Orientation, Span


@dataclass(frozen=True)
class Factored:
    """One fused parameter's LoRA. up: (experts, d1, rank). down: (experts, rank, d2)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[2]

    def transposed(self) -> Factored:
        """That of the transposed parameter: dW_e^T = down_e^T @ up_e^T."""
        return Factored(self.down.transpose(1, 2), self.up.transpose(1, 2))


def factored(
    lora_a: Tensor, lora_b: Tensor, experts: int, orientation: Orientation, packing: LoraBLayout
) -> Factored:
    """Reads a fused pair. lora_a: (rank * experts, a), lora_b: (b, rank * experts)."""
    rank = lora_a.shape[0] // experts
    a = lora_a.view(experts, rank, -1)
    if packing is LoraBLayout.RANK_MAJOR:
        b = lora_b.view(-1, rank, experts).permute(2, 0, 1)
    else:
        b = lora_b.view(-1, experts, rank).permute(1, 0, 2)
    if orientation is Orientation.STANDARD:
        return Factored(b, a)
    return Factored(a.transpose(1, 2), b.transpose(1, 2))


def fused(factors: Factored, orientation: Orientation, packing: LoraBLayout) -> tuple[Tensor, Tensor]:
    """Writes a fused pair, the inverse of `factored`: lora_A and lora_B."""
    if orientation is Orientation.STANDARD:
        a, b = factors.down, factors.up
    else:
        a, b = factors.up.transpose(1, 2), factors.down.transpose(1, 2)
    experts, columns, rank = b.shape
    axes = (1, 2, 0) if packing is LoraBLayout.RANK_MAJOR else (1, 0, 2)
    packed = b.permute(axes).reshape(columns, rank * experts)
    return a.reshape(experts * rank, -1), packed


def dtype_of_all(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds every value of these: float32 for bfloat16 and float16 together."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def joined(parts: Sequence[Factored]) -> Factored:
    """gate's and up's LoRA, out axis first, as one of both: their rows one below the other.

    Where both read their input by the same factor that one serves both, and the rank stays. Else each keeps
    its own part of a rank of both together, with zeros in the other's (as PEFT >= 0.19 fuses them:
    peft/utils/transformers_weight_conversion.py).
    """
    first, *others = parts
    if all(torch.equal(first.down, other.down) for other in others):
        return Factored(torch.cat([part.up for part in parts], dim=1), first.down)
    experts, rank = first.up.shape[0], sum(part.rank for part in parts)
    rows = sum(part.up.shape[1] for part in parts)
    up = first.up.new_zeros(experts, rows, rank, dtype=dtype_of_all(part.up for part in parts))
    row = column = 0
    for part in parts:
        up[:, row : row + part.up.shape[1], column : column + part.rank] = part.up
        row, column = row + part.up.shape[1], column + part.rank
    return Factored(up, torch.cat([part.down for part in parts], dim=1))


def parted(whole: Factored, rows: Sequence[Span]) -> list[Factored]:
    """gate's and up's LoRA, each as its own, from that of both: the inverse of `joined`.

    rows: each one's part of the out axis. One that has zeros in all of the rank but its own part gets that
    part alone, if all are so.
    """
    parts = [Factored(whole.up[:, span.places], whole.down) for span in rows]
    rank, left = divmod(whole.rank, len(parts))
    own = [
        Factored(part.up[:, :, first : first + rank], part.down[:, first : first + rank])
        for first, part in zip(range(0, whole.rank, max(rank, 1)), parts, strict=False)
    ]
    apart = all(
        alone.up.count_nonzero() == part.up.count_nonzero() for alone, part in zip(own, parts, strict=False)
    )
    return own if apart and not left else parts
