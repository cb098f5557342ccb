"""Memory for tensors, taken from the operating system and given back to it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_BYTES = 1 << 20
"""From this size on a tensor is worth pages of its own."""

CPU = torch.device("cpu")


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A new tensor. On the CPU a large one starts on a page, and its memory is gone with its last user.

    malloc keeps the space of freed tensors of up to 32 MiB, split among its arenas: with each layer a merge
    would hold a little more of it (mallopt(3), M_MMAP_THRESHOLD).
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LARGE_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(*shape)


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous and of that dtype: itself where it is so, else a copy."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return empty(tensor.shape, dtype, tensor.device).copy_(tensor)
