"""Guards, repositories and options for the canary's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loudmerge.canary.guards import Guard, load_guards
from loudmerge.canary.run import Verdict, run
from loudmerge.canary.upstream.fetch import HttpOptions
from loudmerge.canary.upstream.sources import SourceOptions
from tests.support.upstream_server import UpstreamServer

UPSTREAM = "owner/zoo"
PATH = "zoo/saving.py"
KEPT = "def guarded(x):\n    return x + 1\n"
GONE = "def other(x):\n    return x + 1\n"

TOKEN = "T0KEN"
QUICK = HttpOptions(timeout=0.5, deadline=1.0, tries=2, backoff=0.0, max_wait=0.2)

GUARD = """
[[guard]]
id = "zoo-guarded"
why = "the test needs it"
upstream = "owner/zoo"
refs = ["main"]
path = "zoo/saving.py"
since = "owner/zoo#7"
rule = { kind = "symbol", name = "guarded" }
"""


def guard_file(directory: Path, text: str = GUARD, name: str = "zoo.toml") -> Path:
    """Writes a guard file; the directory it is in."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.joinpath(name).write_text(text, encoding="utf-8")
    return directory


def guards(directory: Path, text: str = GUARD) -> tuple[Guard, ...]:
    """The guards of a text."""
    return load_guards(guard_file(directory / "guards", text))


def options(cache: Path, upstream: UpstreamServer | None = None, **changed: Any) -> SourceOptions:
    """Options that ask the local server, without patience."""
    bases = {"github_api": upstream.api, "github_raw": upstream.raw} if upstream else {}
    return SourceOptions(**{"cache": cache / "cache", "http": QUICK, **bases, **changed})


def verdict(directory: Path, upstream: UpstreamServer, text: str = GUARD, **changed: Any) -> Verdict:
    """The one verdict of a run against the local server."""
    (found,) = run(guards(directory, text), sources=options(directory, upstream, **changed))
    return found


@contextmanager
def later(monkeypatch: Any, hours: float) -> Iterator[None]:
    """The same some hours later."""
    import time

    now = time.time
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: now() + hours * 3600)
        yield
