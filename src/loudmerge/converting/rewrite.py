"""Writes the LoRA of experts into an adapter's tensors and config in another layout; touches nothing else."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loudmerge.converting.relayout import Factored, fused, parted
from loudmerge.errors import MergeRefused, Problem
from loudmerge.evidence.provenance import FIELDS_SINCE, orientation_written_by
from loudmerge.layout import Axes, LoraBLayout, Span
from loudmerge.planning.misplaced import several_alphas
from loudmerge.planning.options import Options
from loudmerge.reading.adapter import PREFIX
from loudmerge.reading.adapter_config import AdapterConfig, ends_with, parse_config
from loudmerge.reading.families import REGISTRATION_ORDER, Family
from loudmerge.reading.patterns import alphas

PEFT_018, PEFT_019, GROUPED, PER_EXPERT = "peft-0.18", "peft-0.19", "grouped-by-expert", "per-expert"
LAYOUTS = (PEFT_018, PEFT_019, GROUPED, PER_EXPERT)

_WRITERS: Mapping[str, tuple[int, int, int]] = {
    PEFT_018: (0, 18, 1),
    PEFT_019: (0, 19, 1),
    GROUPED: (0, 19, 1),
}
"""The PEFT release that reads a fused layout's orientation, and that its config names."""

_MARKER, _DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"


@dataclass(frozen=True)
class ExpertLora:
    """The LoRA of one experts parameter, or of what would be one.

    module, leaf: of the parameter in memory. factors: out axis first, up (experts, out, rank) and down
    (experts, rank, in). parts: each projection and its rows of the out axis, gate before up.
    names: by (projection, expert), what that expert's own Linear is called.
    """

    module: str
    leaf: str
    factors: Factored
    scaling: float
    parts: tuple[tuple[str, Span], ...]
    names: Mapping[tuple[str, int], str]

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.leaf}"


class Rewritten:
    """An adapter without the LoRA of its experts, to which that is added in another layout.

    tensors: by key. raw: adapter_config.json. replaced: the modules whose own LoRA was taken out.
    sites: pairs added.
    """

    def __init__(self, config: AdapterConfig, tensors: dict[str, Tensor], replaced: Collection[str]) -> None:
        self.tensors = tensors
        self.raw: dict[str, Any] = copy.deepcopy(dict(config.raw))
        self.sites = 0
        self._replaced = frozenset(replaced)

    def add(self, module: str, depth: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Adds a pair under PEFT's names; depth: how many `base_layer` levels inside."""
        stem = f"{PREFIX}{module}{'.base_layer' * depth}"
        # Copies: gate and up of an expert may share their lora_A, and a file has no shared tensors.
        self.tensors[f"{stem}.lora_A.weight"] = lora_a.clone(memory_format=torch.contiguous_format)
        self.tensors[f"{stem}.lora_B.weight"] = lora_b.clone(memory_format=torch.contiguous_format)
        self.sites += 1

    def settle(self, names: Sequence[str], expression: str, rank: int, scaling: float) -> None:
        """Has the config give these modules or parameters this rank and scaling, by a pattern if need be.

        Raises MergeRefused where a key that is there already means them, too: PEFT would save both sorted.
        """
        config = parse_config(self.raw)
        if any(config.rank_for(name) != rank for name in names):
            self._pattern("rank_pattern", expression, rank)
        config = parse_config(self.raw)
        if not all(math.isclose(config.scaling_for(name, rank), scaling, rel_tol=1e-12) for name in names):
            alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
            self._pattern("alpha_pattern", expression, int(alpha) if alpha == int(alpha) else alpha)
        for name in names:
            if len(found := alphas(self.raw, name, rank)) > 1:
                raise MergeRefused(several_alphas(f"a LoRA for {name}", name, found))

    def target(self, add: Collection[str], into: str) -> None:
        """Names what is targeted now, and no longer what only the converted modules were named by."""
        kept = [key for key in self.tensors if key.startswith(PREFIX)]
        found = self.raw.get("target_modules")
        if isinstance(found, list):
            self.raw["target_modules"] = [name for name in found if not self._only_replaced(name, kept)]
        self.raw[into] = self._with(self.raw.get(into), add)

    def _with(self, found: Any, add: Collection[str]) -> Any:
        if isinstance(found, str):
            # A regular expression must match the whole name.
            return "|".join([f"(?:{found})", *(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(add))])
        return [*(found or []), *sorted(set(add) - set(found or []))]

    def _only_replaced(self, name: str, kept: Iterable[str]) -> bool:
        left = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in kept}
        return any(ends_with(module, name) for module in self._replaced) and not any(
            ends_with(module, name) for module in left
        )

    def _pattern(self, field: str, expression: str, value: float) -> None:
        self.raw[field] = {expression: value, **(self.raw.get(field) or {})}

    def name_writer(self, version: tuple[int, int, int]) -> None:
        """peft_version, and none of the empty fields that this release has not: they would belie it."""
        self.raw["peft_version"] = ".".join(map(str, version))
        for name, since in FIELDS_SINCE.items():
            if since > version[:2] and not self.raw.get(name):
                self.raw.pop(name, None)

    def mark(self, packing: LoraBLayout) -> None:
        """Unsloth's marker. rank_major is marked where the adapter was, or may be taken to be Unsloth's."""
        mapping = self.raw.get("auto_mapping")
        places = [self.raw, *([mapping] if isinstance(mapping, dict) else [])]
        marked = any(name in place for place in places for name in (_MARKER, _DETAIL))
        unsloth = any(place.get("unsloth_fixed") for place in places)
        for place in places:
            place.pop(_MARKER, None)
            place.pop(_DETAIL, None)
        if marked or unsloth or packing is LoraBLayout.GROUPED_BY_EXPERT:
            self.raw[_MARKER] = packing.value


def write_fused(
    draft: Rewritten, found: Sequence[ExpertLora], to: str, family: Family, layers: int, axes: Axes
) -> Options:
    """One pair for each parameter, those of a module nested, in the orientation that the layout's PEFT reads.

    layers: how many layers of the base have experts, for `_targets`. axes: those in which a merge states an
    orientation; `family` may have others, of an older transformers. Returns what a merge would be told.
    Raises MergeRefused `ambiguous-layout` where that depends on the transformers version it will run under,
    and `family` has more than one's; `unsupported-adapter` where the parameters have other names there.
    """
    _require_names(found, family)
    version = _WRITERS[to]
    orientation = orientation_written_by(version, family, [one.parameter for one in found])
    if orientation is None:
        named = ".".join(map(str, version))
        raise MergeRefused(
            Problem(
                "ambiguous-layout",
                found[0].parameter,
                f"a family that PEFT {named} reads in another orientation under another transformers",
                "one orientation",
                f"Say --transformers, the version it is for. Or convert to {PER_EXPERT}, or merge it.",
            )
        )
    packing = LoraBLayout.GROUPED_BY_EXPERT if to == GROUPED else LoraBLayout.RANK_MAJOR
    modules: dict[str, list[ExpertLora]] = defaultdict(list)
    for one in found:
        modules[one.module].append(one)
    for module, members in modules.items():
        # PEFT wraps the parameter registered first innermost.
        ordered = sorted(members, key=lambda one: registration(one.leaf)) if members[1:] else members
        for depth, one in enumerate(reversed(ordered)):
            factors = one.factors if family.axes is Axes.OUT_IN else one.factors.transposed()
            draft.add(module, depth, *fused(factors, orientation, packing))
            draft.settle([one.parameter], re.escape(one.parameter), factors.rank, one.scaling)
    targets = _targets([(one.parameter, one.module) for one in found], layers)
    named_already = parse_config(draft.raw).targeted_parameters
    if not all(one.leaf in named_already(one.module) for one in found):
        draft.target(targets, "target_parameters")
    draft.name_writer(version)
    draft.mark(packing)
    stated = orientation if family.axes is axes else orientation.flipped()
    return Options(stated.value, packing.value)


def _require_names(found: Iterable[ExpertLora], family: Family) -> None:
    """Under a name that its transformers does not have PEFT drops LoRA, in silence."""
    there = " or ".join(era.transformers for era in family.eras)
    for one in found:
        if not any(era.has(one.parameter) for era in family.eras):
            raise MergeRefused(
                Problem(
                    "unsupported-adapter",
                    one.parameter,
                    "a name that this family's experts have under another transformers",
                    f"the one they have under transformers {there}",
                    f"Say the --transformers that has this name. Or convert to {PER_EXPERT}, or merge it.",
                )
            )


def write_apart(draft: Rewritten, found: Sequence[ExpertLora], layers: int) -> None:
    """One pair for each expert and projection, as PEFT has them for transformers 4.

    layers: as for `write_fused`. Raises MergeRefused where nothing tells gate from up.
    """
    places: list[tuple[str, str]] = []
    for one in found:
        if not one.parts:
            raise MergeRefused(
                Problem(
                    "unsupported-adapter",
                    one.parameter,
                    "a fused parameter of a model type that is not in the table",
                    "one whose gate and up can be told apart",
                    "Convert between the fused layouts, or merge it.",
                )
            )
        parts = parted(one.factors, [rows for _, rows in one.parts])
        for (projection, _), factors in zip(one.parts, parts, strict=True):
            names = [one.names[projection, expert] for expert in range(factors.up.shape[0])]
            for expert, name in enumerate(names):
                draft.add(name, 0, factors.down[expert], factors.up[expert])
            leaf = names[0].rpartition(".")[2]
            group = names[0].rpartition(".")[0].rpartition(".")[0]
            expression = rf"{re.escape(group)}\.\d+\.{re.escape(leaf)}"
            draft.settle(names, expression, factors.rank, one.scaling)
            places += [(name, group) for name in names]
    draft.raw["target_parameters"] = _others(draft.raw.get("target_parameters"), found) or None
    draft.target(_targets(places, layers), "target_modules")
    draft.mark(LoraBLayout.RANK_MAJOR)
    draft.raw.pop(_MARKER, None)


def _targets(places: Iterable[tuple[str, str]], layers: int) -> set[str]:
    """What names these parameters or Linears, each with its experts module, and nothing of a shared expert.

    The end of the name where all layers with experts have LoRA there, else the whole: where a config targets
    a layer without LoRA, the adapter is not complete.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name, module in places:
        ends[f"{module.rpartition('.')[2]}.{name.removeprefix(f'{module}.')}"].append(name)
    return {target for end, names in ends.items() for target in ([end] if len(names) == layers else names)}


def registration(leaf: str) -> int:
    """When an experts module registers a parameter, before or after the others. PEFT wraps in this order."""
    if leaf not in REGISTRATION_ORDER:
        known = ", ".join(REGISTRATION_ORDER)
        raise MergeRefused(
            Problem(
                "unsupported-adapter", leaf, "an unknown experts parameter", known, "Ask for its support."
            )
        )
    return REGISTRATION_ORDER.index(leaf)


def _others(targets: Sequence[str] | None, found: Sequence[ExpertLora]) -> list[str]:
    """The target_parameters that name none of these."""
    names = [one.parameter for one in found]
    return [target for target in targets or () if not any(ends_with(name, target) for name in names)]
