"""Where upstream's code comes from: what a source is, and those that lie on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from loudmerge.canary.guards import CHANGE
from loudmerge.canary.upstream import archives
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import HttpOptions, NotThere, Unreachable, write

__all__ = [
    "KnowsHistory",
    "Source",
    "SourceError",
    "SourceOptions",
    "TreeSource",
    "Unreachable",
    "parse_override",
]

STALE_AFTER = 48 * 3600.0
"""Seconds without a successful read after which an unreachable source fails everywhere."""


@runtime_checkable
class Source(Protocol):
    """One upstream at one ref, read only.

    upstream, ref: as the guard has them. version: the exact commit or version that is read.
    """

    @property
    def upstream(self) -> str: ...

    @property
    def ref(self) -> str: ...

    @property
    def version(self) -> str: ...

    def read(self, path: str) -> str:
        """The text of a file.

        Raises NotThere when the source has no such file, Unreachable when it could not be asked,
        SourceError when what came is not to be read (too large, not UTF-8).
        """

    def exists(self, path: str) -> bool:
        """Whether the source has this file. Raises as `read`."""


@runtime_checkable
class KnowsHistory(Protocol):
    """A source that can say whether a change had landed in what it reads."""

    def contains(self, change: str) -> bool | None:
        """Whether it holds `owner/name#PR` or `owner/name@COMMIT`; None when that cannot be known."""


def default_cache() -> Path:
    """LOUDMERGE_CANARY_CACHE, else a directory of the user's cache."""
    named = os.environ.get("LOUDMERGE_CANARY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base, "loudmerge", "canary")


@dataclass(frozen=True)
class SourceOptions:
    """How sources are opened.

    overrides: upstream or package -> a directory, an archive, an URL, or `installed`; it replaces every ref.
    github_api, github_raw: base URLs. token: for those two only.
    """

    overrides: Mapping[str, str] = field(default_factory=dict)
    cache: Path = field(default_factory=default_cache)
    http: HttpOptions = field(default_factory=HttpOptions)
    github_api: str = "https://api.github.com"
    github_raw: str = "https://raw.githubusercontent.com"
    token: str | None = field(default=None, repr=False)
    pip_seconds: float = 300.0

    @classmethod
    def from_environment(cls, overrides: Mapping[str, str] = MappingProxyType({})) -> SourceOptions:
        """LOUDMERGE_GITHUB_API_URL, LOUDMERGE_GITHUB_RAW_URL, GITHUB_TOKEN or GH_TOKEN, and the cache."""
        return cls(
            overrides=overrides,
            github_api=os.environ.get("LOUDMERGE_GITHUB_API_URL") or cls.github_api,
            github_raw=os.environ.get("LOUDMERGE_GITHUB_RAW_URL") or cls.github_raw,
            token=os.environ.get("GITHUB_TOKEN") or os.environ.get("GH_TOKEN") or None,
        )

    def override(self, *names: str | None) -> str | None:
        """What was given for any of these names."""
        wanted = {normalised(name) for name in names if name}
        found = [value for name, value in self.overrides.items() if normalised(name) in wanted]
        return found[0] if found else None


def normalised(name: str) -> str:
    """A name as the package index compares it (PEP 503); upstreams compare without case too."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_override(text: str) -> tuple[str, str]:
    """`UPSTREAM=DIR_OR_ARCHIVE_OR_URL` in its two parts. Raises ValueError."""
    name, equals, place = text.partition("=")
    if not (equals and name.strip() and place.strip()):
        raise ValueError(f"found {text!r}, expected UPSTREAM=DIR_OR_ARCHIVE_OR_URL")
    if not (is_url(place) or place == "installed" or Path(place).exists()):
        raise ValueError(f"{place}: no such directory or file, and not an URL")
    if Path(place).is_file() and not archives.is_archive(place):
        raise ValueError(f"{place}: expected a directory or one of {', '.join(archives.SUFFIXES)}")
    return name.strip(), place


def parse_overrides(texts: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Several of them. Raises ValueError when one names an upstream that no guard reads."""
    given = [parse_override(text) for text in texts]
    twice = [name for name, count in Counter(normalised(name) for name, _ in given).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)}: found several places, expected one")
    found = dict(given)
    names = {normalised(name) for name in known}
    unknown = [name for name in found if normalised(name) not in names]
    if unknown:
        raise ValueError(f"no guard reads {', '.join(unknown)}, expected one of {', '.join(sorted(known))}")
    return found


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


@dataclass(frozen=True)
class TreeSource:
    """A directory with source code in it."""

    upstream: str
    ref: str
    version: str
    tree: Path

    def read(self, path: str) -> str:
        place = self._place(path)
        if not place.is_file():
            raise NotThere(f"{self.upstream} {self.version} has no file {path}")
        return decoded(place.read_bytes(), f"{self.upstream} {self.version}: {path}")

    def exists(self, path: str) -> bool:
        return self._place(path).is_file()

    def contains(self, change: str) -> bool | None:
        found = Change.parse(change)
        return _git_contains(self.tree, found) if found and found.of(self.upstream) else None

    def _place(self, path: str) -> Path:
        place = self.tree / path
        if not place.resolve().is_relative_to(self.tree.resolve()):
            raise SourceError(f"{self.upstream} {self.version}: {path} leads out of the source")
        return place


@dataclass(frozen=True)
class Change:
    """A change as `since` names it: `owner/name#PR` or `owner/name@COMMIT`. One of the two is None."""

    repository: str
    pull: int | None
    commit: str | None

    @classmethod
    def parse(cls, text: str) -> Change | None:
        """The change, or None when `text` names none that a repository could be asked for."""
        found = CHANGE.fullmatch(text)
        return cls(found[1], int(found[2]) if found[2] else None, found[3]) if found else None

    def of(self, upstream: str) -> bool:
        """Whether it is a change of this repository."""
        return self.repository.lower() == upstream.lower()


def decoded(content: bytes, where: str) -> str:
    """Source text. Raises SourceError unless it is UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8: {error}") from error


def local(name: str, ref: str, place: Path, options: SourceOptions) -> TreeSource:
    """A directory, or an archive that is unpacked into the cache. Raises SourceError for a bad archive."""
    if place.is_dir():
        return TreeSource(name, ref, _tree_version(place), place)
    digest = sha256(place)
    tree = options.cache / "unpacked" / digest[:32]
    archives.unpack(place, tree)
    return TreeSource(name, ref, _metadata_version(tree) or f"sha256:{digest[:12]}", tree)


def installed(name: str, package: str | None, ref: str) -> TreeSource:
    """The installed package, read where it lies, not imported. Raises SourceError when there is none."""
    try:
        found = metadata.distribution(package or "")
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise SourceError(f"{package or name}: not installed here, so there is no source to read") from error
    return TreeSource(name, ref, found.version, Path(str(found.locate_file(""))))


def sha256(place: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with place.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _tree_version(tree: Path) -> str:
    """The commit of a git clone (`-dirty` when files differ from it), else the version its metadata has."""
    commit = _git(tree, "rev-parse", "HEAD") if (tree / ".git").exists() else None
    if commit:
        return commit + ("-dirty" if _git(tree, "status", "--porcelain", "--untracked-files=no") else "")
    return _metadata_version(tree) or f"directory {tree.name}"


def _metadata_version(tree: Path) -> str | None:
    """The version in a wheel's METADATA or an sdist's PKG-INFO, when there is exactly one."""
    files = [*tree.glob("*.dist-info/METADATA"), *tree.glob("PKG-INFO")]
    if len(files) != 1:
        return None
    found = re.search(r"(?m)^Version: *(\S+)", files[0].read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def _git(tree: Path, *arguments: str) -> str | None:
    """What git answers about a clone; None when it fails or is not there."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_contains(tree: Path, change: Change) -> bool | None:
    """Whether HEAD of a clone holds a change; None when the clone cannot say.

    A pull request is found by the number that GitHub puts into the first line of its commit. A clone where
    no branch has such a commit cannot say: the line may have been edited.
    """
    if not (tree / ".git").exists() or _git(tree, "rev-parse", "--is-shallow-repository") != "false":
        return None
    commit = change.commit or merge_commit(tree, change.pull)
    if not commit or _git(tree, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        return None
    return _git(tree, "merge-base", "--is-ancestor", commit, "HEAD") is not None


def merge_commit(tree: Path, pull: int | None) -> str | None:
    """The first commit that some branch has for a pull request."""
    pattern = rf"(\(#{pull}\)$|^Merge pull request #{pull} )"
    found = _git(tree, "log", "--all", "--format=%H %s", "-E", f"--grep={pattern}") or ""
    subjects = [line.partition(" ") for line in found.splitlines()]
    commits = [commit for commit, _, subject in subjects if re.search(pattern, subject)]
    return commits[-1] if commits else None


@dataclass(frozen=True)
class ReadLog:
    """When each source was last read, in the cache: what makes an unreachable one stale."""

    cache: Path

    def succeeded(self, name: str, ref: str) -> None:
        """Notes that it was read now."""
        write(self._place(name, ref), json.dumps({"source": name, "ref": ref, "read": time.time()}).encode())

    def stale_for(self, name: str, ref: str) -> float | None:
        """Seconds since the last successful read, or without one the first try, when over STALE_AFTER."""
        place = self._place(name, ref)
        try:
            since = float(json.loads(place.read_text(encoding="utf-8"))["read"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Never read: the clock starts now, as if it had been read.
            write(
                place, json.dumps({"source": name, "ref": ref, "read": time.time(), "first": True}).encode()
            )
            return None
        age = time.time() - since
        return age if age > STALE_AFTER else None

    def _place(self, name: str, ref: str) -> Path:
        return self.cache / "reads" / f"{hashlib.sha256(f'{name} {ref}'.encode()).hexdigest()[:32]}.json"
