"""Bad servers, wherever the canary asks one: no answer of theirs ever makes a guard present or pending."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loudmerge.canary.run import Verdict, run
from loudmerge.canary.upstream.fetch import HttpOptions
from tests.support import upstream_server as server
from tests.support.upstream_server import Handler, UpstreamServer
from tests.unit.canary.index import PACKAGE, use_index
from tests.unit.canary.world import GUARD, KEPT, PATH, UPSTREAM, guards, options

PACKAGED = GUARD.replace('upstream = "owner/zoo"', f'package = "{PACKAGE}"').replace('"main"', '"latest"')

Act = Callable[[Handler], None]

SILENT: Mapping[str, Act] = {
    "403 rate limit with reset": server.rate_limited(403, reset_in=1000),
    "403": server.status(403),
    "429": server.status(429),
    "429 with reset": server.rate_limited(429, reset_in=1000),
    "500": server.status(500),
    "503": server.status(503),
    "timeout": server.silence,
    "truncated": server.truncated,
    "redirect in a circle": server.circle,
    "redirect to no server": server.elsewhere("http://127.0.0.1:9/x"),
    "redirect to a file": server.elsewhere("file:///etc/passwd"),
}
"""No answer at all: unreachable."""

LYING: Mapping[str, Act] = {
    "404": server.status(404),
    "garbage": server.garbage,
    "1 GB": server.announced(2**30),
    "endless": server.endless,
    "bomb": server.bomb,
}
"""An answer that is none: unreachable, or missing and not evaluated."""


def ask_github(place: Path, upstream: UpstreamServer, **changed: Any) -> Verdict:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    upstream.files[PATH] = KEPT.encode()
    upstream.files["zoo.tar.gz"] = server.tarball({PATH: KEPT, "setup.py": ""})
    (found,) = run(guards(place), sources=options(place, upstream, http=HttpOptions(), **changed))
    return found


ASKED: Mapping[str, tuple[str, str]] = {
    "the ref": ("/commits/", ""),
    "a file": ("/raw/", ""),
    "another base URL": ("/files/", "files"),
    "an archive": ("/files/", "files/zoo.tar.gz"),
}
"""What is asked for -> (where the fault is, what `--source` names)."""


def asked_badly(place: Path, upstream: UpstreamServer, what: str, act: Act) -> Verdict:
    """A verdict after one that was present, so that there is an earlier answer in the cache."""
    where, source = ASKED[what]
    changed = {"overrides": {UPSTREAM: f"{upstream.url}/{source}"}} if source else {}
    assert ask_github(place, upstream, **changed).verdict == "present"
    upstream.repository(UPSTREAM).commit({PATH: KEPT + "x = 1\n"})
    upstream.files["zoo.tar.gz"] = server.tarball({PATH: KEPT, "setup.py": "x = 1\n"})
    upstream.fail(where, act)
    (found,) = run(guards(place), sources=options(place, upstream, **changed))
    return found


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("name", SILENT)
def test_a_server_that_does_not_answer_is_unreachable(
    tmp_path: Path, upstream: UpstreamServer, what: str, name: str
) -> None:
    found = asked_badly(tmp_path, upstream, what, SILENT[name])
    assert (found.verdict, found.evaluated) == ("unreachable", False)
    assert "passwd" not in found.detail or "not an address" in found.detail


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("name", LYING)
def test_an_answer_that_is_none_is_never_a_pass(
    tmp_path: Path, upstream: UpstreamServer, what: str, name: str
) -> None:
    found = asked_badly(tmp_path, upstream, what, LYING[name])
    assert found.verdict in {"unreachable", "missing"}
    assert not found.evaluated


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("/simple/", "403 rate limit with reset"),
        ("/simple/", "429"),
        ("/simple/", "redirect in a circle"),
        ("/simple/", "garbage"),
        ("/archives/", "404"),
        ("/archives/", "429"),
        ("/archives/", "garbage"),
    ],
)
def test_a_bad_package_index_is_never_a_pass(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch, where: str, name: str
) -> None:
    use_index(monkeypatch, upstream).offer_wheel("1.0", KEPT)
    upstream.fail(where, {**SILENT, **LYING}[name])
    (found,) = run(guards(tmp_path, PACKAGED), sources=options(tmp_path, upstream))
    assert found.verdict in {"unreachable", "missing"}
    assert not found.evaluated
