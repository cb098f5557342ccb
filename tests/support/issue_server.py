"""GitHub's issues on 127.0.0.1, listed, opened and edited: https://docs.github.com/rest/issues/issues."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.upstream_server import Asked, Handler, UpstreamServer, running

REPOSITORY = "owner/watcher"
MAX_BODY = 65_536


@dataclass
class IssueServer(UpstreamServer):
    """issues: of REPOSITORY, the newest last. writes: the method of each change that was asked for."""

    issues: list[dict[str, Any]] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)

    def issue(
        self, body: str, *, state: str = "open", labels: tuple[str, ...] = ("canary",)
    ) -> dict[str, Any]:
        """Adds an issue that somebody wrote."""
        number = len(self.issues) + 1
        made = {"number": number, "title": "", "body": body, "state": state}
        self.issues.append({**made, "labels": [{"name": name} for name in labels]})
        return self.issues[-1]


class IssueHandler(Handler):
    """Answers one connection."""

    state: IssueServer

    def do_POST(self) -> None:  # noqa: N802 (http.server calls it)
        self.change("POST")

    def do_PATCH(self) -> None:  # noqa: N802
        self.change("PATCH")

    def change(self, method: str) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(Asked(path, dict(self.headers)))
        self.state.writes.append(method)
        fault = self.state.fault(path)
        if fault:
            fault.act(self)
        elif "Authorization" not in self.headers:
            self.answer({"message": "Requires authentication"}, 401)
        elif len(document.get("body", "")) > MAX_BODY:
            self.answer({"message": "Validation Failed"}, 422)
        elif method == "POST" and path == f"/api/repos/{REPOSITORY}/issues":
            made = self.state.issue(document["body"], labels=tuple(document["labels"]))
            self.answer(made | {"title": document["title"]}, 201)
            made["title"] = document["title"]
        else:
            self.edit(path, document)

    def edit(self, path: str, document: dict[str, Any]) -> None:
        found = re.fullmatch(rf"/api/repos/{REPOSITORY}/issues/(\d+)", path)
        if not found or int(found[1]) > len(self.state.issues):
            self.answer({"message": "Not Found"}, 404)
            return
        issue = self.state.issues[int(found[1]) - 1]
        issue.update(document)
        self.answer(issue, 200)

    def route(self, path: str) -> None:
        if path != f"/api/repos/{REPOSITORY}/issues":
            super().route(path)
            return
        given = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        asked = {"state": "open", "direction": "desc", "per_page": "30", "page": "1", **given}
        labelled = [
            issue
            for issue in self.state.issues
            if asked.get("labels") in {None, *(label["name"] for label in issue["labels"])}
            and asked["state"] in {"all", issue["state"]}
        ]
        ordered = labelled if asked["direction"] == "asc" else labelled[::-1]
        size, page = int(asked["per_page"]), int(asked["page"])
        self.answer(ordered[size * (page - 1) : size * page], 200)

    def answer(self, document: object, status: int) -> None:
        self.send(json.dumps(document).encode(), status)


@contextmanager
def running_issues() -> Iterator[IssueServer]:
    """A server on a free port of 127.0.0.1, without issues yet."""
    server = IssueServer()
    with running(server, IssueHandler):
        yield server
