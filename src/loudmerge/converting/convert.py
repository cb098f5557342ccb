"""adapter -> the same function in another layout, or a refusal where the layout cannot express it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loudmerge import __version__
from loudmerge.converting.prefixes import Layers, own_linear, require_one_prefix
from loudmerge.converting.publish import Expected, publish
from loudmerge.converting.relayout import Factored, dtype_of_all, factored, joined
from loudmerge.converting.rewrite import (
    LAYOUTS,
    PER_EXPERT,
    ExpertLora,
    Rewritten,
    write_apart,
    write_fused,
)
from loudmerge.converting.told import told_sites
from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.executing.outpath import refuse_existing, refuse_inputs
from loudmerge.executing.preflight import check_weights
from loudmerge.layout import Axes, Span
from loudmerge.merging.merge import Pathish, plan
from loudmerge.planning.options import Options, check_options
from loudmerge.planning.plan import MergePlan, Site
from loudmerge.reading.adapter import Adapter, read_adapter
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.experts import split_expert_name
from loudmerge.reading.families import DOWN, FUSED_LEAVES, GATE, PROJECTION_LEAVES, UP, Family, major_minor
from loudmerge.reading.sidefiles import CONFIG as BASE_CONFIG
from loudmerge.system.tensors import TensorReader
from loudmerge.system.threads import cores

Linears = Mapping[tuple[str, int], Site]
"""The sites of one module's experts, by (projection, expert)."""

APART = "Leave it as it is, one LoRA for each Linear."
"""What helps where no fused parameter can hold the experts' LoRA."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. base: by whose shapes, None for none. before: the layout found.

    sites: LoRA pairs of experts in OUT.
    """

    adapter: Path
    base: Path | None
    out: Path
    to: str
    before: Mapping[str, str]
    sites: int
    tensors: int
    files: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "schema": 1,
            "loudmerge": __version__,
            "status": "converted",
            "adapter": str(self.adapter),
            "base": None if self.base is None else str(self.base),
            "out": str(self.out),
            "from": dict(self.before),
            "to": self.to,
            "sites": self.sites,
            "tensors": self.tensors,
            "files": list(self.files),
            "refusal": None,
        }

    def summary(self) -> str:
        """A line for a person."""
        found = ", ".join(self.before.values())
        pairs = plural(self.sites, "LoRA pair")
        return f"converted from {found} to {self.to}: {pairs} of experts, in {self.out}"


@dataclass(frozen=True)
class Slots:
    """Where the plan puts fused LoRA. num_experts: of an experts module.

    parts: by site, each projection and its rows. keys: by (site, projection, expert), the checkpoint's tensor
    where that expert's matrix lies apart from the others.
    """

    num_experts: int
    parts: Mapping[int, tuple[tuple[str, Span], ...]]
    keys: Mapping[tuple[int, str, int], str]


def convert(
    adapter: Pathish,
    out: Pathish,
    to: str,
    *,
    base: Pathish | None = None,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    transformers: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes the directory `out`: the adapter in the layout `to`, one of LAYOUTS; all else stays as it is.

    Files of other weights are left out, as by a merge.
    base: the checkpoint it was trained on, by whose shapes the adapter's own layout is found, as for a merge;
    by default the one that adapter_config.json names, if that is a directory here. Without any the caller has
    to know the orientation, and only fused layouts can be read and written.
    transformers: the version that OUT is for, such as "5.24": PEFT reads some families by it.
    Raises MergeRefused: what `merge` refuses of the adapter, and what the layout cannot express; ValueError
    for an argument's value that does not exist, before anything is read.
    """
    _check_values(to, Options(orientation, lora_b_layout), transformers)
    where, target = Path(adapter), Path(out)
    trained_on = _named_base(read_adapter(where).config) if base is None else Path(base)
    refuse_inputs(target, [where] if trained_on is None else [where, trained_on])
    refuse_existing(target, overwrite=overwrite)
    if trained_on is None:
        planned, found, family = None, read_adapter(where), Family()
        sites = told_sites(found, orientation, lora_b_layout, to)
    else:
        planned = plan(trained_on, adapter, orientation=orientation, lora_b_layout=lora_b_layout)
        found, family, sites = planned.adapter, planned.family, planned.sites
    with TensorReader() as reader, ThreadPoolExecutor(cores()) as pool:
        check_weights(found, sites, reader, pool)
        tensors = {name: reader.read(entry) for name, entry in found.entries.items()}
    reading = _Reading(found, sites, family, planned, tensors)
    experts = reading.fused()
    if to != PER_EXPERT:
        reading.require_fused(transformers)
        experts += reading.linears()
    if not experts and not reading.apart:
        raise MergeRefused(_nothing(where))
    draft = Rewritten(found.config, tensors, reading.taken)
    read_as = _write(draft, experts, to, reading.layers, family, transformers)
    filled = () if to == PER_EXPERT else reading.apart
    expected = None if planned is None else Expected(planned, read_as, filled)
    files = publish(where, target, draft, expected, overwrite=overwrite)
    return Conversion(where, trained_on, target, to, _before(sites), draft.sites, len(draft.tensors), files)


def _check_values(to: str, options: Options, transformers: str | None) -> None:
    if to not in LAYOUTS:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(LAYOUTS)}")
    check_options(options)
    if transformers is not None:
        major_minor(transformers)


def _write(
    draft: Rewritten,
    experts: Sequence[ExpertLora],
    to: str,
    layers: int,
    family: Family,
    transformers: str | None,
) -> Options:
    """The experts' LoRA in the layout `to`; what a merge is told of it. layers: as for `write_fused`."""
    read_as = Options()
    if to == PER_EXPERT:
        write_apart(draft, experts, layers)
    else:
        read_as = write_fused(draft, experts, to, family.under(transformers), layers, family.axes)
    require_one_prefix(draft.tensors, [one.module for one in experts], family)
    return read_as


def _nothing(adapter: Path) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(adapter),
        "no LoRA on experts",
        "some, to be converted",
        "Leave it as it is: only LoRA on experts has a layout.",
    )


def _named_base(config: AdapterConfig) -> Path | None:
    """The checkpoint that the adapter says it was trained on, None where that is not here."""
    name = config.raw.get("base_model_name_or_path")
    here = isinstance(name, str) and bool(name) and Path(name, BASE_CONFIG).is_file()
    return Path(str(name)) if here else None


def _slots(planned: MergePlan) -> Slots:
    """No parts for a fused parameter that is on disk as it is in memory, where nothing tells gate from up."""
    spans: dict[int, set[Span]] = defaultdict(set)
    places: dict[tuple[int, Span, int], str] = {}
    for output in planned.outputs:
        for term in output.terms:
            spans[term.site].add(term.rows)
            if term.index < 0 and term.expert >= 0:
                places[term.site, term.rows, term.expert] = output.key
    parts = {}
    for index, site in enumerate(planned.sites):
        named = split_expert_name(planned.family.canonical(site.parameter))
        projections = FUSED_LEAVES[named[2]] if site.num_experts and named is not None else ()
        ordered = sorted(spans[index], key=lambda span: span.start)
        if len(projections) == len(ordered):
            parts[index] = tuple(zip(projections, ordered, strict=True))
    keys = {
        (index, projection, expert): places[index, rows, expert]
        for index, members in parts.items()
        for projection, rows in members
        for expert in range(planned.sites[index].num_experts)
        if (index, rows, expert) in places
    }
    return Slots(planned.num_experts or 0, parts, keys)


class _Reading:
    """Takes the LoRA of experts out of an adapter's tensors.

    taken: the modules whose LoRA that was. layers: how many of the base's have experts; 0 without a base.
    apart: the sites of experts' own Linears, by the canonical name of their experts module.
    """

    def __init__(
        self,
        adapter: Adapter,
        sites: Sequence[Site],
        family: Family,
        planned: MergePlan | None,
        tensors: dict[str, Tensor],
    ) -> None:
        self._sites = sites
        self._family = family
        self._slots = _slots(planned) if planned is not None else Slots(0, {}, {})
        self._tensors = tensors
        keys = planned.base.entries if planned is not None else ()
        self._gated = any(map(self._is_gate, keys))
        self.layers = len(self._modules(keys))
        self._apart_on_disk = next(filter(self._is_of_one_expert, keys), None)
        self.taken: set[str] = set()
        self.apart: dict[str, dict[tuple[str, int], Site]] = defaultdict(dict)
        for site in sites:
            parts = split_expert_name(family.canonical(site.parameter))
            if not site.num_experts and parts is not None and parts[1] is not None:
                self.apart[parts[0]][PROJECTION_LEAVES[parts[2]], parts[1]] = site
        linears = [site.pair.module for own in self.apart.values() for site in own.values()]
        self._layers = Layers(adapter, linears, family)

    def require_fused(self, transformers: str | None) -> None:
        """Raises MergeRefused where this version of transformers has a Linear for each expert.

        transformers 4 holds experts as they lie on disk; PEFT drops fused LoRA there, in silence.
        """
        if transformers is None or major_minor(transformers) >= (5, 0) or self._apart_on_disk is None:
            return
        found = f"a Linear for each expert, which transformers {transformers} holds as they are on disk"
        help_text = f"Convert to {PER_EXPERT}, or say another --transformers."
        raise MergeRefused(
            Problem("unsupported-base", self._apart_on_disk, found, "a fused parameter", help_text)
        )

    def fused(self) -> list[ExpertLora]:
        """Every experts parameter that has LoRA."""
        return [self._fused(index, site) for index, site in enumerate(self._sites) if site.num_experts]

    def linears(self) -> list[ExpertLora]:
        """The experts parameters that the experts' own Linears would be."""
        return [one for group, own in self.apart.items() for one in self._joined(group, own)]

    def _fused(self, index: int, site: Site) -> ExpertLora:
        module, _, leaf = site.parameter.rpartition(".")
        a, b = self._take(site)
        if site.num_experts == 1 or site.orientation is None or site.lora_b_layout is None:
            raise MergeRefused(_one_expert(site))
        factors = factored(a, b, site.num_experts, site.orientation, site.lora_b_layout)
        if self._family.axes is Axes.IN_OUT:
            factors = factors.transposed()
        parts = self._slots.parts.get(index, ())
        names = {
            (projection, expert): self._name(index, site, projection, expert)
            for projection, _ in parts
            for expert in range(site.num_experts)
        }
        return ExpertLora(module, leaf, factors, site.scaling, parts, names)

    def _name(self, index: int, site: Site, projection: str, expert: int) -> str:
        """What one expert's own Linear is called; where there is none on disk, as transformers 4 had it."""
        key = self._slots.keys.get((index, projection, expert))
        if key is None:
            group, *_ = split_expert_name(self._family.canonical(site.parameter)) or ("",)
            key = f"{group}.{expert}.{projection}_proj"
        module = site.parameter.rpartition(".")[0]
        return own_linear(site, module, key.removesuffix(".weight"), self._family)

    def _joined(self, group: str, linears: Linears) -> Iterable[ExpertLora]:
        """gate and up become one parameter, down another."""
        site = next(iter(linears.values()))
        if self._slots.num_experts == 1:
            raise MergeRefused(_one_expert(site))
        if self._family.interleaved:
            found = "gate and up that alternate in memory"
            raise MergeRefused(
                Problem("unsupported-adapter", str(site.pair.a), found, "gate before up", APART)
            )
        module = self._layers.experts(group, site)
        first = ("gate_up_proj", (GATE, UP)) if self._gated else ("up_proj", (UP,))
        for leaf, projections in (first, ("down_proj", (DOWN,))):
            mine = {key: site for key, site in linears.items() if key[0] in projections}
            if mine:
                yield self._stacked(module, leaf, projections, mine)

    def _stacked(self, module: str, leaf: str, projections: Sequence[str], linears: Linears) -> ExpertLora:
        scalings = {site.scaling for site in linears.values()}
        if len(scalings) > 1:
            raise MergeRefused(_differ(linears, f"scalings {sorted(scalings)}"))
        stacks = {
            one: self._stack(one, linears) for one in projections if any(one == name for name, _ in linears)
        }
        present = next(iter(stacks.values()))
        # gate and up have the same shape. One that is not adapted has an update of zero.
        idle = Factored(torch.zeros_like(present.up), present.down)
        rows = present.up.shape[1]
        parts = tuple((one, Span(number * rows, rows)) for number, one in enumerate(projections))
        factors = joined([stacks.get(one, idle) for one in projections])
        return ExpertLora(module, leaf, factors, scalings.pop(), parts, {})

    def _modules(self, names: Iterable[str]) -> set[str]:
        """The experts modules that these are inside of, by canonical name."""
        found = (split_expert_name(self._family.canonical(name)) for name in names)
        return {parts[0] for parts in found if parts is not None}

    def _is_of_one_expert(self, key: str) -> bool:
        parts = split_expert_name(self._family.canonical(key))
        return parts is not None and parts[1] is not None

    def _is_gate(self, key: str) -> bool:
        parts = split_expert_name(self._family.canonical(key))
        return parts is not None and GATE in (
            *FUSED_LEAVES.get(parts[2], ()),
            PROJECTION_LEAVES.get(parts[2]),
        )

    def _stack(self, projection: str, linears: Linears) -> Factored:
        """One projection of all experts. An expert without LoRA has an update of zero."""
        mine = {expert: site for (name, expert), site in linears.items() if name == projection}
        shapes = {(site.pair.a.shape, site.pair.b.shape) for site in mine.values()}
        extras = [site for site in mine.values() if site.pair.bias or site.pair.magnitude]
        if len(shapes) > 1 or extras:
            raise MergeRefused(_differ(linears, "ranks that differ" if not extras else "a bias or DoRA"))
        pairs = {expert: self._take(site) for expert, site in mine.items()}
        a, b = next(iter(pairs.values()))
        # The experts' own dtypes may differ, and one tensor holds all of them.
        down_dtype, up_dtype = map(dtype_of_all, zip(*pairs.values(), strict=True))
        up = b.new_zeros(self._slots.num_experts, *b.shape, dtype=up_dtype)
        down = a.new_zeros(self._slots.num_experts, *a.shape, dtype=down_dtype)
        for expert, (a_e, b_e) in pairs.items():
            up[expert], down[expert] = b_e, a_e
        return Factored(up, down)

    def _take(self, site: Site) -> tuple[Tensor, Tensor]:
        self.taken.add(site.pair.module)
        return self._tensors.pop(site.pair.a.name), self._tensors.pop(site.pair.b.name)


def _one_expert(site: Site) -> Problem:
    """With one expert PEFT takes its plain path, which has other layouts (loudmerge.comparing.relay)."""
    return Problem(
        "unsupported-adapter", str(site.pair.a), "one expert", "two or more, which PEFT packs", APART
    )


def _differ(linears: Linears, found: str) -> Problem:
    site = next(iter(linears.values()))
    return Problem(
        "unsupported-adapter",
        str(site.pair.a),
        f"{found} among the experts of one parameter",
        "one rank and scaling, and plain LoRA: a fused parameter has one for all",
        APART,
    )


def _before(sites: Iterable[Site]) -> dict[str, str]:
    orientations = {site.orientation.value for site in sites if site.orientation is not None}
    packings = {site.lora_b_layout.value for site in sites if site.lora_b_layout is not None}
    if not orientations:
        return {"form": PER_EXPERT}
    return {"orientation": "/".join(sorted(orientations)), "lora_b_layout": "/".join(sorted(packings))}
