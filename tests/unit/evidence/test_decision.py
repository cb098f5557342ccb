"""What decides the orientation: shapes, siblings, the config's version, the option; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from loudmerge.errors import MergeRefused
from loudmerge.evidence.decision import decide
from loudmerge.evidence.hypotheses import Evidence, FusedModule, Hypothesis
from loudmerge.layout import Orientation
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.families import family_of
from tests.unit.builders import EXPERTS, config, fused, gated, made, square, ungated

STANDARD, SWAPPED = Orientation.STANDARD, Orientation.SWAPPED
QWEN = family_of("qwen3_moe")
OTHER = "model.layers.1.mlp.experts"
NEWEST = {"peft_version": "0.21.2"}


def dated(version: str, **fields: Any) -> AdapterConfig:
    return config(peft_version=version, **fields)


def refusal(*modules: FusedModule, config_is: AdapterConfig | None = None, **options: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        decide(modules, config_is or config(), QWEN, **options)
    return caught.value


def test_the_order_of_nesting_is_found_by_shape_where_it_is_flipped() -> None:
    layout = decide([made(gated(6, 4), ("gate_up_proj", "down_proj"))], config(**NEWEST), QWEN)
    assert layout.hypotheses[EXPERTS].assignment == ("gate_up_proj", "down_proj")


def test_equal_shapes_are_told_apart_by_the_order_of_registration() -> None:
    layout = decide([made(ungated(6, 6), ("down_proj", "up_proj"))], config(**NEWEST), QWEN)
    assert layout.hypotheses[EXPERTS] == Hypothesis(("down_proj", "up_proj"), STANDARD)
    (said,) = [e for e in layout.evidence if e.source == "module" and e.says == "standard"]
    assert said.detail == "equal shapes; PEFT wraps the parameter registered first innermost: up_proj"
    assert 0 < said.confidence < 1


def test_names_that_no_table_orders_are_ordered_by_themselves() -> None:
    layout = decide([made({"zeta": (6, 6), "alpha": (6, 6)}, ("zeta", "alpha"))], config(**NEWEST), QWEN)
    assert layout.hypotheses[EXPERTS].assignment == ("zeta", "alpha")


def test_equal_shapes_in_an_order_that_peft_never_nests_are_refused() -> None:
    """gate and up have equal shapes; down between them shows that the nesting is not PEFT's usual one."""
    parameters = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    error = refusal(made(parameters, ("up_proj", "down_proj", "gate_proj")))
    assert error.code == "ambiguous-layout"
    assert error.where == EXPERTS


# --- modules together ----------------------------------------------------------------------------


def test_a_square_module_follows_the_module_that_proves_itself() -> None:
    proving = made(gated(6, 4), ("down_proj", "gate_up_proj"), SWAPPED)
    layout = decide([square(OTHER), proving], config(), QWEN)
    assert {h.orientation for h in layout.hypotheses.values()} == {SWAPPED}
    said = {(e.source, e.site): e for e in layout.evidence}
    assert said["shape", EXPERTS].says == said["sibling", OTHER].says == "swapped"
    assert said["sibling", OTHER].detail == f"another module's shapes prove it: {EXPERTS}"
    assert said["shape", EXPERTS].confidence == said["sibling", OTHER].confidence == 1.0
    assert said["peft_version", ""].says == ""


def test_modules_that_prove_different_orientations_are_refused() -> None:
    both = ("down_proj", "gate_up_proj")
    error = refusal(made(gated(6, 4), both), made(gated(6, 4), both, SWAPPED, name=OTHER))
    assert error.code == "unknown-layout"
    assert str(error).startswith(f"unknown-layout: {OTHER}: found swapped by its shapes (A [8, 6] B [4, 8], ")
    assert "expected standard, as the modules before it." in str(error)
    assert "save it again from one" in error.hint


def test_one_expert_says_nothing_about_modules_with_more() -> None:
    other = made({"down_proj": (6, 4)}, ("down_proj",), experts=1, name=OTHER)
    layout = decide([other, square()], config(peft_version="0.18.1"), QWEN)
    assert layout.hypotheses[OTHER].orientation is STANDARD
    assert layout.hypotheses[EXPERTS].orientation is SWAPPED
    assert layout.orientation == "mixed"


def single(orientations: frozenset[Orientation] = frozenset(Orientation)) -> FusedModule:
    return made({"down_proj": (6, 6)}, ("down_proj",), experts=1, orientations=orientations)


def test_a_single_expert_needs_no_evidence() -> None:
    layout = decide([single(frozenset({STANDARD}))], config(), QWEN)
    assert (layout.orientation, layout.lora_b_layout) == ("standard", "rank_major")
    assert layout.evidence == ()


def test_a_single_expert_whose_axes_in_memory_depend_on_transformers_needs_the_option() -> None:
    """qwen3_vl_moe: what a Linear's path writes is standard in the new axes and swapped in the old."""
    error = refusal(single(), config_is=dated("0.21.2"))
    assert (error.code, error.where) == ("ambiguous-layout", EXPERTS)
    for orientation in Orientation:
        layout = decide([single()], config(), QWEN, orientation=orientation.value)
        assert layout.hypotheses[EXPERTS].orientation is orientation


def test_no_module_has_no_layout() -> None:
    layout = decide([], config(), QWEN)
    assert (layout.orientation, layout.lora_b_layout) == ("none", "none")


# --- what fits nothing ---------------------------------------------------------------------------


def one(a: Sequence[int], b: Sequence[int], rank: int = 2) -> FusedModule:
    return fused({"down_proj": (6, 4)}, [(a, b)], rank=rank)


@pytest.mark.parametrize(
    ("module", "code", "says"),
    [
        (one((8, 4), (6, 12)), "shape-mismatch", "found 8 rows of lora_A and 12 columns of lora_B"),
        (
            one((6, 4), (6, 6)),
            "num-experts-mismatch",
            "found 6 rows: 3 experts of rank 2, as adapter_config.json says, expected 4 experts",
        ),
        (
            one((12, 4), (6, 12)),
            "num-experts-mismatch",
            "6 experts of rank 2, as adapter_config.json says, or rank 3 for 4 experts, expected 4 experts",
        ),
        (one((7, 4), (6, 7)), "num-experts-mismatch", "found 7 rows, expected a multiple of 4 experts"),
        (one((12, 4), (6, 12), rank=5), "rank-mismatch", "rank 3 for 4 experts, expected rank 5"),
        (
            one((8, 5), (6, 8)),
            "shape-mismatch",
            "found A [8, 5] B [6, 8], expected down_proj: A [8, 4] B [6, 8] (standard) or A [8, 6] B [4, 8]",
        ),
        (
            fused(gated(6, 4), [((8, 4), (6, 8)), ((8, 8), (6, 8))]),
            "unknown-layout",
            "found A [8, 4] B [6, 8], A [8, 8] B [6, 8], expected gate_up_proj: A [8, 6] B [8, 8]",
        ),
        (
            fused(gated(6, 4), [((8, 4), (6, 8)), ((8, 9), (9, 8))]),
            "shape-mismatch",
            "down_proj: A [8, 4] B [6, 8] (standard) or A [8, 6] B [4, 8] (swapped).",
        ),
    ],
    ids=[
        "rows and columns", "fewer experts", "more experts", "no experts", "rank", "shape",
        "down standard, gate_up swapped", "one of two fits",
    ],
)  # fmt: skip
def test_shapes_that_fit_nothing_are_refused_with_the_reason(
    module: FusedModule, code: str, says: str
) -> None:
    error = refusal(module)
    assert error.code == code
    assert says in str(error)
    if "rows of" not in says:
        assert "base" in error.hint


def test_every_module_that_fits_nothing_is_reported() -> None:
    error = refusal(
        one((8, 5), (6, 8)), made({"down_proj": (5, 3)}, ("down_proj",), name=OTHER, rank=3, experts=2)
    )
    assert len(error.problems) == 1
    bad = fused({"down_proj": (6, 4)}, [((8, 5), (6, 8))], name=OTHER)
    assert [p.where for p in refusal(one((8, 5), (6, 8)), bad).problems] == [EXPERTS, OTHER]


# --- the config ----------------------------------------------------------------------------------


def test_a_square_parameter_follows_the_version() -> None:
    for version, expected in (("0.18.1", "swapped"), ("0.19.1", "standard")):
        layout = decide([square()], dated(version), QWEN)
        assert layout.orientation == expected
        assert [e.says for e in layout.evidence if e.source == "peft_version"] == [expected]


def test_a_square_parameter_without_a_version_is_refused() -> None:
    error = refusal(square(), square(OTHER))
    assert error.code == "ambiguous-layout"
    assert str(error).startswith(
        f"ambiguous-layout: {EXPERTS}: found shapes that fit both standard and swapped"
    )
    assert "(no peft_version, and its fields are not those" in str(error)
    assert "A [8, 6] B [6, 8], expected evidence for one of them." in str(error)
    assert "--orientation swapped for PEFT <= 0.19.0" in error.hint


def test_the_refusal_names_a_module_that_is_open() -> None:
    """The first module has one expert, and nothing to decide."""
    error = refusal(single(frozenset({STANDARD})), square(OTHER))
    assert error.where == OTHER
    assert "A [8, 6] B [6, 8], expected evidence" in str(error)


def test_a_version_against_the_shapes_is_refused() -> None:
    error = refusal(made(gated(6, 4), ("down_proj", "gate_up_proj")), config_is=dated("0.18.1"))
    assert error.code == "ambiguous-layout"
    assert f"{EXPERTS}: found peft_version 0.18.1, whose adapters are swapped" in str(error)
    assert "expected standard, as the shapes prove." in str(error)
    assert "give --orientation standard" in error.hint


def test_a_version_with_the_shapes_adds_to_the_evidence() -> None:
    layout = decide([made(gated(6, 4), ("down_proj", "gate_up_proj"))], dated("0.19.1"), QWEN)
    assert [e.source for e in layout.evidence[:2]] == ["shape", "peft_version"]


@pytest.mark.parametrize(("version", "orientation"), [("0.18.1", SWAPPED), ("0.19.1", STANDARD)])
def test_the_version_decides_up_and_down_without_a_gate(version: str, orientation: Orientation) -> None:
    for hidden, intermediate in ((6, 4), (4, 6), (5, 5)):
        module = made(ungated(hidden, intermediate), ("down_proj", "up_proj"), orientation)
        layout = decide([module], dated(version), QWEN)
        assert layout.hypotheses[EXPERTS] == Hypothesis(("down_proj", "up_proj"), orientation)


@pytest.mark.parametrize(("version", "orientation"), [("0.19.1", SWAPPED), ("0.18.1", STANDARD)])
def test_a_version_that_needs_a_nesting_peft_does_not_make_is_refused(
    version: str, orientation: Orientation
) -> None:
    error = refusal(made(ungated(6, 4), ("down_proj", "up_proj"), orientation), config_is=dated(version))
    assert error.code == "ambiguous-layout"
    assert f"fit both standard and swapped (peft_version {version})" in str(error)


def test_flipped_nesting_without_a_gate_is_read_by_a_version_that_fits_the_usual_one() -> None:
    """Up and down without a gate: standard and flipped has the shapes of swapped and usual."""
    module = made(ungated(6, 4), ("up_proj", "down_proj"), STANDARD)
    assert decide([module], dated("0.18.1"), QWEN).hypotheses[EXPERTS] == Hypothesis(
        ("down_proj", "up_proj"), SWAPPED
    )


# --- the options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["standard", "swapped"])
def test_the_option_decides_what_shapes_leave_open(orientation: str) -> None:
    layout = decide([square()], config(), QWEN, orientation=orientation)
    assert layout.orientation == orientation
    assert Evidence("option", "", orientation, 1.0, "--orientation") in layout.evidence


def test_the_option_outweighs_the_version() -> None:
    layout = decide([square()], dated("0.18.1"), QWEN, orientation="standard")
    assert layout.orientation == "standard"
    assert layout.overruled == (
        "--orientation standard decided, but peft_version says swapped: peft_version 0.18.1",
    )
    assert decide([square()], dated("0.18.1"), QWEN, orientation="swapped").overruled == ()


def test_the_option_settles_a_version_that_contradicts_the_shapes() -> None:
    module = made(gated(6, 4), ("down_proj", "gate_up_proj"))
    assert decide([module], dated("0.18.1"), QWEN, orientation="standard").orientation == "standard"


def test_the_option_against_the_shapes_is_refused() -> None:
    error = refusal(made(gated(6, 4), ("down_proj", "gate_up_proj")), orientation="swapped")
    assert error.code == "shape-mismatch"
    assert "found --orientation swapped, with A [8, 4] B [6, 8], A [8, 6] B [8, 8]" in str(error)
    assert "expected standard: only that fits the base. Leave --orientation out." in str(error)
