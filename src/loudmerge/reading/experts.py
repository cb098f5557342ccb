"""Where a checkpoint stores each expert's matrices: apart or fused, plain or transposed, in any shard.

Everything is read off keys and shapes of the checkpoint as a whole; a shard alone may hold a part of a
layer's experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.layout import Axes, Span
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.families import (
    DOWN,
    EXPERT_COUNT_FIELDS,
    FUSED_LEAVES,
    GATE,
    INTERLEAVED_LEAVES,
    PROJECTION_LEAVES,
    UP,
    Family,
)
from loudmerge.reading.names import Names
from loudmerge.system.tensorfile import TensorEntry

_EXPERT_KEY = re.compile(
    r"^(?P<group>.+\.experts|experts)\.(?:(?P<expert>\d{1,9})\.)?(?P<leaf>\w+?)(?:\.weight)?$"
)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one projection of one expert lies on disk.

    index: which matrix along the tensor's first axis, -1 when the tensor is this expert's alone.
    axes: the order of the matrix's axes on disk. out: its rows along the out axis.
    """

    entry: TensorEntry
    index: int
    axes: Axes
    out: Span


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one layer. `slots` by (projection, expert); `dims` is (out, in) by projection."""

    name: str
    num_experts: int
    slots: Mapping[tuple[str, int], Slot]
    dims: Mapping[str, tuple[int, int]]


@dataclass
class _Found:
    """The tensors of one group as they are found, before they are understood."""

    apart: dict[tuple[str, int], TensorEntry] = field(default_factory=dict)
    fused: dict[str, TensorEntry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def split_expert_name(canonical: str) -> tuple[str, int | None, str] | None:
    """(group, expert, leaf) of a canonical name inside an experts module, None for any other name."""
    match = _EXPERT_KEY.match(canonical)
    if match is None:
        return None
    expert = int(match["expert"]) if match["expert"] is not None else None
    known = PROJECTION_LEAVES if expert is not None else FUSED_LEAVES
    return (match["group"], expert, match["leaf"]) if match["leaf"] in known else None


class Experts:
    """The expert groups of a checkpoint, by canonical name; a group is understood when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, names: Names, family: Family) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._family = family
        self._found: dict[str, _Found] = defaultdict(_Found)
        self._groups: dict[str, ExpertGroup] = {}
        for entry in checkpoint.entries.values():
            self._sort(entry)

    @property
    def names(self) -> Iterable[str]:
        return self._found.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def projections(self, name: str) -> set[str]:
        """The projections that the checkpoint has of a group, whether it is sound or not."""
        found = self._found[name]
        fused = {projection for leaf in found.fused for projection in FUSED_LEAVES[leaf]}
        return fused | {projection for projection, _ in found.apart}

    def group(self, name: str) -> ExpertGroup:
        """The group with this canonical name.

        Raises MergeRefused: `experts-incomplete`, `num-experts-mismatch`, `shape-mismatch`,
        `unsupported-base`.
        """
        if name not in self._groups:
            found = self._found[name]
            if found.problems:
                raise MergeRefused(found.problems)
            group = self._apart(name, found) if found.apart else self._fused(name, found)
            self._check_count(group)
            _check_dims(group)
            self._groups[name] = group
        return self._groups[name]

    def _sort(self, entry: TensorEntry) -> None:
        parts = split_expert_name(self._names.canonical[entry.name])
        if parts is None:
            return
        name, expert, leaf = parts
        if expert is None and len(entry.shape) != 3:
            return
        found = self._found[name]
        place: dict[tuple[str, int], TensorEntry] | dict[str, TensorEntry]
        key = leaf if expert is None else (PROJECTION_LEAVES[leaf], expert)
        place = found.fused if expert is None else found.apart
        if key in place:
            first = place[key]  # type: ignore[index]
            found.problems.append(_two_names(entry, first))
        place[key] = entry  # type: ignore[index]

    def _apart(self, name: str, found: _Found) -> ExpertGroup:
        if found.fused:
            mixed = next(iter(found.fused.values()))
            raise MergeRefused(
                Problem(
                    "unsupported-base",
                    str(mixed),
                    "experts both apart and fused in one layer",
                    "one of the two",
                    "Remove what is left of another save from the directory.",
                )
            )
        count = 1 + max(expert for _, expert in found.apart)
        projections = sorted({projection for projection, _ in found.apart})
        dims: dict[str, tuple[int, int]] = {}
        slots: dict[tuple[str, int], Slot] = {}
        problems = []
        for projection in projections:
            missing = []
            for expert in range(count):
                entry = found.apart.get((projection, expert))
                if entry is None:
                    missing.append(expert)
                    continue
                first = dims.setdefault(projection, _matrix(entry))
                if entry.shape != first:
                    problems.append(_odd_shape(entry, projection, expert, first))
                slots[projection, expert] = Slot(entry, -1, Axes.OUT_IN, Span(0, first[0]))
            if missing:
                problems.append(_incomplete(name, projection, missing, count))
        if problems:
            raise MergeRefused(problems)
        return ExpertGroup(name, count, slots, dims)

    def _fused(self, name: str, found: _Found) -> ExpertGroup:
        counts = {entry.shape[0] for entry in found.fused.values()}
        if len(counts) > 1:
            entry = next(iter(found.fused.values()))
            raise MergeRefused(
                Problem(
                    "num-experts-mismatch",
                    str(entry),
                    f"expert counts {sorted(counts)}",
                    "one count in a layer",
                    "Get the checkpoint again.",
                )
            )
        axes = self._disk_axes(found)
        slots: dict[tuple[str, int], Slot] = {}
        dims: dict[str, tuple[int, int]] = {}
        for leaf, entry in found.fused.items():
            d1, d2 = entry.shape[1:]
            out, into = (d1, d2) if axes is Axes.OUT_IN else (d2, d1)
            for projection, span in self._spans(leaf, out):
                dims[projection] = (span.count, into)
                for expert in range(entry.shape[0]):
                    slots[projection, expert] = Slot(entry, expert, axes, span)
        return ExpertGroup(name, counts.pop(), slots, dims)

    def _spans(self, leaf: str, out: int) -> list[tuple[str, Span]]:
        projections = FUSED_LEAVES[leaf]
        if len(projections) == 1:
            return [(projections[0], Span(0, out))]
        if self._family.interleaved or leaf in INTERLEAVED_LEAVES:
            return [(GATE, Span(0, out // 2, 2)), (UP, Span(1, out // 2, 2))]
        return [(GATE, Span(0, out // 2)), (UP, Span(out // 2, out // 2))]

    def _disk_axes(self, found: _Found) -> Axes:
        """The pair of shapes tells: (E, 2I, H) with (E, H, I), or (E, H, 2I) with (E, I, H)."""
        up = next((entry for leaf, entry in found.fused.items() if UP in FUSED_LEAVES[leaf]), None)
        down = next((entry for leaf, entry in found.fused.items() if DOWN in FUSED_LEAVES[leaf]), None)
        if up is None or down is None:
            entry = up or down or next(iter(found.fused.values()))
            raise MergeRefused(
                Problem(
                    "experts-incomplete",
                    str(entry),
                    "no up or no down projection beside it",
                    "both",
                    "Get the checkpoint again.",
                )
            )
        gated = any(len(FUSED_LEAVES[leaf]) == 2 for leaf in found.fused)
        fits = [axes for axes in Axes if _fits(axes, up.shape, down.shape, 2 if gated else 1)]
        if len(fits) == 2:
            # Ungated and stored (E, a, b), (E, b, a): both read well; every such family stores (out, in).
            return self._family.axes
        if not fits:
            raise MergeRefused(
                Problem(
                    "shape-mismatch",
                    f"{up} and {down}",
                    "shapes that no expert's gate, up and down can have together",
                    "(E, 2I, H) with (E, H, I), or (E, H, 2I) with (E, I, H)",
                    "Get the checkpoint again; if it is as published, ask for its support.",
                )
            )
        return fits[0]

    def _check_count(self, group: ExpertGroup) -> None:
        declared = {
            count
            for value in self._checkpoint.config_values(*EXPERT_COUNT_FIELDS)
            for count in (value if isinstance(value, list) else [value])
            if isinstance(count, int) and count > 0
        }
        if declared and group.num_experts not in declared:
            fewer = group.num_experts < max(declared)
            raise MergeRefused(
                Problem(
                    "experts-incomplete" if fewer else "num-experts-mismatch",
                    f"the experts of {group.name}",
                    f"{plural(group.num_experts, 'expert')} in the checkpoint",
                    f"{' or '.join(map(str, sorted(declared)))}, as config.json says",
                    "Get the checkpoint again, or correct its config.json.",
                )
            )


def _check_dims(group: ExpertGroup) -> None:
    """An expert maps hidden to hidden through its intermediate size: down is the other way round."""
    up = group.dims.get(UP)
    same = {GATE: up, UP: up, DOWN: None if up is None else (up[1], up[0])}
    for projection, dims in group.dims.items():
        if up is not None and dims != same[projection]:
            raise MergeRefused(
                Problem(
                    "shape-mismatch",
                    f"the {projection} projections of {group.name}",
                    f"{list(dims)} (out, in)",
                    f"{list(same[projection] or ())}, as the up projections {list(up)} ask for",
                    "Get the checkpoint again.",
                )
            )


def _fits(axes: Axes, up: tuple[int, ...], down: tuple[int, ...], halves: int) -> bool:
    if axes is Axes.IN_OUT:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    # up is now (E, halves * I, H) and down (E, H, I).
    return up[1] == halves * down[2] and up[2] == down[1]


def _matrix(entry: TensorEntry) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise MergeRefused(
            Problem(
                "shape-mismatch",
                str(entry),
                plural(len(entry.shape), "axis", "axes"),
                "the two axes of a Linear's weight",
                "Get the checkpoint again; if it is as published, ask for its support.",
            )
        )
    return entry.shape[0], entry.shape[1]


def _two_names(entry: TensorEntry, first: TensorEntry) -> Problem:
    return Problem(
        "unsupported-base",
        str(entry),
        f"a second tensor for the same weight as {first}",
        "one name for each weight",
        "Two models seem to share this checkpoint; say so in a bug report.",
    )


def _incomplete(name: str, projection: str, missing: Sequence[int], count: int) -> Problem:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return Problem(
        "experts-incomplete",
        f"{name}, {projection} of expert {missing[0]}{more}",
        "no such tensor in any shard",
        f"every projection of {plural(count, 'expert')}",
        "Get the checkpoint again.",
    )


def _odd_shape(entry: TensorEntry, projection: str, expert: int, first: tuple[int, int]) -> Problem:
    return Problem(
        "shape-mismatch",
        f"{entry}, {projection} of expert {expert}",
        f"{list(entry.shape)}",
        f"{list(first)}, the shape of the layer's other experts",
        "Get the checkpoint again; if it is as published, ask for its support.",
    )
