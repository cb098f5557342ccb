"""The layout algebra of fused expert LoRA: which hypotheses a pair of tensors admits. Pure.

A fused expert parameter of E experts has, for each expert, a matrix. PEFT's `ParamWrapper`
stores its LoRA as

    lora_A.weight  (rank * experts, a)      rows grouped by expert:   A_e = A[e*r:(e+1)*r]
    lora_B.weight  (b, rank * experts)      columns packed in one of two ways:
        rank_major          B_e = B[:, e::E]            PEFT (all versions), vLLM, SkyRL, NeMo
        grouped_by_expert   B_e = B[:, e*r:(e+1)*r]     unsloth_zoo until 2026.9.5

and a and b are the axes (d1, d2) of the parameter in memory, in one of two orders:

    standard   a = d2, b = d1   dW_e = s *  B_e @ A_e
    swapped    a = d1, b = d2   dW_e = s * (B_e @ A_e)^T

Source: peft/tuners/lora/layer.py, `ParamWrapper.update_layer` and `get_delta_weight`
(0.17 to 0.21.2); unslothai/unsloth-zoo#1232 and #1269 for the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol, runtime_checkable

Shape = tuple[int, ...]


class Orientation(str, Enum):
    """Which axis of the parameter `lora_A` reads, in the axes of the in-memory parameter (d1, d2).

    STANDARD: lora_A's second axis is d2 and lora_B's first is d1. SWAPPED: the other way round.
    """

    STANDARD = "standard"
    SWAPPED = "swapped"

    def flipped(self) -> Orientation:
        return Orientation.SWAPPED if self is Orientation.STANDARD else Orientation.STANDARD


class LoraBLayout(str, Enum):
    """How the columns of `lora_B` are packed."""

    RANK_MAJOR = "rank_major"
    GROUPED_BY_EXPERT = "grouped_by_expert"


class Axes(str, Enum):
    """The order of the two axes of an expert matrix, in memory or on disk."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


@dataclass(frozen=True, slots=True)
class Span:
    """`count` indices along one axis: start, start + step, …"""

    start: int
    count: int
    step: int = 1

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)

    def meets(self, other: Span) -> bool:
        """Whether they have an index in common. Both have one step."""
        inside = self.start < other.places.stop and other.start < self.places.stop
        return inside and (self.start - other.start) % self.step == 0


@runtime_checkable
class _HasShape(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


def shape_of(value: _HasShape | Sequence[int]) -> Shape:
    """The shape of a tensor, or the shape itself."""
    dims = value if isinstance(value, Sequence) else value.shape
    return tuple(int(dim) for dim in dims)


@dataclass(frozen=True)
class PairShape:
    """The shapes of one LoRA pair: A is (rows, a), B is (b, columns); rows = columns = rank * experts."""

    rows: int
    a: int
    b: int
    columns: int

    @classmethod
    def of(cls, lora_a: _HasShape | Sequence[int], lora_b: _HasShape | Sequence[int]) -> PairShape:
        """Raises ValueError unless both have two axes."""
        shape_a, shape_b = shape_of(lora_a), shape_of(lora_b)
        if len(shape_a) != 2 or len(shape_b) != 2:
            raise ValueError(f"lora_A {list(shape_a)} and lora_B {list(shape_b)} must have two axes each")
        return cls(shape_a[0], shape_a[1], shape_b[0], shape_b[1])

    def rank(self, num_experts: int) -> int | None:
        """The rank for one expert, or None when rows and columns are not the same multiple of it."""
        if self.rows != self.columns or num_experts < 1 or self.rows % num_experts or not self.rows:
            return None
        return self.rows // num_experts

    def orientations(self, d1: int, d2: int) -> frozenset[Orientation]:
        """The orientations in which this pair fits a parameter whose experts are (d1, d2)."""
        fits = set()
        if (self.b, self.a) == (d1, d2):
            fits.add(Orientation.STANDARD)
        if (self.a, self.b) == (d1, d2):
            fits.add(Orientation.SWAPPED)
        return frozenset(fits)


def detect_layout(
    lora_A: _HasShape | Sequence[int],
    lora_B: _HasShape | Sequence[int],
    num_experts: int,
    out_dim: int,
    in_dim: int,
) -> tuple[Literal["standard", "swapped", "ambiguous", "unknown"], int | None]:
    """The layout that one pair's shapes prove, and its rank.

    lora_A: (rank * experts, a), lora_B: (b, rank * experts), tensors or shapes.
    out_dim, in_dim: the expert's matrix as a Linear's weight.
    "ambiguous": both fit (a square matrix). "unknown": neither fits, or no whole rank (None) exists.
    The shapes never tell how the columns of lora_B are packed.
    """
    shape_a, shape_b = shape_of(lora_A), shape_of(lora_B)
    if len(shape_a) != 2 or len(shape_b) != 2:
        return "unknown", None
    pair = PairShape.of(shape_a, shape_b)
    rank = pair.rank(num_experts)
    fits = pair.orientations(out_dim, in_dim)
    if rank is None or not fits:
        return "unknown", rank
    if len(fits) == 2:
        return "ambiguous", rank
    return ("standard" if Orientation.STANDARD in fits else "swapped"), rank
