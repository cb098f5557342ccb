"""Weighs what shapes, siblings, config, markers and options say: one layout, or a refusal.

The shapes of all targeted parameters of a module, together, are proof. What they leave open is decided by
the adapter's other modules, then by its config (`peft_version`, the `lora_B_layout` marker), or by the user.
Evidence that contradicts proof is a refusal: one of the two is not what it seems to be. The versions
installed here say nothing about where an adapter came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from loudmerge.errors import WHICH_BASE, MergeRefused, Problem, plural
from loudmerge.evidence.hypotheses import Evidence, FusedModule, Hypothesis, admits, hypotheses
from loudmerge.evidence.packing import Packing, made_by_unsloth, perhaps_turned
from loudmerge.evidence.provenance import config_evidence
from loudmerge.evidence.weighing import UNREAD, FusedSite, Weighed, fused_site
from loudmerge.layout import Axes, LoraBLayout, Orientation, PairShape
from loudmerge.reading.adapter_config import OWN_RANK, AdapterConfig
from loudmerge.reading.families import REGISTRATION_ORDER, Family

Weigh = Callable[[Iterable[FusedSite]], Weighed]
"""Says how lora_B is packed, from the weights: `loudmerge.evidence.weighing.weigh`."""

_OTHER: dict[str, str] = dict([*permutations(Orientation, 2), *permutations(LoraBLayout, 2)])
"""What each says no to."""


@dataclass(frozen=True)
class Layout:
    """What was decided. `packing` is by (module, parameter leaf). weighed: what the weights say of it.

    doubts: what the files do not tell, and a person may know.
    """

    hypotheses: Mapping[str, Hypothesis]
    packing: Mapping[tuple[str, str], LoraBLayout]
    evidence: tuple[Evidence, ...]
    weighed: Weighed = UNREAD
    doubts: tuple[str, ...] = ()

    @property
    def orientation(self) -> str:
        return _common(h.orientation.value for h in self.hypotheses.values())

    @property
    def lora_b_layout(self) -> str:
        return _common(packing.value for packing in self.packing.values())

    @property
    def overruled(self) -> tuple[str, ...]:
        """What an option decided against: a marker, the version, the weights. For a person to read."""
        options = {_OTHER[one.says]: one for one in self.evidence if one.source == "option"}
        first: dict[tuple[str, str], str] = {}
        for one in self.evidence:
            if one.says in options:
                option, where = options[one.says], f" of {one.site}" if one.site else ""
                note = f"{option.detail} {option.says} decided, but {one.source}{where} says {one.says}"
                first.setdefault((one.source, one.says), f"{note}: {one.detail}")
        return tuple(first.values())


def decide(
    modules: Sequence[FusedModule],
    config: AdapterConfig,
    family: Family,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    weigh: Weigh | None = None,
) -> Layout:
    """One layout for every fused module, with the evidence for it. weigh: None leaves the weights unread.

    Raises MergeRefused: `rank-mismatch`, `num-experts-mismatch`, `shape-mismatch`, `unknown-layout`,
    `ambiguous-layout`.
    """
    admitted = _admitted(modules)
    evidence: list[Evidence] = []
    # A module with one expert takes another path in PEFT, so it says nothing about the others.
    stacked = [module for module in modules if module.num_experts > 1]
    decided = _orientation(stacked, admitted, config, family, orientation, evidence) if stacked else None
    chosen = {
        module.name: _assignment(
            module,
            admitted[module.name],
            decided if decided and module in stacked else _alone(module, admitted[module.name], orientation),
            evidence,
        )
        for module in modules
    }
    placed = [
        (module, module.parameter(leaf), pair)
        for module in modules
        for leaf, pair in zip(chosen[module.name].assignment, module.pairs, strict=True)
    ]
    weighed = weigh(fused_site(*place) for place in placed) if weigh else UNREAD
    packing = Packing(config, lora_b_layout, evidence, weighed.verdicts)
    packed = {(place[0].name, place[1].leaf): packing.decide(*place) for place in placed}
    problems, doubts = packing.problems, tuple[str, ...]()
    if orientation == "auto" and made_by_unsloth(config) and family.axes is Axes.OUT_IN:
        read = [(module, parameter, packed[module.name, parameter.leaf]) for module, parameter, _ in placed]
        turned, doubts = perhaps_turned(read, evidence)
        if lora_b_layout == "auto":
            problems = [*problems, *turned]
        else:  # who knows the packing is told what else there is to know
            doubts += tuple(f"{one.where}: {one.found}. {one.hint}" for one in turned)
    if problems:
        raise MergeRefused(problems)
    return Layout(chosen, packed, tuple(evidence), weighed, doubts)


def _admitted(modules: Sequence[FusedModule]) -> dict[str, tuple[Hypothesis, ...]]:
    admitted = {module.name: hypotheses(module) for module in modules}
    problems = [_why_none(module) for module in modules if not admitted[module.name]]
    if problems:
        raise MergeRefused(problems)
    return admitted


def _orientation(
    modules: Sequence[FusedModule],
    admitted: Mapping[str, tuple[Hypothesis, ...]],
    config: AdapterConfig,
    family: Family,
    option: str,
    evidence: list[Evidence],
) -> Orientation:
    """The one orientation of all these modules."""
    left = set(Orientation)
    for module in modules:
        fits = {hypothesis.orientation for hypothesis in admitted[module.name]}
        if len(fits) == 1:
            says = next(iter(fits)).value
            evidence.append(Evidence("shape", module.name, says, 1.0, _shapes(module)))
        if not left & fits:
            raise MergeRefused(_disagree(module, fits, left))
        left &= fits
    undecided = [m for m in modules if len({h.orientation for h in admitted[m.name]}) > 1]
    if len(left) == 1 and evidence:
        says = next(iter(left)).value
        detail = f"another module's shapes prove it: {evidence[0].site}"
        evidence += [Evidence("sibling", module.name, says, 1.0, detail) for module in undecided]
    from_config = config_evidence(config, family, [p.name for m in modules for p in m.parameters])
    evidence.append(from_config)
    if option != "auto":
        evidence.append(Evidence("option", "", option, 1.0, "--orientation"))
        if Orientation(option) not in left:
            raise MergeRefused(_option_contradicts(modules[0], option, left))
        return Orientation(option)
    return _without_option(modules, admitted, left, from_config, undecided)


def _alone(module: FusedModule, admitted: Iterable[Hypothesis], option: str) -> Orientation:
    """The orientation of a module with one expert: its shapes, or the option, must say it."""
    fits = {hypothesis.orientation for hypothesis in admitted}
    if len(fits) == 1:
        return fits.pop()
    if option == "auto":
        raise MergeRefused(_ambiguous(module, None))
    return Orientation(option)


def _without_option(
    modules: Sequence[FusedModule],
    admitted: Mapping[str, tuple[Hypothesis, ...]],
    left: set[Orientation],
    from_config: Evidence,
    undecided: Sequence[FusedModule],
) -> Orientation:
    said = {o for o in Orientation if o.value == from_config.says}
    if len(left) == 1:
        if said and not said & left:
            raise MergeRefused(_version_contradicts(modules[0], from_config, left))
        return left.pop()
    if not said:
        raise MergeRefused(_ambiguous(undecided[0], from_config))
    decided = said.pop()
    for module in modules:
        usual = _usual(module, admitted[module.name])
        if usual and not any(h.orientation is decided for h in usual):
            raise MergeRefused(_ambiguous(module, from_config))
    return decided


def _usual(module: FusedModule, admitted: Iterable[Hypothesis]) -> list[Hypothesis]:
    """The readings in which the parameter registered first is innermost, as PEFT nests them."""
    order = sorted((p.leaf for p in module.parameters), key=_registration)
    return [hypothesis for hypothesis in admitted if list(reversed(hypothesis.assignment)) == order]


def _registration(leaf: str) -> tuple[int, str]:
    known = REGISTRATION_ORDER.index(leaf) if leaf in REGISTRATION_ORDER else len(REGISTRATION_ORDER)
    return known, leaf


def _assignment(
    module: FusedModule, admitted: Iterable[Hypothesis], orientation: Orientation, evidence: list[Evidence]
) -> Hypothesis:
    left = [hypothesis for hypothesis in admitted if hypothesis.orientation is orientation]
    if len(left) == 1:
        return left[0]
    # Equal shapes cannot tell which pair is which; PEFT's nesting order can.
    usual = _usual(module, left)
    if len(usual) != 1:
        raise MergeRefused(_ambiguous(module, None))
    detail = f"equal shapes; PEFT wraps the parameter registered first innermost: {usual[0].assignment[-1]}"
    evidence.append(Evidence("module", module.name, orientation.value, 0.9, detail))
    return usual[0]


def _common(values: Iterable[str]) -> str:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else "mixed" if found else "none"


def _shapes(module: FusedModule) -> str:
    return ", ".join(f"A {list(pair.a.shape)} B {list(pair.b.shape)}" for pair in module.pairs)


def _expected(module: FusedModule) -> str:
    parts = []
    for p in module.parameters:
        rows = p.rank * module.num_experts
        standard = f"A [{rows}, {p.d2}] B [{p.d1}, {rows}] (standard)"
        parts.append(f"{p.leaf}: {standard} or A [{rows}, {p.d1}] B [{p.d2}, {rows}] (swapped)")
    return "; ".join(parts)


def _why_none(module: FusedModule) -> Problem:
    """Why no reading fits: the rank, the expert count, or the shapes; the first that can be named."""
    for pair in module.pairs:
        shape = PairShape.of(pair.a.shape, pair.b.shape)
        if shape.rows != shape.columns:
            found = f"{shape.rows} rows of lora_A and {shape.columns} columns of lora_B"
            return Problem(
                "shape-mismatch",
                f"{pair.a} and {pair.b}",
                found,
                "rank * experts of both",
                "They are not of one training: save the adapter again.",
            )
        ranks = sorted({parameter.rank for parameter in module.parameters})
        rank = shape.rank(module.num_experts)
        if rank in ranks:
            continue
        experts = plural(module.num_experts, "expert")
        found, expected = plural(shape.rows, "row"), f"{experts}, as the base has"
        by_rank = None if rank is None else f"rank {rank} for {experts}"
        fits = [r for r in ranks if shape.rows % r == 0]
        if fits:
            # Another base, or another config; of the two the adapter's Linears tell.
            its = plural(shape.rows // fits[0], "expert")
            found = f"{found}: {its} of rank {fits[0]}, as adapter_config.json says"
            found = f"{found}, or {by_rank}" if by_rank else found
            hint = f"{WHICH_BASE} {OWN_RANK}" if by_rank else WHICH_BASE
            return Problem("num-experts-mismatch", str(pair.a), found, expected, hint)
        if by_rank is None:
            return Problem(
                "num-experts-mismatch", str(pair.a), found, f"a multiple of {expected}", WHICH_BASE
            )
        return Problem(
            "rank-mismatch",
            str(pair.a),
            f"{found}: {by_rank}",
            f"rank {' or '.join(map(str, ranks))}, as adapter_config.json says",
            f"Is this the base, and the config, that the adapter was trained with? {OWN_RANK}",
        )
    single = [
        p
        for p in module.parameters
        if any(admits(module, p, pair, o) for pair in module.pairs for o in Orientation)
    ]
    code = "unknown-layout" if len(single) == len(module.parameters) > 1 else "shape-mismatch"
    return Problem(code, module.name, _shapes(module), _expected(module), WHICH_BASE)


def _disagree(module: FusedModule, fits: set[Orientation], left: set[Orientation]) -> Problem:
    return Problem(
        "unknown-layout",
        module.name,
        f"{' or '.join(sorted(fits))} by its shapes ({_shapes(module)})",
        f"{' or '.join(sorted(left))}, as the modules before it",
        "The adapter's modules do not come from one training; save it again from one.",
    )


def _option_contradicts(module: FusedModule, option: str, left: set[Orientation]) -> Problem:
    return Problem(
        "shape-mismatch",
        module.name,
        f"--orientation {option}, with {_shapes(module)}",
        f"{' or '.join(sorted(left))}: only that fits the base",
        "Leave --orientation out.",
    )


def _version_contradicts(module: FusedModule, said: Evidence, left: set[Orientation]) -> Problem:
    proved = " or ".join(sorted(left))
    return Problem(
        "ambiguous-layout",
        module.name,
        f"{said.detail}, whose adapters are {said.says}",
        f"{proved}, as the shapes prove",
        f"The config is not that of these weights. If you know that they are, give --orientation {proved}.",
    )


def _ambiguous(module: FusedModule, said: Evidence | None) -> Problem:
    reason = f" ({said.detail})" if said else ""
    return Problem(
        "ambiguous-layout",
        module.name,
        f"shapes that fit both standard and swapped{reason}: {_shapes(module)}",
        "evidence for one of them",
        "Give --orientation swapped for PEFT <= 0.19.0 or --orientation standard for PEFT >= 0.19.1"
        " (the other way round where the experts class is_transposed).",
    )
