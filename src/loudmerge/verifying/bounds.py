"""Which written values are correct roundings of an exact one, when the merge worked in float32. Pure.

Let v = W + d be exact, x what the merge held in float32 before it rounded to the dtype of OUT, and
|x - v| <= eps. Rounding is monotonic, so the written value w satisfies

    nearest      R(v - eps) <= w <= R(v + eps)      with R = round to float32, then to OUT's dtype
    stochastic   C(v - eps) <= w <= C(v + eps)      with C = away from zero where the number drawn carries
    peft         P(d - eps) <= w <= P(d + eps)      with P(d) = R(W + R'(d)), R' = round to the weight's dtype

R rounds twice as PyTorch does on the way from float64 (through float32). x is a float32, which the first
rounding maps to itself, so the two tests on R hold for every right w, ties included.

eps: each of the `rank` terms of an inner product meets at most `rank` roundings, and then the rounding of
the scaling, the product with it and the sum with W: gamma(rank + 3) * sum |s L R|. W meets the sum, and one
more rounding for every partial sum a matrix product adds to it (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

UNIT = 2.0**-24
"""The unit roundoff of float32."""

_TINY = 2.0**-126
"""The least normal float32: what one flushed subnormal product can lose."""

_SLACK = 1.0 + 2.0**-20
"""Room for the rounding of the float64 computation itself, 2**-29 of float32's."""


_PRECISION: Mapping[torch.dtype, tuple[int, int]] = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
"""Bits of the significand, and the least normal exponent."""


def gamma(roundings: int) -> float:
    """The largest relative error of a product of `roundings` float32 roundings."""
    return roundings * UNIT / (1.0 - roundings * UNIT)


def delta_error(magnitude: Tensor, roundings: int) -> Tensor:
    """How far a float32 s * L @ R may lie from the exact one. magnitude: sum over the rank of |s L R|."""
    error = magnitude * (gamma(roundings) * _SLACK)
    return torch.where(magnitude > 0, error + roundings * _TINY, error)


def sum_error(value: Tensor, error: Tensor) -> Tensor:
    """How far a float32 W + d may lie from `value`, with d within `error`. 0 where `error` is 0."""
    return torch.where(error > 0, (error + UNIT * (value.abs() + error)) * _SLACK, error)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `values` in `dtype`, through float32 as PyTorch does it; float64 stays."""
    return values.to(dtype) if dtype is torch.float64 else values.to(torch.float32).to(dtype)


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring values of `dtype` at each of `values` (float64)."""
    precision, least = _PRECISION[dtype]
    exponent = torch.where(values == 0, least, torch.frexp(values).exponent.to(torch.int64) - 1)
    return torch.ldexp(torch.ones_like(values), exponent.clamp(min=least) - (precision - 1))


def is_nearest(written: Tensor, value: Tensor, error: Tensor) -> Tensor:
    """Whether each of `written` is the nearest of its dtype to some float32 within `error` of `value`."""
    low, high = rounded(value - error, written.dtype), rounded(value + error, written.dtype)
    return ((low <= written) & (written <= high)) | (written.isnan() & value.isnan())


def is_peft(written: Tensor, weight: Tensor, delta: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether each of `written` is weight + delta, the delta (within `error`) first rounded to `dtype`."""
    low = peft_sum(weight, delta - error, dtype, written.dtype)
    high = peft_sum(weight, delta + error, dtype, written.dtype)
    return ((low <= written) & (written <= high)) | (written.isnan() & low.isnan())


def peft_sum(weight: Tensor, delta: Tensor, dtype: torch.dtype, out: torch.dtype) -> Tensor:
    """weight + delta (both float64) with the delta rounded to `dtype`, the sum to float32 and to `out`."""
    return rounded(weight + rounded(delta, dtype).to(torch.float64), out)


def carried(value: Tensor, drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `value` rounded stochastically to `dtype`, still as float64, by `drawn` in 0 … 65535.

    One more unit in magnitude where the fraction of it and drawn / 65536 make 1. What lies past the largest
    number, by less than a unit, is the largest.
    """
    unit = unit_in_last_place(value, dtype)
    share = drawn.to(torch.float64) / 65536.0
    if dtype is torch.float16:
        # A normal float16 drops 13 bits of a float32: three of the 16 drawn are left over.
        normal = torch.floor(share * 8192.0) / 8192.0
        share = torch.where(value.abs() >= 2.0**-14, normal, share)
    size = torch.floor(value.abs() / unit + share) * unit
    largest = torch.finfo(dtype).max
    past = largest + unit_in_last_place(torch.tensor(largest, dtype=torch.float64), dtype)
    size = torch.where((size > largest) & (value.abs() < past), largest, size)
    return size.copysign(value)


def is_drawn(written: Tensor, value: Tensor, error: Tensor, drawn: Tensor) -> Tensor:
    """Whether each of `written` is a float32 within `error` of `value`, rounded by `drawn` in 0 … 65535."""
    # A subnormal float16 is drawn in units of 2**-40.
    wide = error + 2.0**-41 if written.dtype is torch.float16 else error
    low, high = carried(value - wide, drawn, written.dtype), carried(value + wide, drawn, written.dtype)
    return ((low <= written) & (written <= high)) | (written.isnan() & value.isnan())


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """Indices where two flat tensors of one dtype differ. Compares 8 bytes at a time first."""
    group = 8 // a.element_size()
    if group == 1 or a.numel() % group:
        return (a != b).nonzero().view(-1)
    groups = (a.view(torch.int64) != b.view(torch.int64)).nonzero().view(-1, 1)
    flat = (groups * group + torch.arange(group)).view(-1)
    return flat[a[flat] != b[flat]]
