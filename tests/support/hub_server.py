"""A small Hub on 127.0.0.1: the part of the Hub's HTTP API that huggingface_hub calls for models.

It keeps repositories as lists of commits in memory, offers plain LFS only (no Xet), checks what it is sent as
the Hub does (hashes, sizes, parent commits, tokens), logs every request, and fails on demand. The shapes of
its answers are those that huggingface_hub 0.36 to 2.4 read (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`), and of the Hub's API documentation.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.hub_state import Commit, Files, HubServer, Request, git_blob_id, is_lfs


@contextmanager
def connected_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A server that huggingface_hub in this process and its children talks to, without Xet or token."""
    from huggingface_hub import constants, file_download

    settings = {
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_DISABLE_XET": "1",
    }
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Read from HF_ENDPOINT once, when huggingface_hub is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server on a free port of 127.0.0.1; its `url` is what HF_ENDPOINT takes."""
    hub = HubServer()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.storage_url = f"http://localhost:{server.server_address[1]}/lfs"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()
            thread.join()


ERROR_CODES = {404: "RepoNotFound", 403: "GatedRepo"}


class HubError(Exception):
    """An answer other than 2xx, with the headers that huggingface_hub turns into its exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Request-Id": "test-request", **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "model_info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "post_commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/api/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
)


class _Handler(BaseHTTPRequestHandler):
    """Routes a request, applies faults, logs it. One instance a connection."""

    protocol_version = "HTTP/1.1"
    state: HubServer

    def log_message(self, *args: object) -> None:
        """Nothing on stderr: `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.sent = 0
        self.cut = False
        path = unquote(urlsplit(self.path).path)
        try:
            if not self._meet_fault(path):
                handle, arguments = self._route(urlsplit(self.path).path)
                with self.state.lock:
                    status, headers, body = handle(**arguments)
                self._send(status, headers, body)
        except HubError as error:
            body = json.dumps({"error": str(error)}).encode()
            self._send(error.status, error.headers, body)
        finally:
            self.state.requests.append(Request(self.command, path, self.sent))

    def _meet_fault(self, path: str) -> bool:
        """True when nothing is left to answer."""
        action = self.state.take_fault(self.command, path)
        if action == "hang":
            self.state.closing.wait()
            self.close_connection = True
            return True
        if action == "html":
            self._send(200, {"Content-Type": "text/html"}, b"<html>Please log in to the hotel network</html>")
            return True
        if action == "truncate":
            self.cut = True
        elif action is not None:
            raise HubError(action, f"this is a test's {action}", ERROR_CODES.get(action))
        return False

    def _route(self, path: str) -> tuple[Callable[..., Answer], dict[str, str]]:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and method == self.command:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                return getattr(self, name), arguments
        raise HubError(404, f"{self.command} {path} is not an address of this server")

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.sent = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.close_connection = True

    # ---- reading

    def model_info(self, repo: str, revision: str = "main") -> Answer:
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return _json({"id": repo, "sha": commit.oid, "private": False, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> Answer:
        commit = self._commit(repo, revision)
        return _json([_tree_entry(path, data) for path, data in sorted(commit.files.items())])

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        """A regular file itself; for an LFS file a redirect to its content, as the Hub does."""
        commit = self._commit(repo, revision)
        if repo in self.state.gated and not self._authorised():
            raise HubError(403, f"Access to model {repo} is restricted", "GatedRepo")
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if not is_lfs(path, len(data)):
            return self._ranged(data, {**headers, "ETag": f'"{git_blob_id(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.state.blobs[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return 302, {**headers, "Location": f"{self.state.storage_url}/{oid}"}, b""

    def lfs_get(self, oid: str) -> Answer:
        self._refuse_token()
        return self._ranged(self.state.blobs[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            return 200, headers, data
        start = int(wanted[1])
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return 206, {**headers, "Content-Range": span}, data[start:]

    # ---- writing

    def create_repo(self) -> Answer:
        self._require_token()
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.state.url}/{repo}"}
        if repo in self.state.repos:
            return _json({**url, "error": "You already created this model repo"}, 409)
        self.state.add_repo(repo)
        return _json(url)

    def validate_yaml(self) -> Answer:
        """The Hub's rule that matters here: base_model names models on the Hub, never local paths."""
        content = json.loads(self.body)["content"]
        named = re.search(r"^base_model:\n?((?:\s*-\s.*\n)+|.*\n)", content, re.MULTILINE)
        for line in named[1].splitlines() if named else ():
            value = line.strip().removeprefix("- ").strip("'\"")
            if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value):
                message = f'"base_model" with value "{value}" is not valid.'
                return _json({"errors": [{"message": message}]}, 400)
        return _json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> Answer:
        self._require_token()
        asked = json.loads(self.body)
        there = self._commit(repo, revision).files
        ignored = (asked.get("gitIgnore") or there.get(".gitignore", b"").decode()).split()
        return _json({"files": [_preupload(item, there, ignored) for item in asked["files"]]})

    def lfs_batch(self, repo: str) -> Answer:
        self._require_token()
        self._commit(repo, "main")
        objects: list[dict[str, Any]] = []
        for item in json.loads(self.body)["objects"]:
            oid = item["oid"]
            answer = {"oid": oid, "size": item["size"]}
            if oid not in self.state.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.state.storage_url}/{oid}"},
                    "verify": {"href": f"{self.state.url}/api/lfs/{oid}/verify"},
                }
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> Answer:
        self._refuse_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the announced sha256")
        self.state.blobs[oid] = self.body
        return 200, {"ETag": f'"{oid}"'}, b""

    def lfs_verify(self, oid: str) -> Answer:
        if len(self.state.blobs.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(400, "the content does not have the announced size")
        return _json({})

    def post_commit(self, repo: str, revision: str) -> Answer:
        self._require_token()
        head = self._commit(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        added: Files = {}
        deleted: list[str] = []
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                added[value["path"]] = self.state.blobs[value["oid"]]
            else:
                deleted.append(value["path"])
        commit = self.state.commit(repo, header["summary"], added, tuple(deleted))
        url = f"{self.state.url}/{repo}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # ---- what both need

    def _commit(self, repo: str, revision: str) -> Commit:
        if repo not in self.state.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        history = self.state.repos[repo]
        if revision == "main":
            return history[-1]
        for commit in history:
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _authorised(self) -> bool:
        return self.state.token is None or self.headers.get("Authorization") == f"Bearer {self.state.token}"

    def _refuse_token(self) -> None:
        """The storage is another host than the Hub: a token that is sent there has leaked."""
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed")

    def _require_token(self) -> None:
        if not self._authorised():
            raise HubError(401, "Invalid username or password.")


Answer = tuple[int, Mapping[str, str], bytes]


def _json(value: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _preupload(item: Mapping[str, Any], there: Files, ignored: list[str]) -> dict[str, Any]:
    """How to send a file. oid: of what the head has there, a blob id or the sha256 of an LFS file."""
    path, data = item["path"], there.get(item["path"])
    oid = None
    if data is not None:
        oid = hashlib.sha256(data).hexdigest() if is_lfs(path, len(data)) else git_blob_id(data)
    mode = "lfs" if is_lfs(path, item["size"]) else "regular"
    should_ignore = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
    return {"path": path, "uploadMode": mode, "shouldIgnore": should_ignore, "oid": oid}


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob_id(data)}
    if is_lfs(path, len(data)):
        oid = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["oid"] = git_blob_id(pointer)
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    return entry
