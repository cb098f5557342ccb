"""Makes a MergePlan: places the adapter, decides its layout, and accounts for every tensor of both sides.

Every problem found is reported together. Of the weights, only what tells how lora_B is packed is read,
whether an embedding that was trained lies there twice, a head's bias that PEFT leaves out, and a few weights
that LoRAs may hold a part of.
"""

from __future__ import annotations

from loudmerge.errors import MergeRefused, Problem
from loudmerge.evidence.decision import Layout, decide
from loudmerge.evidence.weighing import weigh
from loudmerge.planning.announced import Announced
from loudmerge.planning.copies import settle_copies
from loudmerge.planning.draft import Draft
from loudmerge.planning.forwards import beyond_weight, lost_biases
from loudmerge.planning.options import Options
from loudmerge.planning.plan import MergePlan
from loudmerge.planning.residual import parts_of_weights
from loudmerge.planning.siblings import missing_siblings
from loudmerge.planning.sites import place
from loudmerge.planning.towers import in_its_part
from loudmerge.planning.vocabulary import settle
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.experts import Experts
from loudmerge.reading.families import family_of
from loudmerge.reading.names import Names


def make_plan(base: Checkpoint, adapter: Adapter, options: Options) -> MergePlan:
    """Raises MergeRefused with every problem found."""
    family = family_of(base.model_type)
    if family.refused:
        raise MergeRefused(
            Problem(
                "unsupported-base",
                f"model_type {base.model_type} of {base.path}",
                family.refused,
                "a family that can be merged into",
                "Load base and adapter with PEFT, and use them so, without a merge.",
            )
        )
    family = in_its_part(base, adapter, family)
    names = Names(base, family)
    experts = Experts(base, names, family)
    placement, problems = place(adapter, names, experts, family, base.config)
    if not problems:
        # What is not there can be told once all that is there has its place.
        problems += Announced(base, adapter, names, family, placement).missing(experts)
    problems += beyond_weight(base, adapter, placement)
    problems += missing_siblings(base, adapter, placement, names, family)
    draft = Draft(base, adapter, names, family, options)
    if family.root:
        draft.notes.append(
            f"the adapter is read as one of {family.root.removesuffix('.')}, a part of the base"
        )
    layout, fused = Layout({}, {}, ()), list[Problem]()
    try:
        layout = decide(
            placement.modules, adapter.config, family, options.orientation, options.lora_b_layout, weigh
        )
        draft.add_fused(placement, layout)
    except MergeRefused as refusal:
        fused = list(refusal.problems)
    draft.add_dense(placement.dense)
    draft.add_full(adapter.full)
    draft.add_rows(adapter.rows)
    settle(draft, placement.untied_head)
    settle_copies(draft)
    problems += lost_biases(draft)
    # Linears first: where the config's rank is wrong they prove it, and experts only that something is.
    problems += [*draft.problems, *fused]
    # Only what fits the base's weights can be compared with them.
    problems = problems or list(parts_of_weights(placement.dense))
    if problems:
        raise MergeRefused(problems)
    plan = draft.finish(layout, placement)
    _account(plan)
    return plan


def _account(plan: MergePlan) -> None:
    """Every adapter tensor is used exactly once, whatever the rooms before this one did."""
    used = plan.consumed
    problems = [
        Problem(
            "unconsumed-adapter-tensor",
            str(entry),
            f"used {used[name]} times by the plan",
            "used once",
            "loudmerge misread the adapter; say so in a bug report.",
        )
        for name, entry in plan.adapter.entries.items()
        if used[name] != 1
    ]
    if problems:
        raise MergeRefused(problems)
