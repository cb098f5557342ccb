"""What an adapter is, before it is merged: sites, ranks, layout and its evidence, and what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loudmerge.adapter import Adapter, LoraPair, read_adapter
from loudmerge.errors import MergeRefused
from loudmerge.merge import Pathish, plan
from loudmerge.names import template
from loudmerge.plan import MergePlan
from loudmerge.predict import Prediction, predict
from loudmerge.report import planned_report
from loudmerge.traceplot import terminal_lines
from loudmerge.weighing import UNREAD, Weighed, sites_of, weigh

SHOWN_EVIDENCE = 8


@dataclass(frozen=True)
class Kind:
    """All sites that differ only in their indices. shape_a, shape_b: of their tensors."""

    module: str
    depth: int
    sites: int
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    extras: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "depth": self.depth,
            "sites": self.sites,
            "lora_A": list(self.shape_a),
            "lora_B": list(self.shape_b),
            "extras": list(self.extras),
        }


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    plan: None without a base, or when the merge is refused; then `refusal` says why.
    predicted: what the merge would keep of the update; None without a plan, or where it updates no matrix.
    weighed: what the weights say of how lora_B is packed.
    """

    adapter: Adapter
    kinds: tuple[Kind, ...]
    odd: tuple[str, ...]
    plan: MergePlan | None
    refusal: MergeRefused | None
    predicted: Prediction | None = None
    weighed: Weighed = UNREAD

    def to_json(self) -> dict[str, Any]:
        config = self.adapter.config
        refusal = self.refusal
        return {
            "schema": 1,
            "adapter": {
                "path": str(self.adapter.path),
                "peft_version": config.peft_version,
                "rank": config.rank,
                "alpha": config.alpha,
                "use_rslora": config.use_rslora,
                "target_parameters": sorted(config.target_parameters),
                "tensors": len(self.adapter.entries),
                "bytes": sum(entry.nbytes for entry in self.adapter.entries.values()),
            },
            "sites": [kind.to_json() for kind in self.kinds],
            "full": [full.name for full in self.adapter.full],
            "token_rows": {rows.module: len(rows.indices) for rows in self.adapter.rows},
            "odd": list(self.odd),
            "plan": None if self.plan is None else planned_report(self.plan).to_json(),
            "predicted": None if self.predicted is None else self.predicted.to_json(),
            "packing": self.weighed.to_json(),
            "refusal": None
            if refusal is None
            else {
                "code": refusal.code,
                "where": refusal.where,
                "hint": refusal.hint,
                "message": str(refusal),
            },
        }

    def summary(self) -> str:
        """Plain lines for a person."""
        return "\n".join(_lines(self))


def inspect(
    adapter: Pathish, base: Pathish | None = None, *, orientation: str = "auto", lora_b_layout: str = "auto"
) -> Inspection:
    """Reads an adapter, and with `base` plans its merge and predicts what it keeps; nothing is written.

    Few weights are read, for the prediction and for how lora_B is packed. A merge that would be refused is
    part of the answer, not an error. Raises MergeRefused when the adapter itself cannot be read.
    """
    found = read_adapter(Path(adapter))
    planned, refusal, predicted = None, None, None
    if base is not None:
        try:
            planned = plan(base, adapter, orientation=orientation, lora_b_layout=lora_b_layout)
            predicted = predict(planned)
        except MergeRefused as error:
            refusal = error
    odd = tuple(_odd(found, planned))
    weighed = planned.layout.weighed if planned is not None else weigh(sites_of(found))
    return Inspection(found, _kinds(found.pairs), odd, planned, refusal, predicted, weighed)


def _kinds(pairs: Iterable[LoraPair]) -> tuple[Kind, ...]:
    counts = Counter(
        (template(pair.module), pair.depth, pair.a.shape, pair.b.shape, _extras(pair)) for pair in pairs
    )
    return tuple(
        Kind(module, depth, sites, shape_a, shape_b, extras)
        for (module, depth, shape_a, shape_b, extras), sites in sorted(counts.items())
    )


def _extras(pair: LoraPair) -> tuple[str, ...]:
    named: Mapping[str, object] = {"bias": pair.bias, "DoRA": pair.magnitude, "embedding": pair.embedding}
    return tuple(name for name, value in named.items() if value)


def _odd(adapter: Adapter, planned: MergePlan | None) -> Iterable[str]:
    config = adapter.config
    if config.target_parameters and config.peft_version is None:
        yield "no peft_version: PEFT up to 0.17, or another tool, wrote it"
    if config.raw.get("lora_dropout") and config.target_parameters:
        yield "lora_dropout on fused experts: PEFT itself would not load it again"
    for name, value in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if value:
            yield f"{name}: {dict(value)}"
    if planned is None:
        return
    yield from planned.notes
    for evidence in planned.layout.evidence:
        if evidence.source == "peft_version" and not evidence.says:
            yield evidence.detail


def _lines(found: Inspection) -> Iterable[str]:
    config = found.adapter.config
    scaling = "alpha / sqrt(rank)" if config.use_rslora else "alpha / rank"
    yield f"{found.adapter.path}"
    yield f"  PEFT      {config.peft_version or 'version not recorded'}"
    yield f"  rank      {config.rank}, alpha {config.alpha}, scaled by {scaling}"
    yield f"  tensors   {len(found.adapter.entries)}"
    for kind in found.kinds:
        level = f" (base_layer x{kind.depth})" if kind.depth else ""
        extras = f" with {', '.join(kind.extras)}" if kind.extras else ""
        shapes = f"A {list(kind.shape_a)} B {list(kind.shape_b)}"
        yield f"  {kind.sites:6} x  {kind.module}{level}: {shapes}{extras}"
    for full in found.adapter.full:
        yield f"  replaces  {full.name} {list(full.entry.shape)}"
    for rows in found.adapter.rows:
        yield f"  rows      {len(rows.indices)} of {rows.module}"
    for number, text in enumerate(terminal_lines(found.weighed)):
        yield f"  {'packing' if not number else '':9} {text}"
    yield from _plan_lines(found)
    for text in found.odd:
        yield f"  odd       {text}"


def _plan_lines(found: Inspection) -> Iterable[str]:
    if found.refusal is not None:
        yield f"  refused   {found.refusal}"
    if found.plan is None:
        return
    layout, counts = found.plan.layout, found.plan.counts
    yield f"  layout    {layout.orientation}, {layout.lora_b_layout}"
    for evidence in layout.evidence[:SHOWN_EVIDENCE]:
        site = f" ({evidence.site})" if evidence.site else ""
        yield f"            {evidence.source} says {evidence.says or 'nothing'}{site}: {evidence.detail}"
    if len(layout.evidence) > SHOWN_EVIDENCE:
        yield f"            … and {len(layout.evidence) - SHOWN_EVIDENCE} more"
    yield (
        f"  touches   {counts.expert} expert projections, {counts.dense} dense weights,"
        f" {counts.replaced} replaced, {counts.copied} copied"
    )
    if found.predicted is not None:
        yield from found.predicted.lines()
