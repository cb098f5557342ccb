"""The numbers of a dtype beside each of its numbers: what any rounding may choose between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_BITS: Mapping[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def neighbours(written: Tensor) -> tuple[Tensor, Tensor]:
    """The next value of the tensor's dtype below and above each, as float64."""
    bits = written.view(_BITS[written.dtype])
    least = torch.iinfo(bits.dtype).min
    order = torch.where(bits < 0, least - bits, bits)
    return _from_order(order - 1, written.dtype), _from_order(order + 1, written.dtype)


def _from_order(order: Tensor, dtype: torch.dtype) -> Tensor:
    least = torch.iinfo(order.dtype).min
    return torch.where(order < 0, least - order, order).view(dtype).to(torch.float64)


def is_neighbour(written: Tensor, value: Tensor, error: Tensor) -> Tensor:
    """Whether each of `written` is next below or above (or equal to) a number within `error` of `value`."""
    below, above = neighbours(written)
    return ((below < value + error) & (value - error < above)) | (written.isnan() & value.isnan())
