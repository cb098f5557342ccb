"""Guards: what upstream's source must keep, one TOML table each (`canary/guards/*.toml`).

    [[guard]]
    id = "zoo-moe-fallback-raises"
    why = "a partially merged checkpoint must never be written silently"
    upstream = "unslothai/unsloth-zoo"
    package = "unsloth_zoo"
    refs = ["latest"]
    paths = ["unsloth_zoo/saving_utils.py"]
    since = "unslothai/unsloth-zoo#647"
    since_version = "2026.5.2"
    rule = { kind = "raises", function = "merge", exception = "RuntimeError" }

A ref that spells a release (`latest`, `installed`, `0.19.1`) or a range of releases is read from `package`,
any other from the GitHub repository `upstream`: `refs = ["latest", "main", "v0.19.1"]` watches the newest
release and two GitHub refs. A range is `0.18.1..0.21.2` (both ends are in it, either may be left out) or
PEP 440's `>=0.18.1,<0.22`. It stands for every release in it that the index has, pre-releases left out, each
with a verdict of its own that names the version; a range with no release in it is a failure.

Code that several probes of a file have alike may stand in its table `[shared]` (shared.py).

A machine that reaches no GitHub gets `unreachable` for its refs, which fails in CI: the guards shipped here
therefore name releases. Where the paths of the two differ, as with a `src/` directory, `paths` takes both.
`dist = "sdist"` reads what wheels leave out, tests above all.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from loudmerge.canary import shared
from loudmerge.canary.rules import rules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LATEST, INSTALLED = "latest", "installed"
"""Refs of a package: the newest release on the index, and what is installed beside loudmerge."""

WHEEL, SDIST = "wheel", "sdist"

OWN = Path("canary", "guards")
SHIPPED = Path(__file__).with_name("shipped")
"""Where a project keeps its guard files, and where the installed package has loudmerge's own."""

REQUIRED = ("id", "why", "refs", "since", "rule")
TEXTS = ("id", "why", "upstream", "package", "path", "since", "since_version", "dist")
LISTS = ("refs", "paths")
KNOWN = frozenset({*REQUIRED, *TEXTS, *LISTS})

CHANGE = re.compile(r"([\w.-]+/[\w.-]+)(?:#(\d+)|@([0-9a-f]{7,40}))")
"""A change as `since` may name it: a pull request, or a commit."""
_UPSTREAM = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?")
_REF = re.compile(r"[A-Za-z0-9][\w./+-]*")
_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


class GuardError(ValueError):
    """A guard file that says nothing, or nothing that can be checked. Names file, guard and field."""


@dataclass(frozen=True)
class Guard:
    """One guard.

    upstream: a GitHub repository, `owner/name`. package: the package index's name for it.
    refs: of GitHub (branch, tag, commit), or of the package (`is_package_ref`).
    paths: in the source, the first that exists counts. since: the change that brought it, `owner/name#PR`
    or `owner/name@COMMIT`. since_version: the first release that has it.
    rule: the raw table, which rules.py reads. file: the guard's TOML. dist: wheel or sdist of the package.
    """

    id: str
    why: str
    upstream: str | None
    package: str | None
    refs: tuple[str, ...]
    paths: tuple[str, ...]
    since: str
    rule: Mapping[str, Any]
    file: Path
    since_version: str | None = None
    dist: str = WHEEL
    line: int = 0

    @property
    def name(self) -> str:
        """What a verdict calls the upstream."""
        return self.upstream or self.package or ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the upstream goes by."""
        return tuple(name for name in (self.upstream, self.package) if name)

    def reads_package(self, ref: str) -> bool:
        """Whether `ref` is one of the package, not of the repository."""
        return self.package is not None and is_package_ref(ref)


def is_package_ref(ref: str) -> bool:
    """Whether `ref` names releases: `latest`, `installed`, a version, or a range of them."""
    return ref in {LATEST, INSTALLED} or is_version(ref) or is_range(ref)


def is_version(ref: str) -> bool:
    """Whether `ref` is one version (PEP 440), as it is written: `v0.19.1` is a tag, not a version."""
    try:
        Version(ref)
    except InvalidVersion:
        return False
    return ref[0].isdigit()


def is_range(ref: str) -> bool:
    """Whether `ref` is a range of versions: `FIRST..LAST`, or specifiers (PEP 440)."""
    try:
        return len(specifiers(ref)) > 0
    except InvalidSpecifier:
        return False


def specifiers(ref: str) -> SpecifierSet:
    """Which versions a range holds. `FIRST..LAST` counts both ends, of which one may be left out.

    Pre-releases are in neither form. Raises InvalidSpecifier.
    """
    first, dots, last = ref.partition("..")
    if not dots:
        return SpecifierSet(ref, prereleases=False)
    bad = [end for end in (first, last) if end and not is_version(end)]
    if bad:
        raise InvalidSpecifier(f"{ref}: found {bad[0]!r}, expected a version")
    if first and last and Version(first) > Version(last):
        raise InvalidSpecifier(f"{ref}: its first release is after its last")
    ends = (f"{sign}{end}" for sign, end in ((">=", first), ("<=", last)) if end)
    return SpecifierSet(",".join(ends), prereleases=False)


def default_directory(project: Path) -> Path:
    """The project's guard files; where it has none, those that loudmerge ships."""
    return SHIPPED if SHIPPED.is_dir() and not (project / OWN).is_dir() else project / OWN


def load_guards(directory: Path) -> tuple[Guard, ...]:
    """All guards of the `*.toml` files in `directory`, by file name, then in the file's order.

    Raises GuardError, with every problem found, when there is no file, no guard in a file, an unknown or
    missing field, two guards with one id, a rule that rules.py does not know, or shared code that is missing
    or that nobody takes.
    """
    files = sorted(directory.glob("*.toml"))
    if not files:
        raise GuardError(f"{directory}: found no guard file (*.toml), expected at least one")
    guards: list[Guard] = []
    problems: list[str] = []
    for file in files:
        try:
            guards += _guards(file)
        except GuardError as error:
            problems.append(str(error))
    problems += _repeated(guards)
    if problems:
        raise GuardError("\n".join(problems))
    return tuple(guards)


def _repeated(guards: Sequence[Guard]) -> list[str]:
    counted = Counter(guard.id for guard in guards)
    return [
        f"guard {name}: found {count} guards with this id, expected one ({', '.join(_files(guards, name))})"
        for name, count in counted.items()
        if count > 1
    ]


def _files(guards: Sequence[Guard], name: str) -> list[str]:
    return sorted({guard.file.name for guard in guards if guard.id == name})


def _guards(file: Path) -> list[Guard]:
    try:
        text = file.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GuardError(f"{file}: not TOML: {error}") from error
    unknown = sorted(set(document) - {"guard", shared.TABLE})
    if unknown:
        raise GuardError(
            f"{file}: found {', '.join(unknown)}, expected only [[guard]] tables and [{shared.TABLE}]"
        )
    tables = document.get("guard")
    if not isinstance(tables, list) or not tables:
        raise GuardError(f"{file}: found no [[guard]], expected at least one")
    texts = document.get(shared.TABLE, {})
    problems = [f"{file}: {problem}" for problem in shared.problems(texts)]
    if problems:
        raise GuardError("\n".join(problems))
    lines = _table_lines(text)
    guards: list[Guard] = []
    for number, table in enumerate(tables):
        line = lines[number] if len(lines) == len(tables) else 0
        try:
            guards.append(_guard(file, number, table, line, texts))
        except GuardError as error:
            problems.append(str(error))
    if not problems:
        problems = [f"{file}: {problem}" for problem in shared.unused(texts, [one["rule"] for one in tables])]
    if problems:
        raise GuardError("\n".join(problems))
    return guards


def _table_lines(text: str) -> list[int]:
    """The line of each `[[guard]]`, from 1."""
    found = enumerate(text.splitlines(), start=1)
    return [number for number, line in found if re.match(r"\s*\[\[\s*guard\s*\]\]", line)]


def _guard(file: Path, number: int, table: Any, line: int, texts: Mapping[str, str]) -> Guard:
    where = f"{file}: guard {_label(table, number)}"
    problems = [f"{where}: {problem}" for problem in _problems(table, texts)]
    if problems:
        raise GuardError("\n".join(problems))
    return Guard(
        id=table["id"],
        why=table["why"],
        upstream=table.get("upstream"),
        package=table.get("package"),
        refs=tuple(table["refs"]),
        paths=tuple(table.get("paths") or [table["path"]]),
        since=table["since"],
        rule=MappingProxyType(shared.filled(table["rule"], texts)),
        file=file,
        since_version=table.get("since_version"),
        dist=table.get("dist", WHEEL),
        line=line,
    )


def _label(table: Any, number: int) -> str:
    name = table.get("id") if isinstance(table, dict) else None
    return name if isinstance(name, str) and name else f"number {number + 1}"


def _problems(table: Any, texts: Mapping[str, str]) -> list[str]:
    """What is wrong with a guard's table; empty when nothing is. texts: the file's shared code."""
    if not isinstance(table, dict):
        return [f"found {type(table).__name__}, expected a table"]
    missing = [name for name in REQUIRED if name not in table]
    unknown = sorted(set(table) - KNOWN)
    found = [f"field {name} is missing" for name in missing]
    found += [f"field {name} is unknown, expected one of {', '.join(sorted(KNOWN))}" for name in unknown]
    found += [
        f"field {name}: found {table[name]!r}, expected a text that is not empty"
        for name in TEXTS
        if name in table and not (isinstance(table[name], str) and table[name].strip())
    ]
    found += [
        f"field {name}: found {table[name]!r}, expected a list of texts that is not empty"
        for name in LISTS
        if name in table and not _is_texts(table[name])
    ]
    return found or [*_bad_place(table), *_bad_refs(table), *_bad_rule(table["rule"], texts)]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _bad_place(table: Mapping[str, Any]) -> list[str]:
    found = []
    if not _ID.fullmatch(table["id"]):
        found.append(f"field id: found {table['id']!r}, expected small letters, digits, dots and dashes")
    if ("path" in table) == ("paths" in table):
        found.append("fields path, paths: expected one of the two")
    for path in table.get("paths", [table.get("path", ".")]):
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path:
            found.append(f"field path: found {path!r}, expected a path inside the source, with slashes")
    if "upstream" not in table and "package" not in table:
        found.append("fields upstream, package: expected at least one of the two")
    if "upstream" in table and not _UPSTREAM.fullmatch(table["upstream"]):
        found.append(f"field upstream: found {table['upstream']!r}, expected owner/name")
    if "package" in table and not _PACKAGE.fullmatch(table["package"]):
        found.append(f"field package: found {table['package']!r}, expected a package's name")
    return found


def _bad_refs(table: Mapping[str, Any]) -> list[str]:
    found = []
    for ref in table["refs"]:
        released = is_package_ref(ref)
        if released and "package" not in table and (ref in {LATEST, INSTALLED} or is_range(ref)):
            found.append(f"field refs: {ref!r} is a release, expected a field package beside it")
        if not released and "upstream" not in table:
            found.append(f"field refs: found {ref!r}, expected latest, installed, a version or a range")
        if not released and (not _REF.fullmatch(ref) or ".." in ref):
            found.append(f"field refs: found {ref!r}, expected a branch, tag or commit")
    if len(set(table["refs"])) != len(table["refs"]):
        found.append(f"field refs: found {table['refs']!r}, expected each once")
    if re.search(r"[#@]|://", table["since"]) and not CHANGE.fullmatch(table["since"]):
        expected = "owner/name#NUMBER, owner/name@COMMIT, or words"
        found.append(f"field since: found {table['since']!r}, expected {expected}")
    if "since_version" in table and not is_version(table["since_version"]):
        found.append(f"field since_version: found {table['since_version']!r}, expected a version")
    if table.get("dist", WHEEL) not in {WHEEL, SDIST}:
        found.append(f"field dist: found {table['dist']!r}, expected {WHEEL} or {SDIST}")
    return found


def _bad_rule(rule: Any, texts: Mapping[str, str]) -> list[str]:
    if not isinstance(rule, dict):
        return [f"field rule: found {type(rule).__name__}, expected a table"]
    try:
        rules.validate(shared.filled(rule, texts))
    except rules.RuleError as error:
        return [f"field rule: {error}"]
    return []
