"""`python -m loudmerge`, and the console script `loudmerge`: the command, in a process of its own."""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

from loudmerge.cli import main
from loudmerge.command.terminal import ENVIRONMENT

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

OBJECTS = 100_000
"""New objects between two garbage collections: to import torch makes a million, which all stay."""


class Descriptor(io.FileIO):
    """A standard stream, for writing. forgiven: the errors that say nobody reads it, which are no failure."""

    def __init__(self, number: int, forgiven: type[OSError]) -> None:
        super().__init__(number, "w", closefd=False)
        self._forgiven = forgiven

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
        except self._forgiven:
            return memoryview(data).nbytes
        # None: it would have had to wait.
        return memoryview(data).nbytes if written is None and self._forgiven is OSError else written


def run() -> NoReturn:
    """Runs the command and ends the process with its exit code.

    Only a process's owner may collect so seldom and end without taking the interpreter apart. Together this
    saves a quarter of what importing torch costs.
    """
    gc.set_threshold(OBJECTS)
    open_streams()
    try:
        code = _exit_code()
        sys.stdout.flush()
    except OSError as error:
        # All others have ended in an exit code: this one is of writing the result.
        sys.stderr.write(f"the environment failed: stdout: {error}\n")
        code = ENVIRONMENT
    sys.stderr.flush()
    _release_semaphores()
    os._exit(code)


def _release_semaphores() -> None:
    """From Python 3.14 on they are there until an exit handler has run; else a warning follows on stderr.

    tqdm makes one, with its first bar.
    """
    if "multiprocessing.synchronize" in sys.modules:
        sys.modules["multiprocessing.util"]._run_finalizers(0)  # noqa: SLF001


def open_streams() -> None:
    """A closed pipe, and all of stderr, decide nothing; what an encoding has not is escaped."""
    # A file of OUT would get the number of a stream that is closed, and what a library writes to it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = _stream(1, sys.stdout, BrokenPipeError)
    sys.stderr = _stream(2, sys.stderr, OSError)


def _stream(number: int, old: TextIO | None, forgiven: type[OSError]) -> io.TextIOWrapper:
    encoding = old.encoding if old else "utf-8"
    buffer = io.BufferedWriter(Descriptor(number, forgiven))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


if __name__ == "__main__":
    run()
