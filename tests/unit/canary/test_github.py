"""GitHub by ref, against a local server: every verdict names the commit that was read."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.canary.run import run
from loudmerge.canary.upstream.opener import Opener
from loudmerge.canary.upstream.sources import KnowsHistory
from tests.support import upstream_server as server
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, TOKEN, UPSTREAM, guards, options, verdict


def test_a_branch_is_read_at_its_commit(tmp_path: Path, upstream: UpstreamServer) -> None:
    commit = upstream.repository(UPSTREAM).commit({PATH: KEPT})
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.version, found.line, found.evaluated) == ("present", commit, 1, True)
    assert upstream.paths() == [f"/api/repos/{UPSTREAM}/commits/main", f"/raw/{UPSTREAM}/{commit}/{PATH}"]


def test_a_commit_needs_no_question_and_is_read_once(tmp_path: Path, upstream: UpstreamServer) -> None:
    commit = upstream.repository(UPSTREAM).commit({PATH: KEPT})
    text = GUARD.replace('"main"', f'"{commit}"')
    assert [verdict(tmp_path, upstream, text).verdict for _ in range(2)] == ["present", "present"]
    assert upstream.paths() == [f"/raw/{UPSTREAM}/{commit}/{PATH}"]


def test_a_branch_that_has_not_moved_is_asked_with_its_etag_only(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: KEPT})
    verdict(tmp_path, upstream)
    verdict(tmp_path, upstream)
    assert len(upstream.asked) == 3
    assert "If-None-Match" in upstream.asked[2].headers
    moved = repository.commit({PATH: GONE})
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.version) == ("missing", moved)


def test_the_token_goes_to_both_addresses(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    verdict(tmp_path, upstream, token=TOKEN)
    assert {asked.headers.get("Authorization") for asked in upstream.asked} == {f"Bearer {TOKEN}"}


def test_a_ref_that_is_gone_is_a_failure(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT}, ref="trunk")
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "owner/zoo has no ref main" in found.detail


@pytest.mark.parametrize("ref", ["main", "commit"])
def test_a_cache_that_is_gone_is_no_verdict_on_upstream(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch, ref: str
) -> None:
    commit = upstream.repository(UPSTREAM).commit({PATH: KEPT})
    read = guards(tmp_path, GUARD.replace('"main"', f'"{commit}"') if ref == "commit" else GUARD)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError, match="cache"):
        run(read, sources=options(Path(), upstream))


def test_an_answer_that_is_no_commit_is_unreachable(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.fail("/commits/", server.garbage)
    found = verdict(tmp_path, upstream)
    assert found.verdict == "unreachable"
    assert "expected a commit's 40 digits" in found.detail


def test_a_file_that_is_not_there_is_asked_for_once(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    (guard,) = guards(tmp_path)
    with Opener(options(tmp_path, upstream)) as opener:
        for _ in range(3):
            assert not opener.open(guard, "main").exists("pytest.ini")
    assert sum("pytest.ini" in path for path in upstream.paths()) == 1


def test_a_file_of_garbage_is_a_failure(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.repository(UPSTREAM).commit({PATH: KEPT})
    upstream.fail("/raw/", server.garbage)
    found = verdict(tmp_path, upstream)
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "is not UTF-8" in found.detail
    upstream.faults.clear()
    assert verdict(tmp_path, upstream).verdict == "present"


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        ("/pulls/", b'{"message": "maintenance"}', "expected a document with 'merged_at'"),
        ("/pulls/", b"[]", "expected a document with 'merged_at'"),
        ("/compare/", b'{"message": "maintenance"}', "expected a document with 'status'"),
        ("/compare/", b'{"status": "diverged"}', "are 'diverged', expected one to hold the other"),
        ("/compare/", b'{"status": "diverged"}', "take the ref out of the guard's `refs`"),
        ("/compare/", b'{"status": ["behind"]}', "expected one to hold the other"),
    ],
)
def test_what_is_no_answer_is_not_pending(
    tmp_path: Path, upstream: UpstreamServer, where: str, answer: bytes, message: str
) -> None:
    """Neither an answer of another shape nor a history that was written anew says that nothing has landed."""
    upstream.repository(UPSTREAM).commit({PATH: KEPT}, pull=7)
    upstream.repository(UPSTREAM).commit({PATH: GONE})
    upstream.fail(where, lambda handler: handler.send(answer))
    found = verdict(tmp_path, upstream)
    assert found.verdict == "missing"
    assert "whether owner/zoo#7 is in main could not be asked" in found.detail
    assert message in found.detail


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("owner/zoo#1", True),
        ("owner/zoo#2", True),
        ("owner/zoo#3", False),
        ("Owner/Zoo#4", False),
        ("owner/zoo#5", None),
        ("owner/other#1", None),
        ("some day", None),
    ],
)
def test_a_ref_contains_what_was_merged_before_it(
    tmp_path: Path, upstream: UpstreamServer, change: str, expected: bool | None
) -> None:
    repository = upstream.repository(UPSTREAM)
    repository.commit({PATH: "a = 1\n"}, pull=1)
    repository.commit({PATH: "a = 2\n"}, pull=2)
    repository.commit({PATH: "a = 3\n"}, pull=3, ref="next")
    repository.pulls[4] = None
    (guard,) = guards(tmp_path)
    with Opener(options(tmp_path, upstream)) as opener:
        source = opener.open(guard, "main")
        assert isinstance(source, KnowsHistory)
        assert source.contains(change) is expected
        if expected and "#" in change:
            commit = repository.pulls[int(change.rpartition("#")[2])]
            assert source.contains(f"{UPSTREAM}@{commit}") is True
