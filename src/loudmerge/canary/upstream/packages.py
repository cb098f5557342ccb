"""Released packages, through pip: found, downloaded once, kept by version and hash, never installed.

pip runs in a process of its own (limited_pip.py). It would run an sdist's build backend to learn the
metadata, which may want half a gigabyte of other packages first: standin.py answers instead, from PKG-INFO.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from packaging.version import Version

from loudmerge.canary.guards import LATEST, SDIST, is_version, specifiers
from loudmerge.canary.probing.forks import shared
from loudmerge.canary.upstream import archives
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Unreachable, write
from loudmerge.canary.upstream.sources import SourceOptions, TreeSource, normalised, sha256
from loudmerge.errors import TRY_AGAIN

NOT_ASKED = re.compile(r"Could not fetch URL (?!.*404 Client Error)[^\n]*")
"""What pip logs about an index that did not answer. It goes on with the other places it knows, so that an
old wheel in a local directory would pass for the latest release."""

OFFERED = re.compile(r"Found link (\S+) \(from .*, version: (\S+)$", re.MULTILINE)
"""What pip logs about each file of a package that it would take: its address and version."""

FROM_VERSIONS = re.compile(r"\(from versions: (?!none\))([^)]+)\)")
"""How pip says that none of a package's releases meets the requirement."""

TOO_LARGE = os.strerror(errno.EFBIG)

LIMITED_PIP = Path(__file__).with_name("limited_pip.py")
STAND_IN = Path(__file__).with_name("standin.py")


@dataclass(frozen=True)
class Pip:
    """pip about one package."""

    package: str
    dist: str
    options: SourceOptions

    def latest(self) -> str:
        """The newest release, yanked and pre-releases aside. Raises Unreachable, SourceError."""
        # `pip install --dry-run` says it, too, but downloads the archive where an index has no metadata.
        return self.versions()[0]

    def versions(self) -> tuple[str, ...]:
        """The releases of this kind, yanked and pre-releases aside, newest first. Raises Unreachable."""
        # It names releases of the other kind, too: which file is which is in the log alone.
        logged = self._run("index", "versions", "--pre", "--ignore-requires-python", self.package)
        found = {version for url, version in OFFERED.findall(logged) if self._is_wanted(url)}
        names = [name for name in found if is_version(name)]
        if not names:
            raise Unreachable(
                f"{self.package}: pip named no {self.dist} that could be read here. {TRY_AGAIN}"
            )
        stable = [name for name in names if not Version(name).is_prerelease]
        return tuple(sorted(stable or names, key=Version, reverse=True))

    def _is_wanted(self, url: str) -> bool:
        return urlsplit(url).path.endswith(".whl") is not (self.dist == SDIST)

    def download(self, version: str, target: Path) -> Path:
        """Downloads one release into `target`. Raises Unreachable, SourceError."""
        unbuilt = ("--no-build-isolation", "--use-pep517") if self.dist == SDIST else ()
        asked = ("--no-deps", "--dest", str(target), *self._kind, *unbuilt)
        self._run("download", *asked, f"{self.package}=={version}")
        files = [file for file in target.iterdir() if archives.is_archive(file.name)]
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "nothing"
            raise Unreachable(f"{self.package} {version}: pip downloaded {names}, expected one archive")
        return files[0]

    @property
    def _kind(self) -> tuple[str, str, str]:
        """What kind of archive; for whichever Python, as it is read and not installed."""
        return ("--no-binary" if self.dist == SDIST else "--only-binary", ":all:", "--ignore-requires-python")

    def _run(self, command: str, *arguments: str) -> str:
        """What pip logs. Raises SourceError when the index answers that there is no such release."""
        http = self.options.http
        patience = ("--timeout", f"{http.timeout:g}", "--retries", str(http.tries - 1))
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch, "pip.log")
            silent = ("--no-input", "--disable-pip-version-check", "--no-color")
            order = {
                "arguments": [command, "--log", str(log), *silent, *patience, *arguments],
                "environment": dict(os.environ),
                "folder": str(Path.cwd()),
                "limit": archives.MAX_ARCHIVE_BYTES,
                "python": str(_stand_in(Path(scratch, "python"))),
            }
            try:
                pip = shared((sys.executable,), LIMITED_PIP)
                done = pip.run(json.dumps(order).encode(), self.options.pip_seconds)
            except TimeoutError as error:
                raise Unreachable(
                    f"{self.package}: pip was not done after {self.options.pip_seconds:g} s. {TRY_AGAIN}"
                ) from error
            logged = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        not_asked = NOT_ASKED.search(logged)
        if not_asked:
            raise Unreachable(f"{self.package}: pip: {_without_hosts(not_asked[0])}. {TRY_AGAIN}")
        if done.status != 0:
            raise self._failure(done.complained.decode(errors="replace"))
        return logged

    def _failure(self, said: str) -> Exception:
        lines = said.strip().splitlines() or ["nothing"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        crashed = not errors or errors[-1].startswith("Exception:")
        text = f"{self.package}: pip: {_without_hosts(lines[-1] if crashed else '; '.join(errors))}"
        if TOO_LARGE in text:
            return SourceError(f"{text}: refused: over {archives.MAX_ARCHIVE_BYTES} bytes")
        if FROM_VERSIONS.search(said):
            return SourceError(text)
        return Unreachable(f"{text[:600]}. Check the name, the network, and that pip is installed.")


def _stand_in(place: Path) -> Path:
    """A program that pip takes for Python when it wants a build backend asked."""
    words = shlex.join([sys.executable, "-I", "-S", "-B", str(STAND_IN)])
    place.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    place.chmod(0o700)
    return place


def _without_hosts(text: str) -> str:
    """pip's words without addresses, which may hold credentials."""
    return re.sub(r"(?:https?|file)://\S+", "…", re.sub(r"host='[^']*'", "host=…", text)).strip()


def package_source(name: str, package: str, ref: str, dist: str, options: SourceOptions) -> TreeSource:
    """A release, unpacked in the cache. ref: `latest` or a version. Raises Unreachable, SourceError.

    A version that is in the cache, with the hash it had when it was downloaded, is not asked for again.
    """
    pip = Pip(package, dist, options)
    version = pip.latest() if ref == LATEST else ref
    shelf = options.cache / "packages" / normalised(package) / f"{Version(version)}-{dist}"
    record = shelf / "record.json"
    archive, digest = _recorded(record) or _download(pip, version, record)
    tree = shelf / digest[:32]
    try:
        archives.unpack(archive, tree)
    except archives.BrokenArchive as error:
        record.unlink(missing_ok=True)
        raise Unreachable(f"{package} {version}: {error}") from error
    return TreeSource(name, ref, version, tree)


def _recorded(record: Path) -> tuple[Path, str] | None:
    """The archive that is in the cache and its SHA-256; None when there is none, or its hash is another."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        archive, digest = record.parent / known["file"], str(known["sha256"])
        return (archive, digest) if sha256(archive) == digest else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _download(pip: Pip, version: str, record: Path) -> tuple[Path, str]:
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=record.parent, prefix=".download-") as scratch:
        file = pip.download(version, Path(scratch))
        archive = file.replace(record.parent / file.name)
    digest = sha256(archive)
    write(record, json.dumps({"file": archive.name, "sha256": digest}).encode())
    return archive, digest


def releases(package: str, wanted: str, dist: str, options: SourceOptions) -> tuple[str, ...]:
    """The releases in a range (`guards.specifiers`), oldest first. Raises Unreachable, SourceError."""
    inside = specifiers(wanted)
    found = [name for name in Pip(package, dist, options).versions() if inside.contains(name)]
    if not found:
        raise SourceError(f"{package}: no release is in {wanted}")
    return tuple(sorted(found, key=Version))
