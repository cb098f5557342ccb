"""A tool that serves: it starts once, and gets a line for each case.

It writes one JSON line when it is ready, `{"tool": NAME, "versions": {…}}`. Then it reads a JSON line for
each case,
`{"base": …, "adapter": …, "out": …, "options": {…}, "output": FILE}`, merges in a process of its own (a
fork of what
is already imported), lets that process print into FILE, and answers `{"code": EXIT_CODE}`.
`conformance/drivers`
in the source tree has such tools.
"""

from __future__ import annotations

import json
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loudmerge.conformance.cases import Case
from loudmerge.conformance.judge import Ended
from loudmerge.conformance.runner import TIME_LIMIT, end_group, tail

STARTS = 600.0
"""Seconds a tool may take until it is ready."""
PAUSE = 0.5
"""Seconds between two looks whether a silent tool still runs."""


class ServerError(RuntimeError):
    """A tool that should serve said nothing, or something else than the protocol."""


class _EndedError(ServerError):
    """It ended."""


class Served:
    """A serving tool. Not for several threads at once. limit: seconds for one case."""

    def __init__(self, line: str, limit: float = TIME_LIMIT) -> None:
        self._line, self._limit = line, limit
        self._start()

    @property
    def told(self) -> bool:
        return False

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - the user's own command
            shlex.split(self._line), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._rest = b""
        try:
            hello = self._read(STARTS)
        except ServerError:
            self.close()
            raise
        if hello is None:
            self.close()
            raise ServerError(f"{self._line!r} was not ready after {STARTS:.0f} seconds")
        if not isinstance(hello.get("tool"), str) or not isinstance(hello.get("versions"), dict):
            self.close()
            raise ServerError(f'{self._line!r} said {hello}, expected {{"tool": NAME, "versions": {{…}}}}')
        self.tool, self.versions = hello["tool"], hello["versions"]

    def merge(self, case: Case, base: Path, adapter: Path, out: Path) -> Ended:
        """Sends one case. A tool that does not answer in time, or ends, is started again.

        Raises ServerError for an answer that is none.
        """
        code: int | None = None
        with tempfile.NamedTemporaryFile() as output:
            given = {"base": base, "adapter": adapter, "out": out, "output": output.name}
            try:
                self._write(
                    {name: str(value) for name, value in given.items()} | {"options": dict(case.options)}
                )
                answer = self._read(self._limit)
            except (BrokenPipeError, _EndedError):
                # Without an answer even 0 is no success.
                code, answer = self._ended() or 1, None
            said = tail(output)
        if answer is None:
            self.close()
            self._start()
            return Ended(code, said)
        if not isinstance(answer.get("code"), int):
            raise ServerError(f'{self._line!r} answered {answer}, expected {{"code": EXIT_CODE}}')
        return Ended(answer["code"], said)

    def _write(self, message: Mapping[str, Any]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise ServerError(f"{self._line!r} reads nothing")
        stdin.write(json.dumps(message).encode() + b"\n")
        stdin.flush()

    def _read(self, limit: float) -> dict[str, Any] | None:
        """The next line, None where it does not come within `limit` seconds."""
        stdout = self._process.stdout
        if stdout is None:
            raise ServerError(f"{self._line!r} writes nothing")
        ends = time.monotonic() + limit
        while b"\n" not in self._rest:
            left = max(ends - time.monotonic(), 0)
            ready, _, _ = select.select([stdout], [], [], min(left, PAUSE))
            # What it forked has its standard output, too, and may live on.
            ended = self._process.poll() is not None
            if not ready and not ended:
                if not left:
                    return None
                continue
            more = stdout.read1() if ready else b""  # type: ignore[attr-defined]
            if not more:
                raise _EndedError(f"{self._line!r} ended with exit code {self._ended()}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ServerError(f"{self._line!r} wrote {line[:200]!r}, expected a JSON line") from error
        if not isinstance(message, dict):
            raise ServerError(f"{self._line!r} wrote {message}, expected a JSON object")
        return message

    def _ended(self) -> int:
        """The exit code of a tool that reads or writes no more; one that stays is ended."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(5)
        end_group(self._process)
        return self._process.returncode

    def close(self) -> None:
        """Ends it, and what it started."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a line that it did not read
                    stream.close()
        end_group(self._process)
