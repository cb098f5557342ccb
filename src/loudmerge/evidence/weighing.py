"""Reads what is needed of an adapter's weights to tell how each lora_B is packed.

Some rows of each lora_B, those of some experts of each lora_A, in some of the layers: 6 MB and a quarter of a
second for a site of 128 experts of rank 32, less for a smaller one. The more sites, the surer, so more are
read until they settle it, or until no more could. A parameter is packed alike in all layers; its markers do
not tell layers apart either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from loudmerge.evidence.clustering import SiteTraces, Verdict, sampled_rows, site_traces, verdict
from loudmerge.evidence.hypotheses import FusedModule, FusedParameter
from loudmerge.reading.adapter import Adapter, LoraPair
from loudmerge.system.arrays import Floats, read_rows
from loudmerge.system.tensorfile import FileReader
from loudmerge.system.threads import cores, one_blas_thread

LAYERS = (2, 4, 8, 16)
"""How many layers are looked at, for each parameter of an experts module: the next number only where the
verdict is still open."""

T = TypeVar("T")

THREADS = 4
"""Sites that are looked at at a time, at most: each needs memory of its own."""


@dataclass(frozen=True)
class FusedSite:
    """A pair of fused expert LoRA. name: of its parameter, whose last part is leaf."""

    name: str
    leaf: str
    pair: LoraPair
    experts: int
    rank: int


@dataclass(frozen=True)
class Weighed:
    """What the weights say. verdicts: by parameter leaf. sites: those looked at."""

    verdicts: Mapping[str, Verdict]
    sites: tuple[tuple[FusedSite, SiteTraces], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "verdicts": {leaf: one.to_json() for leaf, one in self.verdicts.items()},
            "sites": [
                {"site": site.name, "columns": traces.columns, "pairs": traces.pairs}
                for site, traces in self.sites
            ],
        }


UNREAD = Weighed({}, ())
"""No weight was looked at."""


def fused_site(module: FusedModule, parameter: FusedParameter, pair: LoraPair) -> FusedSite:
    """One parameter of an experts module, and its pair."""
    return FusedSite(parameter.name, parameter.leaf, pair, module.num_experts, parameter.rank)


def placed(site: FusedSite) -> tuple[FusedModule, FusedParameter, LoraPair]:
    """What a merge would have placed, as far as the pair's own shapes show it: read as standard."""
    pair = site.pair
    parameter = FusedParameter(site.leaf, site.name, pair.b.shape[0], pair.a.shape[1], site.rank)
    return FusedModule(pair.module, site.experts, (pair,), (parameter,)), parameter, pair


def sites_of(adapter: Adapter) -> tuple[FusedSite, ...]:
    """The fused expert LoRA of an adapter whose base is not there: the config has the ranks.

    Which of a module's parameters a pair is for is guessed, the last by name innermost, as PEFT nests
    gate_up_proj and down_proj. What cannot be LoRA of two experts or more is left out.
    """
    by_module: dict[str, list[LoraPair]] = defaultdict(list)
    for pair in adapter.pairs:
        by_module[pair.module].append(pair)
    found = []
    for module, pairs in by_module.items():
        leaves = adapter.config.targeted_parameters(module)
        outermost_first = sorted(pairs, key=lambda pair: pair.depth)
        for leaf, pair in zip(leaves, outermost_first, strict=False):
            rank = adapter.config.rank_for(f"{module}.{leaf}")
            experts, left = divmod(pair.a.shape[0], rank)
            if experts > 1 and not left and pair.b.shape[1] == pair.a.shape[0]:
                found.append(FusedSite(f"{module}.{leaf}", leaf, pair, experts, rank))
    return tuple(found)


def weigh(sites: Iterable[FusedSite]) -> Weighed:
    """Looks at the sites whose packing matters: with one expert, or rank 1, both packings are the same."""
    by_leaf: dict[str, list[FusedSite]] = defaultdict(list)
    for site in sites:
        if site.experts > 1 and site.rank > 1:
            by_leaf[site.leaf].append(site)
    most = max(map(len, by_leaf.values()), default=0)
    found: dict[str, SiteTraces | None] = {}
    looked: tuple[tuple[FusedSite, SiteTraces], ...] = ()
    verdicts: dict[str, Verdict] = {}
    with FileReader() as reader:
        for layers in LAYERS:
            more = [one for same in by_leaf.values() for one in evenly(same, layers) if one.name not in found]
            found |= _looked_at(more, reader)
            in_order = ((one, found.get(one.name)) for same in by_leaf.values() for one in same)
            looked = tuple((one, traces) for one, traces in in_order if traces is not None)
            verdicts = combined(looked)
            growth = max(1.0, min(LAYERS[-1], most) / layers)
            if verdicts and not any(one.open(growth) for one in verdicts.values()):
                break
    return Weighed(verdicts, looked)


def _looked_at(sites: Sequence[FusedSite], reader: FileReader) -> dict[str, SiteTraces | None]:
    """By name; see `_traces`."""
    # Several sites at a time gain what several threads in each do not: their steps are small.
    with one_blas_thread(), ThreadPoolExecutor(cores(THREADS), "loudmerge-weigh") as pool:
        found = pool.map(partial(_traces, reader=reader), sites)
        return dict(zip((site.name for site in sites), found, strict=True))


def combined(looked: Sequence[tuple[FusedSite, SiteTraces]]) -> dict[str, Verdict]:
    """By leaf; of all leaves together where none says another packing than they all do."""
    by_leaf: dict[str, list[SiteTraces]] = defaultdict(list)
    for site, traces in looked:
        by_leaf[site.leaf].append(traces)
    alone = {leaf: verdict(traces) for leaf, traces in by_leaf.items()}
    together = verdict([traces for _, traces in looked])
    # What is exactly 0, as of a parameter that was not trained, leans to no side.
    leanings = {shown > 0 for one in alone.values() for shown in (one.columns, one.pairs) if shown}
    said = {one.says for one in alone.values()} - {None}
    if len(leanings) == 1 and together.says is not None and said <= {together.says}:
        return dict.fromkeys(alone, together)
    return alone


def evenly(sites: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread."""
    count = min(most, len(sites))
    return [sites[number * len(sites) // count] for number in range(count)]


def _traces(site: FusedSite, reader: FileReader) -> SiteTraces | None:
    """None for weights that are not finite, which a merge refuses, and that say nothing."""
    pair, total = site.pair, site.pair.b.shape[0]
    rows = sampled_rows(total)
    b = np.concatenate([read_rows(reader, pair.b, run.start, len(run)) for run in rows])
    lower = np.concatenate([np.arange(run.start, run.stop) for run in rows]) >= (total + 1) // 2
    if not np.isfinite(b).all():
        return None
    return site_traces(partial(_rows_of, site, reader), b, lower, site.experts, site.rank)


def _rows_of(site: FusedSite, reader: FileReader, experts: Sequence[int]) -> Floats:
    """The rows of lora_A of some experts."""
    return np.concatenate([read_rows(reader, site.pair.a, one * site.rank, site.rank) for one in experts])
