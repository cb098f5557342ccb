"""HTTP for the canary: sizes and times limited, retried, rate limits honoured, conditional where it helps."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from loudmerge import __version__
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.errors import TRY_AGAIN

CHUNK = 2**16
MAX_TEXT_BYTES = 8 * 2**20
DENIED = frozenset({401, 403})
GONE = frozenset({404, 410, 422, 451})
"""Answers that mean: there is no such thing. GitHub answers 422 to a commit that does not exist."""
RETRIED = frozenset({408, 425, 500, 502, 503, 504})


class NotThere(FileNotFoundError):
    """Upstream has no such thing. Any other FileNotFoundError is about this machine, and no verdict."""


class Unreachable(Exception):
    """A source that could not be asked: no verdict about it is possible, and none is a pass."""


@dataclass(frozen=True)
class HttpOptions:
    """How patient to be.

    timeout: seconds to connect, and between two pieces of an answer. deadline: seconds for one answer.
    tries: how often in all. backoff: seconds before the second try, doubled for each further one.
    max_wait: the most seconds to wait because a server asks for it (rate limits).
    """

    timeout: float = 15.0
    deadline: float = 120.0
    tries: int = 3
    backoff: float = 0.5
    max_wait: float = 60.0


class _Token(AuthBase):
    """The token, for GitHub's own hosts only: requests takes it off when a redirect leaves them."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class _TryAgain(Exception):
    """This try failed; another may not.

    wait: seconds the server asks for, None when it does not. refused: the server did nothing of what it was
    asked, so that another try cannot do it twice.
    """

    def __init__(self, message: str, wait: float | None = None, *, refused: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.refused = refused


@dataclass
class Client:
    """Asks servers. One for a whole run: it remembers who asked to be left alone until when.

    cache: where ETags and the answers to them lie.
    """

    cache: Path
    options: HttpOptions = field(default_factory=HttpOptions)
    _session: requests.Session = field(default_factory=requests.Session)
    _limited: dict[str, tuple[float, str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Gives back the connections."""
        self._session.close()

    def get(
        self,
        url: str,
        *,
        limit: int = MAX_TEXT_BYTES,
        token: str | None = "",
        accept: str = "*/*",
        conditional: bool = False,
    ) -> bytes:
        """The body at `url`, at most `limit` bytes.

        token: None where there is none, but would help; empty for a server that takes none.
        conditional: ask only whether it changed, when an earlier answer with an ETag is in the cache.
        Raises NotThere when the server says there is no such thing, SourceError when it is larger
        than `limit`, Unreachable for everything else that is not a whole answer.
        """
        headers = {"Accept": accept, "User-Agent": f"loudmerge/{__version__}"}
        known = self._known(url, accept) if conditional else None
        if known:
            headers["If-None-Match"] = known.etag
        return self._patiently(
            url, lambda: self._ask(url, headers, limit, token, known, store=conditional), repeatable=True
        )

    def send(
        self, method: str, url: str, document: Mapping[str, object], *, token: str | None, accept: str
    ) -> bytes:
        """What a server answers to a JSON document that changes something there (POST, PATCH).

        A POST is tried again only where the server refused it (a rate limit): one that got no answer may
        have been carried out. Raises as `get`.
        """
        headers = {
            "Accept": accept,
            "Content-Type": "application/json",
            "User-Agent": f"loudmerge/{__version__}",
        }
        return self._patiently(
            url, lambda: self._send(method, url, headers, document, token), repeatable=method == "PATCH"
        )

    def _patiently(self, url: str, ask: Callable[[], bytes], *, repeatable: bool) -> bytes:
        """Asks until there is an answer, as often and as long as the options allow."""
        for attempt in range(self.options.tries):
            last = attempt + 1 == self.options.tries
            self._respect_limit(url)
            try:
                return ask()
            except _TryAgain as error:
                if last or not (repeatable or error.refused):
                    raise Unreachable(f"{_shown(url)}: {error}. {TRY_AGAIN}") from error
                time.sleep(self.options.backoff * 2**attempt if error.wait is None else error.wait)
        raise Unreachable(f"{_shown(url)}: not asked, {self.options.tries} tries are allowed")

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        document: Mapping[str, object],
        token: str | None,
    ) -> bytes:
        with (
            _failures(url),
            self._session.request(
                method,
                url,
                data=json.dumps(document),
                headers=dict(headers),
                auth=_Token(token),
                stream=True,
                timeout=self.options.timeout,
            ) as answer,
        ):
            if answer.request.method != method:
                raise Unreachable(f"{_shown(url)}: redirected. Has the repository been renamed?")
            self._check(url, answer, token)
            return _body(answer, MAX_TEXT_BYTES, self.options.deadline)

    def _ask(
        self,
        url: str,
        headers: Mapping[str, str],
        limit: int,
        token: str | None,
        known: _Known | None,
        *,
        store: bool,
    ) -> bytes:
        with (
            _failures(url),
            self._session.get(
                url, headers=dict(headers), auth=_Token(token), stream=True, timeout=self.options.timeout
            ) as answer,
        ):
            if known and answer.status_code == 304:
                return known.body
            self._check(url, answer, token)
            body = _body(answer, limit, self.options.deadline)
        etag = answer.headers.get("ETag")
        if store and etag:
            self._keep(url, headers["Accept"], _Known(etag, body))
        return body

    def _check(self, url: str, answer: requests.Response, token: str | None) -> None:
        """Raises unless the answer is a 200, or to a POST a 201, that came the way it was asked for.

        A page of HTML is none: nothing that is read here is one, and proxies that want a sign-in say 200.
        """
        status = answer.status_code
        if urlsplit(url).scheme == "https" and urlsplit(answer.url).scheme != "https":
            raise Unreachable(f"{_shown(url)}: redirected to an address that is not https")
        if status == 200 or (status == 201 and answer.request.method == "POST"):
            if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
                raise Unreachable(f"{_shown(url)}: a web page, and not a file. Has a proxy answered?")
            return
        if status in GONE:
            raise NotThere(f"{_shown(url)}: HTTP {status}, there is no such thing")
        if status == 429 or (status == 403 and _limit_headers(answer)):
            self._limit(url, answer, token)
        if status in RETRIED or status >= 500:
            raise _TryAgain(f"HTTP {status}")
        hint = ""
        if status in DENIED and token != "":
            hint = ". Set GITHUB_TOKEN." if token is None else ". Check what the token may read."
        raise Unreachable(f"{_shown(url)}: HTTP {status}{hint}")

    def _limit(self, url: str, answer: requests.Response, token: str | None) -> None:
        """Raises _TryAgain with the wait that is asked for, or remembers the host and raises Unreachable."""
        wait = _wait(answer)
        if wait is not None and wait <= self.options.max_wait:
            raise _TryAgain(f"HTTP {answer.status_code}, a rate limit", wait, refused=True)
        if wait is None:
            raise _TryAgain(f"HTTP {answer.status_code}, a rate limit", refused=True)
        with self._lock:
            hint = "Wait, or set GITHUB_TOKEN." if token is None else "Wait."
            self._limited[urlsplit(url).netloc] = time.time() + wait, hint
        self._respect_limit(url)

    def _respect_limit(self, url: str) -> None:
        with self._lock:
            until, hint = self._limited.get(urlsplit(url).netloc, (0.0, ""))
        if until > time.time():
            at = datetime.fromtimestamp(until, timezone.utc).strftime("%H:%M:%S UTC")
            raise Unreachable(f"{_shown(url)}: rate limit until {at}. {hint}")

    def _place(self, url: str, accept: str) -> Path:
        return self.cache / "http" / hashlib.sha256(f"{accept} {url}".encode()).hexdigest()

    def _known(self, url: str, accept: str) -> _Known | None:
        place = self._place(url, accept)
        try:
            etag = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            body = place.read_bytes()
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(etag, dict) or hashlib.sha256(body).hexdigest() != etag.get("sha256"):
            return None
        return _Known(str(etag.get("etag")), body)

    def _keep(self, url: str, accept: str, known: _Known) -> None:
        place = self._place(url, accept)
        document = {"etag": known.etag, "sha256": hashlib.sha256(known.body).hexdigest(), "url": _shown(url)}
        write(place, known.body)
        write(place.with_suffix(".json"), json.dumps(document).encode())


@dataclass(frozen=True)
class _Known:
    """An earlier answer, and the ETag that names it."""

    etag: str
    body: bytes


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """What `requests` raises, as what it means: worth another try, or not."""
    try:
        yield
    except requests.TooManyRedirects as error:
        raise Unreachable(f"{_shown(url)}: redirected without end") from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
        raise Unreachable(f"{_shown(url)}: not an address that can be asked: {error}") from error
    except requests.RequestException as error:
        raise _TryAgain(_reason(error)) from error


def write(place: Path, content: bytes) -> None:
    """Writes a file of the cache in one step: another process may read or write it at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.part")
    part.write_bytes(content)
    part.replace(place)


def _body(answer: requests.Response, limit: int, deadline: float) -> bytes:
    """The whole body, decoded. Raises SourceError over `limit` bytes, before and after decompression."""
    end = time.monotonic() + deadline
    declared = answer.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > limit:
        raise SourceError(f"{_shown(answer.url)}: refused: {declared} bytes, expected at most {limit}")
    pieces: list[bytes] = []
    total = 0
    for piece in answer.iter_content(CHUNK):
        total += len(piece)
        if total > limit:
            raise SourceError(f"{_shown(answer.url)}: refused: more than {limit} bytes")
        if time.monotonic() > end:
            raise _TryAgain(f"not complete after {deadline:g} s")
        pieces.append(piece)
    return b"".join(pieces)


def _reason(error: requests.RequestException) -> str:
    """What went wrong, by the names of the exceptions: their texts hold the whole address, query and all."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    names = [type(error).__name__, *([type(inner).__name__] if isinstance(inner, Exception) else [])]
    return ": ".join(names)


def _limit_headers(answer: requests.Response) -> bool:
    return answer.headers.get("X-RateLimit-Remaining") == "0" or "Retry-After" in answer.headers


def _wait(answer: requests.Response) -> float | None:
    """Seconds until the server wants to be asked again, by its headers; None when it does not say.

    https://docs.github.com/rest/using-the-rest-api/rate-limits-for-the-rest-api
    """
    after, reset = answer.headers.get("Retry-After", ""), answer.headers.get("X-RateLimit-Reset", "")
    if after.isdigit():
        return float(after)
    if reset.isdigit():
        return max(0.0, float(reset) - time.time()) + 1.0
    return None


def _shown(url: str) -> str:
    """The address without what may be secret in it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()
