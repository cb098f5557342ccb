"""How the columns of each lora_B are packed: what markers, options and weights say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loudmerge.errors import WHICH_BASE, Problem
from loudmerge.evidence.clustering import Verdict
from loudmerge.evidence.hypotheses import Evidence, FusedModule, FusedParameter
from loudmerge.layout import LoraBLayout
from loudmerge.reading.adapter import LoraPair
from loudmerge.reading.adapter_config import AdapterConfig

ASSUMED = 0.9
"""How sure it is, without anything else, that an adapter is packed as PEFT packs."""


class Packing:
    """Decides how the columns of each lora_B are packed. weighed: what the weights say, by parameter leaf.

    A marker, or the assumption that PEFT made the adapter, that the weights contradict is a problem: one of
    the two is wrong. The user's option is taken as it is.
    """

    def __init__(
        self, config: AdapterConfig, option: str, evidence: list[Evidence], weighed: Mapping[str, Verdict]
    ) -> None:
        self._config = config
        self._option = option
        self._evidence = evidence
        self._weighed = weighed
        self._contradicted: set[str] = set()
        self.problems: list[Problem] = []
        evidence += [weights_evidence(leaf, verdict) for leaf, verdict in weighed.items()]

    def decide(self, module: FusedModule, parameter: FusedParameter, pair: LoraPair) -> LoraBLayout:
        site = parameter.name
        marked = self._marked(module, parameter)
        if module.num_experts == 1 or parameter.rank == 1:
            return marked or LoraBLayout.RANK_MAJOR  # both packings are the same columns
        if self._option != "auto":
            self._say("option", site, LoraBLayout(self._option), 1.0, "--lora-b-layout")
            return LoraBLayout(self._option)
        weighed = self._weighed.get(parameter.leaf)
        if marked is not None:
            self._compare(parameter, marked, "the marker in adapter_config.json", weighed)
            return marked
        if made_by_unsloth(self._config):
            if weighed is not None and weighed.says is not None:
                return weighed.says
            self.problems.append(_unmarked(site, pair, weighed))
            return LoraBLayout.RANK_MAJOR
        self._assume(parameter, weighed)
        return LoraBLayout.RANK_MAJOR

    def _assume(self, parameter: FusedParameter, weighed: Verdict | None) -> None:
        assumed, detail = LoraBLayout.RANK_MAJOR, "assumed: no marker, and PEFT in every version packs so"
        sure = ASSUMED
        if weighed is not None and weighed.says is assumed:
            sure, detail = 1 - (1 - ASSUMED) * (1 - weighed.confidence), f"{detail}; the weights agree"
        self._say("module", parameter.name, assumed, sure, detail)
        self._compare(parameter, assumed, "packed as PEFT packs, as no marker says otherwise", weighed)

    def _compare(
        self, parameter: FusedParameter, said: LoraBLayout, by: str, weighed: Verdict | None
    ) -> None:
        """The weights speak for all layers of a parameter, so they contradict it once."""
        if weighed is None or weighed.says in (None, said) or parameter.leaf in self._contradicted:
            return
        self._contradicted.add(parameter.leaf)
        self.problems.append(_contradiction(parameter, said, by, weighed))

    def _marked(self, module: FusedModule, parameter: FusedParameter) -> LoraBLayout | None:
        """What Unsloth's marker says (unsloth_zoo/temporary_patches/moe_utils.py)."""
        values: dict[str, Any] = {}
        for place, source in (("", self._config.raw), ("auto_mapping.", _auto_mapping(self._config))):
            detail = source.get("unsloth_fused_expert_lora")
            named = self._detailed(module, parameter, detail, place) if isinstance(detail, dict) else None
            flat = source.get("lora_B_layout")
            found = {f"{place}unsloth_fused_expert_lora": named, f"{place}lora_B_layout": flat}
            values.update({where: value for where, value in found.items() if value is not None})
        unknown = [
            value for value in values.values() if value not in [layout.value for layout in LoraBLayout]
        ]
        if unknown:
            self.problems.append(_unknown_marker(parameter.name, unknown[0]))
            return None
        if len(set(values.values())) > 1:
            self.problems.append(_two_markers(parameter.name, sorted(set(values.values()))))
            return None
        for place, value in values.items():
            self._say("marker", parameter.name, LoraBLayout(value), 1.0, place)
            return LoraBLayout(value)
        return None

    def _detailed(
        self, module: FusedModule, parameter: FusedParameter, detail: Mapping[str, Any], place: str
    ) -> Any:
        where = f"{place}unsloth_fused_expert_lora"
        if detail.get("lora_A_layout", "grouped_by_expert") != "grouped_by_expert":
            self.problems.append(_unknown_marker(f"lora_A_layout in {where}", detail["lora_A_layout"]))
        parameters = detail.get("parameters")
        entry = parameters.get(parameter.leaf) if isinstance(parameters, dict) else None
        if not isinstance(entry, dict):
            return detail.get("lora_B_layout")
        if entry.get("num_experts", module.num_experts) != module.num_experts:
            self.problems.append(
                Problem(
                    "num-experts-mismatch",
                    f"{parameter.leaf} in {where}",
                    f"num_experts {entry['num_experts']}",
                    f"{module.num_experts}, as the base has",
                    WHICH_BASE,
                )
            )
        return entry.get("lora_B_layout", detail.get("lora_B_layout"))

    def _say(self, source: str, site: str, says: LoraBLayout, confidence: float, detail: str) -> None:
        self._evidence.append(Evidence(source, site, says.value, confidence, detail))


def made_by_unsloth(config: AdapterConfig) -> bool:
    """Whether its config says so (unsloth_zoo/hf_utils.py, `fix_lora_auto_mapping`)."""
    return bool(_auto_mapping(config).get("unsloth_fixed"))


def perhaps_turned(
    packed: Iterable[tuple[FusedModule, FusedParameter, LoraBLayout]], evidence: Iterable[Evidence]
) -> tuple[list[Problem], tuple[str, ...]]:
    """The square parameters of an adapter by Unsloth, which its own experts forward may have read transposed.

    Until 2026.9.7 that forward took what PEFT lays out as a square parameter's update for its transpose, and
    a parameter that is not square as PEFT does (unsloth_zoo/temporary_patches/moe_utils.py,
    `extract_moe_lora_weights_for_grouped_mm`). What is grouped_by_expert without a marker was trained by it:
    a problem. With a marker it was by 2026.9.6 and 2026.9.7, and by no later one: a note, of all together.
    What PEFT's own forward trained is rank_major, without a marker: neither.
    """
    marked = {one.site for one in evidence if one.source == "marker"}
    square = [
        (parameter, packing)
        for module, parameter, packing in packed
        if parameter.d1 == parameter.d2 and module.num_experts > 1
    ]
    unmarked: dict[str, FusedParameter] = {}
    for parameter, packing in square:
        if parameter.name not in marked and packing is LoraBLayout.GROUPED_BY_EXPERT:
            unmarked.setdefault(parameter.leaf, parameter)  # one stands for those of all layers
    leaves = sorted({parameter.leaf for parameter, _ in square if parameter.name in marked})
    note = (
        f"{' and '.join(leaves)}: square, in an adapter by Unsloth. unsloth_zoo 2026.9.6 and 2026.9.7 trained"
        " such ones transposed, with the marker of later releases: by one of these two, it is merged wrongly"
    )
    return [_turned(parameter) for parameter in unmarked.values()], (note,) if leaves else ()


def _auto_mapping(config: AdapterConfig) -> Mapping[str, Any]:
    value = config.raw.get("auto_mapping")
    return value if isinstance(value, dict) else {}


def weights_evidence(leaf: str, verdict: Verdict) -> Evidence:
    """What the weights of a parameter, in all the layers looked at, say; says "" for no evidence."""
    says = "" if verdict.says is None else verdict.says.value
    return Evidence("weights", leaf, says, verdict.confidence, verdict.detail)


def _contradiction(parameter: FusedParameter, said: LoraBLayout, by: str, weighed: Verdict) -> Problem:
    weights = weighed.says.value if weighed.says is not None else ""
    return Problem(
        "ambiguous-layout",
        f"lora_B of {parameter.leaf}, first {parameter.name}",
        f"{said.value} ({by}), and weights that were trained as {weights}"
        f" (confidence {weighed.confidence:.3f}: {weighed.detail})",
        "both to say the same",
        f"Give --lora-b-layout {weights}, as the weights say, or --lora-b-layout {said.value} if you know"
        " that it was trained so.",
    )


def _unmarked(site: str, pair: LoraPair, weighed: Verdict | None) -> Problem:
    hint = (
        "Give --lora-b-layout grouped_by_expert for unsloth_zoo 2026.9.5 or older, else rank_major; it is"
        " rank_major also where Unsloth has no experts forward for the model, or under"
        " UNSLOTH_MOE_LORA_MERGED=1."
    )
    if weighed is not None and weighed.columns == weighed.pairs == 0:
        hint += (
            " The weights lean to no side at all: where lora_B is zero, its experts were not trained, and"
            " either is right."
        )
    return Problem(
        "ambiguous-layout",
        f"{pair.b} of {site}",
        "an adapter made by Unsloth without the lora_B_layout marker: rank_major or grouped_by_expert",
        "a marker, weights that show it, or the option",
        hint,
    )


def _turned(parameter: FusedParameter) -> Problem:
    return Problem(
        "ambiguous-layout",
        f"orientation of {parameter.leaf}, first {parameter.name}",
        f"a square parameter, {parameter.d1} x {parameter.d2}, in an adapter by Unsloth without a marker, and"
        " unsloth_zoo 2026.9.7 and older trained square ones transposed",
        "evidence of which",
        "Where all fused parameters are square, give --orientation swapped, or standard where PEFT's own"
        " forward trained it; else no option says it and Unsloth's own merge is wrong, too: train it again.",
    )


def _unknown_marker(site: str, value: object) -> Problem:
    return Problem(
        "unknown-layout",
        f"lora_B_layout of {site} in adapter_config.json",
        repr(value),
        "rank_major or grouped_by_expert",
        "Correct the marker, or give --lora-b-layout after removing it.",
    )


def _two_markers(site: str, values: Sequence[str]) -> Problem:
    return Problem(
        "ambiguous-layout",
        f"lora_B_layout of {site} in adapter_config.json",
        f"two markers that differ: {' and '.join(values)}",
        "one layout",
        "Remove the wrong marker.",
    )
