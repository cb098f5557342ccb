"""Unpacks a wheel, sdist or repository archive that may have been made to do harm.

Nothing lands outside the target, no link, device or executable bit is made, and sizes are counted as bytes
come out, whatever the archive's headers say.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

MAX_ARCHIVE_BYTES = 400 * 2**20
MAX_FILE_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_FILES = 60_000
MAX_RATIO = 200
"""Unpacked bytes for each byte of the archive. Source code packs at 3 to 10."""
FREE_BYTES = 16 * 2**20
"""The ratio is not looked at below this: a few empty files may pack very well."""

CHUNK = 2**20
BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError),
)
BAD_NAMES = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL})
"""What the system says to a file below a file, a file over a directory, and the like."""

SUFFIXES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")


@runtime_checkable
class _Readable(Protocol):
    """The content of one member, as zipfile and tarfile give it."""

    def read(self, size: int, /) -> bytes: ...


class SourceError(ValueError):
    """A source that answered, with something that is not to be read: hostile, over-large, no such version."""


class BrokenArchive(SourceError):
    """Bytes that are no archive, or end too early."""


@dataclass
class _Budget:
    """Counts what comes out of one archive."""

    archive: Path
    files: int = 0
    total: int = 0

    def file(self) -> None:
        self.files += 1
        if self.files > MAX_FILES:
            raise SourceError(f"{self.archive.name}: refused: more than {MAX_FILES} files")

    def add(self, count: int) -> None:
        self.total += count
        limit = max(FREE_BYTES, MAX_RATIO * self.archive.stat().st_size)
        if self.total > MAX_UNPACKED_BYTES:
            raise SourceError(
                f"{self.archive.name}: refused: unpacks to more than {MAX_UNPACKED_BYTES} bytes"
            )
        if self.total > limit:
            raise SourceError(
                f"{self.archive.name}: refused: unpacks to more than {MAX_RATIO} times its size, a bomb"
            )


def is_archive(name: str) -> bool:
    """Whether a file of this name is one that `unpack` reads."""
    return name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> None:
    """Unpacks into `target`, which appears complete or not at all. Does nothing when it is there, whole.

    Beside it stands how many files it has: what cleans caches takes old ones, and one that is gone would be
    a guard's file that upstream removed. The one top directory of sdists and repository archives is left out.
    Raises SourceError when the archive is refused, BrokenArchive when it is none.
    """
    if _is_whole(target):
        return
    size = archive.stat().st_size
    if size > MAX_ARCHIVE_BYTES:
        raise SourceError(f"{archive.name}: refused: {size} bytes, expected at most {MAX_ARCHIVE_BYTES}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        tree = Path(scratch, "tree")
        tree.mkdir()
        with _broken(archive):
            _extract(archive, tree)
        if not _is_whole(target):  # another process may have put the same there meanwhile
            _publish(tree if archive.name.lower().endswith(".whl") else _top(tree), target)


def _noted(target: Path) -> Path:
    """The file that says how many files a directory of the cache has."""
    return target.with_name(f"{target.name}.files")


def _is_whole(target: Path) -> bool:
    return _noted(target).is_file() and _noted(target).read_text() == str(_count(target))


def _count(tree: Path) -> int:
    """How many files are in a directory and below it."""
    return sum(len(files) for _, _, files in os.walk(tree))


def _publish(tree: Path, target: Path) -> None:
    """Moves `tree` to `target`. Another process may be about to."""
    shutil.rmtree(target, ignore_errors=True)
    _noted(target).write_text(str(_count(tree)))
    try:
        tree.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _top(tree: Path) -> Path:
    entries = list(tree.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else tree


@contextmanager
def _broken(archive: Path) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise BrokenArchive(f"{archive.name}: not an archive, or not all of it: {error}") from error
    except OSError as error:
        if error.errno not in BAD_NAMES:
            raise
        raise SourceError(f"{archive.name}: refused: names that no directory can hold: {error}") from error


def _extract(archive: Path, tree: Path) -> None:
    budget = _Budget(archive)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            _extract_zip(opened, tree, budget)
        return
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as opened_tar:
        _extract_tar(opened_tar, tree, budget)


def _extract_zip(opened: zipfile.ZipFile, tree: Path, budget: _Budget) -> None:
    for member in opened.infolist():
        budget.file()
        place = _inside(tree, member.filename, budget.archive)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise SourceError(f"{budget.archive.name}: refused: {member.filename} is a link")
        if member.flag_bits & 0x1:
            raise SourceError(f"{budget.archive.name}: refused: {member.filename} is encrypted")
        if not member.is_dir():
            with opened.open(member) as content:
                _write(content, place, budget)


def _extract_tar(opened: tarfile.TarFile, tree: Path, budget: _Budget) -> None:
    for member in opened:
        budget.file()
        place = _inside(tree, member.name, budget.archive)
        if member.issym() or member.islnk():
            # Repositories hold links between their own files. They are left out: no link is ever made.
            _inside(tree, _pointed_at(member), budget.archive)
        elif member.isfile():
            content = opened.extractfile(member)
            if content is not None:
                with content:
                    _write(content, place, budget)
        elif not member.isdir():
            raise SourceError(f"{budget.archive.name}: refused: {member.name} is neither file nor directory")


def _pointed_at(member: tarfile.TarInfo) -> str:
    """Where a link points, from the top of the archive. A hard link's name is that already."""
    if member.islnk() or member.linkname.startswith("/"):
        return member.linkname
    parts: list[str] = list(PurePosixPath(member.name).parent.parts)
    for part in PurePosixPath(member.linkname).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts) or "."


def _inside(tree: Path, name: str, archive: Path) -> Path:
    """The place of a member below `tree`. Raises SourceError when it would lie elsewhere."""
    pure = PurePosixPath(name)
    bad = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
    if bad or (pure.parts and ":" in pure.parts[0]):
        raise SourceError(f"{archive.name}: refused: {name!r} lies outside the archive")
    return tree.joinpath(*pure.parts)


def _write(content: _Readable, place: Path, budget: _Budget) -> None:
    if place.exists():
        place.unlink()
    place.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with place.open("wb") as file:
        while chunk := content.read(CHUNK):
            written += len(chunk)
            if written > MAX_FILE_BYTES:
                raise SourceError(
                    f"{budget.archive.name}: refused: {place.name} is over {MAX_FILE_BYTES} bytes"
                )
            budget.add(len(chunk))
            file.write(chunk)
