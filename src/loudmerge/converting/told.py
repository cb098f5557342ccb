"""Where the LoRA of fused experts lies in an adapter whose base is not there: as the caller says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from loudmerge.converting.rewrite import PER_EXPERT, registration
from loudmerge.errors import MergeRefused, Problem
from loudmerge.evidence.hypotheses import FusedModule, FusedParameter
from loudmerge.evidence.packing import Packing
from loudmerge.evidence.weighing import FusedSite, fused_site, placed, weigh
from loudmerge.layout import Orientation
from loudmerge.planning.misplaced import not_fused
from loudmerge.planning.plan import Site
from loudmerge.reading.adapter import ONE_SAVE, Adapter, LoraPair
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.patterns import ranks


def told_sites(adapter: Adapter, orientation: str, packing: str, to: str) -> tuple[Site, ...]:
    """The fused sites of an adapter whose base is not there: its layout is what the caller says.

    Raises MergeRefused: what a merge refuses of them, and what only a base can tell.
    """
    modules: dict[str, list[LoraPair]] = defaultdict(list)
    for pair in adapter.pairs:
        # A target without its module, "down_proj" say, reads as one of any module; those of target_modules
        # are Linears, which have no such parameter.
        named = adapter.config.targeted_parameters(pair.module)
        if named and not adapter.config.targets_module(pair.module):
            modules[pair.module].append(pair)
    if not modules or orientation == "auto" or to == PER_EXPERT:
        hint = "Give --base."
        if modules and to != PER_EXPERT:
            hint = "Give --base, or say --orientation standard or swapped, as the adapter is now."
        raise MergeRefused(
            Problem("ambiguous-layout", str(adapter.path), "no base", "a base, whose shapes tell", hint)
        )
    places = [
        _told_parameter(adapter.config, pair, f"{module}.{leaf}")
        for module, pairs in modules.items()
        for leaf, pair in _by_leaf(adapter.config, module, pairs)
    ]
    decider = Packing(adapter.config, packing, [], weigh(fused_site(*place) for place in places).verdicts)
    packings = [decider.decide(*place) for place in places]
    if decider.problems:
        raise MergeRefused(decider.problems)
    return tuple(
        Site(
            pair,
            parameter.name,
            module.num_experts,
            parameter.rank,
            adapter.config.scaling_for(parameter.name, parameter.rank),
            True,
            Orientation(orientation),
            packed,
        )
        for (module, parameter, pair), packed in zip(places, packings, strict=True)
    )


def _by_leaf(config: AdapterConfig, module: str, pairs: Sequence[LoraPair]) -> Iterable[tuple[str, LoraPair]]:
    """The pair of each targeted parameter. Raises MergeRefused as `planning.sites` does of fused experts."""
    targeted = config.targeted_parameters(module)
    leaves = sorted(targeted, key=registration)
    outermost_first = sorted(pairs, key=lambda pair: pair.depth)
    problem = not_fused(module, outermost_first, targeted, use_dora=config.use_dora)
    if problem is not None:
        raise MergeRefused(problem)
    # The parameter registered first is wrapped first, innermost.
    return zip(leaves, reversed(outermost_first), strict=True)


def _told_parameter(
    config: AdapterConfig, pair: LoraPair, name: str
) -> tuple[FusedModule, FusedParameter, LoraPair]:
    """See `placed`. Raises MergeRefused `rank-mismatch` where the rank of the config does not fit."""
    rank, *others = ranks(config.raw, name)
    if others:
        found = f"a rank of {' or '.join(map(str, (rank, *others)))} for {name}, by the key of rank_pattern"
        hint = "Give --base, whose number of experts tells."
        raise MergeRefused(Problem("rank-mismatch", str(pair.a), found, "keys that say one thing", hint))
    experts, left = divmod(pair.a.shape[0], rank)
    if left or pair.b.shape[1] != pair.a.shape[0]:
        found = f"{pair.a.shape[0]} rows and {pair.b.shape[1]} columns"
        raise MergeRefused(
            Problem("rank-mismatch", f"{pair.a} and {pair.b}", found, f"a multiple of {rank}", ONE_SAVE)
        )
    return placed(FusedSite(name, name.rpartition(".")[2], pair, experts, rank))
