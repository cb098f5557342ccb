"""What an adapter is, before it is merged: sites, ranks, layout and its evidence, and what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loudmerge.errors import MergeRefused, plural
from loudmerge.evidence.weighing import UNREAD, FusedSite, Weighed, sites_of, weigh
from loudmerge.executing.predict import Prediction, predict
from loudmerge.executing.preflight import check_weights
from loudmerge.executing.report import planned_report
from loudmerge.inspecting.alone import UNDECIDED, LayoutFound, layout_alone
from loudmerge.inspecting.traceplot import terminal_lines
from loudmerge.merging.merge import Pathish, plan
from loudmerge.planning.options import Options, check_options
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.adapter import Adapter, LoraPair, read_adapter
from loudmerge.reading.names import template
from loudmerge.system.tensorfile import FileReader
from loudmerge.system.threads import cores

SHOWN_EVIDENCE = 8


@dataclass(frozen=True, order=True)
class Kind:
    """All sites that differ only in their indices. shape_a, shape_b: of their tensors.

    rank: for one expert, 0 where the config's does not fit. experts, parameter: of fused LoRA, else 0 and "".
    """

    module: str
    depth: int
    sites: int
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    extras: tuple[str, ...]
    rank: int
    experts: int
    parameter: str

    @property
    def rank_text(self) -> str:
        """For a person."""
        if not self.rank:
            return "rank unknown: the config's does not fit"
        fused = f" for each of {self.experts} experts of {self.parameter}" if self.experts else ""
        return f"rank {self.rank}{fused}"

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "depth": self.depth,
            "sites": self.sites,
            "lora_A": list(self.shape_a),
            "lora_B": list(self.shape_b),
            "extras": list(self.extras),
            "rank": self.rank or None,
            "experts": self.experts or None,
            "parameter": self.parameter or None,
        }


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    layout: of fused LoRA; what the adapter alone says, where there is no plan.
    plan: None without a base, or when the merge is refused.
    refusal: why the merge would be refused; without a base, as far as the packing of lora_B shows it.
    predicted: what the merge would keep of the update; None without a plan, or where it updates no matrix.
    weighed: what the weights say of how lora_B is packed. with_base: whether a base was given.
    """

    adapter: Adapter
    kinds: tuple[Kind, ...]
    layout: LayoutFound
    odd: tuple[str, ...]
    plan: MergePlan | None
    refusal: MergeRefused | None
    predicted: Prediction | None = None
    weighed: Weighed = UNREAD
    with_base: bool = False

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
            "layout": self.layout.to_json(),
            "odd": list(self.odd),
            "plan": None if self.plan is None else planned_report(self.plan).to_json(),
            "predicted": None if self.predicted is None else self.predicted.to_json(),
            "packing": self.weighed.to_json(),
            "refusal": None if refusal is None else refusal.to_json(),
        }

    @property
    def orientation_text(self) -> str:
        """For a person."""
        without = "" if self.with_base else " without --base"
        said = self.layout.orientation
        return f"orientation undecided{without}" if said == UNDECIDED else said

    def summary(self) -> str:
        """Plain lines for a person."""
        return "\n".join(_lines(self))


def inspect(
    adapter: Pathish, base: Pathish | None = None, *, orientation: str = "auto", lora_b_layout: str = "auto"
) -> Inspection:
    """Reads an adapter, and with `base` plans its merge and predicts what it keeps; nothing is written.

    Few weights are read, for the prediction and for how lora_B is packed. A merge that would be refused is
    part of the answer, not an error. Raises MergeRefused when the adapter itself cannot be read; ValueError
    for an option's value that does not exist, before anything is.
    """
    check_options(Options(orientation, lora_b_layout))
    found = read_adapter(Path(adapter))
    planned, refusal, predicted = None, None, None
    if base is not None:
        try:
            planned = plan(base, adapter, orientation=orientation, lora_b_layout=lora_b_layout)
            predicted = _predicted(planned)
        except MergeRefused as error:
            refusal = error
    odd = tuple(_odd(found, planned))
    if planned is not None:
        fused, weighed, layout = _fused(planned), planned.layout.weighed, LayoutFound.of(planned.layout)
    else:
        fused = sites_of(found)
        weighed = weigh(fused)
        layout = layout_alone(found, fused, weighed, orientation, lora_b_layout)
        if refusal is None and layout.problems:
            refusal = MergeRefused(layout.problems)
    return Inspection(
        found, _kinds(found, fused), layout, odd, planned, refusal, predicted, weighed, base is not None
    )


def _predicted(planned: MergePlan) -> Prediction | None:
    """As `predict`. Where that is refused for what the adapter holds, the tensor is named, as by a merge."""
    try:
        return predict(planned)
    except MergeRefused:
        with FileReader() as reader, ThreadPoolExecutor(cores()) as pool:
            check_weights(planned.adapter, planned.sites, reader, pool)
        raise


def _fused(planned: MergePlan) -> tuple[FusedSite, ...]:
    return tuple(
        FusedSite(site.parameter, site.parameter.rpartition(".")[2], site.pair, site.num_experts, site.rank)
        for site in planned.sites
        if site.num_experts
    )


def _kinds(adapter: Adapter, fused: Iterable[FusedSite]) -> tuple[Kind, ...]:
    # The plan's pairs were read apart from these.
    by_name = {site.pair.a.name: site for site in fused}
    counts = Counter(_kind(adapter, pair, by_name.get(pair.a.name)) for pair in adapter.pairs)
    return tuple(replace(kind, sites=count) for kind, count in sorted(counts.items()))


def _kind(adapter: Adapter, pair: LoraPair, site: FusedSite | None) -> Kind:
    rank = 0 if _unsplit(adapter, pair) else pair.a.shape[0]
    split = (rank, 0, "") if site is None else (site.rank, site.experts, site.leaf)
    return Kind(template(pair.module), pair.depth, 1, pair.a.shape, pair.b.shape, _extras(pair), *split)


def _unsplit(adapter: Adapter, pair: LoraPair) -> bool:
    """Whether a pair is of a targeted parameter, and has other rows than the config says for one matrix."""
    config = adapter.config
    leaves = config.targeted_parameters(pair.module)
    return bool(leaves) and pair.a.shape[0] not in {config.rank_for(f"{pair.module}.{one}") for one in leaves}


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
    yield from planned.notes if planned else ()


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
        yield f"  {kind.sites:6} x  {kind.module}{level}: {shapes}{extras}, {kind.rank_text}"
    for full in found.adapter.full:
        yield f"  replaces  {full.name} {list(full.entry.shape)}"
    for rows in found.adapter.rows:
        yield f"  rows      {len(rows.indices)} of {rows.module}"
    for number, text in enumerate(terminal_lines(found.weighed)):
        yield f"  {'packing' if not number else '':9} {text}"
    if found.refusal is not None:
        yield f"  refused   {found.refusal}".replace("\n", "\n            ")
    yield from _layout_lines(found)
    yield from _plan_lines(found)
    for text in found.odd:
        yield f"  odd       {text}"


def _layout_lines(found: Inspection) -> Iterable[str]:
    layout = found.layout
    yield f"  layout    {found.orientation_text}, {layout.lora_b_layout}"
    shown = [one for one in layout.evidence if one.source != "weights"]  # stands under "packing"
    for evidence in shown[:SHOWN_EVIDENCE]:
        site = f" ({evidence.site})" if evidence.site else ""
        yield f"            {evidence.source} says {evidence.says or 'nothing'}{site}: {evidence.detail}"
    if len(shown) > SHOWN_EVIDENCE:
        yield f"            … and {len(shown) - SHOWN_EVIDENCE} more"


def _plan_lines(found: Inspection) -> Iterable[str]:
    if found.plan is None:
        return
    counts = found.plan.counts
    yield (
        f"  touches   {plural(counts.expert, 'expert projection')}, {plural(counts.dense, 'dense weight')},"
        f" {counts.replaced} replaced, {counts.copied} copied"
    )
    if found.predicted is not None:
        yield from found.predicted.lines()
