"""Archives that would do harm are refused, and leave nothing outside their target."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loudmerge.canary.upstream import archives
from loudmerge.canary.upstream.archives import BrokenArchive, SourceError, unpack

TEXT = b"x = 1\n"


def tar(place: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(place, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


def file(name: str, content: bytes = TEXT) -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def zipped(place: Path, files: dict[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return place


def tree(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() or path.is_symlink()
    }


def test_an_sdist_loses_its_top_directory_and_a_wheel_does_not(tmp_path: Path) -> None:
    unpack(tar(tmp_path / "zoo-1.tar.gz", file("zoo-1/zoo/a.py"), file("zoo-1/PKG-INFO")), tmp_path / "sdist")
    unpack(zipped(tmp_path / "zoo-1.whl", {"zoo/a.py": TEXT}), tmp_path / "wheel")
    assert tree(tmp_path / "sdist") == {"zoo/a.py", "PKG-INFO"}
    assert tree(tmp_path / "wheel") == {"zoo/a.py"}
    assert (tmp_path / "wheel/zoo/a.py").read_bytes() == TEXT


def outside(name: str) -> Callable[[Path], Path]:
    return lambda place: tar(place / "a.tar.gz", file("top/ok.py"), file(name))


def holding(*members: tuple[tarfile.TarInfo, bytes]) -> Callable[[Path], Path]:
    return lambda place: tar(place / "a.tar.gz", *members)


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent": (outside("../evil.py"), "lies outside"),
    "deep parent": (outside("top/a/../../../evil.py"), "lies outside"),
    "absolute": (outside("/evil-loudmerge.py"), "lies outside"),
    "backslash": (outside("..\\evil.py"), "lies outside"),
    "drive": (outside("C:/evil.py"), "lies outside"),
    "symlink out": (holding(special("top/a", tarfile.SYMTYPE, "../../evil")), "lies outside"),
    "symlink absolute": (holding(special("top/a", tarfile.SYMTYPE, "/etc/passwd")), "lies outside"),
    "hard link out": (holding(special("top/a", tarfile.LNKTYPE, "../evil")), "lies outside"),
    "device": (holding(special("top/a", tarfile.CHRTYPE)), "neither file nor directory"),
    "pipe": (holding(special("top/a", tarfile.FIFOTYPE)), "neither file nor directory"),
    "file below a file": (holding(file("top/a"), file("top/a/b")), "names that no directory can hold"),
    "name too long": (holding(file("top/" + "a" * 300)), "names that no directory can hold"),
    "zip parent": (lambda place: zipped(place / "a.zip", {"../evil.py": TEXT}), "lies outside"),
    "zip absolute": (lambda place: zipped(place / "a.zip", {"/evil-loudmerge.py": TEXT}), "lies outside"),
    "zip link": (lambda place: zipped(place / "a.zip", {"a": b"/etc/passwd"}, 0o120777), "is a link"),
    "tar bomb": (holding(file("top/a", bytes(2**25))), "a bomb"),
    "zip bomb": (lambda place: zipped(place / "a.zip", {"a": bytes(2**25)}), "a bomb"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    place = tmp_path / "place"
    place.mkdir()
    archive = make(place)
    before = tree(tmp_path)
    with pytest.raises(SourceError, match=message):
        unpack(archive, place / "target")
    assert tree(tmp_path) == before
    assert not (place / "target").exists()
    assert not Path("/evil-loudmerge.py").exists()


def test_a_link_inside_is_left_out_and_nothing_is_written_through_it(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar.gz",
        file("top/AGENTS.md"),
        special("top/CLAUDE.md", tarfile.SYMTYPE, "AGENTS.md"),
        special("top/dir", tarfile.SYMTYPE, "."),
        file("top/dir/b.py"),
    )
    unpack(archive, tmp_path / "target")
    assert tree(tmp_path / "target") == {"AGENTS.md", "dir/b.py"}
    assert not (tmp_path / "target/dir").is_symlink()


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"<html>no</html>", bytes(range(256)) * 9, b"\x1f\x8b" + bytes(40)])
def test_what_is_no_archive_is_broken(tmp_path: Path, name: str, content: bytes) -> None:
    place = tmp_path / name
    place.write_bytes(content)
    with pytest.raises(BrokenArchive, match="not an archive, or not all of it"):
        unpack(place, tmp_path / "target")


def test_a_file_that_was_cleaned_away_comes_back(tmp_path: Path) -> None:
    archive, target = tar(tmp_path / "a.tar.gz", file("top/a.py"), file("top/b/c.py")), tmp_path / "target"
    unpack(archive, target)
    (target / "a.py").write_text("kept, as nothing is missing")
    unpack(archive, target)
    assert (target / "a.py").read_text().startswith("kept")
    (target / "b" / "c.py").unlink()
    unpack(archive, target)
    assert tree(target) == {"a.py", "b/c.py"}
    assert (target / "a.py").read_bytes() == TEXT


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_half_an_archive_is_broken(tmp_path: Path, kept: float) -> None:
    whole = tar(
        tmp_path / "whole.tar.gz", file("top/a.py", bytes(range(256)) * 99), file("top/b.py", b"ab" * 999)
    )
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    with pytest.raises(BrokenArchive):
        unpack(half, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_ARCHIVE_BYTES", 10, "bytes, expected at most 10"),
        ("MAX_FILES", 1, "more than 1 files"),
        ("MAX_FILE_BYTES", 3, "is over 3 bytes"),
        ("MAX_UNPACKED_BYTES", 7, "unpacks to more than 7 bytes"),
    ],
)
def test_every_limit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(archives, limit, value)
    with pytest.raises(SourceError, match=message):
        unpack(tar(tmp_path / "a.tar.gz", file("top/a.py"), file("top/b.py")), tmp_path / "target")
