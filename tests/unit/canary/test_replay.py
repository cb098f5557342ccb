"""Guards over upstream's past: a clone commit by commit, and a package release by release."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from loudmerge.canary.replay import Replay, main, replay_clone, replay_releases
from loudmerge.canary.upstream.archives import SourceError
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.index import PACKAGE, use_index
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, UPSTREAM, guard_file, guards, options

HOLLOW = "def guarded(x):\n    pass\n"
OTHER = "zoo/other.py"


def git(place: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *who, "-C", str(place), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(place: Path, subject: str, files: Mapping[str, str | None]) -> str:
    """A commit that writes files, or removes those that are None; its id."""
    for path, text in files.items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
    git(place, "add", "-A")
    git(place, "commit", "-q", "-m", subject)
    return git(place, "rev-parse", "HEAD")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """An empty clone of owner/zoo, on main."""
    place = tmp_path / "clone"
    place.mkdir()
    git(place, "init", "-q", "-b", "main")
    git(place, "remote", "add", "origin", f"https://github.invalid/{UPSTREAM}.git")
    return place


def turns(found: Replay) -> list[tuple[str, str, str]]:
    """(subject of the commit, or version, verdict before, verdict after)."""
    return [(turn.step.subject or turn.step.name, turn.before, turn.after) for turn in found.turns]


def test_pending_before_the_change_present_from_there_on_and_nothing_in_between(
    tmp_path: Path, clone: Path
) -> None:
    commit(clone, "First (#1)", {PATH: GONE})
    commit(clone, "Refactor (#2)", {PATH: GONE + "y = 2\n"})
    landed = commit(clone, "Guard it (#7)", {PATH: KEPT})
    for number in range(8, 12):
        commit(clone, f"Work, see #7 (#{number})", {PATH: KEPT + f"x = {number}\n"})
    found = replay_clone(clone, guards(tmp_path))
    assert turns(found) == [("Guard it (#7)", "pending", "present")]
    assert found.turns[0].step.name == landed
    assert [verdict.verdict for verdict in found.verdicts] == ["pending"]
    assert len(found.steps) == found.evaluations == 7


def test_a_verdict_that_changes_and_changes_back_is_seen(tmp_path: Path, clone: Path) -> None:
    commit(clone, "Guard it (#7)", {PATH: KEPT})
    commit(clone, "Lose it (#8)", {PATH: HOLLOW})
    commit(clone, "Get it back (#9)", {PATH: KEPT})
    commit(clone, "Move it (#10)", {PATH: None, OTHER: KEPT})
    found = replay_clone(clone, guards(tmp_path))
    assert turns(found) == [
        ("Lose it (#8)", "present", "missing"),
        ("Get it back (#9)", "missing", "present"),
        ("Move it (#10)", "present", "missing"),
    ]
    assert "no file zoo/saving.py" in found.turns[-1].detail
    assert found.evaluations == 2, "the file that came back is judged once"


def test_commits_that_touch_no_guarded_file_are_no_steps(tmp_path: Path, clone: Path) -> None:
    commit(clone, "Guard it (#7)", {PATH: KEPT})
    for number in range(3):
        commit(clone, f"Elsewhere {number}", {OTHER: f"x = {number}\n"})
    last = commit(clone, "Lose it", {PATH: GONE})
    found = replay_clone(clone, guards(tmp_path))
    assert [step.subject for step in found.steps] == ["Guard it (#7)", "Lose it"]
    assert found.steps[-1].name == last


def test_a_guard_is_owed_from_the_commit_of_its_change_even_where_that_touches_another_file(
    tmp_path: Path, clone: Path
) -> None:
    commit(clone, "First", {PATH: GONE})
    commit(clone, "Guard something else (#7)", {OTHER: KEPT})
    commit(clone, "Go on", {PATH: GONE + "x = 1\n"})
    found = replay_clone(clone, guards(tmp_path))
    assert turns(found) == [("Guard something else (#7)", "pending", "missing")]


def test_a_merged_branch_is_one_step(tmp_path: Path, clone: Path) -> None:
    commit(clone, "First", {PATH: GONE})
    git(clone, "checkout", "-q", "-b", "work")
    commit(clone, "On the way", {PATH: HOLLOW})
    commit(clone, "Done", {PATH: KEPT})
    git(clone, "checkout", "-q", "main")
    git(clone, "merge", "-q", "--no-ff", "-m", "Merge pull request #7 from work", "work")
    found = replay_clone(clone, guards(tmp_path))
    assert turns(found) == [("Merge pull request #7 from work", "pending", "present")]
    assert len(found.steps) == 2


def test_first_and_last_bound_the_replay_and_first_is_its_start(tmp_path: Path, clone: Path) -> None:
    commit(clone, "Guard it (#7)", {PATH: KEPT})
    commit(clone, "Lose it", {PATH: GONE})
    start = commit(clone, "Elsewhere", {OTHER: ""})
    commit(clone, "Get it back", {PATH: KEPT})
    end = commit(clone, "Elsewhere again", {OTHER: "x = 1\n"})
    commit(clone, "Lose it again", {PATH: GONE})
    found = replay_clone(clone, guards(tmp_path), first=start, last=end)
    assert turns(found) == [("Get it back", "missing", "present")]
    assert (found.steps[0].name, found.verdicts[0].verdict) == (start, "missing")


def test_the_first_path_that_a_commit_has_is_read(tmp_path: Path, clone: Path) -> None:
    commit(clone, "Guard it (#7)", {PATH: KEPT})
    commit(clone, "Move it", {PATH: None, OTHER: KEPT})
    text = GUARD.replace(f'path = "{PATH}"', f'paths = ["{PATH}", "{OTHER}"]')
    found = replay_clone(clone, guards(tmp_path, text))
    assert found.turns == ()
    assert len(found.steps) == 2


def test_a_file_that_cannot_be_read_is_a_failure_at_its_commit(tmp_path: Path, clone: Path) -> None:
    commit(clone, "Guard it (#7)", {PATH: KEPT})
    (clone / PATH).write_bytes(b"\xff\xfe\xff")
    git(clone, "commit", "-q", "-am", "Spoil it")
    commit(clone, "Break it", {PATH: "def guarded(:\n"})
    found = replay_clone(clone, guards(tmp_path))
    assert turns(found) == [("Spoil it", "present", "missing")]
    assert "not UTF-8" in found.turns[0].detail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": "no-such"}, "rev-parse"),
        ({"last": "--all"}, "rev-parse"),
        ({"upstream": "owner/other"}, "no guard reads owner/other"),
    ],
)
def test_what_cannot_be_replayed(
    tmp_path: Path, clone: Path, arguments: dict[str, str], message: str
) -> None:
    commit(clone, "First", {PATH: KEPT})
    with pytest.raises(SourceError, match=message):
        replay_clone(clone, guards(tmp_path), **arguments)


def test_a_clone_with_a_part_of_its_history_is_refused(tmp_path: Path, clone: Path) -> None:
    commit(clone, "First", {PATH: KEPT})
    commit(clone, "Second", {PATH: GONE})
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{clone}", str(shallow))
    with pytest.raises(SourceError, match="shallow"):
        replay_clone(shallow, guards(tmp_path), upstream=UPSTREAM)
    (tmp_path / "plain").mkdir()
    with pytest.raises(SourceError, match="git"):
        replay_clone(tmp_path / "plain", guards(tmp_path), upstream=UPSTREAM)


def test_a_clone_without_an_origin_needs_the_upstreams_name(tmp_path: Path, clone: Path) -> None:
    commit(clone, "First", {PATH: KEPT})
    git(clone, "remote", "remove", "origin")
    with pytest.raises(SourceError, match="upstream must be given"):
        replay_clone(clone, guards(tmp_path))
    assert len(replay_clone(clone, guards(tmp_path), upstream="Owner/Zoo").steps) == 1


def test_no_commit_touches_the_guards_files(tmp_path: Path, clone: Path) -> None:
    commit(clone, "First", {OTHER: KEPT})
    with pytest.raises(SourceError, match=r"none of 1 commits touches zoo/saving\.py"):
        replay_clone(clone, guards(tmp_path))


def package_guard(since_version: str) -> str:
    named = f'package = "{PACKAGE}"\nsince_version = "{since_version}"'
    return GUARD.replace('upstream = "owner/zoo"', named).replace('"main"', '"latest"')


def test_releases_are_replayed_in_their_order(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = use_index(monkeypatch, upstream)
    for version, text in {"0.10.0": HOLLOW, "0.2.0": GONE, "0.9.0": KEPT, "0.9.1": KEPT, "1.0": KEPT}.items():
        index.offer_wheel(version, text)
    found = replay_releases(
        PACKAGE, guards(tmp_path, package_guard("0.9.0")), options(tmp_path), first="0.2.0", last="0.10.0"
    )
    assert [step.name for step in found.steps] == ["0.2.0", "0.9.0", "0.9.1", "0.10.0"]
    assert turns(found) == [("0.9.0", "pending", "present"), ("0.10.0", "present", "missing")]
    assert found.evaluations == 3


def test_a_release_that_cannot_be_downloaded_is_unreachable_not_missing(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = use_index(monkeypatch, upstream)
    index.offer_wheel("1.0", KEPT)
    index.offer_wheel("1.1", KEPT)
    del upstream.files["archives/zoo_pkg-1.1-py3-none-any.whl"]
    found = replay_releases(PACKAGE, guards(tmp_path, package_guard("1.0")), options(tmp_path))
    assert turns(found) == [("1.1", "present", "unreachable")]
    assert found.turns[0].detail


def test_a_range_without_a_release_is_no_replay(
    tmp_path: Path, upstream: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_index(monkeypatch, upstream).offer_wheel("1.0", KEPT)
    with pytest.raises(SourceError, match="nothing could be judged: "):
        replay_releases(
            PACKAGE, guards(tmp_path, package_guard("1.0")), options(tmp_path), first="3.0", last="2.0"
        )


def test_a_package_that_no_guard_reads(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no guard reads the package other"):
        replay_releases("other", guards(tmp_path), options(tmp_path))


def test_the_command_prints_the_turns_with_their_commits(tmp_path: Path, clone: Path) -> None:
    commit(clone, "First", {PATH: GONE})
    landed = commit(clone, "Guard it (#7)", {PATH: KEPT})
    where = ["--guards", str(guard_file(tmp_path / "guards"))]
    said = CliRunner().invoke(main, [str(clone), *where])
    date = git(clone, "log", "-1", "--format=%cs")
    assert said.exit_code == 0, said.output
    first, step, turn, tally = said.output.splitlines()
    assert first.endswith("First: 1 pending")
    assert step == f"{landed[:12]} {date} Guard it (#7)"
    assert turn == "    zoo-guarded: pending -> present: guarded is defined"
    assert tally == f"replay: 2 steps to {landed[:12]}, 1 guard, 2 files judged, 1 turn"
    document = json.loads(CliRunner().invoke(main, [str(clone), *where, "--json"]).output)
    assert document["first"] == {"zoo-guarded": "pending"}
    assert document["turns"][0]["step"] == {"name": landed, "date": date, "subject": "Guard it (#7)"}
    assert [document["turns"][0][name] for name in ("before", "after")] == ["pending", "present"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected a clone or --package"),
        (["--guard", "no-such", "--package", "zoo"], 1, "found no guard no-such"),
        (["--package", "other"], 1, "no guard reads the package other"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    where = ["--guards", str(guard_file(tmp_path / "guards"))]
    said = CliRunner().invoke(main, [*where, *arguments])
    assert (said.exit_code, message in said.output) == (code, True), said.output
