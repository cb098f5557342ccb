"""Processes that import once, and then run each job in a fork of what they were: torch takes two seconds.

    python forks.py SCRIPT SETTINGS

runs SCRIPT's `prepare(SETTINGS)`, and `job()` for each request on its stdin, a socket. What the job returns
is its exit code; its own stdin, stdout and stderr are files. Imports nothing of loudmerge.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NUMBER = struct.Struct("=i")
APART = {"HOME": os.sep, "OMP_NUM_THREADS": "1", "PATH": os.defpath}


@dataclass(frozen=True)
class Done:
    """How a job ended. status: its exit code, -N where signal N ended it, None where the fork was lost.

    said, complained: what it wrote to stdout and to stderr.
    """

    status: int | None
    said: bytes = b""
    complained: bytes = b""


class Forks:
    """One such process. Threads may share it.

    apart: it knows nothing of our environment, and what the terminal sends (Ctrl-C) does not reach it.
    """

    def __init__(self, python: Sequence[str], script: Path, settings: str, *, apart: bool) -> None:
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [*python, __file__, str(script), settings],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=APART if apart else None,
                cwd=os.sep,
                start_new_session=apart,
            )
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it. What still runs goes on."""
        atexit.unregister(self.close)
        self._requests.close()
        self._process.kill()
        self._process.wait()

    def run(self, order: bytes, seconds: float) -> Done:
        """One job. Raises TimeoutError after so many seconds, with the imports; the job is killed then."""
        end = time.monotonic() + seconds
        ours, theirs = socket.socketpair()
        temporary = tempfile.TemporaryFile
        with ours, temporary() as given, temporary() as out, temporary() as err:
            given.write(order)
            given.seek(0)
            with theirs:
                try:
                    files = [one.fileno() for one in (theirs, given, out, err)]
                    socket.send_fds(self._requests, [b"?"], files)
                except (BrokenPipeError, ConnectionResetError):
                    return Done(None)
            pid = _number(ours, end)
            try:
                status = _number(ours, end)
            except TimeoutError:
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise
            out.seek(0)
            err.seek(0)
            return Done(status, out.read(), err.read())


_SHARED: dict[tuple[object, ...], Forks] = {}
_LOCK = threading.Lock()


def shared(python: tuple[str, ...], script: Path, settings: str = "", *, apart: bool = False) -> Forks:
    """The one such process of this program; a new one where it has ended. Arguments as for Forks."""
    key = (python, script, settings, apart)
    with _LOCK:
        known = _SHARED.get(key)
        if known is None or not known.alive:
            known = _SHARED[key] = Forks(python, script, settings, apart=apart)
        return known


def _number(channel: socket.socket, end: float) -> int | None:
    """The next number on a channel; None where it is closed."""
    channel.settimeout(max(0.0, end - time.monotonic()) or 1e-3)
    said = channel.recv(NUMBER.size)
    return int(NUMBER.unpack(said)[0]) if said else None


def _serve(job: Callable[[], int]) -> None:
    """Forks for each request: one byte, the job's channel, and its stdin, stdout and stderr."""
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for jobs
    gc.freeze()
    while True:
        asked, files, _, _ = socket.recv_fds(requests, 1, 4)
        if not asked:
            return
        if os.fork() == 0:
            requests.close()
            _keep(job, *files)
        for file in files:
            os.close(file)


def _keep(job: Callable[[], int], channel: int, *files: int) -> None:
    """Runs the job in a process of its own; says its number, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        for target, file in enumerate(files):
            os.dup2(file, target)
        for file in (channel, *files):
            os.close(file)
        status = 1
        try:
            status = job()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.write(channel, NUMBER.pack(pid))
    _, ended = os.waitpid(pid, 0)
    os.write(channel, NUMBER.pack(os.waitstatus_to_exitcode(ended)))
    os._exit(0)


def _main() -> None:
    script, settings = sys.argv[1:]
    here = str(Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != here]
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec is not None and spec.loader is not None  # noqa: PT018, S101 - it ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare(settings)
    _serve(module.job)


if __name__ == "__main__":
    _main()
