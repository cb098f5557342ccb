"""A git clone of an upstream, read commit by commit without a checkout."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loudmerge.canary.upstream.archives import SourceError
from loudmerge.canary.upstream.fetch import NotThere
from loudmerge.canary.upstream.sources import Change, decoded, merge_commit

GIT_SECONDS = 300


@dataclass(frozen=True)
class Commit:
    """One commit. date: when it was committed, `YYYY-MM-DD`."""

    id: str
    date: str
    subject: str


@dataclass(frozen=True)
class Clone:
    """A clone with its whole history. upstream: the GitHub repository it is of, `owner/name`."""

    tree: Path
    upstream: str
    _blobs: dict[tuple[str, str], str] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def at(cls, tree: Path, upstream: str | None = None) -> Clone:
        """The clone in a directory. upstream: by default, what the remote `origin` is.

        Raises SourceError when it is no clone, has only a part of its history, or names no upstream.
        """
        if _git(tree, "rev-parse", "--is-shallow-repository") != "false":
            raise SourceError(f"{tree}: a shallow clone, expected its whole history: git fetch --unshallow")
        name = upstream or _origin(tree)
        if name is None:
            raise SourceError(f"{tree}: its origin names no owner/name, so the upstream must be given")
        return cls(tree, name)

    def commits(
        self, paths: Sequence[str], first: str | None, last: str, changes: Collection[str] = ()
    ) -> tuple[Commit, ...]:
        """The commits on the way from `first` to `last` that touch `paths`, oldest first, and `first` itself.

        A branch that was merged is one step, as upstream saw it: parents other than the first are not walked.
        changes: `owner/name#PR`; the commits that brought them are steps, too.
        Raises SourceError when a revision is not in the clone, or none touches the paths.
        """
        start = self.resolved(first) if first else None
        span = f"{start}..{self.resolved(last)}" if start else self.resolved(last)
        walk = ("log", "--first-parent", "--reverse")
        touching = _git(self.tree, *walk, "--format=%H", span, "--", *paths).split()
        wanted = {*touching, *(self.landed(change) for change in changes)}
        described = _git(self.tree, *walk, "--format=%H%x00%cs%x00%s", span).splitlines()
        if start:
            described.insert(0, _git(self.tree, "log", "-1", "--format=%H%x00%cs%x00%s", start))
            wanted.add(start)
        found = tuple(Commit(*line.split("\0", 2)) for line in described)
        steps = tuple(commit for commit in found if commit.id in wanted)
        if not steps:
            raise SourceError(f"{self.tree}: none of {len(found)} commits touches {', '.join(paths)}")
        self._learn([commit.id for commit in steps], paths)
        return steps

    def resolved(self, revision: str) -> str:
        """The commit that a revision means. Raises SourceError when there is none."""
        return _git(self.tree, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")

    def landed(self, change: str) -> str | None:
        """The commit that brought `owner/name#PR` or `owner/name@COMMIT`; None when the clone has none."""
        asked = Change.parse(change)
        if asked is None or not asked.of(self.upstream):
            return None
        commit = asked.commit or merge_commit(self.tree, asked.pull)
        try:
            return self.resolved(commit) if commit else None
        except SourceError:
            return None

    def since(self, commit: str, last: str) -> frozenset[str]:
        """A commit, and all on the way to `last` that hold it."""
        later = _git(self.tree, "rev-list", "--ancestry-path", f"{commit}..{self.resolved(last)}")
        return frozenset((commit, *later.split()))

    def blob(self, commit: str, path: str) -> str | None:
        """The object that a path is at a commit; None when there is no such file."""
        if (commit, path) not in self._blobs:
            self._learn([commit], [path])
        return self._blobs[commit, path] or None

    def text(self, blob: str) -> str:
        """The text of an object. Raises SourceError when it is not UTF-8."""
        with self._lock:
            if blob not in self._texts:
                content = _bytes(self.tree, "cat-file", "blob", blob)
                self._texts[blob] = decoded(content, f"{self.upstream} object {blob}")
            return self._texts[blob]

    def _learn(self, commits: Sequence[str], paths: Sequence[str]) -> None:
        """Asks git once for many (commit, path); an empty object stands for no such file."""
        names = [(commit, path) for commit in commits for path in paths]
        asked = "".join(f"{commit}:{path}\n" for commit, path in names)
        answers = _git(self.tree, "cat-file", "--batch-check", text=asked).splitlines()
        for name, answer in zip(names, answers, strict=True):
            found = re.fullmatch(r"([0-9a-f]{40,64}) blob \d+", answer)
            self._blobs[name] = found[1] if found else ""


@dataclass(frozen=True)
class CommitSource:
    """A clone at one commit. holds: whether each change had landed by then; not in it is not known."""

    clone: Clone
    version: str
    holds: dict[str, bool | None] = field(default_factory=dict)

    @property
    def upstream(self) -> str:
        return self.clone.upstream

    @property
    def ref(self) -> str:
        return self.version

    def read(self, path: str) -> str:
        blob = self.clone.blob(self.version, path)
        if blob is None:
            raise NotThere(f"{self.upstream} {self.version} has no file {path}")
        return self.clone.text(blob)

    def exists(self, path: str) -> bool:
        return self.clone.blob(self.version, path) is not None

    def contains(self, change: str) -> bool | None:
        return self.holds.get(change)


def _origin(tree: Path) -> str | None:
    try:
        url = _git(tree, "config", "--get", "remote.origin.url")
    except SourceError:
        return None
    found = re.search(r"[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", url)
    return found[1] if found else None


def _git(tree: Path, *arguments: str, text: str = "") -> str:
    return _bytes(tree, *arguments, text=text).decode("utf-8", errors="replace").strip("\n")


def _bytes(tree: Path, *arguments: str, text: str = "") -> bytes:
    """What git prints. Raises SourceError with what it says when it fails."""
    command = ["git", "--literal-pathspecs", "-c", "core.fsmonitor=false", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=text.encode(), capture_output=True, check=False, timeout=GIT_SECONDS
        )
    except FileNotFoundError as error:
        raise SourceError("git is not installed, so a clone cannot be read") from error
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{tree}: git {arguments[0]} was not done after {GIT_SECONDS} s") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", errors="replace").strip()
        raise SourceError(f"{tree}: git {arguments[0]}: {said or 'failed'}")
    return done.stdout
