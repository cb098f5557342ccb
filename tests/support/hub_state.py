"""What the test Hub (`hub_server`) holds: repositories, blobs, the log of requests, and faults to come."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Files = dict[str, bytes]
Action = int | Literal["hang", "truncate", "html"]

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
REGULAR_LIMIT = 10_000_000  # bytes: from here on any file must be LFS, whatever its name

CONFIG = b'{"model_type": "qwen3_moe"}'
WEIGHTS = os.urandom(40_000)
BASE: Files = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.model": b"tokens",
    "model.safetensors": WEIGHTS,
}
"""A checkpoint for a test to put there."""


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree after it, and what its request added and deleted."""

    oid: str
    message: str
    files: Files
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One request as it arrived, with the status of the answer (0: none was sent)."""

    method: str
    path: str
    status: int


@dataclass
class Fault:
    """What the next `times` requests of `method` whose path matches `pattern` meet."""

    method: str
    pattern: str
    action: Action
    times: int = 1_000


@dataclass
class HubServer:
    """The server's state. Tests read `repos`, `blobs` and `requests` and set `token` and `faults`.

    url: the Hub's. storage_url: of the contents of LFS files, under another host name, as in life.
    token: if set, every write must carry it, and every read of a name in `gated`.
    """

    url: str = ""
    storage_url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_repo(self, repo: str, files: Mapping[str, bytes] | None = None) -> Commit:
        """Puts a repository there, as if it had been pushed long ago."""
        tree = {".gitattributes": GITATTRIBUTES, **(files or {})}
        self.repos[repo] = []
        return self.commit(repo, "initial commit", tree)

    def commit(self, repo: str, message: str, files: Files, deleted: tuple[str, ...] = ()) -> Commit:
        """Appends a commit that adds `files` to the tree at the head and removes `deleted`."""
        history = self.repos[repo]
        tree = dict(history[-1].files) if history else {}
        tree.update(files)
        for path in deleted:
            del tree[path]
        oid = _sha1(f"{repo} {len(history)} {message}".encode())
        history.append(Commit(oid, message, tree, tuple(files), deleted))
        return history[-1]

    def head(self, repo: str) -> Commit:
        return self.repos[repo][-1]

    def fail(self, method: str, pattern: str, action: Action, times: int = 1_000) -> None:
        """Makes matching requests end in a status, a hang, a cut-off body or a page that is not the Hub's."""
        self.faults.append(Fault(method, pattern, action, times))

    @property
    def writes(self) -> list[Request]:
        """The requests that could change something: all but GET and HEAD."""
        return [request for request in self.requests if request.method not in ("GET", "HEAD")]

    def take_fault(self, method: str, path: str) -> Action | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault.action
        return None


def is_lfs(path: str, size: int) -> bool:
    """As the `.gitattributes` of a new repository on the Hub says, for the files that matter here."""
    return path.endswith(".safetensors") or size >= REGULAR_LIMIT


def git_blob_id(data: bytes) -> str:
    return _sha1(b"blob %d\0" % len(data) + data)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
