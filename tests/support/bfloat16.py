"""Models of bfloat16, compared weight by weight with PEFT's own merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DIFFERING = 1e-3
"""The largest share of bfloat16 weights that may differ, each by one unit in the last place."""


def assert_rounded_alike(
    found: Mapping[str, Tensor], oracle: Mapping[str, Tensor], *, others: float = 0.0
) -> None:
    """Two state dicts are the same. Only where float32 products differ may a last bit differ: that is rare.

    others: the largest difference of a tensor of another dtype, of its largest element.
    """
    assert oracle.keys() == found.keys()
    differing = total = 0
    for name, tensor in oracle.items():
        assert (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape), name
        if tensor.dtype != torch.bfloat16:
            same = torch.equal(tensor, found[name])
            assert same or (tensor - found[name]).abs().max() <= others * tensor.abs().max(), name
            continue
        steps = (_ordinal(tensor) - _ordinal(found[name])).abs()
        assert steps.max() <= 1, name
        differing += int(steps.sum())
        total += steps.numel()
    assert differing <= DIFFERING * total, f"{differing} of {total}"


def _ordinal(tensor: Tensor) -> Tensor:
    """bfloat16 as integers in the order of the values: neighbours differ by one, and -0 is 0."""
    bits = tensor.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
