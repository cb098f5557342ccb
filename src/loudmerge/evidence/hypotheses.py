"""What an experts module's pairs can mean: the readings that all of its shapes admit together. Pure."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from loudmerge.layout import Orientation, PairShape
from loudmerge.reading.adapter import LoraPair


@dataclass(frozen=True)
class Evidence:
    """One thing that speaks for a layout. says: the orientation or the lora_B layout it speaks for."""

    source: str
    site: str
    says: str
    confidence: float
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FusedParameter:
    """A targeted parameter of an experts module: its experts' matrices are (d1, d2) in memory."""

    leaf: str
    name: str
    d1: int
    d2: int
    rank: int


@dataclass(frozen=True)
class FusedModule:
    """An experts module that the adapter wraps. pairs: outermost wrapper first.

    orientations: those that PEFT can have written. With one expert it takes the path of a plain Linear,
    which never swaps the axes that the parameter had in memory.
    """

    name: str
    num_experts: int
    pairs: tuple[LoraPair, ...]
    parameters: tuple[FusedParameter, ...]
    orientations: frozenset[Orientation] = frozenset(Orientation)

    def parameter(self, leaf: str) -> FusedParameter:
        return next(parameter for parameter in self.parameters if parameter.leaf == leaf)


@dataclass(frozen=True)
class Hypothesis:
    """One reading of a module: the parameter of each pair, outermost first, and the orientation of all."""

    assignment: tuple[str, ...]
    orientation: Orientation


def hypotheses(module: FusedModule) -> tuple[Hypothesis, ...]:
    """Every reading that the shapes of all the module's pairs admit together."""
    return tuple(
        Hypothesis(tuple(parameter.leaf for parameter in order), orientation)
        for order in itertools.permutations(module.parameters)
        for orientation in Orientation
        if orientation in module.orientations
        and all(admits(module, p, pair, orientation) for p, pair in zip(order, module.pairs, strict=True))
    )


def admits(module: FusedModule, parameter: FusedParameter, pair: LoraPair, orientation: Orientation) -> bool:
    """Whether one pair can be the LoRA of one parameter in this orientation."""
    shape = PairShape.of(pair.a.shape, pair.b.shape)
    return shape.rank(module.num_experts) == parameter.rank and orientation in shape.orientations(
        parameter.d1, parameter.d2
    )
