"""HTTP in bad days: what is tried again, what is refused, and what is never taken for an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Client, Unreachable
from tests.support import upstream_server as server
from tests.support.upstream_server import Handler, UpstreamServer
from tests.unit.canary.world import QUICK, TOKEN


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = Client(tmp_path, QUICK)
    yield made
    made.close()


BAD: dict[str, tuple[Callable[[Handler], None], str, int]] = {
    "500": (server.status(500), "HTTP 500", 2),
    "503": (server.status(503), "HTTP 503", 2),
    "401": (server.status(401), r"HTTP 401$", 1),
    "403": (server.status(403), "HTTP 403", 1),
    "429 without a word": (server.status(429), "HTTP 429, a rate limit", 2),
    "204": (server.status(204), "HTTP 204", 1),
    "no answer": (server.silence, "Timeout", 2),
    "cut off": (server.truncated, "ChunkedEncodingError|ConnectionError|IncompleteRead", 2),
    "circle": (server.circle, "redirected without end", 1),
    "page": (server.page, "a web page, and not a file", 1),
    "not an address": (server.elsewhere("ftp://127.0.0.1/x"), "not an address", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_unreachable(client: Client, upstream: UpstreamServer, name: str) -> None:
    act, message, tries = BAD[name]
    upstream.files["a.py"] = b"x = 1\n"
    upstream.fail("a.py", act)
    with pytest.raises(Unreachable, match=message):
        client.get(f"{upstream.url}/files/a.py?secret=1")
    if name != "circle":
        assert len(upstream.asked) == tries


def test_the_message_hides_query_and_credentials(client: Client, upstream: UpstreamServer) -> None:
    upstream.fail("a.py", server.truncated)
    url = f"{upstream.url}/files/a.py?secret=1".replace("http://", "http://me:password@")
    with pytest.raises(Unreachable) as error:
        client.get(url)
    assert "secret" not in str(error.value)
    assert "password" not in str(error.value)


@pytest.mark.parametrize("act", [server.status(500), server.truncated, server.silence, server.status(429)])
def test_one_bad_try_is_forgiven(
    client: Client, upstream: UpstreamServer, act: Callable[[Handler], None]
) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    upstream.fail("a.py", act, times=1)
    assert client.get(f"{upstream.url}/files/a.py") == b"x = 1\n"
    assert len(upstream.asked) == 2


def test_nobody_there(client: Client) -> None:
    with pytest.raises(Unreachable, match="ConnectionError: NewConnectionError"):
        client.get("http://127.0.0.1:9/a.py")


def test_what_does_not_exist_is_not_unreachable(client: Client, upstream: UpstreamServer) -> None:
    with pytest.raises(FileNotFoundError, match="HTTP 404"):
        client.get(f"{upstream.url}/files/a.py")
    assert len(upstream.asked) == 1


OVERSIZE = {"announced": server.announced(2**30), "endless": server.endless, "bomb": server.bomb}


@pytest.mark.parametrize("name", OVERSIZE)
def test_a_file_that_is_too_large_is_refused_early(
    client: Client, upstream: UpstreamServer, name: str
) -> None:
    upstream.fail("a.py", OVERSIZE[name])
    started = time.monotonic()
    with pytest.raises(SourceError, match="refused"):
        client.get(f"{upstream.url}/files/a.py", limit=2**20)
    assert time.monotonic() - started < 5
    assert len(upstream.asked) == 1


def test_an_answer_that_drips_is_given_up(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.fail("a.py", server.drip)
    client = Client(tmp_path, replace(QUICK, deadline=0.1, tries=1))
    with pytest.raises(Unreachable, match=r"not complete after 0\.1 s"):
        client.get(f"{upstream.url}/files/a.py", limit=2**30)
    client.close()


def test_a_redirect_is_followed_and_keeps_the_token_at_home(client: Client, upstream: UpstreamServer) -> None:
    upstream.files["b.py"] = b"x = 2\n"
    upstream.fail("a.py", server.elsewhere(f"{upstream.url.replace('127.0.0.1', 'localhost')}/files/b.py"))
    assert client.get(f"{upstream.url}/files/a.py", token=TOKEN) == b"x = 2\n"
    first, second = upstream.asked
    assert first.headers["Authorization"] == f"Bearer {TOKEN}"
    assert "Authorization" not in second.headers


@pytest.mark.parametrize("code", [403, 429])
def test_a_rate_limit_that_ends_soon_is_waited_for(
    tmp_path: Path, upstream: UpstreamServer, code: int
) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    upstream.fail("a.py", server.status(code, {"Retry-After": "1"}), times=1)
    client = Client(tmp_path, replace(QUICK, max_wait=2))
    started = time.monotonic()
    assert client.get(f"{upstream.url}/files/a.py") == b"x = 1\n"
    assert time.monotonic() - started >= 1
    client.close()


@pytest.mark.parametrize("code", [403, 429])
def test_a_rate_limit_that_lasts_stops_all_questions_to_that_host(
    client: Client, upstream: UpstreamServer, code: int
) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    upstream.fail("a.py", server.rate_limited(code, reset_in=1000), times=1)
    for _ in range(3):
        with pytest.raises(
            Unreachable, match=r"rate limit until \d\d:\d\d:\d\d UTC. Wait, or set GITHUB_TOKEN"
        ):
            client.get(f"{upstream.url}/files/a.py", token=None)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("token", "denied", "limited"),
    [
        (None, "HTTP 403. Set GITHUB_TOKEN.", "UTC. Wait, or set GITHUB_TOKEN."),
        ("secret", "HTTP 403. Check what the token may read.", "UTC. Wait."),
        ("", "HTTP 403", "UTC. Wait."),
    ],
    ids=["none", "one", "of no use"],
)
def test_a_token_is_asked_for_only_where_it_may_help(
    token: str | None, denied: str, limited: str, client: Client, upstream: UpstreamServer
) -> None:
    """GitHub takes one; the package index, and a proxy before it, does not."""
    url = f"{upstream.url}/files/a.py"
    acts = {
        denied: server.status(403),
        "HTTP 418": server.status(418),
        limited: server.rate_limited(403, reset_in=1000),
    }
    for said, act in acts.items():
        upstream.fail("a.py", act, times=1)
        with pytest.raises(Unreachable) as error:
            client.get(url, token=token)
        assert str(error.value).endswith(said)


def test_an_etag_spares_the_body(client: Client, upstream: UpstreamServer) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    url = f"{upstream.url}/files/a.py"
    assert [client.get(url, conditional=True) for _ in range(2)] == [b"x = 1\n"] * 2
    assert "If-None-Match" in upstream.asked[1].headers
    upstream.files["a.py"] = b"x = 2\n"
    assert client.get(url, conditional=True) == b"x = 2\n"


def test_a_spoilt_cache_is_not_believed(client: Client, upstream: UpstreamServer, tmp_path: Path) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    url = f"{upstream.url}/files/a.py"
    client.get(url, conditional=True)
    (body,) = (place for place in (tmp_path / "http").iterdir() if place.suffix != ".json")
    body.write_bytes(b"x = 9\n")
    assert client.get(url, conditional=True) == b"x = 1\n"
    assert "If-None-Match" not in upstream.asked[1].headers


def test_the_cache_is_not_taken_when_the_server_cannot_be_asked(
    client: Client, upstream: UpstreamServer
) -> None:
    upstream.files["a.py"] = b"x = 1\n"
    client.get(f"{upstream.url}/files/a.py", conditional=True)
    upstream.fail("a.py", server.status(500))
    with pytest.raises(Unreachable):
        client.get(f"{upstream.url}/files/a.py", conditional=True)
