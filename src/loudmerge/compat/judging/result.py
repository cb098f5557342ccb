"""What one cell of the matrix showed: CellResult <-> .compat/results/CELL.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

SCHEMA = 1

OK, FAILED, NOT_INSTALLED, UNREACHABLE, NOT_RUN = "ok", "failed", "not-installed", "unreachable", "not-run"
STATUSES = (OK, FAILED, NOT_INSTALLED, UNREACHABLE, NOT_RUN)
"""ok: all that matrix.toml expects was shown. not-installed: pip could not make the environment.
unreachable: the lane needs a host that was not reached. not-run: the cell was not asked for, or
never came to it."""

REFUSED = "refused by design"
"""What a family's entry begins with that loudmerge refuses, as its tests require."""

ASIDE: Mapping[str, Any] = {
    "detail": "",
    "seconds": 0.0,
    "stages": {},
    "date": "",
    "errors": {},
    "source": "",
    "unmoved": 0,
}
"""The keys of CELL.json that a row is not compared by, as they are where it has none: an older row has fewer.
Every other key has to be there: without it a row would show less, and nobody would see it."""


@dataclass(frozen=True)
class Figures:
    """How base, trained (the model in memory, right after training) and merged (OUT, reloaded) behave.

    KL in nats a token. All in float32 arithmetic, but kl_bfloat16_arithmetic: KL(trained || merged), both run
    in bfloat16, which is what the table of unslothai/unsloth-zoo#647 reports.
    kl_float32_merge: KL(trained || a merge written in float32): is the merge right?
    kl_floor: KL(trained || trained run in bfloat16), the noise of bfloat16 arithmetic.
    delta_kept: of the bfloat16 merge. samples: greedy ones that matched, and of how many.
    """

    kl_trained_merged: float
    kl_base_trained: float
    kl_base_merged: float
    kl_float32_merge: float
    kl_floor: float
    kl_bfloat16_arithmetic: float
    top1_agreement: float
    samples: tuple[int, int]
    delta_kept: float


NUMBERS = tuple(item.name for item in fields(Figures) if item.name != "samples")
"""The figures that are one number each; they stand at the top of CELL.json."""


@dataclass(frozen=True)
class Tests:
    """What pytest counted. skips: how often for each reason. failures: node ids.

    suite: how many of verdict.SUITE passed.
    """

    __test__: ClassVar[bool] = False  # pytest would take it for a class of tests
    passed: int
    failed: int
    skipped: int
    skips: Mapping[str, int] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    suite: int = 0


@dataclass(frozen=True)
class Shortfall:
    """One thing that matrix.toml expects and the cell did not show. check: `kl_base_trained`, `samples`, …"""

    check: str
    found: str
    expected: str


@dataclass(frozen=True)
class CellResult:
    """One row of the table.

    versions: of transformers, peft, trl, torch and python, as installed; as pinned where not installed.
    path: "fused" or "per-expert". orientation: "standard" or "swapped" on fused, None elsewhere.
    merged: per-expert projections (applied, attempted), as in merge_report.json's counts.expert.
    families, crossed: by model family, and by the cell that saved the adapter: "ok" or the reason why not.
    errors: by check, why a part that ran shows nothing, or what else makes it none of this cell.
    detail: one line for a row without figures (what pip said, which host). stages: seconds of each part.
    date: the day, in UTC, that a row is of which outlives its run: `2026-11-29`; else empty.
    source: of the checkout that ran, as cell.source names it; empty where none did.
    unmoved: how many of the samples the base says, too.
    """

    cell: str
    lane: str
    status: str
    versions: Mapping[str, str]
    path: str | None = None
    orientation: str | None = None
    merged: tuple[int, int] | None = None
    figures: Figures | None = None
    tests: Tests | None = None
    families: Mapping[str, str] = field(default_factory=dict)
    crossed: Mapping[str, str] = field(default_factory=dict)
    shortfalls: tuple[Shortfall, ...] = ()
    detail: str = ""
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    date: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    unmoved: int = 0

    def to_json(self) -> dict[str, Any]:
        """The document of CELL.json: figures and counts that were not taken are null.

        A figure that is no number ("nan", "inf") stands as a string: JSON has no such numbers.
        """
        figures, tests = self.figures, self.tests
        return {
            "schema": SCHEMA,
            "cell": self.cell,
            "lane": self.lane,
            "status": self.status,
            "versions": dict(self.versions),
            "path": self.path,
            "orientation": self.orientation,
            "merged": _pair(self.merged, "applied", "attempted"),
            **{name: None if figures is None else _number(getattr(figures, name)) for name in NUMBERS},
            "samples": _pair(None if figures is None else figures.samples, "matched", "total"),
            "tests": None if tests is None else {**asdict(tests), "failures": list(tests.failures)},
            "families": dict(self.families),
            "crossed": dict(self.crossed),
            "shortfalls": [asdict(shortfall) for shortfall in self.shortfalls],
            "detail": self.detail,
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "date": self.date,
            "errors": dict(self.errors),
            "source": self.source,
            "unmoved": self.unmoved,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CellResult:
        """Reads CELL.json; raises ValueError naming the key that is missing or wrong.

        The keys of ASIDE may be missing.
        """
        read = Reader({**ASIDE, **document})
        if read.whole("schema") != SCHEMA:
            raise _wrong("schema", document["schema"], str(SCHEMA))
        status = read.text("status")
        if status not in STATUSES:
            raise _wrong("status", status, f"one of {', '.join(STATUSES)}")
        return cls(
            cell=read.text("cell"),
            lane=read.text("lane"),
            status=status,
            versions=read.texts("versions"),
            path=read.optional("path", read.text),
            orientation=read.optional("orientation", read.text),
            merged=read.optional("merged", lambda key: read.pair(key, "applied", "attempted")),
            figures=read_figures(document),
            tests=read.optional("tests", lambda key: read_tests(read.mapping(key))),
            families=read.texts("families"),
            crossed=read.texts("crossed"),
            shortfalls=tuple(_shortfall(each) for each in read.mappings("shortfalls")),
            detail=read.text("detail"),
            seconds=read.number("seconds"),
            stages={stage: Reader(read.mapping("stages")).number(stage) for stage in read.mapping("stages")},
            date=read.text("date"),
            errors=read.texts("errors"),
            source=read.text("source"),
            unmoved=read.whole("unmoved"),
        )


def read_figures(document: Mapping[str, Any]) -> Figures | None:
    """The figures of a document that holds all of them, or null for each; ValueError on anything between."""
    read = Reader(document)
    keys = (*NUMBERS, "samples")
    absent = [key for key in keys if read.optional(key, lambda _: True) is None]
    if len(absent) == len(keys):
        return None
    if absent:
        raise _wrong(absent[0], None, "a figure, as for the others")
    return Figures(
        **{name: read.number(name) for name in NUMBERS}, samples=read.pair("samples", "matched", "total")
    )


def read_tests(document: Mapping[str, Any]) -> Tests:
    """The counts of `tests`; ValueError naming the key that is missing or wrong. `suite` may be missing."""
    read = Reader({"suite": 0, **document})
    skips = Reader(read.mapping("skips"))
    return Tests(
        passed=read.whole("passed"),
        failed=read.whole("failed"),
        skipped=read.whole("skipped"),
        skips={reason: skips.whole(reason) for reason in skips.document},
        failures=tuple(read.listed("failures", str)),
        suite=read.whole("suite"),
    )


def _shortfall(document: Mapping[str, Any]) -> Shortfall:
    read = Reader(document)
    return Shortfall(read.text("check"), read.text("found"), read.text("expected"))


def _pair(pair: tuple[int, int] | None, first: str, second: str) -> dict[str, int] | None:
    return None if pair is None else {first: pair[0], second: pair[1]}


def _number(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(value)


T = TypeVar("T")


def _wrong(key: str, found: object, expected: str) -> ValueError:
    return ValueError(f"{key}: found {found!r}, expected {expected}")


@dataclass(frozen=True)
class Reader:
    """Reads one JSON object; each method raises ValueError naming the key, what it found and expected."""

    document: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.document:
            raise ValueError(f"{key}: missing")
        return self.document[key]

    def _of(self, key: str, kind: type[T], expected: str) -> T:
        value = self[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _wrong(key, value, expected)
        return value

    def optional(self, key: str, reader: Callable[[str], T]) -> T | None:
        """What `reader` makes of the key, None where it is null."""
        return None if self[key] is None else reader(key)

    def text(self, key: str) -> str:
        """A string."""
        return self._of(key, str, "a string")

    def whole(self, key: str) -> int:
        """An integer."""
        return self._of(key, int, "an integer")

    def number(self, key: str) -> float:
        """A number, or one of the strings that stand for what JSON has no number for."""
        value = self[key]
        if value in ("nan", "inf", "-inf"):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(key, value, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise _wrong(key, f"a number of {len(str(value))} digits", "one that a float can hold") from error

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object."""
        return self._of(key, dict, "an object")

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        inner = Reader(self.mapping(key))
        return {name: inner.text(name) for name in inner.document}

    def listed(self, key: str, kind: type[T]) -> list[T]:
        """A list whose members are all of one kind."""
        values = self._of(key, list, "a list")
        wrong = [value for value in values if not isinstance(value, kind)]
        if wrong:
            raise _wrong(key, wrong[0], f"only {kind.__name__}")
        return values

    def mappings(self, key: str) -> list[dict[str, Any]]:
        """A list of objects."""
        return self.listed(key, dict)

    def pair(self, key: str, first: str, second: str) -> tuple[int, int]:
        """An object of two integers."""
        inner = Reader(self.mapping(key))
        some, all_of_them = inner.whole(first), inner.whole(second)
        if not 0 <= some <= all_of_them:
            raise _wrong(key, dict(inner.document), f"no more {first} than {second}")
        return some, all_of_them
