"""A converted adapter is the same function: what its merge writes is what the float64 reference says."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge.converting.convert import convert
from loudmerge.converting.relayout import Factored, factored, fused, joined, parted
from loudmerge.converting.rewrite import GROUPED, LAYOUTS, PEFT_018, PEFT_019, PER_EXPERT
from loudmerge.errors import MergeRefused
from loudmerge.layout import LoraBLayout, Orientation, Span
from loudmerge.reading.adapter import read_adapter
from loudmerge.reading.adapter_config import WEIGHTS
from tests.unit.builders import fused_lora, values, write_adapter, write_base
from tests.unit.reference import Built, build
from tests.unit.strategies import NAMED, cases, examples, must_merge
from tests.unit.synthetic import Case
from tests.unit.test_merge_properties import SCRATCH, check_tensor, read

FUSED = tuple(layout for layout in LAYOUTS if layout != PER_EXPERT)
ALL = ("gate", "up", "down")
# What each layout's expert pairs are, as merge's options name it.
SAYS = {
    PEFT_018: {"orientation": "swapped", "lora_b_layout": "rank_major"},
    PEFT_019: {"orientation": "standard", "lora_b_layout": "rank_major"},
    GROUPED: {"orientation": "standard", "lora_b_layout": "grouped_by_expert"},
    PER_EXPERT: {},
}


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / WEIGHTS)


def config(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def check_function(case: Case, built: Built, adapter: Path, root: Path, orientation: str = "auto") -> None:
    """The merge of `adapter` is the one that `case` must have."""
    loudmerge.merge(
        built.base, adapter, root / "out", rounding="nearest", orientation=orientation, verify=False
    )
    merged, _ = read(root / "out")
    rank = 2 * max([case.rank, *case.rank_pattern.values()])
    for key, want in built.expected.items():
        check_tensor(key, merged[key], want, rank, Counter())


def qwen(**changes: Any) -> Case:
    return replace(
        Case(NAMED["qwen3_moe"], fused=("gate_up", "down"), layers=2, fused_layers=(0, 1)), **changes
    )


# --- the algebra ---------------------------------------------------------------------------------

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(Orientation), st.sampled_from(LoraBLayout))
def test_reading_a_fused_pair_and_writing_it_gives_the_same_bits(
    experts: int, rank: int, d1: int, d2: int, orientation: Orientation, packing: LoraBLayout
) -> None:
    first, second = (d2, d1) if orientation is Orientation.STANDARD else (d1, d2)
    a, b = values(rank * experts, first, seed=1), values(second, rank * experts, seed=2)
    read_back = fused(factored(a, b, experts, orientation, packing), orientation, packing)
    assert torch.equal(read_back[0], a)
    assert torch.equal(read_back[1], b)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_pair_means_what_the_layouts_formulas_say(experts: int, rank: int, d1: int, d2: int) -> None:
    """W_e's update: B[:, e::E] @ A[e*r:(e+1)*r] in PEFT's standard layout."""
    a, b = values(rank * experts, d2, seed=1), values(d1, rank * experts, seed=2)
    found = factored(a, b, experts, Orientation.STANDARD, LoraBLayout.RANK_MAJOR)
    for e in range(experts):
        torch.testing.assert_close(
            found.up[e] @ found.down[e], b[:, e::experts] @ a[e * rank : (e + 1) * rank]
        )


def test_gate_and_up_that_share_their_input_factor_keep_their_rank() -> None:
    down = values(3, 2, 6)
    both = joined([Factored(values(3, 4, 2, seed=1), down), Factored(values(3, 5, 2, seed=2), down)])
    assert (both.rank, tuple(both.up.shape)) == (2, (3, 9, 2))


def test_gate_and_up_that_do_not_get_a_rank_for_both() -> None:
    parts = [Factored(values(3, 4, 2, seed=seed), values(3, 2, 6, seed=seed)) for seed in (1, 2)]
    both = joined(parts)
    assert both.rank == 4
    stacked = torch.cat([part.up @ part.down for part in parts], dim=1)
    torch.testing.assert_close(both.up @ both.down, stacked)


def test_gate_and_up_of_two_dtypes_keep_every_bit() -> None:
    """bfloat16 has float32's range, float16 has more digits: neither holds the other's values."""
    gate = Factored(values(3, 4, 2, dtype=torch.bfloat16), values(3, 2, 6, dtype=torch.bfloat16))
    up = Factored(values(3, 4, 2, seed=1, dtype=torch.float16), values(3, 2, 6, seed=1, dtype=torch.float16))
    found = parted(joined([gate, up]), [Span(0, 4), Span(4, 4)])
    for alone, before in zip(found, (gate, up), strict=True):
        assert torch.equal(alone.up, before.up.float())
        assert torch.equal(alone.down, before.down.float())


def test_gate_and_up_come_apart_as_they_were_joined() -> None:
    parts = [Factored(values(3, 4, 2, seed=seed), values(3, 2, 6, seed=seed)) for seed in (1, 2)]
    found = parted(joined(parts), [Span(0, 4), Span(4, 4)])
    for alone, before in zip(found, parts, strict=True):
        assert torch.equal(alone.up, before.up)
        assert torch.equal(alone.down, before.down)


@pytest.mark.parametrize("rank", [3, 4])
def test_gate_and_up_that_share_a_rank_each_keep_all_of_it(rank: int) -> None:
    whole = Factored(values(3, 8, rank), values(3, rank, 6))
    whole.up[:, :4, rank // 2 :] = 0
    assert [part.rank for part in parted(whole, [Span(0, 4), Span(4, 4)])] == [rank, rank]


# --- any adapter, any layout -----------------------------------------------------------------------


@examples(in_ci=60)
@given(cases(kinds=("fused", "per_expert")), st.sampled_from(LAYOUTS))
def test_the_function_survives_a_conversion(case: Case, to: str) -> None:
    """Or the conversion is refused, and then it has written nothing."""
    assume(must_merge(case) and case.num_experts > 1)
    # One parameter has one rank and scaling: experts that differ are another test's.
    assume(not (case.per_expert and (case.rank_pattern or case.alpha_pattern)))
    # A key that means only what the other layout has is refused: PEFT would save it and the new one sorted.
    assume(not any(key.startswith("experts") for key in case.alpha_pattern))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        root = Path(scratch)
        built = build(case, root)
        if to != PER_EXPERT and case.family.transposed != "never":
            # Where transformers' version decides what PEFT reads it is refused.
            try:
                convert(built.adapter, root / "converted", to, base=built.base)
            except MergeRefused:
                assert not (root / "converted").exists()
                return
        else:
            convert(built.adapter, root / "converted", to, base=built.base)
        # A square parameter alone does not tell; then the user does.
        told = SAYS[to].get("orientation", "auto") if case.family.transposed == "never" else "auto"
        check_function(case, built, root / "converted", root, told)


@pytest.mark.parametrize("to", [PEFT_018, PER_EXPERT])
def test_a_family_of_two_orientations_converts_where_the_layout_reads_one(to: str, tmp_path: Path) -> None:
    case = replace(qwen(peft="none"), family=NAMED["gpt_oss"], hidden=6, intermediate=5)
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "converted", to, base=built.base)
    check_function(case, built, tmp_path / "converted", tmp_path)


class Converted(NamedTuple):
    """A case and its adapter, which is in one of the layouts that PEFT packs."""

    case: Case
    built: Built
    adapter: Path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Converted]:
    """By family and layout; each is made once."""

    @cache
    def make(family: str, layout: str) -> Converted:
        start, root = NAMED[family], tmp_path_factory.mktemp("converted")
        case = replace(
            qwen(dense=("q_proj",)), family=start, fused=(start.first, "down"), rank_pattern={"down_proj": 3}
        )
        built = build(case, root)
        convert(built.adapter, root / "one", layout, base=built.base)
        return Converted(case, built, root / "one")

    return make


@pytest.mark.parametrize("first", FUSED)
@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_fused", "mixtral", "nemotron_h"])
def test_a_round_trip_between_any_two_layouts_is_exact(
    first: str, then: str, family: str, converted: Callable[[str, str], Converted], tmp_path: Path
) -> None:
    case, built, start = converted(family, first)
    convert(start, tmp_path / "two", then, base=built.base)
    convert(tmp_path / "two", tmp_path / "three", first, base=built.base)
    one, three = tensors(start), tensors(tmp_path / "three")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    if then != PER_EXPERT:
        before, after = config(start), config(tmp_path / "three")
        for field in ("r", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters"):
            assert before[field] == after[field]
    check_function(case, built, tmp_path / "two", tmp_path)


@pytest.mark.parametrize("then", FUSED)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_linears_that_were_fused_come_back_as_they_were(then: str, family: str, tmp_path: Path) -> None:
    case = replace(qwen(fused=(), per_expert=ALL), family=NAMED[family], fused_layers=())
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "fused", then, base=built.base)
    convert(tmp_path / "fused", tmp_path / "apart", PER_EXPERT, base=built.base)
    before, after = tensors(built.adapter), tensors(tmp_path / "apart")
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    check_function(case, built, tmp_path / "apart", tmp_path)


@pytest.mark.parametrize("half", ["lora_A", "lora_B", "lora_"])
@pytest.mark.parametrize("others", [torch.float32, torch.float16])
def test_experts_of_two_dtypes_keep_every_bit(others: torch.dtype, half: str, tmp_path: Path) -> None:
    """Whichever comes first. One tensor holds all experts, so it has the dtype that holds both."""
    built = build(qwen(fused=(), per_expert=ALL, fused_layers=()), tmp_path)
    held = {
        key: tensor.to(torch.bfloat16 if ".experts.0." in key and half in key else others)
        for key, tensor in tensors(built.adapter).items()
    }
    save_file(held, built.adapter / WEIGHTS)
    convert(built.adapter, tmp_path / "fused", PEFT_019, base=built.base)
    convert(tmp_path / "fused", tmp_path / "apart", PER_EXPERT, base=built.base)
    found = tensors(tmp_path / "apart")
    assert found.keys() == held.keys()
    assert all(torch.equal(found[key].double(), held[key].double()) for key in held)


def test_a_nesting_that_is_the_other_way_round_is_put_right(tmp_path: Path) -> None:
    built = build(qwen(flipped=True), tmp_path)
    right = build(qwen(), tmp_path / "right")
    convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)
    found, wanted = tensors(tmp_path / "converted"), tensors(right.adapter)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in wanted.items()
    }


# --- names and config --------------------------------------------------------------------------------


def test_per_expert_has_one_pair_for_each_experts_own_linears(tmp_path: Path) -> None:
    built = build(qwen(num_experts=3), tmp_path)
    convert(built.adapter, tmp_path / "converted", PER_EXPERT, base=built.base)
    found = read_adapter(tmp_path / "converted")
    assert {pair.module for pair in found.pairs} == {
        f"model.layers.{layer}.mlp.experts.{e}.{name}_proj"
        for layer in (0, 1)
        for e in range(3)
        for name in ALL
    }
    assert not found.config.target_parameters
    assert all(found.config.targets_module(pair.module) for pair in found.pairs)


def test_per_expert_has_the_checkpoints_own_names(tmp_path: Path) -> None:
    built = build(replace(qwen(), family=NAMED["mixtral"]), tmp_path)
    convert(built.adapter, tmp_path / "converted", PER_EXPERT, base=built.base)
    modules = {pair.module for pair in read_adapter(tmp_path / "converted").pairs}
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in modules


@pytest.mark.parametrize("then", FUSED)
def test_down_in_one_layer_and_gate_and_up_in_another_are_read_back(then: str, tmp_path: Path) -> None:
    """Each is targeted where it has LoRA: in the other layer the config would name what the file lacks."""
    built = build(qwen(), tmp_path)
    held = tensors(built.adapter)
    inner, outer = "layers.0.mlp.experts.base_layer.lora_", "layers.1.mlp.experts.lora_"
    half = {key.replace(".base_layer", ""): held[key] for key in held if inner in key or outer in key}
    save_file(half, built.adapter / WEIGHTS)
    targets = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    raw = {**config(built.adapter), "target_parameters": targets}
    (built.adapter / "adapter_config.json").write_text(json.dumps(raw))
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base)
    convert(tmp_path / "apart", tmp_path / "fused", then, base=built.base)
    merged = {}
    for name in ("adapter", "apart", "fused"):
        loudmerge.merge(built.base, tmp_path / name, tmp_path / f"out-{name}", verify=False)
        merged[name], _ = read(tmp_path / f"out-{name}")
    for key, wanted in merged["adapter"].items():
        torch.testing.assert_close(merged["apart"][key], wanted)
        torch.testing.assert_close(merged["fused"][key], wanted)


def test_experts_without_lora_get_an_update_of_zero(tmp_path: Path) -> None:
    case = replace(qwen(fused=(), per_expert=ALL, num_experts=3), fused_layers=())
    built = build(case, tmp_path)
    held = tensors(built.adapter)
    for key in [key for key in held if ".experts.1.up_proj." in key]:
        del held[key]
    save_file(held, built.adapter / WEIGHTS)
    raw = config(built.adapter)
    raw["target_modules"] = sorted(
        {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in held}
    )
    (built.adapter / "adapter_config.json").write_text(json.dumps(raw))
    convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)
    for name in ("converted", "adapter"):
        loudmerge.merge(built.base, tmp_path / name, tmp_path / f"{name}-out", dtype="float32")
    found, wanted = read(tmp_path / "converted-out")[0], read(tmp_path / "adapter-out")[0]
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize(("to", "version"), [(PEFT_018, "0.18.1"), (PEFT_019, "0.19.1")])
def test_the_config_names_the_peft_that_reads_it(to: str, version: str, tmp_path: Path) -> None:
    built = build(qwen(extra={"kasa_config": None, "use_bdlora": None}), tmp_path)
    convert(built.adapter, tmp_path / "converted", to, base=built.base)
    found = config(tmp_path / "converted")
    assert found["peft_version"] == version
    assert "kasa_config" not in found
    assert ("use_bdlora" in found) == (to == PEFT_019)


def test_grouping_by_expert_is_marked_and_undone(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    convert(built.adapter, tmp_path / "grouped", GROUPED, base=built.base)
    assert config(tmp_path / "grouped")["lora_B_layout"] == "grouped_by_expert"
    convert(tmp_path / "grouped", tmp_path / "back", PEFT_019, base=built.base)
    assert config(tmp_path / "back")["lora_B_layout"] == "rank_major"


def test_an_old_unsloth_adapter_is_repaired(tmp_path: Path) -> None:
    """No marker, and packed by expert: the user says so once, and the copy says it from then on."""
    case = qwen(packing="grouped_by_expert", extra={"auto_mapping": {"unsloth_fixed": True}})
    built = build(case, tmp_path)
    with pytest.raises(MergeRefused, match="made by Unsloth without the lora_B_layout marker"):
        convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)
    convert(
        built.adapter, tmp_path / "converted", PEFT_019, base=built.base, lora_b_layout="grouped_by_expert"
    )
    assert config(tmp_path / "converted")["lora_B_layout"] == "rank_major"
    check_function(case, built, tmp_path / "converted", tmp_path)


def test_what_is_not_of_experts_stays_as_it_is(tmp_path: Path) -> None:
    built = build(qwen(dense=("q_proj", "router"), replaced=True), tmp_path)
    (built.adapter / "README.md").write_text("mine")
    convert(built.adapter, tmp_path / "converted", PER_EXPERT, base=built.base)
    before, after = tensors(built.adapter), tensors(tmp_path / "converted")
    same = [key for key in before if ".experts." not in key]
    assert len(same) > 4
    assert all(torch.equal(before[key], after[key]) for key in same)
    assert (tmp_path / "converted" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "optimizer.pt", "model.safetensors.index.json", "automodel_peft_config.json"],
)
def test_what_is_of_the_layout_that_it_had_is_left_out(name: str, tmp_path: Path) -> None:
    """adapter_model.bin is the adapter once more; automodel_peft_config.json names the layout to NeMo."""
    built = build(qwen(), tmp_path)
    (built.adapter / name).write_bytes(b"{}")
    found = convert(built.adapter, tmp_path / "converted", PEFT_018, base=built.base)
    written = [path.name for path in (tmp_path / "converted").iterdir()]
    assert name not in written
    assert sorted(written) == sorted(found.files)


def test_the_base_is_the_one_that_the_adapter_names_where_it_is_here(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    named = {**config(built.adapter), "base_model_name_or_path": str(built.base)}
    (built.adapter / "adapter_config.json").write_text(json.dumps(named))
    found = convert(built.adapter, tmp_path / "found", PER_EXPERT)
    assert found.to_json()["base"] == str(built.base)
    given = convert(built.adapter, tmp_path / "given", PER_EXPERT, base=built.base)
    assert tensors(found.out).keys() == tensors(given.out).keys()
    with pytest.raises(MergeRefused, match="out-exists"):
        convert(built.adapter, built.base, PER_EXPERT, overwrite=True)


# --- refusals ------------------------------------------------------------------------------------------


def test_a_family_whose_orientation_depends_on_transformers_is_refused(tmp_path: Path) -> None:
    case = replace(qwen(peft="none"), family=NAMED["gpt_oss"], hidden=6, intermediate=5)
    built = build(case, tmp_path)
    with pytest.raises(MergeRefused, match="reads in another orientation under another transformers"):
        convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("family", "transformers", "orientation"),
    [
        ("gpt_oss", "4.57", "standard"),
        ("gpt_oss", "5.24.0", "swapped"),
        ("qwen3_vl_moe", "4.57", "standard"),
        ("qwen3_vl_moe", "5", "standard"),
    ],
)
@pytest.mark.parametrize("to", [PEFT_019, GROUPED])
def test_told_the_transformers_it_is_written_as_peft_reads_it_there(
    family: str, transformers: str, orientation: str, to: str, tmp_path: Path
) -> None:
    """orientation: what PEFT 0.19.1 reads under it, in the axes that the parameter has there."""
    case = replace(qwen(peft="none"), family=NAMED[family], hidden=6, intermediate=5)
    built = build(case, tmp_path)
    convert(built.adapter, tmp_path / "converted", to, base=built.base, transformers=transformers)
    check_function(case, built, tmp_path / "converted", tmp_path)
    pair = next(pair for pair in read_adapter(tmp_path / "converted").pairs if pair.depth == 1)
    rows_first = {"gpt_oss": False, "qwen3_vl_moe": transformers != "4.57"}[family]
    d1, d2 = (10, 6) if rows_first else (6, 10)
    assert (pair.a.shape[1], pair.b.shape[0]) == ((d2, d1) if orientation == "standard" else (d1, d2))


@pytest.mark.parametrize(
    ("family", "there", "elsewhere"),
    [("granitemoe", "5.13", "5.12"), ("granitemoe_55", "5.12", "5.13")],
)
@pytest.mark.parametrize("to", [PEFT_018, PEFT_019])
def test_experts_that_have_another_name_under_the_transformers_told_are_refused(
    family: str, there: str, elsewhere: str, to: str, tmp_path: Path
) -> None:
    """PEFT finds no module of the old name, and drops the LoRA with a warning at most."""
    built = build(replace(qwen(peft="none"), family=NAMED[family]), tmp_path)
    with pytest.raises(MergeRefused, match="a name that this family's experts have under another") as refusal:
        convert(built.adapter, tmp_path / "converted", to, base=built.base, transformers=elsewhere)
    assert refusal.value.code == "unsupported-adapter"
    assert not (tmp_path / "converted").exists()
    convert(built.adapter, tmp_path / "converted", to, base=built.base, transformers=there)


@pytest.mark.parametrize("to", [PEFT_018, PEFT_019, GROUPED])
def test_transformers_4_has_no_fused_parameter_for_experts_that_lie_apart(to: str, tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    with pytest.raises(
        MergeRefused, match=r"a Linear for each expert, which transformers 4\.57 holds"
    ) as refusal:
        convert(built.adapter, tmp_path / "converted", to, base=built.base, transformers="4.57")
    assert refusal.value.code == "unsupported-base"
    convert(built.adapter, tmp_path / "apart", PER_EXPERT, base=built.base, transformers="4.57")
    convert(built.adapter, tmp_path / "converted", to, base=built.base, transformers="5")


def test_experts_of_different_rank_are_no_fused_parameter(tmp_path: Path) -> None:
    case = replace(
        qwen(fused=(), per_expert=ALL, rank_pattern={r"experts\.0\.down_proj": 4}), fused_layers=()
    )
    built = build(case, tmp_path)
    with pytest.raises(MergeRefused, match="among the experts of one parameter"):
        convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)


@pytest.mark.parametrize("form", ["fused", "per_expert"])
def test_a_single_expert_is_not_packed(form: str, tmp_path: Path) -> None:
    parts = {"fused": ("gate_up", "down")} if form == "fused" else {"fused": (), "per_expert": ALL}
    built = build(
        qwen(num_experts=1, layers=1, fused_layers=(0,), hidden=4, intermediate=2, **parts), tmp_path
    )
    with pytest.raises(MergeRefused, match="found one expert, expected two or more"):
        convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)


@pytest.mark.parametrize("leaf", ["gate_up_proj", "kernels"])
def test_a_parameter_whose_gate_and_up_nobody_tells_apart_is_not_taken_apart(
    leaf: str, tmp_path: Path
) -> None:
    """Of a model type that no row describes. Its LoRA is not dropped; between fused layouts it converts."""
    name = f"model.layers.0.mlp.experts.{leaf}"
    base = write_base(tmp_path / "base", {name: values(3, 8, 6)}, model_type="unheard_of")
    lora = fused_lora("model.layers.0.mlp.experts", [(6, 8)], experts=3)
    adapter = write_adapter(
        tmp_path / "adapter", lora, target_parameters=[f"experts.{leaf}"], peft_version="0.19.1"
    )
    with pytest.raises(MergeRefused, match="one whose gate and up can be told apart"):
        convert(adapter, tmp_path / "converted", PER_EXPERT, base=base)
    assert not (tmp_path / "converted").exists()
    convert(adapter, tmp_path / "converted", GROUPED, base=base)
    assert len(tensors(tmp_path / "converted")) == 2


def test_an_adapter_without_lora_on_experts_is_refused(tmp_path: Path) -> None:
    built = build(qwen(fused=(), dense=("q_proj",)), tmp_path)
    with pytest.raises(MergeRefused, match="no LoRA on experts"):
        convert(built.adapter, tmp_path / "converted", PEFT_019, base=built.base)


def test_an_out_that_exists_stays_unless_told(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    (tmp_path / "converted").mkdir()
    with pytest.raises(MergeRefused) as caught:
        convert(built.adapter, tmp_path / "converted", PEFT_018, base=built.base)
    assert caught.value.code == "out-exists"
    convert(built.adapter, tmp_path / "converted", PEFT_018, base=built.base, overwrite=True)
    assert (tmp_path / "converted" / WEIGHTS).exists()


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_factor_that_is_not_finite_is_refused_as_by_a_merge(
    value: float, with_base: bool, tmp_path: Path
) -> None:
    built = build(qwen(), tmp_path)
    held = tensors(built.adapter)
    key = next(key for key in held if key.endswith("lora_B.weight"))
    held[key][0, 0] = value
    save_file(held, built.adapter / WEIGHTS)
    base = built.base if with_base else None
    with pytest.raises(MergeRefused, match="found 1 NaN or infinite value, expected finite") as caught:
        convert(built.adapter, tmp_path / "converted", PEFT_018, base=base, orientation="standard")
    assert (caught.value.code, key in caught.value.where) == ("non-finite", True)
    assert not (tmp_path / "converted").exists()


def test_an_update_that_peft_scaled_wrongly_is_refused_as_by_a_merge(tmp_path: Path) -> None:
    """PEFT doubles alpha where it fuses gate and up, also with rslora. Apart again, nothing would show it."""
    built = build(qwen(fused=(), per_expert=ALL, fused_layers=(), rslora=True), tmp_path)
    convert(built.adapter, tmp_path / "fused", PEFT_019, base=built.base)
    raw = config(tmp_path / "fused")
    raw["alpha_pattern"] = dict.fromkeys(raw["alpha_pattern"], 2 * raw["lora_alpha"])
    (tmp_path / "fused" / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(MergeRefused, match=r"scales them by sqrt\(2\) too much"):
        convert(tmp_path / "fused", tmp_path / "apart", PER_EXPERT, base=built.base)
    assert not (tmp_path / "apart").exists()


def test_an_unknown_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'peft-1' is not|to is 'peft-1', expected one of peft-0\.18"):
        convert(tmp_path, tmp_path / "out", "peft-1")
