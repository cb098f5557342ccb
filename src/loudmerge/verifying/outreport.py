"""What OUT's merge_report.json says, against the plan and against what the verification measured."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from loudmerge.errors import MergeRefused, Mismatch
from loudmerge.executing.report import SCHEMA
from loudmerge.planning.options import Options, check_options
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.reading.sidefiles import REPORT, walk
from loudmerge.system.jsonfile import parse
from loudmerge.verifying.outfiles import TensorMismatch

KEPT_TOLERANCE = 1e-4
"""How far delta_kept may lie from what is recomputed, relative to the larger of it and 1. The merge sums in
float32: with updates from 1 down to 1e-10 of common ones, and every rounding, that was at most 1e-6."""

NO_UPDATE = 1e-25
"""A sum of squares under which the merge's float32 may have lost single squares, or holds its own errors."""

SHOWN = 300
"""Characters of a value that a mismatch shows: an OUT may have hundreds of files."""


class Recomputed(NamedTuple):
    """One merged tensor: the sums of (W' - W) dW and of dW dW, and its terms by the rule that holds.

    unsettled: how many of its terms the merge may have rounded by another rule that makes the same.
    """

    output: OutputTensor
    along: float
    total: float
    rounded: Mapping[str, int]
    unsettled: int = 0

    @property
    def kept(self) -> float:
        return self.along / self.total if self.total else 1.0


def read_report(file: Path) -> Mapping[str, Any] | None:
    """OUT's report, None where it has none. Raises Mismatch for what is no report."""
    if not file.is_file():
        return None
    try:
        report = parse(file.read_bytes())
    except ValueError as error:
        raise Mismatch(f"{file} is no report of a merge: {error}") from error
    if not isinstance(report, dict):
        raise Mismatch(f"{file} is no report of a merge: a JSON {type(report).__name__}")
    return report


def recorded_options(report: Mapping[str, Any] | None, file: Path) -> Options:
    """Those that OUT was merged with, by its report; another tool rounds to the nearest. Raises Mismatch."""
    if report is None:
        return Options(rounding="nearest")
    recorded = report.get("options", {})
    if not isinstance(recorded, dict):
        raise Mismatch(f"{file} is no report of a merge: its options are {recorded!r}")
    names = {field.name for field in fields(Options)}
    options = Options(**{name: str(value) for name, value in recorded.items() if name in names})
    try:
        check_options(options)
    except ValueError as error:
        raise Mismatch(f"{file} is no report of a merge: {error}") from error
    return options


def unreadable_so(options: Options, file: Path, refusal: MergeRefused) -> Mismatch:
    """Of a report whose orientation is none that the adapter can have been merged in."""
    said = _text(options.orientation)
    return Mismatch(f"{file}: options.orientation: found {said}, expected another: {refusal}")


def check_layout(plan: MergePlan, report: Mapping[str, Any], file: Path, asked: Iterable[str]) -> None:
    """Raises Mismatch where the plan reads the adapter otherwise than the merge did, by OUT's report.

    asked: the options of the layout that were given. What nobody asks for is not compared: the same adapter
    in another way of saving it has another layout.
    """
    said = _mapping(report.get("layout"))
    for name in asked:
        found, expected = said.get(name), getattr(plan.layout, name)
        if found != expected:
            option = f"--{name.replace('_', '-')}"
            raise Mismatch(
                f"{file}: found that the adapter was read as {_text(found)}, expected {_text(expected)}, as "
                f"{option} says. Leave {option} out to check the merge that the report tells of."
            )


def check_status(report: Mapping[str, Any]) -> Iterator[TensorMismatch]:
    """Yields the status of a report that is not that of a merge: OUT is there."""
    for name, value in {"status": "merged", "refusal": None}.items():
        if report.get(name) != value:
            yield _mismatch(name, report.get(name), value)


def check_fields(plan: MergePlan, report: Mapping[str, Any]) -> Iterator[TensorMismatch]:
    """Yields what a report says of schema, options, base and adapter, and the plan says otherwise.

    Of what nobody can recompute, such as the seconds, that it is of the right kind.
    """
    expected: dict[str, Any] = {
        "schema": SCHEMA,
        "options": asdict(recorded_options(report, Path(REPORT))),
        "base.model_type": plan.base.model_type,
        "adapter.rank": plan.adapter.config.rank,
    }
    if _names_adapter(plan, report):
        expected["adapter.peft_version"] = plan.adapter.config.peft_version
        expected["config_edits"] = dict(plan.config_edits)
        expected |= {f"layout.{name}": getattr(plan.layout, name) for name in _LAYOUTS}
    for path, value in expected.items():
        found = _at(report, path)
        if not _same(found, value):
            yield _mismatch(path, found, value)
    for path, (fits, kind) in _KINDS.items():
        found = _at(report, path)
        if path not in expected and not fits(found):
            yield _mismatch(path, found, kind)


def check_counts(plan: MergePlan, report: Mapping[str, Any], out: Path) -> Iterator[TensorMismatch]:
    """Yields what a report says of counts and files, and the plan, or OUT's directory, says otherwise.

    Another way of saving the same adapter has another number of tensors, and a base may have lost a file
    that no loader reads since: of these the report need only be of one mind.
    """
    expected = _counted(plan, report)
    for name, value in expected.items():
        if not _same(report.get(name), value):
            yield _mismatch(name, report.get(name), value)
    named = report.get("files")
    files = named if isinstance(named, list) else []
    unnamed = sorted(set(plan.files).difference(map(str, files)))
    # By what is there: a name may be longer than one that a directory can be asked for, or lead out of OUT.
    there = {path.relative_to(out).as_posix() for path in walk(out) if path.is_file()}
    gone = [name for name in files if not isinstance(name, str) or name not in there]
    if unnamed or gone:
        yield _mismatch("files", files, f"those of OUT; not named: {unnamed}, not there: {gone}")


def _counted(plan: MergePlan, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the counts have to be; those of an adapter that is saved otherwise, as far as they may be so."""
    counts = {name: getattr(plan.counts, name) for name in ("expert", "dense", "replaced")}
    done: dict[str, Any] = {name: {"attempted": count, "applied": count} for name, count in counts.items()}
    copied = plan.counts.copied
    tensors = {"total": len(plan.adapter.entries), "consumed": len(plan.consumed)}
    if not _names_adapter(plan, report):
        said = _mapping(report.get("counts"))
        replaced, others = _mapping(said.get("replaced")), said.get("copied")
        if _agree(replaced, "attempted", "applied") and type(others) is int:
            # A tensor that is replaced is no longer copied, unless something else is for it, too.
            more = replaced["applied"] - counts["replaced"]
            if min(0, more) <= copied - others <= max(0, more) and 0 <= others <= len(plan.outputs):
                done["replaced"], copied = replaced, others
        if _agree(report.get("adapter_tensors"), "total", "consumed"):
            tensors = report["adapter_tensors"]
    return {
        "num_experts": plan.num_experts,
        "counts": {**done, "copied": copied},
        "adapter_tensors": tensors,
    }


def _names_adapter(plan: MergePlan, report: Mapping[str, Any]) -> bool:
    """Whether the merge was of the directory that the plan reads, and not of the adapter saved elsewhere."""
    said = _at(report, "adapter.path")
    return isinstance(said, str) and Path.cwd() / said == Path.cwd() / plan.adapter.path


def check_measured(
    plan: MergePlan, report: Mapping[str, Any], merged: Sequence[Recomputed]
) -> Iterator[TensorMismatch]:
    """Yields what a report says of rounding and delta_kept, and OUT's tensors, which are right, do not."""
    rounded, unsettled = Counter[str](), 0
    for one in merged:
        unsettled += one.unsettled if plan.rounding == "auto" else 0
        for rule, count in one.rounded.items():
            rounded[_recorded_as(rule, plan.rounding, one.output)] += count
    rounded = +rounded
    if not _may_be(report.get("rounding"), rounded, unsettled):
        yield _mismatch("rounding", report.get("rounding"), dict(sorted(rounded.items())))
    if all(one.output.dora is None and one.output.token_rows is None for one in merged):
        # Else the merge weighs other differences: float32 ones, or those of rows that are replaced.
        yield from _check_kept(report.get("delta_kept"), merged)


def _recorded_as(rule: str, rounding: str, output: OutputTensor) -> str:
    """What the merge calls a rule that holds: the one that was asked for, also where it is the nearest."""
    if output.dora is not None:
        return "nearest"
    if rounding == "balanced":
        return output.balanced
    return rule if rounding == "auto" else rounding


def _may_be(recorded: Any, expected: Mapping[str, int], unsettled: int) -> bool:
    """Whether these are the counts: `unsettled` of the terms may have been rounded by another rule."""
    if recorded == expected:
        return True
    if not isinstance(recorded, dict):
        return False
    if not all(type(count) is int and count > 0 for count in recorded.values()):
        return False
    known = recorded.keys() <= {"nearest", "balanced", "stochastic"}
    apart = sum(abs(recorded.get(rule, 0) - expected.get(rule, 0)) for rule in {*recorded, *expected})
    return known and apart <= 2 * unsettled and sum(recorded.values()) == sum(expected.values())


def _check_kept(recorded: Any, merged: Sequence[Recomputed]) -> Iterator[TensorMismatch]:
    said = _mapping(recorded)
    total = sum(one.total for one in merged)
    overall = sum(one.along for one in merged) / total if total else 1.0
    if (total >= NO_UPDATE or not merged) and not _close(said.get("overall"), overall):
        yield _mismatch("delta_kept.overall", said.get("overall"), overall)
    least = min((one for one in merged if one.total >= NO_UPDATE), key=lambda one: one.kept, default=None)
    found = _mapping(said.get("least"))
    named = next((one for one in merged if one.output.key == found.get("tensor")), None)
    if named is None:
        if merged or said.get("least") is not None:
            yield _mismatch("delta_kept.least", said.get("least"), least and least.output.key)
        return
    if named.total < NO_UPDATE:
        return  # What the merge found of it may be anything, also less than what the others keep.
    for one in (named, least):
        if one is not None and not _close(found.get("kept"), one.kept):
            expected = {"tensor": one.output.key, "kept": one.kept}
            yield _mismatch("delta_kept.least", said.get("least"), expected)
            return


def _agree(said: Any, *names: str) -> bool:
    """Whether all of these have one number, and there is nothing else."""
    held = _mapping(said)
    return held.keys() == set(names) and all(map(_is_whole, held.values())) and len({*held.values()}) == 1


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _at(report: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    value: Any = report
    for name in path.split("."):
        value = _mapping(value).get(name)
    return value


def _same(found: Any, expected: Any) -> bool:
    """As JSON, where true is not 1, and 4.0 not 4."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_evidence(value: Any) -> bool:
    """A list of `Evidence`, as JSON."""
    texts = ("source", "site", "says", "detail")
    return isinstance(value, list) and all(
        _mapping(one).keys() == {*texts, "confidence"}
        and all(isinstance(one[name], str) for name in texts)
        and type(one["confidence"]) in (int, float)
        and 0 <= one["confidence"] <= 1
        for one in value
    )


def _is_notes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _close(recorded: Any, expected: float) -> bool:
    if type(recorded) not in (int, float):
        return False
    try:
        apart = abs(float(recorded) - expected)
    except OverflowError:  # a JSON integer may be larger than any float
        return False
    return apart <= KEPT_TOLERANCE * max(1.0, abs(expected))


def _mismatch(name: str, found: Any, expected: Any) -> TensorMismatch:
    detail = f"{name}: found {_text(found)}, expected {_text(expected)}"
    return TensorMismatch(REPORT, REPORT, "report", detail)


def _text(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "orientation": ("standard", "swapped", "mixed", "none"),
    "lora_b_layout": ("rank_major", "grouped_by_expert", "mixed", "none"),
}
"""What a report may say of the layout: the names of one, or that modules differ, or that none is fused."""

_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "base.path": (_is_text, "a path or name"),
    "adapter.path": (_is_text, "a path or name"),
    "adapter.peft_version": (lambda value: value is None or _is_text(value), "a version or null"),
    "out": (_is_text, "a path or name"),
    **{
        f"layout.{name}": (names.__contains__, f"one of {', '.join(names)}")
        for name, names in _LAYOUTS.items()
    },
    "layout.evidence": (_is_evidence, "a list of what spoke for it: source, site, says, confidence, detail"),
    "config_edits": (lambda value: isinstance(value, dict), "an object"),
    "notes": (_is_notes, "a list of texts"),
    "verified": (lambda value: isinstance(value, bool), "true or false"),
    "seconds": (_is_seconds, "a number of seconds"),
    "peak_rss_bytes": (_is_whole, "a number of bytes"),
}
"""What the fields that a merge alone can know have to be, and how that is said."""
