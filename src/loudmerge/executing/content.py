"""What pieces are made of: the bytes of the base, read into memory that each thread keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Generic, TypeVar

from loudmerge.executing.pieces import PIECE_BYTES, Piece
from loudmerge.system.memory import Bytes, buffer
from loudmerge.system.tensorfile import FileReader

T = TypeVar("T")


class Lent(Generic[T]):
    """What a piece borrows: what was given back last goes first, for it is still in a cache."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._kept: LifoQueue[T] = LifoQueue()

    @contextmanager
    def one(self) -> Iterator[T]:
        try:
            lent = self._kept.get_nowait()
        except Empty:
            lent = self._make()
        try:
            yield lent
        finally:
            self._kept.put(lent)


class Content(threading.local):
    """The memory of one thread, reused: fresh memory for every piece would cost its page faults."""

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader
        self._held: dict[str, Bytes] = {}

    def bytes(self, name: str, nbytes: int) -> Bytes:
        """The thread's memory of that name, whose content is undefined."""
        if name not in self._held or len(self._held[name]) < nbytes:
            self._held[name] = buffer(max(nbytes, PIECE_BYTES))
        return self._held[name][:nbytes]

    def read(self, piece: Piece, itemsize: int, name: str = "source") -> Bytes:
        """A piece as the base has it."""
        content = self.bytes(name, piece.rows * piece.columns * itemsize)
        self._reader.read_bytes(piece.output.source, piece.offset * itemsize, content)
        return content

    def sample(self, piece: Piece, itemsize: int, first: int, last: int) -> Bytes:
        """Some rows of the piece's matrix, from the disk."""
        offset = piece.offset + (first - piece.first) * piece.columns
        rows = piece._replace(first=first, rows=last - first, offset=offset)
        return self.read(rows, itemsize, "sample")
