"""One tracking issue: opened, updated, closed and opened again over real HTTP, and never two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import loudmerge
from loudmerge.canary.report import markdown
from loudmerge.canary.run import CanaryReport, Verdict
from loudmerge.canary.tracking import MARKER, Tracker, track
from loudmerge.canary.upstream.fetch import Client, Unreachable
from tests.support import upstream_server as server
from tests.support.issue_server import REPOSITORY, IssueServer, running_issues
from tests.unit.canary.world import QUICK, TOKEN, guard_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = Verdict("zoo-guarded", "owner/zoo", "main", "zoo/saving.py", "present", "is defined", 1, COMMIT, True)
GONE = replace(GOOD, verdict="missing", detail="there is no guarded")
PENDING = replace(GOOD, verdict="pending", detail="owner/zoo#7 has not landed")
DOWN = replace(GOOD, verdict="unreachable", detail="HTTP 500", line=0, version="", evaluated=False)
STALE = replace(DOWN, stale=True)


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[IssueServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_issues() as found:
        yield found


@dataclass
class Workflow:
    """The workflow's step, run day by day."""

    github: IssueServer
    client: Client

    def __call__(self, *verdicts: Verdict, not_run: tuple[str, ...] = ()) -> tuple[str, ...]:
        report = CanaryReport(verdicts, not_run=not_run)
        tracker = Tracker(self.client, self.github.api, REPOSITORY, TOKEN)
        return track(tracker, report, markdown(report))


@pytest.fixture
def workflow(github: IssueServer, tmp_path: Path) -> Iterator[Workflow]:
    client = Client(tmp_path, replace(QUICK, timeout=10, deadline=10))
    yield Workflow(github, client)
    client.close()


def test_it_opens_updates_closes_and_opens_the_same_issue_again(workflow: Workflow) -> None:
    issues = workflow.github.issues
    assert workflow(GOOD, PENDING) == ()
    assert issues == []
    assert workflow(GONE, GOOD) == ("issue #1 opened",)
    assert issues[0]["body"].startswith(MARKER)
    assert "there is no guarded" in issues[0]["body"]
    assert COMMIT in issues[0]["body"]
    assert [label["name"] for label in issues[0]["labels"]] == ["canary"]
    assert workflow(GONE, replace(GONE, guard="another")) == ("issue #1 updated",)
    assert issues[0]["title"] == "Canary: 2 missing"
    assert "another" in issues[0]["body"]
    assert workflow(GOOD, PENDING) == ("issue #1 closed",)
    assert (issues[0]["state"], issues[0]["state_reason"]) == ("closed", "completed")
    assert workflow(GOOD) == ()
    assert workflow(GONE) == ("issue #1 opened again",)
    assert (issues[0]["state"], len(issues)) == ("open", 1)
    assert workflow.github.writes == ["POST", "PATCH", "PATCH", "PATCH"]


def test_who_could_not_be_asked_opens_nothing_until_it_is_stale(workflow: Workflow) -> None:
    assert workflow(GOOD, DOWN) == ()
    assert workflow(GOOD, STALE) == ("issue #1 opened",)
    assert workflow.github.issues[0]["title"] == "Canary: 1 stale"


@pytest.mark.parametrize("verdict", [DOWN, PENDING, GOOD], ids=lambda one: str(one.verdict))
@pytest.mark.parametrize("not_run", [(), ("zoo-guarded@v1",)], ids=["all run", "not all run"])
def test_an_issue_is_closed_only_when_everything_was_asked(
    workflow: Workflow, verdict: Verdict, not_run: tuple[str, ...]
) -> None:
    workflow(GONE)
    proven = verdict is not DOWN and not not_run
    said = workflow(GOOD, verdict, not_run=not_run)
    assert said == ("issue #1 closed" if proven else "issue #1 updated",)
    assert workflow.github.issues[0]["state"] == ("closed" if proven else "open")


def test_what_others_wrote_is_left_alone(workflow: Workflow) -> None:
    github = workflow.github
    github.issue("the canary does not sing")
    github.issue(MARKER, labels=())
    github.issue(f"as I said: {MARKER}")
    github.issue(MARKER)["pull_request"] = {"url": ""}
    before = json.dumps(github.issues)
    assert workflow(GONE) == ("issue #5 opened",)
    assert workflow(GOOD) == ("issue #5 closed",)
    assert json.dumps(github.issues[:4]) == before


def test_an_issue_is_found_behind_many_others(workflow: Workflow) -> None:
    for _ in range(230):
        workflow.github.issue("another canary")
    assert workflow(GONE) == ("issue #231 opened",)
    assert workflow(GONE) == ("issue #231 updated",)


def test_of_two_open_issues_one_stays(workflow: Workflow) -> None:
    workflow.github.issue(MARKER, state="closed")
    workflow.github.issue(MARKER)
    workflow.github.issue(MARKER)
    assert workflow(GONE) == ("issue #2 updated", "issue #3 closed, as there is another")
    assert [issue["state"] for issue in workflow.github.issues] == ["closed", "open", "closed"]


def test_a_post_without_an_answer_is_not_sent_twice(workflow: Workflow) -> None:
    def made_and_silent(handler: server.Handler) -> None:
        workflow.github.issue(MARKER)
        server.truncated(handler)

    workflow.github.issue("another canary")
    workflow.github.faults.append(_OnWrite("/issues", made_and_silent, 1, workflow.github))
    with pytest.raises(Unreachable):
        workflow(GONE)
    assert workflow.github.writes == ["POST"]
    assert workflow(GONE) == ("issue #2 updated",)
    assert len(workflow.github.issues) == 2


@dataclass
class _OnWrite(server.Fault):
    """A fault in the way of changes only."""

    github: IssueServer

    def __post_init__(self) -> None:
        act = self.act

        def only(handler: server.Handler) -> None:
            if handler.command == "GET":
                self.times += 1
                handler.route("/api/repos/owner/watcher/issues")
            else:
                act(handler)

        self.act = only


@pytest.mark.parametrize("code", [403, 429])
def test_a_rate_limit_that_ends_soon_is_waited_for_and_one_that_lasts_is_told(
    workflow: Workflow, code: int
) -> None:
    soon = server.status(code, {"Retry-After": "0"})
    workflow.github.faults.append(_OnWrite("/issues", soon, 1, workflow.github))
    assert workflow(GONE) == ("issue #1 opened",)
    assert workflow.github.writes == ["POST", "POST"]
    workflow.github.fail("/issues", server.rate_limited(code, reset_in=1000), times=1)
    with pytest.raises(Unreachable, match="rate limit until"):
        workflow(GOOD)
    assert workflow.github.issues[0]["state"] == "open"


def test_an_edit_is_tried_again(workflow: Workflow) -> None:
    workflow(GONE)
    workflow.github.faults.append(_OnWrite("/issues/1", server.status(502), 1, workflow.github))
    assert workflow(GOOD) == ("issue #1 closed",)


@pytest.mark.parametrize(
    "answer", [server.garbage, lambda handler: handler.send(b'{"message": "hello"}')], ids=["bytes", "object"]
)
def test_an_answer_that_is_no_list_of_issues_opens_nothing(workflow: Workflow, answer: object) -> None:
    workflow.github.fail("/issues", answer, times=1)  # type: ignore[arg-type]
    with pytest.raises(Unreachable, match=r"not JSON|no list of issues"):
        workflow(GONE)
    assert workflow.github.writes == []


@pytest.mark.parametrize(("code", "sent"), [(301, ["POST"]), (307, ["POST", "POST"])])
def test_a_renamed_repository(workflow: Workflow, code: int, sent: list[str]) -> None:
    """GitHub answers 307 to a change, which keeps the method; one that loses it is no success."""
    moved = server.status(code, {"Location": f"{workflow.github.api}/repos/{REPOSITORY}/issues"})
    workflow.github.faults.append(_OnWrite("/issues", moved, 1, workflow.github))
    if code == 307:
        assert workflow(GONE) == ("issue #1 opened",)
    else:
        with pytest.raises(Unreachable, match="redirected"):
            workflow(GONE)
    assert workflow.github.writes == sent


def test_a_huge_report_fits_into_an_issue(workflow: Workflow) -> None:
    gone = [replace(GONE, guard=f"guard-{number}", detail="`é` | " * 900) for number in range(80)]
    report = CanaryReport(tuple(gone))
    tracker = Tracker(workflow.client, workflow.github.api, REPOSITORY, TOKEN)
    assert track(tracker, report, markdown(report, limit=60_000)) == ("issue #1 opened",)
    body = workflow.github.issues[0]["body"]
    assert "more parts do not fit here" in body
    assert sum(line.startswith("```") for line in body.splitlines()) % 2 == 0


class Command:
    """`python -m loudmerge.canary.tracking`, in a process of its own."""

    def __init__(self, place: Path, github: IssueServer) -> None:
        self.place, self.github = place, github

    def __call__(self, text: str, *arguments: str, token: str | None = TOKEN) -> tuple[int, str]:
        file = self.place / "report.json"
        file.write_text(text)
        dropped = {"GITHUB_TOKEN", "GH_TOKEN"}
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment["PYTHONPATH"] = str(Path(loudmerge.__file__).parents[1])
        environment |= {"GITHUB_API_URL": self.github.api, "LOUDMERGE_CANARY_CACHE": str(self.place)}
        environment |= {"GITHUB_TOKEN": token} if token else {}
        command = [sys.executable, "-m", "loudmerge.canary.tracking", str(file), "--repo", REPOSITORY]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def command(tmp_path: Path, github: IssueServer) -> Command:
    return Command(tmp_path, github)


def document(*verdicts: Verdict) -> str:
    return json.dumps(CanaryReport(verdicts).to_json())


def test_the_command_says_what_it_did_and_why_the_guard_matters(command: Command, tmp_path: Path) -> None:
    guards = str(guard_file(tmp_path / "guards"))
    run = "https://github.com/owner/watcher/actions/runs/7"
    assert command(document(GONE), "--guards", guards, "--run", run) == (0, "issue #1 opened\n")
    (issue,) = command.github.issues
    assert "the test needs it" in issue["body"]
    assert f"Run: {run}" in issue["body"]
    assert command.github.asked[-1].headers["Authorization"] == f"Bearer {TOKEN}"
    assert command(document(GOOD)) == (0, "issue #1 closed\n")
    assert command(document(GOOD)) == (0, "no issue is needed\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "verdicts": [{"guard": "x"}]}', "verdict 1"),
        (document(), "found no verdict"),
        (document(replace(GOOD, verdict="fine")), "verdict is 'fine'"),
    ],
)
def test_a_report_that_says_nothing_is_a_usage_error(command: Command, text: str, message: str) -> None:
    code, said = command(text)
    assert code == 2
    assert message in said
    assert command.github.asked == []


def test_no_right_to_write_is_the_environments_failure(command: Command) -> None:
    code, said = command(document(GONE), token=None)
    assert code == 5
    assert "HTTP 401. Set GITHUB_TOKEN." in said
    assert command.github.issues == []
