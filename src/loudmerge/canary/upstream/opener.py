"""Opens the source that a guard's ref means, or what `--source` puts in its place."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from loudmerge.canary.guards import INSTALLED, Guard, is_range
from loudmerge.canary.upstream import archives
from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import Client, NotThere, Unreachable, write
from loudmerge.canary.upstream.github import BaseUrlSource, GithubSource
from loudmerge.canary.upstream.packages import package_source, releases
from loudmerge.canary.upstream.sources import Source, SourceOptions, installed, is_url, local

Key = tuple[str | None, str | None, str, str]
Found = Source | tuple[str, ...] | Unreachable | SourceError


class Opener:
    """Opens sources for one run: each once, what it found or why not. Threads may share it."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.client = Client(options.cache, options.http)
        self._found: dict[Key, Found] = {}
        self._locks: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Opener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the connections."""
        self.client.close()

    def refs(self, guard: Guard, ref: str) -> tuple[str, ...]:
        """The refs that one ref of a guard stands for: a range stands for every release in it.

        Raises Unreachable, or SourceError when no release is in it.
        """
        if not self._is_range(guard, ref):
            return (ref,)
        found = self._once(guard, ref)
        assert isinstance(found, tuple)  # noqa: S101 - a range is nothing else
        return found

    def open(self, guard: Guard, ref: str) -> Source:
        """The source of a guard at one ref. Raises Unreachable, or SourceError when there is no such ref."""
        found = self._once(guard, ref)
        assert not isinstance(found, tuple)  # noqa: S101
        return found

    def key(self, guard: Guard, ref: str) -> Key:
        """What two guards share when they read the same source."""
        return guard.upstream, guard.package, ref, guard.dist

    def prepare(self, guard: Guard, ref: str) -> None:
        """Finds out about a source, or about all those in a range; `open` and `refs` then know."""
        found = self._remembered(guard, ref)
        for release in found if isinstance(found, tuple) else ():
            self._remembered(guard, release)

    def _once(self, guard: Guard, ref: str) -> Source | tuple[str, ...]:
        found = self._remembered(guard, ref)
        if isinstance(found, (Unreachable, SourceError)):
            raise type(found)(str(found)) from found
        return found

    def _remembered(self, guard: Guard, ref: str) -> Found:
        key = self.key(guard, ref)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._found:
                self._found[key] = self._try(guard, ref)
            return self._found[key]

    def _try(self, guard: Guard, ref: str) -> Found:
        try:
            if guard.package is not None and self._is_range(guard, ref):
                return releases(guard.package, ref, guard.dist, self.options)
            return self._open(guard, ref)
        except NotThere as error:
            return SourceError(str(error))
        except (Unreachable, SourceError) as error:
            return error

    def _is_range(self, guard: Guard, ref: str) -> bool:
        return guard.package is not None and is_range(ref) and self._override(guard) is None

    def _override(self, guard: Guard) -> str | None:
        return self.options.override(guard.upstream, guard.package)

    def _open(self, guard: Guard, ref: str) -> Source:
        place = self._override(guard)
        if (place or ref) == INSTALLED:
            return installed(guard.name, guard.package, ref)
        if place is not None:
            return self._elsewhere(guard.name, ref, place)
        if guard.package is not None and guard.reads_package(ref):
            return package_source(guard.name, guard.package, ref, guard.dist, self.options)
        return GithubSource.at(guard.name, ref, self.client, self.options)

    def _elsewhere(self, name: str, ref: str, place: str) -> Source:
        """What `--source` names."""
        if not is_url(place):
            return local(name, ref, Path(place), self.options)
        if archives.is_archive(urlsplit(place).path):
            return self._remote_archive(name, ref, place)
        return BaseUrlSource(name, ref, place, self.client)

    def _remote_archive(self, name: str, ref: str, url: str) -> Source:
        """An archive at an URL, kept by hash."""
        content = self.client.get(url, limit=archives.MAX_ARCHIVE_BYTES, conditional=True)
        file = urlsplit(url).path.rsplit("/", 1)[-1]
        place = self.options.cache / "archives" / hashlib.sha256(content).hexdigest()[:32] / file
        write(place, content)
        try:
            return local(name, ref, place, self.options)
        except archives.BrokenArchive as error:
            raise Unreachable(f"{url}: {error}") from error
