"""Refs that stand for several releases, and releases that are read without building anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.specifiers import InvalidSpecifier

from loudmerge.canary.guards import GuardError, is_package_ref, is_range, specifiers
from loudmerge.canary.run import run
from loudmerge.canary.upstream.packages import package_source, releases
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.index import PACKAGE, Index, use_index
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, guards, options


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, upstream: UpstreamServer) -> Index:
    return use_index(monkeypatch, upstream)


def ranged(ref: str, **more: str) -> str:
    """The guard over the releases of the package on the local index."""
    lines = [f'{name} = "{value}"' for name, value in more.items()]
    text = GUARD.replace('upstream = "owner/zoo"', "\n".join([f'package = "{PACKAGE}"', *lines]))
    return text.replace('"main"', f'"{ref}"')


@pytest.mark.parametrize(
    ("ref", "inside", "outside"),
    [
        ("0.18.1..0.21.2", ["0.18.1", "0.19.0", "0.21.2", "0.19.0.post1"], ["0.18.0", "0.21.3", "0.20.0rc1"]),
        ("0.18.1..", ["0.18.1", "99"], ["0.18", "1.0.dev1"]),
        ("..2026.5.1", ["2026.5.1", "1"], ["2026.5.2", "2026.5.1rc1"]),
        ("0.19.0..0.19.0", ["0.19.0"], ["0.19.1"]),
        ("1.0rc1..1.0", ["1.0"], ["1.0rc1", "1.0rc2"]),
        (">=0.18,<0.20", ["0.18", "0.19.1"], ["0.20", "0.19.0rc1"]),
    ],
)
def test_a_range_holds_its_ends_and_no_prerelease(ref: str, inside: list[str], outside: list[str]) -> None:
    assert is_range(ref)
    assert is_package_ref(ref)
    assert [one for one in inside + outside if specifiers(ref).contains(one)] == inside


@pytest.mark.parametrize("ref", ["", "..", "main..dev", "main", "v1..v2", "1.0...2.0", "2.0..1.0", "0.19.1"])
def test_what_is_no_range(ref: str) -> None:
    assert not is_range(ref)


def test_a_range_that_runs_backwards_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpecifier, match="first release is after its last"):
        specifiers("2.0..1.0")
    with pytest.raises(GuardError, match=r"found '2\.0\.\.1\.0', expected"):
        guards(tmp_path, ranged("2.0..1.0"))


def test_each_release_in_a_range_has_a_verdict_that_names_it(tmp_path: Path, index: Index) -> None:
    for version, text in {"0.9": KEPT, "1.0": GONE, "1.5": KEPT, "2.0rc1": GONE, "2.0": GONE}.items():
        index.offer_wheel(version, text)
    found = run(guards(tmp_path, ranged("1.0..2.0", since_version="1.5")), sources=options(tmp_path))
    assert [(one.version, one.ref, one.verdict) for one in found] == [
        ("1.0", "1.0", "pending"),
        ("1.5", "1.5", "present"),
        ("2.0", "2.0", "missing"),
    ]
    assert all(one.evaluated for one in found)


def test_a_range_without_a_release_is_a_failure(tmp_path: Path, index: Index) -> None:
    index.offer_wheel("1.0", KEPT)
    (found,) = run(guards(tmp_path, ranged("1.1..")), sources=options(tmp_path))
    assert (found.verdict, found.evaluated) == ("missing", False)
    assert "no release is in 1.1.." in found.detail


def test_a_range_holds_only_releases_of_the_kind_that_is_read(tmp_path: Path, index: Index) -> None:
    index.offer_sdist("1.0", {PATH: KEPT})
    index.offer_wheel("1.1", KEPT)
    index.offer_wheel("1.2", KEPT)
    assert releases(PACKAGE, "1.0..", "wheel", options(tmp_path)) == ("1.1", "1.2")
    assert releases(PACKAGE, "1.0..", "sdist", options(tmp_path)) == ("1.0",)


def test_reading_an_sdist_runs_no_build_backend_and_fetches_no_requirement(
    tmp_path: Path, index: Index
) -> None:
    mark = tmp_path / "ran"
    hostile = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('')\nraise SystemExit(1)\n"
    project = '[build-system]\nrequires = ["torch"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    index.offer_sdist(
        "1.0", {PATH: KEPT, "backend.py": hostile, "setup.py": hostile, "pyproject.toml": project}
    )
    source = package_source("zoo", PACKAGE, "1.0", "sdist", options(tmp_path))
    assert (source.version, source.read(PATH)) == ("1.0", KEPT)
    assert not mark.exists()
    assert index.downloads() == ["zoo_pkg-1.0.tar.gz"]
