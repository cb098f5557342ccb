"""matrix.toml: the cells, and what each must show. Standard library only."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "matrix.toml"
RELEASED, LATEST, DEV = "released", "latest", "dev"
LANES = (RELEASED, LATEST, DEV)
PACKAGES = ("transformers", "peft", "trl")
FUSED, PER_EXPERT = "fused", "per-expert"
PATHS: Mapping[str, tuple[str | None, ...]] = {FUSED: ("standard", "swapped"), PER_EXPERT: (None,)}
"""The orientations that an adapter can have on each path."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")

MOST: Mapping[str, float] = {
    "kl_base_trained_at_least": math.inf,
    "kl_float32_merge_at_most": math.inf,
    "kl_trained_merged_share": 1.0,
    "kl_base_merged_within": 1.0,
    "kl_bfloat16_share": 1.0,
    "delta_kept_at_least": 1.0,
    "top1_at_least": 1.0,
}
"""The numbers of Expectation that need not be whole, and the most that each can be: five are shares."""

COUNTS = ("samples_of", "merged", "tests_at_least", "suite_at_least", "families_at_least")
"""Those that are whole, from 1 on."""


class MatrixError(ValueError):
    """matrix.toml, or a cell's name, is wrong."""


@dataclass(frozen=True)
class Expectation:
    """What a cell must show; the names and units are those of result.Figures.

    kl_trained_merged_share, kl_base_merged_within, kl_bfloat16_share: of kl_base_trained. samples: "all", or
    how many, of samples_of. merged: per-expert projections. tests_at_least, suite_at_least: that passed, all
    and of verdict.SUITE. families_at_least: merged, not refused.
    """

    path: str
    orientation: str | None
    kl_base_trained_at_least: float
    kl_float32_merge_at_most: float
    kl_trained_merged_share: float
    kl_base_merged_within: float
    kl_bfloat16_share: float
    delta_kept_at_least: float
    top1_at_least: float
    samples: str | int
    samples_of: int
    merged: int
    tests_at_least: int
    suite_at_least: int
    families_at_least: int


EXPECTED = tuple(item.name for item in fields(Expectation))


@dataclass(frozen=True)
class Cell:
    """One combination. versions: pins (released), nothing (latest), GitHub repositories (dev).

    optional: a run does not fail because the cell could not be reached.
    """

    name: str
    lane: str
    versions: Mapping[str, str]
    expects: Expectation
    optional: bool = False

    @property
    def is_pinned(self) -> bool:
        """Whether it is the same combination today and tomorrow."""
        return self.lane == RELEASED


@dataclass(frozen=True)
class Matrix:
    """The cells in matrix.toml's order."""

    cells: tuple[Cell, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(cell.name for cell in self.cells)

    @property
    def optional(self) -> frozenset[str]:
        """The names of the cells that may be unreachable."""
        return frozenset(cell.name for cell in self.cells if cell.optional)

    def chosen(self, names: Sequence[str]) -> tuple[Cell, ...]:
        """The cells of these names, all where there are none. Raises MatrixError on a name it has not."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise MatrixError(f"{FILE} has no cell {unknown[0]!r}; it has: {', '.join(self.names)}")
        return tuple(cell for cell in self.cells if not names or cell.name in names)

    def github(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """What a workflow's `strategy.matrix` takes: one job for each cell.

        https://docs.github.com/actions/how-tos/write-workflows/choose-what-workflows-do/run-job-variations
        """
        jobs = [
            {"cell": cell.name, "lane": cell.lane, "optional": cell.optional, **cell.versions}
            for cell in self.chosen(names)
        ]
        return {"include": jobs}


def load(file: Path) -> Matrix:
    """Reads matrix.toml. Raises MatrixError naming the cell and the key that is missing, unknown or wrong."""
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise MatrixError(f"{file}: no such file. Run this in the project's root.") from error
    except UnicodeDecodeError as error:
        raise MatrixError(f"{file}: no UTF-8: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise MatrixError(f"{file}: no TOML: {error}") from error
    defaults, lanes = _table(document, "expect"), _table(document, "lanes")
    _only(document, ("expect", "lanes"), FILE)
    _only(defaults, EXPECTED, f"{FILE}: [expect]")
    _only(lanes, LANES, f"{FILE}: [lanes]")
    for lane, lines in lanes.items():
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise MatrixError(f"{FILE}: lanes.{lane}: found {lines!r}, expected a list of tables")
    cells = tuple(_cell(lane, line, defaults) for lane in LANES for line in lanes.get(lane, ()))
    folded = [cell.name.lower() for cell in cells]
    twice = [cell.name for cell in cells if folded.count(cell.name.lower()) > 1]
    if twice:
        said = "is there twice, and the names of files may not tell upper case from lower"
        raise MatrixError(f"{FILE}: the cell {twice[-1]} {said}")
    if not cells:
        raise MatrixError(f"{FILE}: found no cell, expected at least one under [lanes]")
    return Matrix(cells)


def name_of(versions: Mapping[str, str]) -> str:
    """tf5.5.0-peft0.19.1-trl0.25.1"""
    return "tf{transformers}-peft{peft}-trl{trl}".format(**versions)


def _cell(lane: str, line: Mapping[str, Any], defaults: Mapping[str, Any]) -> Cell:
    where = f"{FILE}: lanes.{lane} {line.get('name') or [line.get(package) for package in PACKAGES]}"
    _only(line, ("name", "optional", *PACKAGES, *EXPECTED), where)
    versions = _versions(where, lane, line)
    name = line["name"] if "name" in line else name_of(versions) if versions else lane
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MatrixError(f"{where}: the name {name!r} cannot be a file's: expected {_NAME.pattern}")
    optional = line.get("optional", False)
    if not isinstance(optional, bool):
        raise MatrixError(f"{where}: optional: found {optional!r}, expected true or false")
    return Cell(name, lane, versions, _expectation(where, {**defaults, **line}), optional)


def _versions(where: str, lane: str, line: Mapping[str, Any]) -> dict[str, str]:
    versions = {package: line[package] for package in PACKAGES if package in line}
    wanted = () if lane == LATEST else PACKAGES
    if tuple(versions) != wanted:
        raise MatrixError(f"{where}: found versions of {list(versions)}, expected of {list(wanted)}")
    form, meant = (_REPOSITORY, "OWNER/NAME") if lane == DEV else (_VERSION, "one version, a string")
    for package, version in versions.items():
        if not isinstance(version, str) or not form.fullmatch(version):
            raise MatrixError(f"{where}: {package}: found {version!r}, expected {meant}")
    return versions


def _expectation(where: str, values: Mapping[str, Any]) -> Expectation:
    known: dict[str, Any] = {key: values.get(key) for key in EXPECTED}
    absent = [key for key, value in known.items() if value is None and key != "orientation"]
    if absent:
        raise MatrixError(f"{where}: {absent[0]} is missing, here and under [expect]")
    if known["path"] not in list(PATHS):
        raise MatrixError(f"{where}: path: found {known['path']!r}, expected one of {list(PATHS)}")
    orientations = PATHS[known["path"]]
    if known["orientation"] not in orientations:
        found = known["orientation"]
        raise MatrixError(f"{where}: orientation: found {found!r}, expected one of {list(orientations)}")
    for key, most in MOST.items():
        _number(f"{where}: {key}", known[key], most)
    for key in COUNTS:
        if not _is_count(known[key]):
            raise MatrixError(f"{where}: {key}: found {known[key]!r}, expected a whole number from 1")
    samples = known["samples"]
    if samples != "all" and not _is_count(samples):
        raise MatrixError(f'{where}: samples: found {samples!r}, expected "all", or a number from 1')
    return Expectation(**known)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(where: str, value: Any, most: float) -> None:
    """Raises MatrixError. A bound of 0 would expect nothing, or what rounding never leaves."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MatrixError(f"{where}: found {value!r}, expected a number")
    if not (math.isfinite(value) and 0 < value <= most):
        meant = "a finite number over 0" if math.isinf(most) else f"a number over 0, {most:g} at most"
        raise MatrixError(f"{where}: found {value!r}, expected {meant}")


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = document.get(key)
    if not isinstance(table, dict):
        raise MatrixError(f"{FILE}: found no table [{key}]")
    return table


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise MatrixError(f"{where}: unknown key {unknown[0]!r}, expected only {', '.join(known)}")
