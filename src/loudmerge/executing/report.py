"""MergeReport <-> JSON, and its human summary."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from loudmerge import __version__
from loudmerge.errors import MergeRefused
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import CONFIG
from loudmerge.system import jsonfile

SCHEMA = 1
KEPT_WARNING = 0.95

_UNMEASURED: Mapping[str, Any] = {
    "delta_kept": None,
    "rounding": None,
    "verified": None,
    "seconds": None,
    "peak_rss_bytes": None,
}
"""What only a finished merge can say."""


class TensorKept(NamedTuple):
    """What one merged tensor keeps of its update, and how it was rounded: "mixed" where matrices differ."""

    tensor: str
    kept: float
    rounding: str


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, would do, or why it refused. `document` is the JSON of merge_report.json.

    Its fields are attributes, too: `report.counts["expert"]["applied"]`.
    details: of every merged tensor, in the plan's order; too long for the document.
    """

    document: Mapping[str, Any]
    details: tuple[TensorKept, ...] = ()

    def __getattr__(self, name: str) -> Any:
        # Not for what Python itself asks of an object that is not made yet, as copy does.
        if name.startswith("__") or name == "document" or name not in self.document:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.document[name]

    def to_json(self) -> dict[str, Any]:
        return dict(self.document)

    def summary(self) -> str:
        """A few plain lines for a person."""
        if self.document["refusal"]:
            return f"refused: {self.document['refusal']['message']}"
        return "\n".join(_summary(self.document))


@runtime_checkable
class HasDetails(Protocol):
    """The report of a merge, or a verification."""

    @property
    def details(self) -> Sequence[TensorKept]: ...

    def to_json(self) -> dict[str, Any]: ...

    def summary(self) -> str: ...


@dataclass(frozen=True)
class Detailed:
    """A result with its details."""

    result: HasDetails

    def to_json(self) -> dict[str, Any]:
        return {**self.result.to_json(), "details": [one._asdict() for one in self.result.details]}

    def summary(self) -> str:
        """The result's own lines, and one for each merged tensor."""
        lines = (f"  {one.kept:.4f}    {one.rounding:10} {one.tensor}" for one in self.result.details)
        return "\n".join([self.result.summary(), *lines])


def one_rounding(found: Collection[str]) -> str:
    """How a tensor was rounded, by the roundings of its matrices."""
    return next(iter(found)) if len(found) == 1 else "mixed"


def planned_report(
    plan: MergePlan,
    out: Path | None = None,
    *,
    seconds: float | None = None,
    peak_rss_bytes: int | None = None,
) -> MergeReport:
    """The report of a plan that was not executed. seconds, peak_rss_bytes: of making it, where measured."""
    measured = {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes}
    return MergeReport({**_document(plan, out, "planned"), **measured})


def merged_report(
    plan: MergePlan,
    out: Path,
    measured: Mapping[str, Any],
    details: Sequence[TensorKept] = (),
    named: tuple[str, str] | None = None,
) -> MergeReport:
    """The report of a finished merge.

    measured: delta_kept, rounding, files, verified, seconds, peak_rss_bytes. named: what base and adapter
    are, where their paths do not say it.
    """
    document = _document(plan, out, "merged", named)
    return MergeReport({**document, **measured}, tuple(details))


def refused_report(base: str, adapter: str, out: str | None, error: MergeRefused) -> MergeReport:
    """The report of a refusal: every key of the others', with null or nothing where nobody knows.

    base, adapter: as they were given; of local directories the configs are asked what they are.
    """
    config, trained = _fields(Path(base, CONFIG)), _fields(Path(adapter, ADAPTER_CONFIG))
    return MergeReport(
        {
            "schema": SCHEMA,
            "loudmerge": __version__,
            "status": "refused",
            "base": {"path": str(base), "model_type": _known(config, "model_type", str)},
            "adapter": {
                "path": str(adapter),
                "peft_version": _known(trained, "peft_version", str),
                "rank": _known(trained, "r", int),
            },
            "out": None if out is None else str(out),
            "options": None,
            "layout": {"orientation": None, "lora_b_layout": None, "evidence": []},
            "num_experts": None,
            "counts": {
                **{name: {"attempted": None, "applied": 0} for name in ("expert", "dense", "replaced")},
                "copied": None,
            },
            "adapter_tensors": {"total": None, "consumed": None},
            "config_edits": {},
            "notes": [],
            **_UNMEASURED,
            "files": [],
            "refusal": error.to_json(),
        }
    )


def _fields(config: Path) -> Mapping[str, Any]:
    """What a config says; nothing where it cannot be read, which may be what was refused."""
    try:
        value = jsonfile.parse(config.read_bytes()) if config.is_file() else None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _known(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    return value if type(value) is kind else None


def dump(report: MergeReport) -> bytes:
    """The content of merge_report.json."""
    return jsonfile.dump(report.to_json())


def _document(
    plan: MergePlan, out: Path | None, status: str, named: tuple[str, str] | None = None
) -> dict[str, Any]:
    counts = plan.counts
    base, adapter = named or (str(plan.base.path), str(plan.adapter.path))

    def done(attempted: int) -> dict[str, int]:
        return {"attempted": attempted, "applied": attempted if status == "merged" else 0}

    return {
        "schema": SCHEMA,
        "loudmerge": __version__,
        "status": status,
        "base": {"path": base, "model_type": plan.base.model_type},
        "adapter": {
            "path": adapter,
            "peft_version": plan.adapter.config.peft_version,
            "rank": plan.adapter.config.rank,
        },
        "out": None if out is None else str(out),
        "options": asdict(plan.options),
        "layout": {
            "orientation": plan.layout.orientation,
            "lora_b_layout": plan.layout.lora_b_layout,
            "evidence": [evidence.to_json() for evidence in plan.layout.evidence],
        },
        "num_experts": plan.num_experts,
        "counts": {
            "expert": done(counts.expert),
            "dense": done(counts.dense),
            "replaced": done(counts.replaced),
            "copied": counts.copied,
        },
        "adapter_tensors": {"total": len(plan.adapter.entries), "consumed": len(plan.consumed)},
        "config_edits": dict(plan.config_edits),
        "notes": list(plan.notes),
        **_UNMEASURED,
        "files": [],
        "refusal": None,
    }


def _summary(document: Mapping[str, Any]) -> list[str]:
    counts, layout = document["counts"], document["layout"]
    status = document["status"]
    lines = [f"{status}: {document['out'] or document['base']['path']}"]
    for name in ("expert", "dense", "replaced"):
        attempted = counts[name]["attempted"]
        if attempted:
            shown = f"{counts[name]['applied']}/{attempted}" if status == "merged" else str(attempted)
            lines.append(f"  {name:9} {shown}")
    lines.append(f"  {'copied':9} {counts['copied']}")
    lines.append(f"  layout    {layout['orientation']}, {layout['lora_b_layout']}")
    lines += [f"  note      {note}" for note in document["notes"]]
    if status == "merged":
        lines += _measured(document)
    return lines


def what_keeps(rounding: str) -> str:
    """The options that keep what this rounding swallows."""
    return "--dtype float32" if rounding == "auto" else "--rounding auto or --dtype float32"


def _measured(document: Mapping[str, Any]) -> list[str]:
    kept = document["delta_kept"]["overall"]
    lines = [f"  kept      {kept:.4f} of the update, after rounding"]
    if kept < KEPT_WARNING:
        least = document["delta_kept"]["least"]
        helps = what_keeps(document["options"]["rounding"])
        lines.append(
            f"  warning   rounding swallowed a part of the update (least kept: {least['kept']:.4f} in"
            f" {least['tensor']}); {helps} keeps it"
        )
    verified = "verified" if document["verified"] else "not verified"
    gib = document["peak_rss_bytes"] / 2**30
    lines.append(f"  {verified}, {document['seconds']:.1f} s, peak memory {gib:.2f} GiB")
    return lines
