"""What an adapter says of its layout where no base is there: markers, PEFT's version, the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loudmerge.errors import Problem
from loudmerge.evidence.decision import Layout
from loudmerge.evidence.hypotheses import Evidence
from loudmerge.evidence.packing import Packing
from loudmerge.evidence.provenance import evidence_by_class
from loudmerge.evidence.weighing import FusedSite, Weighed, placed
from loudmerge.reading.adapter import Adapter

UNDECIDED, NONE = "undecided", "none"


@dataclass(frozen=True)
class LayoutFound:
    """A layout, as far as it is decided, and the evidence.

    orientation, lora_b_layout: as those of `evidence.decision.Layout`, or "undecided".
    problems: why a merge would refuse the packing.
    """

    orientation: str
    lora_b_layout: str
    evidence: tuple[Evidence, ...]
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, layout: Layout) -> LayoutFound:
        """The layout of a plan."""
        return cls(layout.orientation, layout.lora_b_layout, layout.evidence)

    def to_json(self) -> dict[str, Any]:
        return {
            "orientation": self.orientation,
            "lora_b_layout": self.lora_b_layout,
            "evidence": [one.to_json() for one in self.evidence],
        }


def layout_alone(
    adapter: Adapter, sites: Sequence[FusedSite], weighed: Weighed, orientation: str, lora_b_layout: str
) -> LayoutFound:
    """The layout of fused LoRA without its base. orientation, lora_b_layout: the options.

    sites: those of `evidence.weighing.sites_of`. Only an option decides the orientation: shapes prove
    nothing without those of the base, and what PEFT's version says depends on its experts class.
    """
    if not any(adapter.config.targeted_parameters(pair.module) for pair in adapter.pairs):
        return LayoutFound(NONE, NONE, ())
    evidence = list(evidence_by_class(adapter.config))
    if orientation != "auto":
        evidence.append(Evidence("option", "", orientation, 1.0, "--orientation"))
    decider = Packing(adapter.config, lora_b_layout, evidence, weighed.verdicts)
    packed = {(site.pair.module, site.leaf): decider.decide(*placed(site)) for site in sites}
    decided = packed and not decider.problems
    return LayoutFound(
        UNDECIDED if orientation == "auto" else orientation,
        Layout({}, packed, ()).lora_b_layout if decided else UNDECIDED,
        tuple(evidence),
        tuple(decider.problems),
    )
