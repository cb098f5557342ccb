"""`loudmerge canary`: exit codes, and the one JSON document."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import upstream_server as server
from tests.support.command import Ended, run_inside
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, UPSTREAM, guard_file, later


class Command:
    """The command, with the local server for GitHub."""

    def __init__(
        self,
        place: Path,
        upstream: UpstreamServer,
        patched: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.place, self.upstream, self.capsys = place, upstream, capsys
        self.repository = upstream.repository(UPSTREAM)
        patched.chdir(place)
        patched.setenv("LOUDMERGE_GITHUB_API_URL", upstream.api)
        patched.setenv("LOUDMERGE_GITHUB_RAW_URL", upstream.raw)
        patched.setenv("LOUDMERGE_CANARY_CACHE", str(place / "cache"))
        guard_file(place / "canary" / "guards")

    def __call__(self, *arguments: str) -> Ended:
        return run_inside(self.capsys, "canary", *arguments)


@pytest.fixture
def canary(
    tmp_path: Path,
    upstream: UpstreamServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    return Command(tmp_path, upstream, monkeypatch, capsys)


def test_all_present_is_0_and_the_summary_ends_with_the_count(canary: Command) -> None:
    canary.repository.commit({PATH: KEPT})
    ended = canary()
    assert ended.code == 0
    assert ended.stdout.splitlines()[-1].startswith("canary: 1 of 1 guards evaluated (1 present")


def test_missing_is_4_and_the_document_is_the_contracts(canary: Command) -> None:
    commit = canary.repository.commit({PATH: GONE}, pull=7)
    ended = canary("--json")
    assert ended.code == 4
    (verdict,) = ended.document["verdicts"]
    assert ended.document["schema"] == 1
    expected = {
        "guard": "zoo-guarded",
        "upstream": UPSTREAM,
        "ref": "main",
        "path": PATH,
        "verdict": "missing",
    }
    assert expected.items() <= verdict.items()
    assert verdict["version"] == commit
    assert isinstance(verdict["line"], int)


def test_pending_is_0(canary: Command) -> None:
    canary.repository.commit({PATH: GONE})
    canary.repository.pulls[7] = None
    ended = canary("--json")
    assert (ended.code, ended.document["verdicts"][0]["verdict"]) == (0, "pending")


def test_unreachable_is_5_when_strict_and_never_counted_as_a_pass(canary: Command) -> None:
    canary.upstream.fail("/commits/", server.rate_limited(403, reset_in=1000))
    ended = canary("--json")
    assert (ended.code, ended.document["evaluated"]) == (0, 0)
    assert ended.document["verdicts"][0]["verdict"] == "unreachable"
    assert canary("--strict").code == 5


def test_stale_is_5_without_strict(canary: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    canary.repository.commit({PATH: KEPT})
    assert canary().code == 0
    canary.upstream.fail("/commits/", server.status(401))
    with later(monkeypatch, 49):
        assert canary().code == 5


def test_missing_weighs_more_than_unreachable(canary: Command) -> None:
    guard_file(canary.place / "canary" / "guards", GUARD.replace('"main"', '"main", "v1"'))
    canary.repository.commit({PATH: GONE})
    canary.upstream.fail("/commits/v1", server.status(401))
    assert canary("--strict").code == 4


@pytest.mark.parametrize("place", ["checkout", "checkout.tar.gz", "URL"])
def test_source_reads_from_elsewhere(canary: Command, place: str) -> None:
    checkout = canary.place / "checkout" / PATH
    checkout.parent.mkdir(parents=True)
    checkout.write_text(KEPT)
    (canary.place / "checkout.tar.gz").write_bytes(server.tarball({PATH: KEPT, "setup.py": ""}))
    canary.upstream.files[PATH] = KEPT.encode()
    named = f"{canary.upstream.url}/files" if place == "URL" else place
    ended = canary("--json", "--source", f"{UPSTREAM}={named}")
    assert (ended.code, ended.document["verdicts"][0]["verdict"]) == (0, "present")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guards", "none"], "found no guard file"),
        (["--source", f"{UPSTREAM}=nowhere"], "no such directory or file"),
        (["--source", "owner/zo=canary"], "no guard reads owner/zo"),
    ],
)
def test_wrong_arguments_are_2(canary: Command, arguments: list[str], message: str) -> None:
    ended = canary(*arguments)
    assert ended.code == 2
    assert message in ended.stderr.replace("\n", " ")
