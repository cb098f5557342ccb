"""Commands that end with all that they started: when they take too long, and when the run is interrupted.

Each is the first of a session, which is its process group. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class Interrupted(RuntimeError):
    """The command was not started, or not let to its end."""


class Children:
    """The commands that run now. At the end of the `with` block those that still do are killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for child in self._running:
                _kill(child)

    def run(
        self,
        command: Sequence[str],
        *,
        seconds: float,
        env: Mapping[str, str],
        cwd: Path | None = None,
        asked: str = "",
        log: IO[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; what it says goes into `log`, or is captured. asked: what it reads.

        Raises subprocess.TimeoutExpired after that many seconds, Interrupted, and OSError where the command
        cannot be started.
        """
        with self._lock:
            if self._ended:
                raise Interrupted("the run was interrupted")
            child = subprocess.Popen(  # noqa: S603 - lines made by the caller
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.PIPE,
                stdout=log or subprocess.PIPE,
                stderr=log or subprocess.PIPE,
                text=True,
                start_new_session=True,
                close_fds=False,  # of this run's own the lock of `alone` is the only one that they get
            )
            self._running.add(child)
        try:
            out, err = child.communicate(asked, timeout=seconds)
        finally:
            with self._lock:
                self._running.remove(child)
            _kill(child)
            with child:  # waits, and closes what was not read
                pass
        if self._ended:
            raise Interrupted("the run was interrupted")
        return subprocess.CompletedProcess(command, child.returncode, out, err)


def exit_on_signals() -> None:
    """Has SIGTERM and SIGHUP end this process as Ctrl-C does, with what it started; a second one at once.

    One that is ignored stays so: nohup's SIGHUP.
    """
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _exit)


def _exit(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def _kill(child: subprocess.Popen[str]) -> None:
    """Kills the command's group: also what it left behind when it ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
