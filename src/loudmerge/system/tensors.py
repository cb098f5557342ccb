"""Tensors of safetensors files, as torch has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loudmerge.system.memory import Bytes, buffer
from loudmerge.system.tensorfile import DTYPE_NAMES, FileReader, TensorEntry

DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}
"""By safetensors' code."""


CPU = torch.device("cpu")


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A new tensor; on the CPU its memory is that of `memory.buffer`."""
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    return bytes_of(buffer(math.prod(shape) * dtype.itemsize)).view(dtype).view(*shape)


def bytes_of(content: Bytes) -> Tensor:
    """uint8, (n,), in the same memory."""
    # Of no bytes numpy says another stride than torch asks for.
    return torch.from_numpy(content) if len(content) else torch.empty(0, dtype=torch.uint8)


def read_tensor(reader: FileReader, entry: TensorEntry) -> Tensor:
    """The whole tensor, in its own dtype and shape."""
    content = buffer(entry.nbytes)
    reader.read_bytes(entry, 0, content)
    return bytes_of(content).view(DTYPES[entry.dtype]).view(entry.shape)


class TensorReader(FileReader):
    """Reads tensors of any number of files. Use as a context manager."""

    def read(self, entry: TensorEntry) -> Tensor:
        """As `read_tensor`."""
        return read_tensor(self, entry)
