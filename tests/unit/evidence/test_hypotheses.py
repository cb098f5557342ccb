"""What the shapes of a module's pairs admit together."""

from __future__ import annotations

import itertools

import pytest

from loudmerge.evidence.hypotheses import Evidence, FusedModule, FusedParameter, Hypothesis, hypotheses
from loudmerge.layout import Orientation
from tests.unit.builders import fused, gated, made, ungated

STANDARD, SWAPPED = Orientation.STANDARD, Orientation.SWAPPED
SIZES = range(1, 13)


@pytest.mark.parametrize("transposed_in_memory", [False, True])
@pytest.mark.parametrize("orientation", list(Orientation))
@pytest.mark.parametrize("order", list(itertools.permutations(("gate_up_proj", "down_proj"))))
def test_gate_up_and_down_together_admit_one_reading_whatever_their_sizes(
    order: tuple[str, ...], orientation: Orientation, transposed_in_memory: bool
) -> None:
    """For every H and I, 2I = H and I = H among them: the pair of shapes decides orientation and nesting."""
    for hidden, intermediate in itertools.product(SIZES, SIZES):
        parameters = gated(hidden, intermediate)
        if transposed_in_memory:
            parameters = {leaf: (d2, d1) for leaf, (d1, d2) in parameters.items()}
        found = hypotheses(made(parameters, order, orientation))
        assert found == (Hypothesis(order, orientation),), (hidden, intermediate)


def test_a_single_parameter_is_decided_by_its_shape_unless_it_is_square() -> None:
    for d1, d2 in itertools.product(SIZES, SIZES):
        for orientation in Orientation:
            found = {
                h.orientation for h in hypotheses(made({"down_proj": (d1, d2)}, ("down_proj",), orientation))
            }
            assert found == (set(Orientation) if d1 == d2 else {orientation}), (d1, d2)


@pytest.mark.parametrize("orientation", list(Orientation))
@pytest.mark.parametrize("order", list(itertools.permutations(("up_proj", "down_proj"))))
def test_up_and_down_without_a_gate_always_admit_both_orientations(
    order: tuple[str, ...], orientation: Orientation
) -> None:
    """up is (I, H) and down is (H, I): each read the other way is the other."""
    for hidden, intermediate in itertools.product(SIZES, SIZES):
        found = hypotheses(made(ungated(hidden, intermediate), order, orientation))
        assert Hypothesis(order, orientation) in found
        assert Hypothesis(order[::-1], orientation.flipped()) in found
        assert len(found) == (4 if hidden == intermediate else 2)


def test_only_the_orientations_that_peft_can_have_written_are_admitted() -> None:
    """With one expert it takes a Linear's path: B @ A, in the axes of the parameter in memory."""
    only = frozenset({STANDARD})
    found = hypotheses(made({"down_proj": (6, 6)}, ("down_proj",), experts=1, orientations=only))
    assert found == (Hypothesis(("down_proj",), STANDARD),)
    swapped = made({"down_proj": (6, 4)}, ("down_proj",), SWAPPED, experts=1, orientations=only)
    assert hypotheses(swapped) == ()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks_that_differ_tell_which_pair_is_which(rank: int) -> None:
    """Equal shapes otherwise: up and down square, up of rank 4."""
    rows = {"up_proj": 16, "down_proj": 4 * rank}
    pairs = [((rows[leaf], 6), (6, rows[leaf])) for leaf in ("up_proj", "down_proj")]
    module = fused({"up_proj": (6, 6), "down_proj": (6, 6)}, pairs)
    ranked = FusedModule(
        module.name,
        4,
        module.pairs,
        tuple(FusedParameter(p.leaf, p.name, 6, 6, rows[p.leaf] // 4) for p in module.parameters),
    )
    assert {h.assignment for h in hypotheses(ranked)} == {("up_proj", "down_proj")}


def test_evidence_is_written_by_its_fields() -> None:
    assert Evidence("marker", "x.down_proj", "rank_major", 1.0, "lora_B_layout").to_json() == {
        "source": "marker",
        "site": "x.down_proj",
        "says": "rank_major",
        "confidence": 1.0,
        "detail": "lora_B_layout",
    }
