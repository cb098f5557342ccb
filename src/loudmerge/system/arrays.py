"""Tensors of safetensors files as numpy's arrays: planning needs no torch, whose import takes a second."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from loudmerge.system.memory import Array, Bytes, array, buffer
from loudmerge.system.tensorfile import DTYPE_NAMES, ITEM_BYTES, FileReader, TensorEntry

Floats = npt.NDArray[np.float32]

HALF_SIZE, HALF_INFINITY = 0x7FFF, 0x7F80
"""Of a bfloat16's bits: all but the sign's, and, of these, those of an infinity; those of a NaN are more."""


def read_array(reader: FileReader, entry: TensorEntry) -> Array:
    """The whole tensor in its shape and dtype; bfloat16, which numpy has not, as float32."""
    content = buffer(entry.nbytes)
    reader.read_bytes(entry, 0, content)
    return as_numbers(content, entry.dtype).reshape(entry.shape)


def read_rows(reader: FileReader, entry: TensorEntry, first: int, count: int) -> Floats:
    """Some rows of a matrix: (count, columns) in float32."""
    columns = entry.shape[1]
    row = columns * ITEM_BYTES[entry.dtype]
    content = np.empty(count * row, np.uint8)
    reader.read_bytes(entry, first * row, content)
    return floats(as_numbers(content, entry.dtype).reshape(count, columns))


def as_numbers(content: Bytes, code: str) -> Array:
    """The numbers, (n,), that these bytes are in safetensors' dtype `code`; bfloat16 as float32."""
    if code != "BF16":
        return content.view(DTYPE_NAMES[code])
    halves = content.view(np.uint16)
    words = array(halves.shape, np.uint32)
    words[...] = halves
    # In place: to widen and shift at once takes numpy three times as long.
    words <<= np.uint32(16)
    return words.view(np.float32)


def floats(numbers: Array) -> Floats:
    """As float32: themselves where they are."""
    if numbers.dtype == np.float32:
        return numbers
    made = array(numbers.shape, np.float32)
    with np.errstate(over="ignore"):
        made[...] = numbers
    return made
