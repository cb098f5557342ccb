"""Verdicts: what passes, what is pending, and that nothing unread or unevaluated ever passes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import NoReturn

import pytest

from loudmerge.canary.run import CanaryReport, run, tally
from loudmerge.canary.upstream.sources import SourceError
from tests.support import upstream_server as server
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.world import (
    GONE,
    GUARD,
    KEPT,
    PATH,
    UPSTREAM,
    guards,
    later,
    options,
    verdict,
)


def test_a_guard_that_is_gone_is_missing(tmp_path: Path, upstream: UpstreamServer) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: KEPT}, pull=7)
    repository.commit({PATH: GONE})
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated) == ("missing", True)
    assert "guarded" in found.detail


def test_the_conftest_of_a_source_is_read_with_its_tests(tmp_path: Path, upstream: UpstreamServer) -> None:
    rule = 'rule = { kind = "tests", names = ["test_a"] }'
    text = GUARD.replace('rule = { kind = "symbol", name = "guarded" }', rule)
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: "def test_a():\n    assert f()\n"}, pull=7)
    assert verdict(tmp_path, upstream, text).verdict == "present"
    repository.commit({PATH: "def test_a():\n    assert f()\n", "conftest.py": "collect_ignore = ['zoo']"})
    found = verdict(tmp_path, upstream, text)
    assert (found.verdict, found.evaluated) == ("missing", True)
    assert found.detail.endswith("is left out by conftest.py at line 1")


def test_pending_promotes_itself(tmp_path: Path, upstream: UpstreamServer) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: GONE})
    repository.pulls[7] = None
    assert verdict(tmp_path, upstream).verdict == "pending"
    repository.commit({PATH: KEPT}, ref="next", pull=7)
    found = verdict(tmp_path, upstream)
    assert found.verdict == "pending"
    assert found.detail.startswith(f"owner/zoo#7 has not landed in {repository.refs['main']}: ")
    repository.refs["main"] = repository.refs["next"]
    assert verdict(tmp_path, upstream).verdict == "present"
    repository.commit({PATH: GONE + "\n"})
    assert verdict(tmp_path, upstream).verdict == "missing"


def test_a_file_that_is_not_there_yet_is_pending_and_one_that_vanished_is_missing(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({"README.md": ""})
    repository.commit({PATH: KEPT}, ref="next", pull=7)
    assert verdict(tmp_path, upstream).verdict == "pending"
    repository.commit({"README.md": "", "zoo/moved.py": KEPT})
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert f"no file {PATH}" in found.detail
    assert "moved, renamed or removed" in found.detail


def test_not_knowing_whether_the_change_landed_is_no_excuse(tmp_path: Path, upstream: UpstreamServer) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: GONE})
    assert verdict(tmp_path, upstream).verdict == "missing"  # there is no pull request 7
    upstream.fail("/pulls/", server.status(500))
    found = verdict(tmp_path, upstream)
    assert found.verdict == "missing"
    assert "whether owner/zoo#7 is in main could not be asked" in found.detail


@pytest.mark.parametrize("text", ["def (", "\0", "def guarded():\n  return\n return 1"])
def test_source_that_cannot_be_parsed_is_a_failure(
    tmp_path: Path, upstream: UpstreamServer, text: str
) -> None:
    upstream.repository(UPSTREAM).commit({PATH: text})
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "the rule cannot be evaluated" in found.detail


def test_the_first_path_that_exists_counts(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    text = GUARD.replace(f'path = "{PATH}"', f'paths = ["src/{PATH}", "{PATH}"]')
    found = verdict(tmp_path, upstream, text)
    assert (found.verdict, found.path) == ("present", PATH)


FAULTS = {
    "limited": server.rate_limited(403, reset_in=1000),
    "error": server.status(500),
    "cut off": server.truncated,
    "silent": server.silence,
    "circle": server.circle,
}


@pytest.mark.parametrize("where", ["/commits/", "/raw/"])
@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_asked_is_unreachable_even_when_it_was_read_before(
    tmp_path: Path, upstream: UpstreamServer, where: str, name: str
) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: KEPT})
    assert verdict(tmp_path, upstream).verdict == "present"
    repository.commit({PATH: KEPT + "x = 1\n"})
    upstream.fail(where, FAULTS[name])
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated, found.stale) == ("unreachable", False, False)


def test_unreachable_for_48_hours_is_stale_and_a_read_ends_it(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    verdict(tmp_path, upstream)
    upstream.fail("/commits/", server.status(500), times=6)
    found = []
    for hours in (1, 47, 49):
        with later(monkeypatch, hours):
            found.append(verdict(tmp_path, upstream))
    assert [each.verdict for each in found] == ["unreachable"] * 3
    assert [each.stale for each in found] == [False, False, True]
    assert found[-1].detail.startswith("stale, not read for 49 h: ")
    with later(monkeypatch, 50):
        assert verdict(tmp_path, upstream).verdict == "present"


def test_one_that_was_never_read_is_stale_48_hours_after_the_first_try(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.fail("/commits/", server.status(500))
    assert not verdict(tmp_path, upstream).stale
    with later(monkeypatch, 47):
        assert not verdict(tmp_path, upstream).stale
    with later(monkeypatch, 49):
        assert verdict(tmp_path, upstream).stale


def test_guards_of_one_source_share_its_questions_and_keep_their_order(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    text = "".join(GUARD.replace("zoo-guarded", f"guard-{number}") for number in range(12))
    found = run(guards(tmp_path, text), sources=options(tmp_path, upstream))
    assert [verdict.guard for verdict in found] == [f"guard-{number}" for number in range(12)]
    assert {verdict.verdict for verdict in found} == {"present"}
    assert sum("/commits/" in path for path in upstream.paths()) == 1


def test_the_report_counts_what_was_evaluated(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    upstream.repository("owner/other").commit({PATH: GONE})
    other = GUARD.replace("owner/zoo", "owner/other").replace("zoo-guarded", "other")
    gone = GUARD.replace("zoo-guarded", "gone").replace('"main"', '"main", "v1"')
    verdicts = run(guards(tmp_path, GUARD + other + gone), sources=options(tmp_path, upstream))
    assert [verdict.verdict for verdict in verdicts] == ["present", "missing", "present", "missing"]
    expected = "canary: 3 of 4 guards evaluated (2 present, 2 missing, 0 pending, 0 unreachable)"
    assert tally(verdicts) == expected
    report = CanaryReport(verdicts)
    assert report.summary().splitlines()[-1] == expected
    document = json.loads(json.dumps(report.to_json()))
    assert (document["schema"], document["evaluated"], document["total"]) == (1, 3, 4)
    contract = {"guard", "upstream", "ref", "path", "verdict", "detail", "line"}
    assert all(contract <= set(each) for each in document["verdicts"])


def test_garbage_is_not_collected_while_a_guard_is_judged(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def judged(*_: object) -> NoReturn:
        seen.append(gc.isenabled())
        raise SourceError("no")

    monkeypatch.setattr("loudmerge.canary.run.judged", judged)
    upstream.repository(UPSTREAM).commit({PATH: KEPT}, pull=7)
    verdict(tmp_path, upstream)
    assert (seen, gc.isenabled()) == ([False], True)
