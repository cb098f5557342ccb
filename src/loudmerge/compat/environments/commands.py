"""Commands that ask a host or install, and what a failed one says: was a host not reached, or is it a fault?

Standard library only.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from loudmerge.compat.environments.children import Children

INSTALL_SECONDS, ASK_SECONDS = 1800, 300
"""How long an installation, and a question to an index or a host, may take."""

_ERROR = re.compile(r"\s*((ERROR|error|fatal)\b|×)")

_PIPS_GIT = re.compile(r"× git |Failed to build .* when git ")
"""How pip 23 and 26 end where a git of theirs failed."""

_UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|NameResolutionError|ProxyError|ReadTimeout|Read timed out|SSLError"
    r"|Max retries exceeded|5\d\d Server Error|status server error|returned error: (429|5\d\d)"
    r"|Could not resolve|[Ff]ailed to connect|Couldn't connect|Connection (refused|reset|timed out)"
    r"|(Operation|Resolving) timed out|error sending request|dns error|Network is unreachable"
    r"|CONNECT tunnel failed|from proxy after CONNECT|Empty reply from server|GnuTLS recv error"
    r"|SSL certificate problem|certificate verification failed"
)
"""How pip, uv and git say that a host did not answer."""

_NO_RELEASE = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)")
_OF_THE_REQUEST = re.compile(r"\b(?!429)4\d\d Client Error")
"""The host answered: what was asked for is not there, or not for the asker."""


class NotInstalled(RuntimeError):
    """The environment could not be made; the message is what the installer said."""


class Unreachable(RuntimeError):
    """The package index or the host of the heads did not answer."""


def answer(command: Sequence[str], children: Children, asked: str = "") -> str:
    """What a command says. Raises Unreachable or NotInstalled with the last line of what went wrong."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        details = Path(scratch, "pip.txt")
        try:
            done = _run(command, children, details, ASK_SECONDS, asked=asked)
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"{command[0]} had no answer after {ASK_SECONDS} s") from error
        if done.returncode:
            decisive = done.stderr if command[0] == "git" else _last_error(done.stderr)
            raise _failure(done.stderr, decisive, details)
        return done.stdout


def logged(command: Sequence[str], children: Children, log: Path) -> None:
    """Runs a command, its words into `log`. Raises NotInstalled or Unreachable with the last of them."""
    heading = f"$ {' '.join(command)}\n"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        details = Path(scratch, "pip.txt")
        with log.open("a", encoding="utf-8") as file:
            start = file.tell()
            file.write(heading)
            file.flush()
            try:
                code = _run(command, children, details, INSTALL_SECONDS, log=file).returncode
            except subprocess.TimeoutExpired as error:
                raise NotInstalled(f"{command[0]} was not done after {INSTALL_SECONDS} s") from error
        if code:
            words = log.read_bytes()[start:].decode("utf-8", "replace")
            words = words.removeprefix(heading)
            raise _failure(words, _last_error(words), details)


def _run(
    command: Sequence[str],
    children: Children,
    details: Path,
    seconds: float,
    *,
    asked: str = "",
    log: IO[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Raises NotInstalled where there is no such command, and as Children.run does.

    details: pip's own log; what it unpacks is put beside it, since one that is killed leaves it behind.
    """
    own = {"GIT_TERMINAL_PROMPT": "0", "PIP_LOG": str(details), "TMPDIR": str(details.parent)}
    try:
        return children.run(command, seconds=seconds, env={**os.environ, **own}, asked=asked, log=log)
    except FileNotFoundError as error:
        raise NotInstalled(f"{command[0]} is not installed") from error


def _failure(words: str, error: str, details: Path) -> NotInstalled | Unreachable:
    """What a command that failed with these words raises. details: pip's own log, if it wrote one.

    error: what decides of the words. An installer's are its last error: a retry that it told of before may
    have been answered the next time. git does not try again, and its ssh says why before git's own line.
    """
    more = details.read_text("utf-8", "replace") if details.is_file() else ""
    return (Unreachable if _unreached(error, more) else NotInstalled)(said(words))


def _last_error(words: str) -> str:
    """From the last line that says `error` to the end; where a git of pip's failed, all that it said."""
    lines = words.splitlines()
    starts = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if starts and _PIPS_GIT.search(lines[starts[-1]]):
        starts = [number for number, line in enumerate(lines) if "Running command git " in line] or starts
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])


def _unreached(error: str, details: str) -> bool:
    """Whether an error is that a host did not answer.

    pip's "No matching distribution found" is the same where the index has no such package and where it did
    not answer. Its log says which: `Could not fetch URL …/simple/peft/: connection error: … - skipping`.
    """
    none = _NO_RELEASE.search(error)
    if none is None:
        return _UNREACHABLE.search(error) is not None
    page = re.sub(r"[-_.]+", "-", none[1]).lower()
    reasons = re.findall(rf"Could not fetch URL \S*/{re.escape(page)}/?: (.*) - skipping", details)
    return any(_OF_THE_REQUEST.search(reason) is None for reason in reasons)


def said(text: str) -> str:
    """The line that says what is wrong, without addresses, which may hold credentials."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|error|fatal)\b", line)]
    telling = [line for line in errors if not re.search("ResolutionImpossible|subprocess-exited", line)]
    line = (telling or errors or lines or ["it said nothing"])[-1]
    return re.sub(r"[a-z+]+://\S+", "…", re.sub(r"host='[^']*'", "host=…", line))[:400]
