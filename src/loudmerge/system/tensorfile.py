"""One safetensors file: its header, and the bytes of its tensors.

Tensors are read with positioned reads into memory that the caller owns, not through a
memory map: pages of a map count as resident memory, and a merge must stay small.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from loudmerge.errors import MergeRefused, Problem
from loudmerge.system.memory import Bytes
from loudmerge.system.placeholders import pointer_problem

DTYPE_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' dtype codes that can be read as numbers, and torch's names; other codes can only be copied."""

ITEM_BYTES: Mapping[str, int] = {
    code: 2 if code == "BF16" else np.dtype(name).itemsize for code, name in DTYPE_NAMES.items()
}

FLOAT_CODES = frozenset({"F64", "F32", "F16", "BF16"})

MERGEABLE_CODES = frozenset({"F32", "F16", "BF16"})
"""Weights that can be updated: the arithmetic is float32."""

COMPARED_BYTES = 16 << 20
"""Bytes of a tensor that are compared at a time."""

Reader = TypeVar("Reader", bound="FileReader")

State = tuple[int, int, int, int]
"""Of a file: its device, inode, size in bytes, and time of change."""

OPEN_FILES = 16
"""How many files one reader keeps open: a checkpoint may have more shards than a process may open files."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `start` is the absolute offset in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype} in {self.file.name}"

    def is_like(self, other: TensorEntry) -> bool:
        """Whether two tensors can have the same bytes."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)


def state_of(stat: os.stat_result) -> State:
    """What tells whether a file is still the same. Not its ctime: a link to it changes that, too."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries and the metadata of a safetensors file.

    Raises MergeRefused `corrupt-file` when safetensors' own reader rejects the file.
    """
    # Opened first: safetensors' word for a file that may not be read is that there is none.
    with file.open("rb") as stream:
        try:
            with safe_open(file, framework="np", backend="pread"):
                pass
        except SafetensorError as error:
            expected = "a complete safetensors file"
            found, hint = f"a file that safetensors cannot open ({error})", "Download or save it again."
            damaged = Problem("corrupt-file", str(file), found, expected, hint)
            raise MergeRefused(pointer_problem(file, expected) or damaged) from error
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {}
    data = 8 + length
    entries = {
        name: TensorEntry(
            name,
            item["dtype"],
            tuple(item["shape"]),
            file,
            data + item["data_offsets"][0],
            item["data_offsets"][1] - item["data_offsets"][0],
        )
        for name, item in header.items()
    }
    return entries, metadata


@dataclass
class _Opened:
    """An open file. users: how many read from it now."""

    descriptor: int
    users: int = 0


class Descriptors:
    """Any number of files to be read, of which `most` are open at a time. Threads may share it.

    The file that was used longest ago is closed, but never one that is read from: the next file opened may
    get its descriptor's number. Only where more than `most` are read from at once are more open.
    """

    def __init__(self, most: int = OPEN_FILES) -> None:
        self._most = most
        self._open: OrderedDict[Path, _Opened] = OrderedDict()
        self._states: dict[Path, State] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, file: Path) -> Iterator[int]:
        """A descriptor of the file, which stays open until the block is left.

        Raises MergeRefused `corrupt-file` when it is another file than the one that was closed.
        """
        with self._lock:
            if file not in self._open:
                self._close_down_to(self._most - 1)
                self._open[file] = _Opened(self._opened(file))
            self._open.move_to_end(file)
            opened = self._open[file]
            opened.users += 1
        try:
            yield opened.descriptor
        finally:
            with self._lock:
                opened.users -= 1
                self._close_down_to(self._most)

    def close(self) -> None:
        """Closes every file; nobody may be reading any more."""
        with self._lock:
            self._close_down_to(0)

    def _opened(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDONLY)
        state = state_of(os.fstat(descriptor))
        if self._states.setdefault(file, state) == state:
            return descriptor
        os.close(descriptor)
        raise MergeRefused(
            Problem(
                "corrupt-file",
                str(file),
                "another file, or another size or time of change, than when it was first opened",
                "a file that stays as it is while it is read",
                "Something replaced or changed it: run again once that has ended.",
            )
        )

    def _close_down_to(self, most: int) -> None:
        if len(self._open) <= most:
            return
        idle = [file for file, opened in self._open.items() if not opened.users]
        for file in idle[: len(self._open) - most]:
            os.close(self._open.pop(file).descriptor)


class FileReader:
    """Reads bytes of tensors of any number of files, of which a few are open at a time: a context manager.

    Positioned reads keep no state, so threads may share one reader.
    """

    def __init__(self) -> None:
        self._files = Descriptors()

    def __enter__(self: Reader) -> Reader:  # noqa: PYI019 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def read_bytes(self, entry: TensorEntry, start: int, buffer: Bytes) -> None:
        """Fills `buffer` with the bytes of `entry` from byte `start` on."""
        view = buffer.data
        position = entry.start + start
        with self._files.use(entry.file) as descriptor:
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise MergeRefused(
                        Problem(
                            "corrupt-file",
                            str(entry),
                            f"the end of the file at byte {position}",
                            f"{entry.nbytes} bytes of data from byte {entry.start} on",
                            "The file changed while it was read, or was cut short; get it again.",
                        )
                    )
                view = view[count:]
                position += count

    def same_bytes(self, first: TensorEntry, second: TensorEntry) -> bool:
        """Whether two tensors of one size have the same bytes."""
        for start in range(0, first.nbytes, COMPARED_BYTES):
            count = min(COMPARED_BYTES, first.nbytes - start)
            buffers = np.empty((2, count), np.uint8)
            self.read_bytes(first, start, buffers[0])
            self.read_bytes(second, start, buffers[1])
            if not np.array_equal(buffers[0], buffers[1]):
                return False
        return True
