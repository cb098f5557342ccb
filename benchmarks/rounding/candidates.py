"""Roundings that were tried, beside loudmerge's own. Each takes W, dW and A, and returns W', all in float32.

weight, delta: (out, in); weight has bfloat16's values. a: (rank, in), the rows that span dW's inputs.
"""

# ruff: noqa: ARG001, D103, FBT001 - every candidate takes the same arguments, and its name says what it does

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rounding.thresholds import Rounding, by_row, by_threshold, systematic


def to_bfloat16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def peft(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    return to_bfloat16(weight + to_bfloat16(delta))


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers below and above each float32, equal where it is one."""
    bits = value.view(torch.int32)
    inner = bits & -65536
    outer = torch.where(bits == inner, inner, inner + 65536)
    one, other = inner.view(torch.float32), outer.view(torch.float32)
    return torch.minimum(one, other), torch.maximum(one, other)


def pushed(weight: Tensor, delta: Tensor, push: Tensor) -> Tensor:
    """The nearest of W + push, held between the two neighbours of W + dW."""
    low, high = neighbours(weight + delta)
    return to_bfloat16(weight + push).clamp(low, high)


def solved_gain(weight: Tensor, delta: Tensor, by_row: bool) -> Tensor:
    """The gain g for which the nearest of W + g dW keeps dW: a number, or one for each row (rows, 1)."""
    shape = (weight.shape[0], 1) if by_row else (1, 1)
    low, high = torch.zeros(shape), torch.full(shape, 10.0)
    total = (delta * delta).sum(1, keepdim=True)
    for _ in range(14):
        middle = (low + high) / 2
        kept = ((pushed(weight, delta, delta * middle.exp2()) - weight) * delta).sum(1, keepdim=True)
        enough = kept >= total if by_row else (kept.sum() >= total.sum()).view(1, 1)
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return ((low + high) / 2).exp2()


def gain_tensor(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    return pushed(weight, delta, delta * solved_gain(weight, delta, by_row=False))


def gain_row(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    return pushed(weight, delta, delta * solved_gain(weight, delta, by_row=True))


def subspace(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator, rounds: int = 6) -> Tensor:
    """Nearest of W + push, the push moved in the span of A until (W' - W - dW) A^T is about 0."""
    gain = solved_gain(weight, delta, by_row=True)
    push = delta * gain
    basis = torch.linalg.qr(a.T)[0]
    best, least = pushed(weight, delta, push), torch.full((weight.shape[0], 1), torch.inf)
    for _ in range(rounds):
        found = pushed(weight, delta, push)
        missing = (weight + delta - found) @ basis
        size = missing.norm(dim=1, keepdim=True)
        best, least = torch.where(size < least, found, best), torch.minimum(size, least)
        push = push + (missing * gain) @ basis.T
    return best


def partly(share: float) -> Rounding:
    """Stochastic with `share` of the randomness, pushed so that the whole of dW is kept."""

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        value = weight + delta
        low, high = neighbours(value)
        unit = (high - low).clamp(min=2.0**-133)
        place = (value - low) / unit
        push = delta / unit
        dither = (torch.rand(value.shape, generator=draw) - 0.5) * share
        total = (delta * delta).sum()
        least, most = torch.zeros(()), torch.full((), 10.0)
        for _ in range(14):
            middle = (least + most) / 2
            up = place + push * (middle.exp2() - 1) + dither > 0.5
            kept = ((torch.where(up, high, low) - weight) * delta).sum()
            most, least = (middle, least) if kept >= total else (most, middle)
        up = place + push * (((least + most) / 2).exp2() - 1) + dither > 0.5
        return torch.where(low == high, low, torch.where(up, high, low))

    return rounding


ROUNDINGS: dict[str, Rounding] = {
    "peft": peft,
    "gain_tensor": gain_tensor,
    "gain_row": gain_row,
    "subspace": subspace,
    "partly0.5": partly(0.5),
    "partly0.8": partly(0.8),
}


def balanced(weight: Tensor, delta: Tensor, rows: bool, columns: bool, rounds: int = 12) -> Tensor:
    """The push dW * g_row * g_column for which every row, and every column, keeps its part of dW."""
    push = delta * solved_gain(weight, delta, by_row=False)
    squares = delta * delta
    for step in range(rounds):
        power = 1.0 if step < 4 else 0.5
        for axis in ([1] if rows else []) + ([0] if columns else []):
            found = ((pushed(weight, delta, push) - weight) * delta).sum(axis, keepdim=True)
            wanted = squares.sum(axis, keepdim=True)
            ratio = (wanted + 0.02 * wanted.mean()) / (found.clamp(min=0) + 0.02 * wanted.mean())
            push = push * ratio.clamp(0.25, 4.0) ** power
    return push


def gain_column(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    return pushed(weight, delta, balanced(weight, delta, rows=False, columns=True))


def gain_both(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    return pushed(weight, delta, balanced(weight, delta, rows=True, columns=True))


def two_sided(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    """As gain_both, then moved until (W' - W - dW) A^T and B^T (W' - W - dW) are about 0."""
    push = balanced(weight, delta, rows=True, columns=True, rounds=8)
    right = torch.linalg.qr(a.T)[0]
    left = torch.linalg.qr(delta @ right)[0]
    gain = push.norm() / delta.norm()
    for step in range(10):
        missing = weight + delta - pushed(weight, delta, push)
        if step % 2:
            push = push + gain * left @ (left.T @ missing)
        else:
            push = push + gain * (missing @ right) @ right.T
    return pushed(weight, delta, push)


ROUNDINGS |= {
    "gain_column": gain_column,
    "gain_both": gain_both,
    "two_sided": two_sided,
}


def rooted(row_scale: float, power: float = 0.5) -> Rounding:
    """One step more where g_column |dW|**power (rms of W's row)**row_scale reaches |W| / 2**8."""

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        value = weight + delta
        scale = weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        push = delta.sign() * value.sign() * delta.abs().pow(power) * scale**row_scale
        push *= 65536 / value.abs().clamp(min=1e-30)
        bits, squares = value.view(torch.int32), (delta * delta).sum(0)
        low, high = torch.full_like(squares, -30.0), torch.full_like(squares, 10.0)

        def stepped(gain: Tensor) -> Tensor:
            more = (push * gain).clamp(-32768, 32767).to(torch.int32)
            return ((bits + 32768 + more) & -65536).view(torch.float32)

        for _ in range(16):
            middle = (low + high) / 2
            enough = ((stepped(middle.exp2()) - weight) * delta).sum(0) >= squares
            high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
        return stepped(((low + high) / 2).exp2())

    return rounding


ROUNDINGS |= {"root_row": rooted(0.5), "root": rooted(0.0)}


def row_scaled(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
    """As gain_column, with the push of a row times the root of (rms of W's row / rms of dW's row)."""
    rows = (
        weight.square().mean(1, keepdim=True) / delta.square().mean(1, keepdim=True).clamp(min=1e-30)
    ).pow(0.25)
    push, squares = delta * rows, (delta * delta).sum(0, keepdim=True)
    low, high = torch.full_like(squares, -8.0), torch.full_like(squares, 8.0)
    for _ in range(14):
        middle = (low + high) / 2
        found = pushed(weight, delta, delta + push * (middle.exp2() - 2.0**-8))
        enough = ((found - weight) * delta).sum(0, keepdim=True) >= squares
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return pushed(weight, delta, delta + push * (((low + high) / 2).exp2() - 2.0**-8))


ROUNDINGS |= {"row_scaled": row_scaled}


def dithered(share: float) -> Rounding:
    """As gain_column, with a uniform random part, `share` of a unit wide, in where an element steps."""

    def rounding(weight: Tensor, delta: Tensor, a: Tensor, draw: torch.Generator) -> Tensor:
        value = weight + delta
        bits = value.view(torch.int32)
        unit = torch.ldexp(torch.ones_like(value), torch.frexp(value).exponent - 8) * value.sign()
        push = torch.where(unit == 0, 0.0, delta / unit) * 65536
        middle = 32768 + (torch.rand(value.shape, generator=draw) - 0.5) * share * 65536
        squares = (delta * delta).sum(0)
        low, high = torch.full_like(squares, -1.0), torch.full_like(squares, 10.0)

        def stepped(gain: Tensor) -> Tensor:
            more = (middle + push * gain).clamp(0, 65535).to(torch.int32)
            return ((bits + more) & -65536).view(torch.float32)

        for _ in range(12):
            gain = (low + high) / 2
            enough = ((stepped(gain.exp2() - 1) - weight) * delta).sum(0) >= squares
            high, low = torch.where(enough, gain, high), torch.where(enough, low, gain)
        return stepped(((low + high) / 2).exp2() - 1)

    return rounding


ROUNDINGS |= {"dithered0.5": dithered(0.5), "dithered0.25": dithered(0.25)}

ROUNDINGS |= {
    "threshold16": by_threshold(16),
    "threshold64": by_threshold(64),
    "threshold256": by_threshold(256),
    "threshold_all": by_threshold(0),
    "threshold64_random": by_threshold(64, width=0.5),
    "threshold64_octave": by_threshold(64, octaves=1.0),
    "threshold64_octaves": by_threshold(64, octaves=2.0),
    "threshold64_root": by_threshold(64, power=0.5),
    "threshold64_row": by_row(64),
    "systematic_out": systematic(0),
    "systematic_in": systematic(1),
}
