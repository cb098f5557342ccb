"""Roundings that fix what each column of a group of rows keeps, and systematic sampling: candidates.

Every element goes to one of the two neighbours of W + dW. "Its share" is how far it lies between them, from
the neighbour on W's side to the one that dW points to: 0 … 1.
"""

# ruff: noqa: ARG001, D103 - every candidate takes the same arguments, and its name says what it does

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Rounding = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


class Steps(NamedTuple):
    """near: the neighbour on W's side. unit: to the other one, signed as dW. share: of the unit, 0 … 1."""

    near: Tensor
    unit: Tensor
    share: Tensor


def steps(weight: Tensor, delta: Tensor) -> Steps:
    value = weight + delta
    bits = value.view(torch.int32)
    inner, outer = bits & -65536, (bits + 65535) & -65536
    away = (value < 0) == (delta < 0)
    near = torch.where(away, inner, outer).view(torch.float32)
    far = torch.where(away, outer, inner).view(torch.float32)
    unit = far - near
    return Steps(near, unit, torch.where(unit == 0, 0.0, (value - near) / unit))


def by_threshold(group: int, width: float = 0.0, power: float = 1.0, octaves: float = 0.0) -> Rounding:
    """Steps what has the largest share, in each column of `group` rows (0: all), until dW is kept.

    width: of the random part that is added to the shares. octaves: by how many, at random, each is more or
    less than it is. power: of the unit, in what orders the elements.
    The last step is taken by chance, so that the expectation is exact.
    """

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        result = torch.empty_like(weight)
        size = group or weight.shape[0]
        for first in range(0, weight.shape[0], size):
            w, d = weight[first : first + size], delta[first : first + size]
            near, unit, share = steps(w, d)
            gain = unit * d
            missing = (d * d).sum(0) - ((near - w) * d).sum(0)
            score = share * unit.abs().clamp(min=1e-38) ** (1 - power)
            if width:
                score = score + (torch.rand(w.shape, generator=draw) - 0.5) * width
            if octaves:
                score = score * torch.exp2((torch.rand(w.shape, generator=draw) - 0.5) * octaves)
            lot = torch.rand((1, w.shape[1]), generator=draw) if group else torch.tensor(0.5)
            result[first : first + size] = near + unit * largest(score, gain, missing, lot)
        return result

    return rounding


def largest(score: Tensor, gain: Tensor, missing: Tensor, lot: Tensor) -> Tensor:
    """1 for the largest scores of a column whose gains make what is missing, else 0; the last one by lot."""
    order = score.masked_fill(gain <= 0, -torch.inf).argsort(dim=0, descending=True)
    gains = gain.gather(0, order)
    kept = gains.cumsum(0)
    before = kept - gains
    chance = (missing - before) / (kept - before).clamp(min=1e-38)
    moved = (chance > lot) & (gains > 0)
    return torch.zeros_like(gain).scatter_(0, order, moved.float())


def by_row(group: int) -> Rounding:
    """As by_threshold, with each share over the threshold at which its row would keep dW."""

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        near, unit, share = steps(weight, delta)
        gain = (unit * delta).masked_fill(share == 0, 0.0)
        ordered, order = share.sort(dim=1, descending=True)
        reached = gain.gather(1, order).cumsum(1)
        last = (reached < (gain * share).sum(1, keepdim=True)).sum(1, keepdim=True)
        threshold = ordered.gather(1, last.clamp(max=share.shape[1] - 1)).clamp(min=2.0**-16)
        result = torch.empty_like(weight)
        for first in range(0, weight.shape[0], group):
            part = slice(first, first + group)
            missing = (gain[part] * share[part]).sum(0)
            lot = torch.rand((1, weight.shape[1]), generator=draw)
            steps_taken = largest(share[part] / threshold[part], gain[part], missing, lot)
            result[part] = near[part] + unit[part] * steps_taken
        return result

    return rounding


def systematic(axis: int) -> Rounding:
    """Steps where the sum of the shares, along an axis from a random start, passes a whole number."""

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        near, unit, share = steps(weight, delta)
        start = torch.rand(
            (1, weight.shape[1]) if axis == 0 else (weight.shape[0], 1), generator=draw, dtype=torch.float64
        )
        total = share.double().cumsum(axis) + start
        moved = total.floor() > (total - share.double()).floor()
        return near + unit * moved.float()

    return rounding
