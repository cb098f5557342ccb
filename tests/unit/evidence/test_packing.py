"""How the columns of lora_B are packed: markers, the option, and what the weights say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from loudmerge.errors import MergeRefused
from loudmerge.evidence.clustering import Verdict
from loudmerge.evidence.decision import Layout, decide
from loudmerge.evidence.hypotheses import Evidence, FusedModule
from loudmerge.evidence.weighing import FusedSite, Weighed
from loudmerge.layout import LoraBLayout
from loudmerge.reading.families import family_of
from tests.unit.builders import EXPERTS, config, gated, made, square

MAJOR, GROUPED = LoraBLayout
LEAVES = ("down_proj", "gate_up_proj")
QWEN = family_of("qwen3_moe")
NEWEST = {"peft_version": "0.21.2"}
BOTH = made(gated(6, 4), ("down_proj", "gate_up_proj"))
GROUPED_MARK: dict[str, Any] = {"lora_B_layout": "grouped_by_expert"}
MAJOR_MARK: dict[str, Any] = {"lora_B_layout": "rank_major"}
UNMARKED: dict[str, Any] = {"auto_mapping": {"unsloth_fixed": True}}


def packed(module: FusedModule = BOTH, **fields: Any) -> dict[str, str]:
    """The packing by parameter, as the markers in `fields` say."""
    layout = decide([module], config(**NEWEST, **fields), QWEN)
    return {leaf: packing.value for (_, leaf), packing in layout.packing.items()}


def unpacked(module: FusedModule = BOTH, **fields: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        decide([module], config(**NEWEST, **fields), QWEN)
    return caught.value


def detail(**parameters: Any) -> dict[str, Any]:
    return {"lora_A_layout": "grouped_by_expert", "parameters": parameters}


def test_without_a_marker_columns_are_rank_major_as_peft_packs_them() -> None:
    layout = decide([BOTH], config(**NEWEST), QWEN)
    assert layout.lora_b_layout == "rank_major"
    said = [e for e in layout.evidence if e.says == "rank_major"]
    assert {e.site for e in said} == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert {(e.source, e.confidence, e.detail) for e in said} == {
        ("module", 0.9, "assumed: no marker, and PEFT in every version packs so")
    }


@pytest.mark.parametrize("value", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("place", ["top", "auto_mapping", "both"])
def test_a_marker_is_read_at_the_top_and_in_auto_mapping(value: str, place: str) -> None:
    mark = {"lora_B_layout": value}
    fields: dict[str, Any] = {"auto_mapping": mark} if place != "top" else {}
    if place != "auto_mapping":
        fields |= mark
    layout = decide([BOTH], config(**NEWEST, **fields), QWEN)
    assert layout.lora_b_layout == value
    name = "auto_mapping.lora_B_layout" if place == "auto_mapping" else "lora_B_layout"
    said = {(e.source, e.says, e.confidence, e.detail) for e in layout.evidence if e.source == "marker"}
    assert said == {("marker", value, 1.0, name)}


def test_each_parameter_may_have_a_packing_of_its_own() -> None:
    marks = detail(gate_up_proj=GROUPED_MARK, down_proj=MAJOR_MARK)
    found = packed(unsloth_fused_expert_lora=marks)
    assert found == {"gate_up_proj": "grouped_by_expert", "down_proj": "rank_major"}
    layout = decide([BOTH], config(**NEWEST, unsloth_fused_expert_lora=marks), QWEN)
    assert layout.lora_b_layout == "mixed"


@pytest.mark.parametrize(
    "marks",
    [GROUPED_MARK, {**GROUPED_MARK, "parameters": []}, {**GROUPED_MARK, "parameters": {"down_proj": 3}}],
    ids=["no parameters", "a list", "a number"],
)
def test_a_detail_without_parameters_holds_for_all(marks: dict[str, Any]) -> None:
    assert set(packed(unsloth_fused_expert_lora=marks).values()) == {"grouped_by_expert"}


def test_a_parameter_without_a_marker_of_its_own_has_the_details() -> None:
    marks = {**GROUPED_MARK, "parameters": {"down_proj": {"num_experts": 4}, "gate_up_proj": {}}}
    assert set(packed(unsloth_fused_expert_lora=marks).values()) == {"grouped_by_expert"}


def test_a_parameter_without_a_marker_anywhere_in_the_detail_has_the_tops() -> None:
    marks = detail(down_proj={"num_experts": 4})
    assert set(packed(**GROUPED_MARK, unsloth_fused_expert_lora=marks).values()) == {"grouped_by_expert"}


@pytest.mark.parametrize("junk", ["yes", 3, ["rank_major"]])
def test_a_detail_that_is_no_object_is_passed_over(junk: object) -> None:
    assert set(packed(**GROUPED_MARK, unsloth_fused_expert_lora=junk).values()) == {"grouped_by_expert"}


def test_two_markers_that_differ_are_refused() -> None:
    error = unpacked(**GROUPED_MARK, auto_mapping=MAJOR_MARK)
    assert error.code == "ambiguous-layout"
    assert f"lora_B_layout of {EXPERTS}.down_proj in adapter_config.json" in str(error)
    assert "found two markers that differ: grouped_by_expert and rank_major, expected one layout." in str(
        error
    )
    assert error.hint == "Remove the wrong marker."
    assert len(error.problems) == 2


def test_a_top_marker_that_contradicts_its_own_detail_is_refused() -> None:
    marks = {**MAJOR_MARK, "parameters": {"down_proj": MAJOR_MARK, "gate_up_proj": MAJOR_MARK}}
    assert unpacked(**GROUPED_MARK, unsloth_fused_expert_lora=marks).code == "ambiguous-layout"


@pytest.mark.parametrize("value", ["mixed", "diagonal", "", 7, ["rank_major"]])
def test_an_unknown_marker_is_refused(value: object) -> None:
    error = unpacked(lora_B_layout=value)
    assert error.code == "unknown-layout"
    assert f"found {value!r}, expected rank_major or grouped_by_expert." in str(error)
    assert "Correct the marker" in error.hint


def test_a_parameter_whose_layers_are_packed_differently_is_refused() -> None:
    """Unsloth writes "mixed" for it, and no flat marker: which layer is which is not in the file."""
    marks = detail(gate_up_proj={"lora_B_layout": "mixed", "num_experts": 4}, down_proj=MAJOR_MARK)
    error = unpacked(unsloth_fused_expert_lora=marks)
    assert error.code == "unknown-layout"
    assert f"lora_B_layout of {EXPERTS}.gate_up_proj" in str(error)
    assert "found 'mixed'" in str(error)
    assert len(error.problems) == 1


def test_rows_of_lora_a_that_are_packed_otherwise_are_refused() -> None:
    error = unpacked(unsloth_fused_expert_lora={**MAJOR_MARK, "lora_A_layout": "rank_major"})
    assert error.code == "unknown-layout"
    assert "lora_A_layout in unsloth_fused_expert_lora" in str(error)


def test_a_marker_for_another_number_of_experts_is_refused() -> None:
    marks: dict[str, Any] = {
        "auto_mapping": {"unsloth_fused_expert_lora": detail(down_proj={**MAJOR_MARK, "num_experts": 8})}
    }
    error = unpacked(**marks)
    assert error.code == "num-experts-mismatch"
    assert str(error).startswith(
        "num-experts-mismatch: down_proj in auto_mapping.unsloth_fused_expert_lora: found num_experts 8,"
        " expected 4, as the base has."
    )


def test_an_adapter_of_unsloth_without_a_marker_is_refused() -> None:
    error = unpacked(auto_mapping={"unsloth_fixed": True})
    assert error.code == "ambiguous-layout"
    assert "found an adapter made by Unsloth without the lora_B_layout marker" in str(error)
    assert error.hint == (
        "Give --lora-b-layout grouped_by_expert for unsloth_zoo 2026.9.5 or older, else rank_major; it is"
        " rank_major also where Unsloth has no experts forward for the model, or under"
        " UNSLOTH_MOE_LORA_MERGED=1."
    )
    assert len(error.problems) == 2


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
def test_the_option_settles_an_adapter_of_unsloth_without_a_marker(packing: str) -> None:
    fields = config(**NEWEST, auto_mapping={"unsloth_fixed": True})
    assert decide([BOTH], fields, QWEN, lora_b_layout=packing).lora_b_layout == packing


def test_what_the_option_overrules_is_said_once_for_each_witness() -> None:
    layout = weighed(MAJOR, option="grouped_by_expert", **MAJOR_MARK)
    assert layout.lora_b_layout == "grouped_by_expert"
    weights, marker = layout.overruled
    said = "--lora-b-layout grouped_by_expert decided, but"
    assert weights.startswith(f"{said} weights of down_proj says rank_major: 2 sites: ")
    assert marker == f"{said} marker of {EXPERTS}.down_proj says rank_major: lora_B_layout"
    assert weighed(GROUPED, option="grouped_by_expert", **GROUPED_MARK).overruled == ()
    assert weighed(MAJOR, **MAJOR_MARK).overruled == ()


@pytest.mark.parametrize("size", [{"rank": 1}, {"experts": 1}])
def test_rank_one_and_one_expert_are_packed_alike_either_way(size: dict[str, int]) -> None:
    module = made({"down_proj": (6, 4)}, ("down_proj",), **size)  # type: ignore[arg-type]
    assert packed(module, auto_mapping={"unsloth_fixed": True}) == {"down_proj": "rank_major"}


def saying(says: LoraBLayout | None, *leaves: str, sure: float = 0.99) -> Any:
    """What `weigh` gives where the weights say so of these parameters; of all by default."""

    def weigh(sites: Iterable[FusedSite]) -> Weighed:
        found = Verdict(says, sure if says else 0.0, 30.0, 9.0, 2)
        return Weighed({site.leaf: found for site in sites if site.leaf in (leaves or LEAVES)}, ())

    return weigh


def weighed(says: LoraBLayout | None, *leaves: str, option: str = "auto", **fields: Any) -> Layout:
    return decide([BOTH], config(**NEWEST, **fields), QWEN, lora_b_layout=option, weigh=saying(says, *leaves))


def contradicted(says: LoraBLayout, *leaves: str, **fields: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        weighed(says, *leaves, **fields)
    return caught.value


def test_the_weights_are_asked_once_for_all_sites() -> None:
    asked: list[FusedSite] = []

    def weigh(sites: Iterable[FusedSite]) -> Weighed:
        asked.extend(sites)
        return Weighed({}, ())

    layout = decide([BOTH], config(**NEWEST), QWEN, weigh=weigh)
    assert [(site.leaf, site.experts, site.rank, site.pair.depth) for site in asked] == [
        ("down_proj", 4, 2, 0),
        ("gate_up_proj", 4, 2, 1),
    ]
    assert layout.lora_b_layout == "rank_major"


def test_what_the_weights_say_is_in_the_evidence_once_for_each_parameter() -> None:
    layout = weighed(MAJOR, "gate_up_proj")
    said = [e for e in layout.evidence if e.source == "weights"]
    assert [(e.site, e.says, e.confidence) for e in said] == [("gate_up_proj", "rank_major", 0.99)]
    assert said[0].detail.startswith("2 sites: lora_B's columns +30.0, A and B together +9.0, in standard")


def test_no_evidence_is_in_the_evidence_and_changes_nothing() -> None:
    layout = weighed(None)
    said = [(e.site, e.says, e.confidence) for e in layout.evidence if e.source == "weights"]
    assert sorted(said) == [("down_proj", "", 0.0), ("gate_up_proj", "", 0.0)]
    assumed = [e for e in layout.evidence if e.source == "module"]
    assert {(e.says, e.confidence) for e in assumed} == {("rank_major", 0.9)}


def test_weights_that_agree_make_the_assumption_surer() -> None:
    assumed = {e.site: e for e in weighed(MAJOR, "down_proj").evidence if e.source == "module"}
    assert assumed[f"{EXPERTS}.down_proj"].confidence == pytest.approx(0.999)
    assert assumed[f"{EXPERTS}.down_proj"].detail.endswith("; the weights agree")
    assert assumed[f"{EXPERTS}.gate_up_proj"].confidence == 0.9


def test_weights_that_contradict_the_assumption_are_refused() -> None:
    error = contradicted(GROUPED, "down_proj")
    assert error.code == "ambiguous-layout"
    assert str(error).startswith(
        f"ambiguous-layout: lora_B of down_proj, first {EXPERTS}.down_proj: found rank_major (packed as PEFT"
        " packs, as no marker says otherwise), and weights that were trained as grouped_by_expert"
        " (confidence 0.990: 2 sites: "
    )
    assert error.hint == (
        "Give --lora-b-layout grouped_by_expert, as the weights say, or --lora-b-layout rank_major if you"
        " know that it was trained so."
    )


def test_a_contradiction_is_told_once_for_all_layers_of_a_parameter() -> None:
    modules = [made(gated(6, 4), LEAVES, name=f"model.layers.{n}.mlp.experts") for n in range(3)]
    with pytest.raises(MergeRefused) as caught:
        decide(modules, config(**NEWEST), QWEN, weigh=saying(GROUPED))
    assert [problem.where.partition(",")[0] for problem in caught.value.problems] == [
        "lora_B of down_proj",
        "lora_B of gate_up_proj",
    ]


@pytest.mark.parametrize(("marked", "says"), [("rank_major", GROUPED), ("grouped_by_expert", MAJOR)])
def test_a_marker_that_the_weights_contradict_is_refused(marked: str, says: LoraBLayout) -> None:
    error = contradicted(says, lora_B_layout=marked)
    assert error.code == "ambiguous-layout"
    assert f"found {marked} (the marker in adapter_config.json), and weights that were trained as" in str(
        error
    )
    assert f"--lora-b-layout {marked} if you know" in error.hint


@pytest.mark.parametrize("says", [GROUPED, None])
def test_a_marker_that_the_weights_do_not_contradict_holds(says: LoraBLayout | None) -> None:
    assert weighed(says, lora_B_layout="grouped_by_expert").lora_b_layout == "grouped_by_expert"


@pytest.mark.parametrize("says", list(LoraBLayout))
def test_an_unmarked_adapter_of_unsloth_is_packed_as_its_weights_say(says: LoraBLayout) -> None:
    layout = weighed(says, auto_mapping={"unsloth_fixed": True})
    assert set(layout.packing.values()) == {says}
    assert {e.source for e in layout.evidence if e.says == says.value} == {"weights"}


def test_an_unmarked_adapter_of_unsloth_is_refused_where_its_weights_say_nothing() -> None:
    error = contradicted(MAJOR, "down_proj", auto_mapping={"unsloth_fixed": True})
    assert [problem.where.partition(" of ")[2] for problem in error.problems] == [f"{EXPERTS}.gate_up_proj"]
    assert "expected a marker, weights that show it, or the option" in str(error)


@pytest.mark.parametrize(("columns", "said"), [(0.0, True), (0.1, False)])
def test_an_unmarked_adapter_whose_experts_were_not_trained_may_be_read_either_way(
    columns: float, said: bool
) -> None:
    """Unsloth's loop forward of 2026.4 left the experts' LoRA out, its Qwen3-MoE of 2026.3.7 always."""
    weights = Weighed(dict.fromkeys(LEAVES, Verdict(None, 0.0, columns, 0.0, 2)), ())
    with pytest.raises(MergeRefused) as caught:
        decide([BOTH], config(**NEWEST, **UNMARKED), QWEN, weigh=lambda _: weights)
    assert caught.value.hint.endswith("were not trained, and either is right.") is said


SQUARE_AND_NOT = made({"gate_up_proj": (6, 6), "down_proj": (6, 3)}, ("down_proj", "gate_up_proj"))


@pytest.mark.parametrize("module", [SQUARE_AND_NOT, square()])
def test_a_square_parameter_that_unsloths_own_forward_trained_is_refused(module: FusedModule) -> None:
    """unsloth_zoo 2026.9.5 with PEFT 0.19.1, 2I = H: its live model has gate_up's update transposed, its own
    merge has not."""
    fields = config(**NEWEST, **UNMARKED)
    with pytest.raises(MergeRefused) as caught:
        decide([module], fields, QWEN, weigh=saying(GROUPED))
    (problem,) = caught.value.problems
    leaf = "gate_up_proj" if module is SQUARE_AND_NOT else "down_proj"
    where = f"orientation of {leaf}, first {EXPERTS}.{leaf}"
    assert (problem.code, problem.where) == ("ambiguous-layout", where)
    assert "found a square parameter, 6 x 6, in an adapter by Unsloth without a marker" in str(caught.value)
    told = decide([module], fields, QWEN, lora_b_layout="grouped_by_expert")
    assert [doubt.partition(": a square parameter, 6 x 6,")[0] for doubt in told.doubts] == [problem.where]
    more = [square(), square(f"second.{EXPERTS}")]
    assert len(decide(more, fields, QWEN, lora_b_layout="grouped_by_expert").doubts) == 1
    assert decide([module], fields, QWEN, "standard", weigh=saying(GROUPED)).orientation == "standard"


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        # gpt_oss: its class is_transposed, and Unsloth reads it as PEFT does.
        ("gpt_oss", UNMARKED, GROUPED),
        # Trained by PEFT's own forward.
        ("qwen3_moe", UNMARKED, MAJOR),
        ("qwen3_moe", {**UNMARKED, **GROUPED_MARK}, GROUPED),
    ],
)
def test_other_square_parameters_of_unsloth_are_as_peft_lays_them_out(
    family: str, fields: dict[str, Any], says: LoraBLayout
) -> None:
    layout = decide([SQUARE_AND_NOT], config(**NEWEST, **fields), family_of(family), weigh=saying(says))
    assert layout.lora_b_layout == says.value


@pytest.mark.parametrize(
    ("module", "family", "fields", "said"),
    [
        (SQUARE_AND_NOT, "qwen3_moe", {**UNMARKED, "lora_B_layout": "rank_major"}, True),
        (SQUARE_AND_NOT, "gpt_oss", {**UNMARKED, "lora_B_layout": "rank_major"}, False),
        (SQUARE_AND_NOT, "qwen3_moe", {"lora_B_layout": "rank_major"}, False),
        (BOTH, "qwen3_moe", {**UNMARKED, "lora_B_layout": "rank_major"}, False),
    ],
    ids=["square", "is_transposed", "not by Unsloth", "not square"],
)
def test_a_marked_square_parameter_may_be_of_two_releases_that_trained_it_transposed(
    module: FusedModule, family: str, fields: dict[str, Any], said: bool
) -> None:
    """2026.9.6 and 2026.9.7 write the marker that later ones, which read it as PEFT does, write, too."""
    doubts = decide([module], config(**NEWEST, **fields), family_of(family), weigh=saying(MAJOR)).doubts
    assert [doubt.partition(": square, in an adapter by Unsloth.")[0] for doubt in doubts] == [
        "gate_up_proj"
    ] * said


@pytest.mark.parametrize("option", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("says", [*LoraBLayout, None])
def test_the_option_wins_over_weights_and_both_are_recorded(option: str, says: LoraBLayout | None) -> None:
    layout = weighed(says, option=option, lora_B_layout="rank_major")
    assert layout.lora_b_layout == option
    assert {e.says for e in layout.evidence if e.source == "option"} == {option}
    assert {e.says for e in layout.evidence if e.source == "weights"} == {says.value if says else ""}


@pytest.mark.parametrize("size", [{"rank": 1}, {"experts": 1}])
def test_weights_are_not_compared_where_both_packings_are_the_same(size: dict[str, int]) -> None:
    module = made({"down_proj": (6, 4)}, ("down_proj",), **size)  # type: ignore[arg-type]
    assert decide([module], config(**NEWEST), QWEN, weigh=saying(GROUPED)).lora_b_layout == "rank_major"


def test_the_packing_option_decides_an_adapter_without_a_marker() -> None:
    layout = decide([square()], config(**NEWEST), QWEN, lora_b_layout="grouped_by_expert")
    assert layout.packing == {(EXPERTS, "down_proj"): GROUPED}
    assert layout.lora_b_layout == "grouped_by_expert"
    said = Evidence("option", f"{EXPERTS}.down_proj", "grouped_by_expert", 1.0, "--lora-b-layout")
    assert said in layout.evidence
