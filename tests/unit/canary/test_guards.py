"""Guard files: what is read from them, and what is refused with the file, the guard and the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.canary import guards as module
from loudmerge.canary.guards import GuardError, default_directory, is_package_ref, load_guards
from tests.unit.canary.world import GUARD, guard_file

SINCE = 'since = "owner/zoo#7"'
ODD = ("#7", "owner/zoo#seven", "owner/zoo@main", "https://github.com/owner/zoo/pull/7")


def test_a_guard_is_read_with_its_file_and_line(tmp_path: Path) -> None:
    (guard,) = load_guards(guard_file(tmp_path, "# a comment\n" + GUARD))
    assert (guard.id, guard.upstream, guard.package) == ("zoo-guarded", "owner/zoo", None)
    assert (guard.refs, guard.paths, guard.since) == (("main",), ("zoo/saving.py",), "owner/zoo#7")
    assert dict(guard.rule) == {"kind": "symbol", "name": "guarded"}
    assert (guard.file, guard.line) == (tmp_path / "zoo.toml", 3)


def test_guards_come_by_file_then_in_the_files_order(tmp_path: Path) -> None:
    second = GUARD.replace("zoo-guarded", "a-second")
    guard_file(tmp_path, GUARD + second, "b.toml")
    guard_file(tmp_path, GUARD.replace("zoo-guarded", "z-first"), "a.toml")
    assert [guard.id for guard in load_guards(tmp_path)] == ["z-first", "zoo-guarded", "a-second"]


@pytest.mark.parametrize(
    ("found", "replaced", "message"),
    [
        ('why = "the test needs it"', "", "guard zoo-guarded: field why is missing"),
        ('why = "the test needs it"', 'why = " "', "field why: found ' ', expected a text"),
        ('id = "zoo-guarded"', "", "guard number 1: field id is missing"),
        ('id = "zoo-guarded"', 'id = "Zoo Guard"', "field id: found 'Zoo Guard', expected small letters"),
        (
            'since = "owner/zoo#7"',
            'since = "owner/zoo#7"\nrefz = 1',
            "field refz is unknown, expected one of dist",
        ),
        ('refs = ["main"]', "refs = []", r"field refs: found \[\], expected a list of texts"),
        ('refs = ["main"]', 'refs = "main"', "field refs: found 'main', expected a list"),
        ('refs = ["main"]', 'refs = ["main", "main"]', "expected each once"),
        ('refs = ["main"]', 'refs = ["../main"]', "found '../main', expected a branch, tag or commit"),
        ('refs = ["main"]', 'refs = ["latest"]', "'latest' is a release, expected a field package"),
        ('path = "zoo/saving.py"', 'path = "/etc/passwd"', "found '/etc/passwd', expected a path inside"),
        ('path = "zoo/saving.py"', 'paths = ["a.py", "../b.py"]', "found '../b.py', expected a path inside"),
        ('path = "zoo/saving.py"', 'path = "a.py"\npaths = ["b.py"]', "fields path, paths: expected one"),
        ('path = "zoo/saving.py"', "", "fields path, paths: expected one"),
        ('upstream = "owner/zoo"', "", "fields upstream, package: expected at least one"),
        ('upstream = "owner/zoo"', 'package = "zoo"', "found 'main', expected latest, installed, a version"),
        ('upstream = "owner/zoo"', 'upstream = "zoo"', "found 'zoo', expected owner/name"),
        ('since = "owner/zoo#7"', 'since = "x"\nsince_version = "soon"', "found 'soon', expected a version"),
        (
            'since = "owner/zoo#7"',
            'since = "x"\ndist = "egg"',
            "field dist: found 'egg', expected wheel or sdist",
        ),
        ('kind = "symbol"', 'kind = "grep"', "field rule: .*'grep'"),
        ('name = "guarded"', 'nome = "guarded"', "field rule: .*'nome'"),
        (
            'rule = { kind = "symbol", name = "guarded" }',
            'rule = "symbol"',
            "field rule: found str, expected a table",
        ),
        *((SINCE, f'since = "{text}"', "field since: found .*expected owner/name#NUMBER") for text in ODD),
        ("[[guard]]", "[[guards]]", "found guards, expected only"),
        ("[[guard]]", "[guard]", "found no .*guard"),
        ("[[guard]]", "[[guard", "not TOML"),
    ],
)
def test_a_guard_that_cannot_be_checked_is_refused(
    tmp_path: Path, found: str, replaced: str, message: str
) -> None:
    assert found in GUARD
    with pytest.raises(GuardError, match=message) as error:
        load_guards(guard_file(tmp_path, GUARD.replace(found, replaced)))
    assert "zoo.toml" in str(error.value)


def test_a_file_or_directory_without_guards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="found no guard file"):
        load_guards(tmp_path)
    with pytest.raises(GuardError, match="found no guard file"):
        load_guards(tmp_path / "none")
    with pytest.raises(GuardError, match=r"empty\.toml: found no .*guard"):
        load_guards(guard_file(tmp_path, "# nothing yet\n", "empty.toml"))


def test_all_problems_of_all_files_are_told_together(tmp_path: Path) -> None:
    guard_file(tmp_path, GUARD.replace('why = "the test needs it"', ""), "a.toml")
    guard_file(tmp_path, GUARD + GUARD, "b.toml")
    with pytest.raises(
        GuardError, match=r"(?s)a\.toml.*why is missing.*zoo-guarded: found 2 guards with this id"
    ):
        load_guards(tmp_path)


@pytest.mark.parametrize("ref", ["latest", "installed", "0.19.1", "2026.10.9", ">=0.18,<0.20", "5.0.0rc1"])
def test_refs_of_a_package(ref: str) -> None:
    assert is_package_ref(ref)


@pytest.mark.parametrize("ref", ["main", "v0.19.1", "a" * 40, "release/0.19", ""])
def test_refs_of_a_repository(ref: str) -> None:
    assert not is_package_ref(ref)


def test_a_project_without_guards_gets_those_that_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(module, "SHIPPED", shipped)
    assert default_directory(tmp_path) == tmp_path / "canary" / "guards"
    shipped.mkdir()
    assert default_directory(tmp_path) == shipped
    guard_file(tmp_path / "canary" / "guards")
    assert default_directory(tmp_path) == tmp_path / "canary" / "guards"
