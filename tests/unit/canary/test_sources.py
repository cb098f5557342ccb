"""Sources on this machine and what `--source` may name."""

from __future__ import annotations

import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from loudmerge.canary.run import run
from loudmerge.canary.upstream.sources import (
    SourceError,
    SourceOptions,
    local,
    parse_override,
    parse_overrides,
)
from tests.support import upstream_server as server
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, TOKEN, UPSTREAM, guards, options, verdict


def tree(root: Path, text: str = KEPT) -> Path:
    place = root / PATH
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return root


def git(place: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, "-C", str(place), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def clone(place: Path) -> Path:
    """A clone with a commit before the change #7, the change, and one after it, on main."""
    place.mkdir()
    git(place, "init", "-q", "-b", "main")
    subjects = {"First (#70)": GONE, "Guard it (#7)": KEPT, "Go on, see #7": KEPT + "x = 1\n"}
    for subject, text in subjects.items():
        tree(place, text)
        git(place, "add", ".")
        git(place, "commit", "-q", "-m", subject)
    return place


def test_a_directory_is_read_and_named(tmp_path: Path, upstream: UpstreamServer) -> None:
    place = tree(tmp_path / "checkout")
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)})
    assert (found.verdict, found.version, found.ref) == ("present", "directory checkout", "main")
    assert upstream.asked == []


def test_a_clone_is_named_by_its_commit_and_whether_files_differ(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    place = clone(tmp_path / "clone")
    head = git(place, "rev-parse", "HEAD")
    assert verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)}).version == head
    tree(place, GONE)
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)})
    assert (found.verdict, found.version) == ("missing", f"{head}-dirty")


def test_a_clone_is_pending_before_the_change_and_missing_after(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    place = clone(tmp_path / "clone")
    verdicts = {}
    for steps_back in (2, 1, 0):
        git(place, "checkout", "-q", f"main~{steps_back}")
        verdicts[steps_back] = verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)}).verdict
    assert verdicts == {2: "pending", 1: "present", 0: "present"}
    git(place, "checkout", "-q", "main")
    tree(place, GONE)
    git(place, "commit", "-q", "-am", "Tidy up")
    assert verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)}).verdict == "missing"


def test_a_clone_that_does_not_know_the_change_does_not_excuse_a_guard(
    tmp_path: Path, upstream: UpstreamServer
) -> None:
    place = clone(tmp_path / "clone")
    git(place, "checkout", "-q", "main~2")
    git(place, "branch", "-q", "-D", "main")
    assert verdict(tmp_path, upstream, overrides={UPSTREAM: str(place)}).verdict == "missing"
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{place}", str(shallow))
    assert verdict(tmp_path, upstream, overrides={UPSTREAM: str(shallow)}).verdict == "missing"


def test_a_wheel_is_named_by_the_version_in_it(tmp_path: Path, upstream: UpstreamServer) -> None:
    wheel = tmp_path / "zoo-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(PATH, KEPT)
        archive.writestr("zoo-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: zoo\nVersion: 1.2\n")
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: str(wheel)})
    assert (found.verdict, found.version) == ("present", "1.2")


def test_an_archive_without_metadata_is_named_by_its_hash(tmp_path: Path, upstream: UpstreamServer) -> None:
    archive = tmp_path / "zoo.tar.gz"
    archive.write_bytes(server.tarball({f"zoo-main/{PATH}": KEPT}))
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: str(archive)})
    assert found.verdict == "present"
    assert found.version.startswith("sha256:")


# The first has a time in it: it is named, so that every worker of a parallel run collects the same test.
@pytest.mark.parametrize(
    "content", [server.tarball({"../evil.py": ""}), b"garbage"], ids=["outside", "garbage"]
)
def test_a_bad_archive_is_a_failure(tmp_path: Path, upstream: UpstreamServer, content: bytes) -> None:
    archive = tmp_path / "zoo.tar.gz"
    archive.write_bytes(content)
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: str(archive)})
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "cannot be read" in found.detail


@pytest.mark.parametrize("layout", [f"{UPSTREAM}/main/{PATH}", f"main/{PATH}", PATH])
def test_another_base_url_serves_files_by_ref_or_without(
    tmp_path: Path, upstream: UpstreamServer, layout: str
) -> None:
    upstream.files[f"mirror/{layout}"] = KEPT.encode()
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: f"{upstream.url}/files/mirror"})
    assert found.verdict == "present"
    assert found.version.startswith("sha256:")


def test_another_base_url_gets_no_token(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.files[PATH] = KEPT.encode()
    verdict(tmp_path, upstream, overrides={UPSTREAM: f"{upstream.url}/files"}, token=TOKEN)
    assert all("Authorization" not in asked.headers for asked in upstream.asked)


def test_an_archive_at_a_url(tmp_path: Path, upstream: UpstreamServer) -> None:
    upstream.files["zoo.tar.gz"] = server.tarball({f"zoo-1/{PATH}": KEPT, "zoo-1/PKG-INFO": "Version: 1\n"})
    url = f"{upstream.url}/files/zoo.tar.gz"
    found = verdict(tmp_path, upstream, overrides={UPSTREAM: url})
    assert (found.verdict, found.version) == ("present", "1")
    upstream.fail("zoo.tar.gz", server.garbage)
    assert verdict(tmp_path, upstream, overrides={UPSTREAM: url}).verdict == "unreachable"


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path) -> None:
    text = (
        GUARD.replace('upstream = "owner/zoo"', 'package = "Click"')
        .replace('"main"', '"installed"')
        .replace(PATH, "click/core.py")
        .replace('name = "guarded"', 'name = "Command"')
    )
    (found,) = run(guards(tmp_path, text), sources=options(tmp_path))
    assert (found.verdict, found.version) == ("present", metadata.version("click"))
    missing = text.replace('"Click"', '"surely-not-installed"')
    (found,) = run(guards(tmp_path, missing), sources=options(tmp_path))
    assert found.verdict == "missing"
    assert "surely-not-installed: not installed here" in found.detail


def test_a_source_replaces_the_installed_package_too(tmp_path: Path) -> None:
    text = GUARD.replace('upstream = "owner/zoo"', 'package = "click"').replace('"main"', '"installed"')
    place = {"click": str(tree(tmp_path / "checkout"))}
    (found,) = run(guards(tmp_path, text), sources=options(tmp_path, overrides=place))
    assert (found.verdict, found.version) == ("present", "directory checkout")


def test_a_path_that_leads_out_of_the_source_is_refused(tmp_path: Path) -> None:
    place = tree(tmp_path / "checkout")
    (tmp_path / "secret.py").write_text("")
    (place / "link.py").symlink_to(tmp_path / "secret.py")
    source = local("zoo", "main", place, SourceOptions(cache=tmp_path))
    for path in ("../secret.py", "link.py"):
        with pytest.raises(SourceError, match="leads out of the source"):
            source.read(path)
    with pytest.raises(FileNotFoundError, match="has no file zoo"):
        source.read("zoo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zoo", "expected UPSTREAM="),
        ("=dir", "expected UPSTREAM="),
        ("zoo=", "expected UPSTREAM="),
        ("zoo=/no/such/place", "no such directory or file"),
        (f"zoo={__file__}", "expected a directory or one of .whl"),
    ],
)
def test_what_source_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_override(text)


def test_a_source_that_no_guard_reads_is_a_slip(tmp_path: Path) -> None:
    assert parse_overrides([f"Unsloth-Zoo={tmp_path}"], {"unsloth_zoo"}) == {"Unsloth-Zoo": str(tmp_path)}
    with pytest.raises(ValueError, match="no guard reads unslot, expected one of unsloth"):
        parse_overrides([f"unslot={tmp_path}"], {"unsloth"})
    with pytest.raises(ValueError, match="unsloth-zoo: found several places, expected one"):
        parse_overrides([f"Unsloth-Zoo={tmp_path}", f"unsloth_zoo={tmp_path}"], {"unsloth_zoo"})
