"""A GitHub repository at a ref: the ref is resolved to a commit once, and every file read at that commit."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Client, NotThere, Unreachable, write
from loudmerge.canary.upstream.sources import Change, SourceOptions, decoded

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA_ONLY = "application/vnd.github.sha"
JSON = "application/vnd.github+json"
HOLDS = {"identical": True, "ahead": True, "behind": False}
"""What GitHub says of how a commit lies to another -> whether it holds it."""


@dataclass(frozen=True)
class GithubSource:
    """`upstream` at a commit. version: the commit, 40 hexadecimal digits."""

    upstream: str
    ref: str
    version: str
    client: Client
    options: SourceOptions
    _absent: set[str] = field(default_factory=set)
    """Files that the commit has not: guards of tests ask for the same few that most projects lack."""

    @classmethod
    def at(cls, upstream: str, ref: str, client: Client, options: SourceOptions) -> GithubSource:
        """Resolves the ref. Raises Unreachable, or SourceError when there is no such repository or ref."""
        if COMMIT.fullmatch(ref):
            return cls(upstream, ref, ref, client, options)
        url = f"{options.github_api}/repos/{upstream}/commits/{quote(ref, safe='')}"
        try:
            answer = client.get(url, token=options.token, accept=SHA_ONLY, conditional=True)
        except NotThere as error:
            raise SourceError(f"{upstream} has no ref {ref}, or the token may not see it: {error}") from error
        commit = answer.decode("ascii", errors="replace").strip()
        if not COMMIT.fullmatch(commit):
            raise Unreachable(f"{url}: found {commit[:60]!r}, expected a commit's 40 digits")
        return cls(upstream, ref, commit, client, options)

    def read(self, path: str) -> str:
        place = self._cache / "files" / _safe(path)
        if place.is_file():
            return decoded(place.read_bytes(), f"{self.upstream} {self.version}: {path}")
        url = f"{self.options.github_raw}/{self.upstream}/{self.version}/{quote(path)}"
        if path in self._absent:
            raise NotThere(f"{url}: there is no such thing")
        try:
            content = self.client.get(url, token=self.options.token)
        except NotThere:
            self._absent.add(path)
            raise
        text = decoded(content, f"{self.upstream} {self.version}: {path}")
        write(place, content)
        return text

    def exists(self, path: str) -> bool:
        return _exists(self, path)

    def contains(self, change: str) -> bool | None:
        """Asks GitHub whether the change is among the ancestors of this commit.

        Raises Unreachable where the answer is none to the question, and where neither commit holds the other:
        a branch that the change never reached and a history that was written anew look the same.
        """
        asked = Change.parse(change)
        if asked is None or not asked.of(self.upstream):
            return None
        commit = asked.commit
        if commit is None:
            pull = self._json(f"pulls/{asked.pull}", "merged_at")
            if pull is None:
                return None
            if not pull["merged_at"]:
                return False
            commit = str(pull.get("merge_commit_sha"))
        compared = self._json(f"compare/{quote(commit, safe='')}...{self.version}?per_page=1", "status")
        if compared is None:
            return None
        status = str(compared["status"])
        if status not in HOLDS:
            raise Unreachable(
                f"{commit}, with which it landed, and {self.version} are {status!r}, expected one "
                f"to hold the other: is the history of {self.upstream} written anew, or {self.ref} a branch "
                "without it? For a branch that is never to have it, take the ref out of the guard's `refs`"
            )
        return HOLDS[status]

    def _json(self, path: str, field: str) -> dict[str, Any] | None:
        """An answer of the API; None when it knows of no such thing. Raises Unreachable without `field`."""
        url = f"{self.options.github_api}/repos/{self.upstream}/{path}"
        try:
            found = json.loads(self.client.get(url, token=self.options.token, accept=JSON, conditional=True))
        except NotThere:
            return None
        except ValueError as error:
            raise Unreachable(f"{url}: not JSON: {error}") from error
        if not isinstance(found, dict) or field not in found:
            raise Unreachable(f"{url}: found {str(found)[:80]!r}, expected a document with {field!r}")
        return found

    @property
    def _cache(self) -> Path:
        return self.options.cache / "github" / self.upstream.replace("/", "+") / self.version


@dataclass(frozen=True)
class BaseUrlSource:
    """Another base URL: files at BASE/owner/name/ref/path, else BASE/ref/path, else BASE/path.

    version: empty, as such a server names no commit; a verdict then names the hash of the file.
    """

    upstream: str
    ref: str
    base: str
    client: Client
    version: str = ""
    _read: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, path: str) -> str:
        with self._lock:
            if path not in self._read:
                self._read[path] = decoded(self._fetch(str(_safe(path))), f"{self.base}: {path}")
            return self._read[path]

    def _fetch(self, path: str) -> bytes:
        base = self.base.rstrip("/")
        places = (f"{self.upstream}/{self.ref}/{path}", f"{self.ref}/{path}", path)
        for place in places:
            try:
                return self.client.get(f"{base}/{quote(place)}")
            except NotThere:
                continue
        raise NotThere(f"{base} has none of {', '.join(places)}")

    def exists(self, path: str) -> bool:
        return _exists(self, path)


def _exists(source: GithubSource | BaseUrlSource, path: str) -> bool:
    try:
        source.read(path)
    except NotThere:
        return False
    return True


def _safe(path: str) -> PurePosixPath:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise SourceError(f"{path} leads out of the source")
    return pure
