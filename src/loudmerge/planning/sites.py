"""The adapter's LoRA pairs, placed: which weight of the base each one updates.

Names come from memory (adapter) and disk (checkpoint) and meet in the family's canonical names; shapes are
checked at the meeting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loudmerge.errors import WHICH_BASE, MergeRefused, Problem
from loudmerge.evidence.hypotheses import FusedModule, FusedParameter
from loudmerge.layout import Axes, Orientation, PairShape, Span
from loudmerge.planning.conv1d import has_conv1d, is_conv1d
from loudmerge.planning.misplaced import (
    dora_on_a_part,
    dora_on_experts,
    linear_or_conv1d,
    missing_base,
    mixed,
    nested,
    no_matrix,
    no_projection,
    no_target_parameters,
    not_fused,
    not_targeted,
    several_counts,
    unknown_family,
)
from loudmerge.reading.adapter import Adapter, LoraPair
from loudmerge.reading.adapter_config import OWN_RANK
from loudmerge.reading.experts import ExpertGroup, Experts, Slot, split_expert_name
from loudmerge.reading.families import FUSED_LEAVES, PROJECTION_LEAVES, Family
from loudmerge.reading.names import Names
from loudmerge.system.tensorfile import MERGEABLE_CODES, TensorEntry


@dataclass(frozen=True)
class Placed:
    """A dense pair and the weight it updates. slot: where that weight lies (a whole tensor, or a part).

    rank, scaling: as the config gives them. expert: whether the weight is one expert's projection.
    wrapped: whether `target_parameters` names the weight, so that PEFT wraps the parameter, not the module.
    """

    pair: LoraPair
    parameter: str
    rank: int
    scaling: float
    slot: Slot
    expert: bool
    wrapped: bool


@dataclass(frozen=True)
class Target:
    """Where one fused parameter's experts lie: (expert, rows of its matrix, the slot they go to)."""

    axes: Axes
    parts: tuple[tuple[int, Span, Slot], ...]


@dataclass(frozen=True)
class Placement:
    """All pairs of an adapter, placed. `targets` is by (module, parameter leaf)."""

    dense: tuple[Placed, ...]
    modules: tuple[FusedModule, ...]
    targets: Mapping[tuple[str, str], Target]
    untied_head: tuple[LoraPair, ...]
    num_experts: int | None


def place(
    adapter: Adapter, names: Names, experts: Experts, family: Family, base_config: Mapping[str, Any]
) -> tuple[Placement, list[Problem]]:
    """Places every pair; what cannot be placed is a problem, and all problems are returned together."""
    placer = _Placer(adapter, names, experts, family, base_config)
    by_module: dict[str, list[LoraPair]] = defaultdict(list)
    for pair in adapter.pairs:
        by_module[pair.module].append(pair)
    for module, pairs in by_module.items():
        try:
            placer.place(module, sorted(pairs, key=lambda pair: pair.depth))
        except MergeRefused as refusal:
            placer.problems += refusal.problems
    result = Placement(
        tuple(placer.dense),
        tuple(placer.modules),
        placer.targets,
        tuple(placer.untied_head),
        max(placer.counts, default=None),
    )
    return result, placer.problems


class _Placer:
    def __init__(
        self,
        adapter: Adapter,
        names: Names,
        experts: Experts,
        family: Family,
        base_config: Mapping[str, Any],
    ) -> None:
        self._adapter = adapter
        self._base_config = base_config
        self._config = adapter.config
        self._names = names
        self._experts = experts
        self._family = family
        # A resized embedding is in the adapter; its LoRA has the new size.
        self._full = {family.canonical(full.name): full.entry for full in adapter.full}
        self.problems: list[Problem] = []
        self.dense: list[Placed] = []
        self.modules: list[FusedModule] = []
        self.targets: dict[tuple[str, str], Target] = {}
        self.untied_head: list[LoraPair] = []
        self.counts: set[int] = set()

    def place(self, module: str, pairs: Sequence[LoraPair]) -> None:
        """pairs: all pairs of this module, outermost wrapper first."""
        leaves = self._leaves(module, len(pairs))
        fused = [leaf for leaf in leaves if self._is_fused(f"{module}.{leaf}")]
        lacking = [leaf for leaf in leaves if leaf not in fused and not self._names.place(f"{module}.{leaf}")]
        if lacking:
            name = f"{module}.{lacking[0]}"
            raise MergeRefused(missing_base(str(pairs[0].a), f"a LoRA for {name}", name))
        if fused:
            self._place_fused(module, fused, leaves, pairs)
        elif len(pairs) > 1 or pairs[0].depth:
            raise MergeRefused(nested(pairs))
        elif leaves and not pairs[0].embedding:
            self._place_dense(pairs[0], f"{module}.{leaves[0]}", f"{module}.{leaves[0]}")
        elif self._config.never_targets_module(module):
            raise MergeRefused(not_targeted(pairs[0]))
        else:
            self._place_dense(pairs[0], f"{module}.weight", module)

    def _leaves(self, module: str, count: int) -> list[str]:
        """The parameters of the module that are targeted. count: of its pairs.

        A short target such as "down_proj" means existing parameters, and a Linear has no such one.
        """
        leaves = self._config.targeted_parameters(module)
        if self._names.place(f"{module}.weight") is None:
            # target_parameters may name what other experts have: gate_up_proj, where these have no gates.
            there = [leaf for leaf in leaves if not self._absent(f"{module}.{leaf}")]
            return there if len(there) == count else list(leaves)
        return [leaf for leaf in leaves if leaf == "weight" or self._names.place(f"{module}.{leaf}")]

    def _absent(self, name: str) -> list[str]:
        """The projections that a fused parameter of this name has, and the base's experts lack."""
        group, expert, leaf = split_expert_name(self._family.canonical(name)) or ("", None, "")
        if expert is not None or group not in self._experts:
            return []
        return [one for one in FUSED_LEAVES[leaf] if one not in self._experts.projections(group)]

    def _is_fused(self, name: str) -> bool:
        parts = split_expert_name(self._family.canonical(name))
        if parts is not None and parts[1] is None and parts[0] in self._experts:
            return True
        entry = self._names.find(name)
        return entry is not None and len(entry.shape) == 3

    def _place_fused(
        self, module: str, fused: Sequence[str], leaves: Sequence[str], pairs: Sequence[LoraPair]
    ) -> None:
        if len(fused) != len(leaves):
            raise MergeRefused(mixed(pairs[0], leaves))
        problem = not_fused(module, pairs, fused, use_dora=self._config.use_dora)
        if problem is not None:
            raise MergeRefused(problem)
        parameters = []
        counts = set()
        for leaf in fused:
            parameter, target, count = self._target(module, leaf, pairs)
            parameters.append(parameter)
            counts.add(count)
            self.targets[module, leaf] = target
        if len(counts) != 1:
            raise MergeRefused(several_counts(module, counts))
        self.counts |= counts
        count = counts.pop()
        orientations = frozenset(Orientation) if count > 1 else self._family.single_expert_orientations()
        self.modules.append(FusedModule(module, count, tuple(pairs), tuple(parameters), orientations))

    def _target(
        self, module: str, leaf: str, pairs: Sequence[LoraPair]
    ) -> tuple[FusedParameter, Target, int]:
        name = f"{module}.{leaf}"
        group_name, _, canonical_leaf = split_expert_name(self._family.canonical(name)) or ("", None, "")
        if group_name not in self._experts or not self._family.known:
            return self._same_on_disk(name, leaf, pairs)
        group = self._experts.group(group_name)
        rank = self._rank_of(name, pairs, group.num_experts)
        projections = FUSED_LEAVES[canonical_leaf]
        if absent := self._absent(name):
            raise MergeRefused(no_projection(name, absent[0], group))
        outs = [group.dims[projection][0] for projection in projections]
        into = group.dims[projections[0]][1]
        spans = self._memory_spans(outs)
        parts = tuple(
            (expert, span, group.slots[projection, expert])
            for projection, span in zip(projections, spans, strict=True)
            for expert in range(group.num_experts)
        )
        for _, _, slot in parts:
            require_float(slot.entry)
        out = sum(outs)
        d1, d2 = (out, into) if self._family.axes is Axes.OUT_IN else (into, out)
        return FusedParameter(leaf, name, d1, d2, rank), Target(self._family.axes, parts), group.num_experts

    def _memory_spans(self, outs: Sequence[int]) -> list[Span]:
        if len(outs) == 1:
            return [Span(0, outs[0])]
        if self._family.interleaved:
            return [Span(0, outs[0], 2), Span(1, outs[1], 2)]
        return [Span(0, outs[0]), Span(outs[0], outs[1])]

    def _rank_of(self, name: str, pairs: Sequence[LoraPair], experts: int) -> int:
        shapes = (PairShape.of(pair.a.shape, pair.b.shape) for pair in pairs)
        return self._config.rank_for(name, {shape.rank(experts) for shape in shapes})

    def _same_on_disk(
        self, name: str, leaf: str, pairs: Sequence[LoraPair]
    ) -> tuple[FusedParameter, Target, int]:
        """A fused parameter that is on disk as it is in memory; gate and up need not be told apart."""
        entry = self._names.find(name)
        if entry is None:
            raise MergeRefused(unknown_family(name, pairs[0]))
        require_float(entry)
        count, d1, d2 = entry.shape
        rank, span = self._rank_of(name, pairs, count), Span(0, d1)
        parts = tuple((expert, span, Slot(entry, expert, Axes.OUT_IN, span)) for expert in range(count))
        return FusedParameter(leaf, name, d1, d2, rank), Target(Axes.OUT_IN, parts), count

    def _place_dense(self, pair: LoraPair, name: str, rank_name: str) -> None:
        parts = split_expert_name(self._family.canonical(name))
        rank = self._config.rank_for(rank_name, pair.a.shape[:1])
        if parts is not None and parts[1] is not None and parts[0] in self._experts:
            expert, slot = True, self._expert_slot(pair, self._experts.group(parts[0]), parts[1], parts[2])
        elif (place := self._names.place(name)) is not None:
            expert, slot = False, self._dense_slot(*place, pair, wrapped=name == rank_name)
        else:
            self._missing(pair, name)
            return
        scaling = self._config.scaling_for(rank_name, rank)
        placed = Placed(pair, name, rank, scaling, slot, expert, name == rank_name)
        problem = dense_problem(placed)
        if problem is not None:
            raise MergeRefused(problem)
        self.dense.append(placed)

    def _expert_slot(self, pair: LoraPair, group: ExpertGroup, expert: int, leaf: str) -> Slot:
        self.counts.add(group.num_experts)
        slot = group.slots.get((PROJECTION_LEAVES[leaf], expert))
        if slot is None:
            raise MergeRefused(
                Problem(
                    "missing-base-tensor",
                    str(pair.a),
                    f"a LoRA for {PROJECTION_LEAVES[leaf]} of expert {expert}",
                    f"experts 0 to {group.num_experts - 1} with {', '.join(sorted(group.dims))}",
                    WHICH_BASE,
                )
            )
        require_float(slot.entry)
        if pair.magnitude is not None and slot.index >= 0:
            raise MergeRefused(dora_on_experts(pair))
        return slot

    def _dense_slot(self, entry: TensorEntry, rows: Span | None, pair: LoraPair, *, wrapped: bool) -> Slot:
        require_float(entry)
        final = self._full.get(self._family.canonical(entry.name), entry)
        for tensor in (entry, final):
            if len(tensor.shape) != 2:
                raise MergeRefused(no_matrix(tensor, pair))
        if pair.embedding and pair.magnitude is not None:
            raise MergeRefused(
                Problem(
                    "unsupported-adapter",
                    str(pair.magnitude),
                    "DoRA on an embedding",
                    "plain LoRA",
                    "Merge it with PEFT's merge_and_unload.",
                )
            )
        if rows is not None:
            if pair.magnitude is not None:
                raise MergeRefused(dora_on_a_part(pair, entry))
            return Slot(entry, -1, Axes.OUT_IN, rows)
        axes = Axes.OUT_IN if pair.embedding or wrapped else self._axes(entry.name, final, pair)
        return Slot(entry, -1, axes, Span(0, final.shape[1] if axes is Axes.IN_OUT else final.shape[0]))

    def _axes(self, name: str, entry: TensorEntry, pair: LoraPair) -> Axes:
        """(out, in), but for a Conv1D. name: on disk. entry: the weight in the size that the LoRA has."""
        flagged = self._config.fan_in_fan_out
        if entry.shape[0] != entry.shape[1]:
            may = has_conv1d(self._base_config, name)
            fits = entry.shape == (pair.a.shape[1], pair.b.shape[0])
            return Axes.IN_OUT if fits and (may or (may is None and flagged)) else Axes.OUT_IN
        conv1d = is_conv1d(self._base_config, name, pair.module, flagged=flagged)
        if conv1d is None:
            raise MergeRefused(linear_or_conv1d(entry, pair, known=not flagged))
        return Axes.IN_OUT if conv1d else Axes.OUT_IN

    def _missing(self, pair: LoraPair, name: str) -> None:
        canonical = self._family.canonical(name)
        if canonical == "lm_head.weight":
            self.untied_head.append(pair)
        elif canonical.rpartition(".")[0] in self._experts:
            raise MergeRefused(no_target_parameters(pair))
        else:
            raise MergeRefused(missing_base(str(pair.a), f"a LoRA for {name}", name))


def require_float(entry: TensorEntry) -> None:
    """Raises MergeRefused `unsupported-base` for a weight that float32 arithmetic cannot update."""
    problem = wrong_dtype(entry, MERGEABLE_CODES)
    if problem is not None:
        raise MergeRefused(problem)
    if 0 in entry.shape:
        raise MergeRefused(
            Problem(
                "unsupported-base",
                str(entry),
                f"a weight of shape {list(entry.shape)}",
                "at least one number to update",
                WHICH_BASE,
            )
        )


def wrong_dtype(entry: TensorEntry, dtypes: Collection[str]) -> Problem | None:
    """A problem where a base's tensor, which is to be changed, is of none of these dtypes."""
    if entry.dtype in dtypes:
        return None
    return Problem(
        "unsupported-base",
        str(entry),
        f"a weight of dtype {entry.dtype}",
        f"one of {', '.join(sorted(dtypes))}",
        "Merge into the unquantised checkpoint, in one of these dtypes.",
    )


def dense_problem(placed: Placed) -> Problem | None:
    """Whether the shapes of a dense pair fit its weight: (out, in) with A (rank, in), B (out, rank)."""
    pair, slot = placed.pair, placed.slot
    rank = pair.a.shape[0]
    if rank != pair.b.shape[1]:
        return Problem(
            "shape-mismatch",
            f"{pair.a} and {pair.b}",
            f"ranks {rank} and {pair.b.shape[1]}",
            "one rank for both halves",
            "They are not of one training: save the adapter again.",
        )
    if rank != placed.rank:
        return Problem(
            "rank-mismatch",
            str(pair.a),
            f"rank {rank}",
            f"rank {placed.rank}, as adapter_config.json says for {pair.module}",
            "Is this the config that the adapter was trained with?"
            + (f" {OWN_RANK}" if placed.expert else ""),
        )
    out, into = _dims(slot)
    shapes = (pair.a.shape[1], pair.b.shape[0])
    expected = (out, into) if pair.embedding else (into, out)
    if shapes != expected:
        return Problem(
            "shape-mismatch",
            f"{pair.a} and {pair.b}",
            f"a LoRA from {shapes[0]} to {shapes[1]}",
            f"from {expected[0]} to {expected[1]}, as {slot.entry} has it",
            WHICH_BASE,
        )
    for vector in (pair.bias, pair.magnitude):
        if vector is not None and vector.shape != (out,):
            return Problem(
                "shape-mismatch",
                str(vector),
                f"{list(vector.shape)}",
                f"[{out}]",
                WHICH_BASE,
            )
    return None


def _dims(slot: Slot) -> tuple[int, int]:
    """(out, in) of the matrix in a slot."""
    d1, d2 = slot.entry.shape[-2:]
    return slot.out.count, (d2 if slot.axes is Axes.OUT_IN else d1)
