"""GitHub as the canary sees it, on 127.0.0.1: raw files and the API, in good days and bad.

The shapes of the answers are those of https://docs.github.com/rest: commits by ref (media type `sha`), pulls,
compare, ETags, and the headers of its rate limits.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, str]


@dataclass
class Repository:
    """Commits in one line, oldest first. refs: name -> commit. pulls: number -> merge, None while open."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str | None] = field(default_factory=dict)

    def commit(self, files: Files, *, ref: str = "main", pull: int | None = None) -> str:
        """Adds a commit, moves `ref` to it, and says that it is the merge of `pull`."""
        text = json.dumps([len(self.commits), dict(files)])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        if pull is not None:
            self.pulls[pull] = sha
        return sha

    def compare(self, base: str, head: str) -> str:
        """GitHub's word for how `head` lies to `base`."""
        order = list(self.commits)
        if base == head:
            return "identical"
        return "ahead" if order.index(head) > order.index(base) else "behind"


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What happens instead of the answer to paths that contain `where`, the first `times` times."""

    where: str
    act: Callable[[Handler], None]
    times: int


@dataclass
class UpstreamServer:
    """The server's state, which tests set and read. files: paths below /files/, whole."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def api(self) -> str:
        return f"{self.url}/api"

    @property
    def raw(self) -> str:
        return f"{self.url}/raw"

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fail(self, where: str, act: Callable[[Handler], None], times: int = 1_000) -> None:
        """Puts a fault in the way."""
        self.faults.append(Fault(where, act, times))

    def fault(self, path: str) -> Fault | None:
        """The fault that is in this path's way now."""
        for fault in self.faults:
            if fault.where in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]


@contextmanager
def running_upstream() -> Iterator[UpstreamServer]:
    """A server on a free port of 127.0.0.1."""
    upstream = UpstreamServer()
    with running(upstream, Handler):
        yield upstream


@contextmanager
def running(upstream: UpstreamServer, handler: type[Handler]) -> Iterator[None]:
    """Answers with this handler for as long as the block runs."""

    class Bound(handler):  # type: ignore[valid-type, misc]
        state = upstream

    with _Quiet(("127.0.0.1", 0), Bound) as server:
        server.daemon_threads = True
        upstream.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            upstream.closing.set()
            server.shutdown()
            thread.join()


class _Quiet(ThreadingHTTPServer):
    """Says nothing when a client hangs up, which is what clients with limits do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


ROUTES = (
    (r"/api/repos/(?P<name>[^/]+/[^/]+)/commits/(?P<ref>.+)", "commit_of"),
    (r"/api/repos/(?P<name>[^/]+/[^/]+)/pulls/(?P<number>\d+)", "pull"),
    (r"/api/repos/(?P<name>[^/]+/[^/]+)/compare/(?P<base>\w+)\.\.\.(?P<head>\w+)", "compare"),
    (r"/raw/(?P<name>[^/]+/[^/]+)/(?P<sha>[^/]+)/(?P<path>.+)", "raw"),
    (r"/files/(?P<path>.+)", "file"),
)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    state: UpstreamServer

    def log_message(self, *args: object) -> None:
        """Nothing on stderr: `UpstreamServer.asked` is the log."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(Asked(path, dict(self.headers)))
        fault = self.state.fault(path)
        try:
            if fault:
                fault.act(self)
            else:
                self.route(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, path: str) -> None:
        for pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                try:
                    getattr(self, name)(**found.groupdict())
                except KeyError:
                    self.send(b'{"message": "Not Found"}', 404)
                return
        self.send(b"404: Not Found", 404)

    def send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if status == 200 and self.headers.get("If-None-Match") == etag:
            status, body = 304, b""
        self.send_response(status)
        given = {"Content-Length": str(len(body)), "ETag": etag, **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def commit_of(self, name: str, ref: str) -> None:
        repository = self.state.repositories[name]
        self.send(repository.refs[ref].encode())

    def pull(self, name: str, number: str) -> None:
        merge = self.state.repositories[name].pulls[int(number)]
        document: dict[str, Any] = {"number": int(number), "merge_commit_sha": merge}
        self.send(json.dumps({**document, "merged_at": merge and "2026-01-01T00:00:00Z"}).encode())

    def compare(self, name: str, base: str, head: str) -> None:
        repository = self.state.repositories[name]
        if base not in repository.commits or head not in repository.commits:
            raise KeyError(base)
        self.send(json.dumps({"status": repository.compare(base, head)}).encode())

    def raw(self, name: str, sha: str, path: str) -> None:
        repository = self.state.repositories[name]
        self.send(repository.commits[repository.refs.get(sha, sha)][path].encode())

    def file(self, path: str) -> None:
        self.send(self.state.files[path], headers={"Content-Type": "text/html"} if path.endswith("/") else {})


def tarball(files: Files) -> bytes:
    """A .tar.gz of text files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def status(code: int, headers: Mapping[str, str] | None = None) -> Callable[[Handler], None]:
    """An answer with this status and nothing else."""
    return lambda handler: handler.send(b"", code, headers)


def rate_limited(code: int, *, reset_in: float) -> Callable[[Handler], None]:
    """GitHub's answer to one who asked too often, who may ask again in `reset_in` seconds."""
    reset = str(int(time.time() + reset_in))
    return status(code, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset})


def silence(handler: Handler) -> None:
    """No answer at all."""
    handler.state.closing.wait(30)
    handler.close_connection = True


def truncated(handler: Handler) -> None:
    """Less than was announced, then the end of the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"def f():\n    pass\n")
    handler.close_connection = True


def cut_off(content: bytes) -> Callable[[Handler], None]:
    """The beginning of a longer answer, then the end of the connection."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", str(len(content) + 100))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    return act


def drip(handler: Handler) -> None:
    """A byte now and then, for as long as somebody listens."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.state.closing.wait(0.02):
        handler.wfile.write(b"#" * 70_000)
        handler.wfile.flush()


def garbage(handler: Handler) -> None:
    """Bytes that are neither text nor an archive, with status 200."""
    handler.send(bytes(range(256)) * 8)


def page(handler: Handler) -> None:
    """A page of HTML, with status 200, as a proxy that wants one to sign in has it."""
    handler.send(b"<!doctype html>\nSign in", headers={"Content-Type": "text/html; charset=utf-8"})


def circle(handler: Handler) -> None:
    """A redirect to the same address."""
    handler.send(b"", 302, {"Location": handler.path})


def elsewhere(url: str) -> Callable[[Handler], None]:
    """A redirect."""
    return lambda handler: handler.send(b"", 302, {"Location": url})


def announced(size: int) -> Callable[[Handler], None]:
    """An answer that says it has `size` bytes, and begins to send them."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(size))
        handler.end_headers()
        handler.wfile.write(b"#" * 65_536)
        handler.close_connection = True

    return act


def endless(handler: Handler) -> None:
    """An answer without a length that never ends."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    while not handler.state.closing.is_set():
        handler.wfile.write(b"#" * 65_536)


def bomb(handler: Handler) -> None:
    """A small body that unpacks to 16 MiB, quickly made: the client does not wait long."""
    handler.send(gzip.compress(bytes(2**24), 1), 200, {"Content-Encoding": "gzip"})
