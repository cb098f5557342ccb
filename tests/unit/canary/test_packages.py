"""Released packages, through the real pip and an index on the local server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loudmerge.canary.run import Verdict, run
from loudmerge.canary.upstream import archives
from tests.support import upstream_server as server
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.index import PACKAGE, Index, use_index
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, QUICK, guards, options

LATEST = GUARD.replace('refs = ["main"]', f'refs = ["latest"]\npackage = "{PACKAGE}"')
SDIST = LATEST.replace('since = "owner/zoo#7"', 'since = "owner/zoo#7"\ndist = "sdist"')


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, upstream: UpstreamServer) -> Index:
    return use_index(monkeypatch, upstream)


def verdicts(directory: Path, text: str) -> list[Verdict]:
    http = replace(QUICK, timeout=1, tries=1)
    return list(run(guards(directory, text), sources=options(directory, http=http)))


def at(text: str, ref: str) -> str:
    return text.replace('"latest"', f'"{ref}"')


def test_latest_is_the_newest_release_and_promotes_itself(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", GONE)
    index.offer_wheel("1.1rc1", GONE)
    (found,) = verdicts(tmp_path, LATEST)
    assert (found.verdict, found.ref, found.version) == ("missing", "latest", "1.0")
    index.offer_wheel("1.10", KEPT)
    index.offer_wheel("1.9", GONE)
    (found,) = verdicts(tmp_path, LATEST)
    assert (found.verdict, found.version, found.path) == ("present", "1.10", PATH)
    index.offer_wheel("1.11", GONE, yanked=True)
    asked = len(index.downloads())
    (found,) = verdicts(tmp_path, LATEST)
    assert (found.verdict, found.version) == ("present", "1.10")
    assert len(index.downloads()) == asked  # what is in the cache is not downloaded to learn its version


def test_a_version_is_downloaded_once_and_then_needs_no_index(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    assert verdicts(tmp_path, at(LATEST, "1.0"))[0].verdict == "present"
    asked = len(index.server.asked)
    assert verdicts(tmp_path, at(LATEST, "1.0"))[0].verdict == "present"
    assert len(index.server.asked) == asked
    assert verdicts(tmp_path, LATEST)[0].version == "1.0"
    assert index.downloads().count("zoo_pkg-1.0-py3-none-any.whl") <= 2  # pip reads a wheel for its metadata


def test_an_archive_whose_hash_changed_in_the_cache_is_downloaded_again(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    verdicts(tmp_path, at(LATEST, "1.0"))
    (archive,) = tmp_path.rglob("*.whl")
    archive.write_bytes(b"spoilt")
    asked = len(index.server.asked)
    assert verdicts(tmp_path, at(LATEST, "1.0"))[0].verdict == "present"
    assert len(index.server.asked) > asked


def test_a_guard_is_pending_in_releases_before_since_version(tmp_path: Path, index: Index) -> None:
    for version, text in {"0.9": GONE, "1.0": KEPT, "1.1": GONE}.items():
        index.offer_wheel(version, text)
    text = at(LATEST, ">=0.9").replace(
        'since = "owner/zoo#7"', 'since = "owner/zoo#7"\nsince_version = "1.0"'
    )
    found = {verdict.ref: verdict.verdict for verdict in verdicts(tmp_path, text)}
    assert found == {"0.9": "pending", "1.0": "present", "1.1": "missing"}


def test_a_release_is_missing_where_nobody_says_since_when(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("0.9", GONE)
    assert verdicts(tmp_path, LATEST)[0].verdict == "missing"


def test_a_range_reads_each_release_in_it_oldest_first(tmp_path: Path, index: Index) -> None:
    for version in ("0.9", "1.2", "1.10", "2.0"):
        index.offer_wheel(version, KEPT)
    found = verdicts(tmp_path, at(LATEST, ">=1.0,<2"))
    assert [verdict.ref for verdict in found] == ["1.2", "1.10"]
    (found_none,) = verdicts(tmp_path, at(LATEST, ">=3"))
    assert found_none.verdict == "missing"
    assert "no release is in >=3" in found_none.detail


def test_a_version_that_does_not_exist_is_a_failure(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    (found,) = verdicts(tmp_path, at(LATEST, "7.7"))
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "No matching distribution found for zoo-pkg==7.7" in found.detail


def test_an_sdist_has_what_a_wheel_leaves_out(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    index.offer_sdist("1.0", {"tests/test_zoo.py": "def guarded(x):\n    assert x\n"})
    text = SDIST.replace(PATH, "tests/test_zoo.py")
    (found,) = verdicts(tmp_path, text)
    assert (found.verdict, found.version) == ("present", "1.0")
    (in_wheel,) = verdicts(tmp_path, text.replace('"sdist"', '"wheel"'))
    assert in_wheel.verdict == "missing"


def test_latest_is_the_newest_of_its_kind(tmp_path: Path, index: Index) -> None:
    index.offer_sdist("1.0", {PATH: KEPT})
    index.offer_wheel("1.1", KEPT)
    index.offer_sdist("1.2", {PATH: KEPT})
    assert verdicts(tmp_path, LATEST)[0].version == "1.1"
    index.offer_wheel("1.3", KEPT)
    assert verdicts(tmp_path, SDIST)[0].version == "1.2"


def test_a_package_without_this_kind_is_unreachable(tmp_path: Path, index: Index) -> None:
    index.offer_sdist("1.0", {PATH: KEPT})
    (found,) = verdicts(tmp_path, LATEST)
    assert (found.verdict, "pip named no wheel" in found.detail) == ("unreachable", True)


DOWN = {
    "500": server.status(500),
    "silent": server.silence,
    "cut off": server.truncated,
}


@pytest.mark.parametrize("name", DOWN)
def test_an_index_that_does_not_answer_is_unreachable(tmp_path: Path, index: Index, name: str) -> None:
    index.offer_wheel("1.0", KEPT)
    index.server.fail("/simple/", DOWN[name])
    both = verdicts(tmp_path, LATEST.replace('"latest"', '"latest", ">=1"'))
    assert [(verdict.verdict, verdict.version) for verdict in both] == [("unreachable", "")] * 2


def test_an_index_page_that_is_cut_off_names_no_latest(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    (page,) = (page for name, page in index.server.files.items() if name.startswith("simple/"))
    index.offer_wheel("2.0", GONE)
    assert verdicts(tmp_path, LATEST)[0].verdict == "missing"
    index.server.fail("/simple/", server.cut_off(page))
    (found,) = verdicts(tmp_path, LATEST)
    assert (found.verdict, found.version) == ("unreachable", "")


def test_an_old_wheel_at_hand_does_not_pass_for_the_latest(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.offer_wheel("1.0", KEPT)
    at_hand = tmp_path / "wheels"
    at_hand.mkdir()
    name = "zoo_pkg-1.0-py3-none-any.whl"
    (at_hand / name).write_bytes(index.server.files[f"archives/{name}"])
    monkeypatch.setenv("PIP_FIND_LINKS", str(at_hand))
    assert verdicts(tmp_path, LATEST)[0].verdict == "present"
    index.server.fail("/simple/", server.status(500))
    assert verdicts(tmp_path, LATEST)[0].verdict == "unreachable"


def test_a_package_the_index_does_not_know_never_passes(tmp_path: Path, index: Index) -> None:
    assert index.downloads() == []
    (found,) = verdicts(tmp_path, LATEST)
    assert found.verdict == "unreachable"
    assert "Check the name" in found.detail


def test_an_archive_that_the_hash_on_the_index_does_not_fit_never_passes(
    tmp_path: Path, index: Index
) -> None:
    index.offer_wheel("1.0", KEPT)
    index.server.files["archives/zoo_pkg-1.0-py3-none-any.whl"] += b"more"
    (found,) = verdicts(tmp_path, at(LATEST, "1.0"))
    assert (found.verdict, found.evaluated) == ("unreachable", False)


def test_a_hostile_wheel_is_refused(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT, path="../../evil.py")
    (found,) = verdicts(tmp_path, at(LATEST, "1.0"))
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "lies outside the archive" in found.detail
    assert not list(tmp_path.rglob("evil.py"))


def test_pip_may_not_write_more_than_the_limit(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.offer_wheel("1.0", KEPT + "#" * 2**20)
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 2**19)
    (found,) = verdicts(tmp_path, at(LATEST, "1.0"))
    assert found.verdict != "present"
    assert "too large" in found.detail


def test_pip_is_ended_when_it_takes_too_long(tmp_path: Path, index: Index) -> None:
    index.server.fail("/simple/", server.silence)
    http = replace(QUICK, timeout=30)
    (found,) = run(guards(tmp_path, LATEST), sources=options(tmp_path, http=http, pip_seconds=1.5))
    assert found.verdict == "unreachable"
    assert "pip was not done after 1.5 s" in found.detail
