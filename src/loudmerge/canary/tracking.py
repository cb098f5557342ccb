"""Keeps one issue that says what the canary found: opens it, updates it, closes it, opens it again.

    python -m loudmerge.canary.tracking REPORT.json --repo OWNER/NAME [--guards DIR]

REPORT.json is what `loudmerge canary --json` printed. A guard that is missing or stale opens the issue. It
is closed when every guard is present or pending. A run that could not ask everybody, or did not run every
guard, proves neither: it opens nothing and closes nothing. The issue is found again by its label and by the
comment in its first line.

The token, of GITHUB_TOKEN or GH_TOKEN, may write issues. Exit codes: 0 done, 2 usage, 5 the repository could
not be asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click

from loudmerge.canary.guards import Guard, load_guards
from loudmerge.canary.report import headline, load, markdown
from loudmerge.canary.run import CanaryReport
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Client, NotThere, Unreachable
from loudmerge.canary.upstream.github import JSON
from loudmerge.canary.upstream.sources import default_cache
from loudmerge.command.terminal import ENVIRONMENT

LABEL = "canary"
MARKER = "<!-- loudmerge canary: this issue is written by the canary's workflow -->"
BODY_BYTES = 60_000
"""GitHub refuses a body over 65,536 characters."""

PAGE = 100


@dataclass(frozen=True)
class Issue:
    """An issue that carries the marker."""

    number: int
    is_open: bool


@dataclass(frozen=True)
class Step:
    """One change on GitHub, and what it is in words. number: of the issue, None for one to be made."""

    says: str
    number: int | None
    document: dict[str, object]


def plan(report: CanaryReport, body: str, issues: Sequence[Issue]) -> tuple[Step, ...]:
    """What is to be done. issues: those that carry the marker, oldest first."""
    opened = [issue for issue in issues if issue.is_open]
    kept = next(iter(opened or issues), None)
    text: dict[str, object] = {"title": headline(report), "body": f"{MARKER}\n\n{body}"}
    steps: list[Step] = []
    if _broken(report):
        steps.append(_opened(kept, text))
    elif kept and kept.is_open:
        steps.append(_settled(kept, text, proven=_proven(report)))
    twice: dict[str, object] = {"state": "closed", "state_reason": "not_planned"}
    return (*steps, *(Step("closed, as there is another", one.number, twice) for one in opened[1:]))


def _broken(report: CanaryReport) -> bool:
    return report.missing or any(verdict.stale for verdict in report.verdicts)


def _proven(report: CanaryReport) -> bool:
    """Whether every guard was asked about."""
    return not report.not_run and not any(one.verdict == "unreachable" for one in report.verdicts)


def _opened(kept: Issue | None, text: dict[str, object]) -> Step:
    if kept is None:
        return Step("opened", None, {**text, "labels": [LABEL]})
    return Step("updated" if kept.is_open else "opened again", kept.number, {**text, "state": "open"})


def _settled(kept: Issue, text: dict[str, object], *, proven: bool) -> Step:
    if not proven:
        return Step("updated", kept.number, text)
    return Step("closed", kept.number, {**text, "state": "closed", "state_reason": "completed"})


@dataclass(frozen=True)
class Tracker:
    """The issues of a repository, OWNER/NAME. api: the base URL of GitHub's REST API."""

    client: Client
    api: str
    repository: str
    token: str | None

    def issues(self) -> tuple[Issue, ...]:
        """Those that carry the marker, oldest first. Raises Unreachable, NotThere, SourceError."""
        return tuple(self._marked())

    def _marked(self) -> Iterator[Issue]:
        for page in count(1):
            query = f"labels={LABEL}&state=all&sort=created&direction=asc&per_page={PAGE}&page={page}"
            found = self._list(f"{self._url}?{query}")
            for one in found:
                if "pull_request" not in one and str(one.get("body") or "").startswith(MARKER):
                    yield Issue(int(one["number"]), one.get("state") == "open")
            if len(found) < PAGE:
                return

    def _list(self, url: str) -> list[dict[str, Any]]:
        found = _json(url, self.client.get(url, token=self.token, accept=JSON))
        if not isinstance(found, list) or not all(isinstance(one, dict) and "number" in one for one in found):
            raise Unreachable(f"{self._url}: found no list of issues")
        return found

    def take(self, step: Step) -> int:
        """Does a step; the issue's number. Raises Unreachable, NotThere, SourceError."""
        method, url = ("POST", self._url) if step.number is None else ("PATCH", f"{self._url}/{step.number}")
        answer = self.client.send(method, url, step.document, token=self.token, accept=JSON)
        found = _json(url, answer)
        if not isinstance(found, dict) or not isinstance(found.get("number"), int):
            raise Unreachable(f"{url}: found no issue in the answer")
        return int(found["number"])

    @property
    def _url(self) -> str:
        return f"{self.api.rstrip('/')}/repos/{self.repository}/issues"


def _json(url: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise Unreachable(f"{url}: not JSON: {error}") from error


def track(tracker: Tracker, report: CanaryReport, body: str) -> tuple[str, ...]:
    """Does what the report asks for; a line for each step. Raises as `Tracker` does."""
    return tuple(f"issue #{tracker.take(step)} {step.says}" for step in plan(report, body, tracker.issues()))


def _body(report: CanaryReport, guards: Sequence[Guard], run: str | None) -> str:
    text = markdown(report, guards, limit=BODY_BYTES)
    return f"{text}\nRun: {run}\n" if run else text


def _repository(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise click.BadParameter(f"{value!r} is not OWNER/NAME.", context, parameter)
    return value


@click.command()
@click.argument("report_file", metavar="REPORT.json", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--repo", "repository", required=True, metavar="OWNER/NAME", callback=_repository)
@click.option("--guards", type=click.Path(path_type=Path), help="The guard files, for why each matters.")
@click.option("--run", "run_url", metavar="URL", help="The run's address, for the issue.")
@click.option(
    "--api",
    default=lambda: os.environ.get("GITHUB_API_URL") or "https://api.github.com",
    show_default="GITHUB_API_URL, else api.github.com",
    help="The base URL of the REST API.",
)
def main(report_file: Path, repository: str, guards: Path | None, run_url: str | None, api: str) -> None:
    """Open, update or close the one issue that tracks the canary in OWNER/NAME, as REPORT.json asks for."""
    try:
        report = load(report_file)
        body = _body(report, load_guards(guards) if guards else (), run_url)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if not report.verdicts:
        raise click.UsageError(f"{report_file}: found no verdict, so there is nothing to say")
    token = os.environ.get("GITHUB_TOKEN") or os.environ.get("GH_TOKEN") or None
    client = Client(default_cache())
    try:
        done = track(Tracker(client, api, repository, token), report, body)
    except (Unreachable, SourceError, NotThere) as error:
        click.echo(f"{repository}: {error}", err=True)
        raise click.exceptions.Exit(ENVIRONMENT) from error
    finally:
        client.close()
    click.echo("\n".join(done) or "no issue is needed")


if __name__ == "__main__":
    main()
