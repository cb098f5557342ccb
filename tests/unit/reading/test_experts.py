"""Where a checkpoint stores each expert's matrices: apart or fused, plain or transposed, in any shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.errors import MergeRefused
from loudmerge.layout import Axes, Span
from loudmerge.reading.checkpoint import open_checkpoint
from loudmerge.reading.experts import ExpertGroup, Experts, split_expert_name
from loudmerge.reading.families import family_of
from loudmerge.reading.names import Names
from tests.unit.builders import expert_tensors, values, write_base

MLP = "model.layers.0.mlp"
GROUP = "layers.0.mlp.experts"
E, H, I = 3, 6, 4  # noqa: E741


def experts_of(
    path: Path, tensors: Mapping[str, torch.Tensor], model_type: str = "qwen3_moe", **fields: Any
) -> Experts:
    shards = fields.pop("shards", ())
    base = open_checkpoint(write_base(path / "base", tensors, shards=shards, model_type=model_type, **fields))
    family = family_of(model_type)
    return Experts(base, Names(base, family), family)


def group_of(path: Path, tensors: Mapping[str, torch.Tensor], **more: Any) -> ExpertGroup:
    return experts_of(path, tensors, **more).group(GROUP)


def refused(path: Path, tensors: Mapping[str, torch.Tensor], **more: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        group_of(path, tensors, **more)
    return caught.value


def fused_pair(gate_up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{MLP}.experts.gate_up_proj": values(*gate_up), f"{MLP}.experts.down_proj": values(*down)}


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("layers.0.mlp.experts.7.gate_proj.weight", (GROUP, 7, "gate_proj")),
        ("layers.0.mlp.experts.7.gate_proj", (GROUP, 7, "gate_proj")),
        ("layers.0.mlp.experts.7.w3.weight", (GROUP, 7, "w3")),
        ("layers.0.mlp.experts.gate_up_proj", (GROUP, None, "gate_up_proj")),
        ("layers.0.mlp.experts.down_proj.weight", (GROUP, None, "down_proj")),
        ("experts.1.up_proj.weight", ("experts", 1, "up_proj")),
        ("layers.0.mlp.experts.gate_up_proj_bias", None),
        ("layers.0.mlp.experts.7.gate_up_proj", None),
        ("layers.0.mlp.experts.7.gate_proj.bias", None),
        ("layers.0.mlp.experts.w1", None),
        ("layers.0.mlp.shared_experts.gate_proj.weight", None),
        ("layers.0.mlp.gate.weight", None),
    ],
)
def test_a_name_inside_experts_has_a_group_an_expert_and_a_leaf(
    name: str, parts: tuple[str, int | None, str] | None
) -> None:
    assert split_expert_name(name) == parts


# --- apart ---------------------------------------------------------------------------------------


def test_experts_apart_are_found_over_all_shards(tmp_path: Path) -> None:
    """A shard alone may hold a part of a layer's experts."""
    tensors = expert_tensors(E, H, I)
    keys = list(tensors)
    group = group_of(tmp_path, tensors, shards=(keys[:4], keys[4:]))
    assert group.num_experts == E
    assert group.dims == {"gate": (I, H), "up": (I, H), "down": (H, I)}
    slot = group.slots["down", 2]
    assert (slot.entry.name, slot.index, slot.axes) == (f"{MLP}.experts.2.down_proj.weight", -1, Axes.OUT_IN)
    assert slot.out == Span(0, H)
    assert len(group.slots) == 3 * E


def test_w1_w3_w2_are_gate_up_and_down(tmp_path: Path) -> None:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {}
    for key, value in expert_tensors(E, H, I).items():
        leaf = key.split(".")[-2]
        tensors[key.replace(".mlp.", ".block_sparse_moe.").replace(leaf, names[leaf])] = value
    group = group_of(tmp_path, tensors, model_type="mixtral")
    assert group.slots["up", 1].entry.name == "model.layers.0.block_sparse_moe.experts.1.w3.weight"


def test_up_and_down_without_a_gate_are_a_group(tmp_path: Path) -> None:
    tensors = {key: value for key, value in expert_tensors(E, H, I).items() if "gate" not in key}
    assert group_of(tmp_path, tensors).dims == {"up": (I, H), "down": (H, I)}


@pytest.mark.parametrize("expert", [0, 1])
def test_a_missing_matrix_is_named_with_its_expert(expert: int, tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I)
    del tensors[f"{MLP}.experts.{expert}.up_proj.weight"]
    error = refused(tmp_path, tensors)
    assert str(error) == (
        f"experts-incomplete: {GROUP}, up of expert {expert}: found no such tensor in any shard,"
        " expected every projection of 3 experts. Get the checkpoint again."
    )


def test_many_missing_matrices_are_counted(tmp_path: Path) -> None:
    """A stray key says how many experts there are."""
    stray = {f"{MLP}.experts.{E + 5}.up_proj.weight": values(I, H)}
    error = refused(tmp_path, expert_tensors(E, H, I) | stray)
    found = [str(problem.where) for problem in error.problems]
    assert f"{GROUP}, up of expert {E} and 4 more" in found
    assert len(found) == 3


def test_a_number_of_many_digits_is_no_experts(tmp_path: Path) -> None:
    """int() of 5000 digits raises ValueError."""
    stray = {f"{MLP}.experts.{'9' * 5000}.up_proj.weight": values(I, H)}
    assert group_of(tmp_path, expert_tensors(E, H, I) | stray).num_experts == E


def test_a_missing_last_expert_is_found_by_the_config(tmp_path: Path) -> None:
    tensors = {key: value for key, value in expert_tensors(E, H, I).items() if ".experts.2." not in key}
    error = refused(tmp_path, tensors, num_experts=3)
    assert error.code == "experts-incomplete"
    assert (
        f"the experts of {GROUP}: found 2 experts in the checkpoint, expected 3, as config.json says."
        in str(error)
    )


def test_a_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I) | {f"{MLP}.experts.1.gate_proj.weight": values(I + 1, H)}
    error = refused(tmp_path, tensors)
    assert error.code == "shape-mismatch"
    assert "gate of expert 1: found [5, 6], expected [4, 6], the shape of the layer's other experts." in str(
        error
    )


def test_an_expert_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I) | {f"{MLP}.experts.0.gate_proj.weight": values(I, H, 1)}
    assert "found 3 axes, expected the two axes of a Linear's weight." in str(refused(tmp_path, tensors))


def test_every_problem_of_a_layer_is_reported(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I) | {f"{MLP}.experts.1.gate_proj.weight": values(I + 1, H)}
    del tensors[f"{MLP}.experts.0.up_proj.weight"]
    assert [p.code for p in refused(tmp_path, tensors).problems] == ["shape-mismatch", "experts-incomplete"]


def test_experts_apart_and_fused_in_one_layer_are_refused(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I) | {f"{MLP}.experts.gate_up_proj": values(E, 2 * I, H)}
    error = refused(tmp_path, tensors)
    assert error.code == "unsupported-base"
    assert "found experts both apart and fused in one layer, expected one of the two." in str(error)


def test_two_keys_for_one_weight_are_refused(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I)
    tensors["language_model." + f"{MLP}.experts.0.gate_proj.weight"] = values(I, H)
    error = refused(tmp_path, tensors)
    assert error.code == "unsupported-base"
    assert "a second tensor for the same weight as" in str(error)


# --- fused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "intermediate"), [(6, 4), (4, 4), (8, 4), (4, 8), (1, 1), (2, 1)])
@pytest.mark.parametrize("axes", list(Axes))
def test_the_pair_of_shapes_tells_the_order_of_the_axes(
    axes: Axes, hidden: int, intermediate: int, tmp_path: Path
) -> None:
    shapes = [(E, 2 * intermediate, hidden), (E, hidden, intermediate)]
    if axes is Axes.IN_OUT:
        shapes = [(e, d2, d1) for e, d1, d2 in shapes]
    group = group_of(tmp_path, fused_pair(*shapes))
    assert group.num_experts == E
    assert group.dims == {
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    assert {slot.axes for slot in group.slots.values()} == {axes}
    assert group.slots["gate", 1].out == Span(0, intermediate)
    assert group.slots["up", 1].out == Span(intermediate, intermediate)
    assert (group.slots["down", 2].index, group.slots["down", 2].out) == (2, Span(0, hidden))


def test_gate_and_up_alternate_where_the_family_interleaves_them(tmp_path: Path) -> None:
    group = group_of(tmp_path, fused_pair((E, H, 2 * I), (E, I, H)), model_type="gpt_oss")
    assert (group.slots["gate", 0].out, group.slots["up", 0].out) == (Span(0, I, 2), Span(1, I, 2))


def test_w13_weight_alternates_on_disk_in_every_family(tmp_path: Path) -> None:
    tensors = {f"{MLP}.experts.w13_weight": values(E, 2 * I, H), f"{MLP}.experts.w2_weight": values(E, H, I)}
    group = group_of(tmp_path, tensors)
    assert (group.slots["gate", 0].out, group.slots["up", 0].out) == (Span(0, I, 2), Span(1, I, 2))


def test_fused_projections_without_a_pair_are_in_the_familys_axes(tmp_path: Path) -> None:
    """(E, I, H) with (E, H, I) reads well both ways."""
    tensors = {f"{MLP}.experts.up_proj": values(E, I, H), f"{MLP}.experts.down_proj": values(E, H, I)}
    assert group_of(tmp_path, tensors).dims == {"up": (I, H), "down": (H, I)}


def test_a_fused_group_needs_up_and_down(tmp_path: Path) -> None:
    for leaf, shape in (("gate_up_proj", (E, 2 * I, H)), ("down_proj", (E, H, I)), ("gate_proj", (E, I, H))):
        error = refused(tmp_path / leaf, {f"{MLP}.experts.{leaf}": values(*shape)})
        assert error.code == "experts-incomplete"
        assert f"{MLP}.experts.{leaf} [3, " in error.where
        assert "no up or no down projection beside it" in str(error)


def test_shapes_that_no_experts_have_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, fused_pair((E, 2 * I, H), (E, H, I + 1)))
    assert error.code == "shape-mismatch"
    assert "[3, 8, 6] F32 in model.safetensors and " in error.where
    assert "expected (E, 2I, H) with (E, H, I), or (E, H, 2I) with (E, I, H)." in str(error)


def test_an_odd_number_of_gate_and_up_rows_fits_no_expert(tmp_path: Path) -> None:
    error = refused(tmp_path / "pair", fused_pair((E, 2 * I + 1, H), (E, H, I)))
    assert error.code == "shape-mismatch"


def test_fused_tensors_of_different_expert_counts_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, fused_pair((E, 2 * I, H), (E + 1, H, I)))
    assert error.code == "num-experts-mismatch"
    assert "found expert counts [3, 4], expected one count in a layer." in str(error)


def test_a_flat_tensor_under_experts_is_no_expert(tmp_path: Path) -> None:
    tensors = expert_tensors(E, H, I) | {f"{MLP}.experts.down_proj": values(H)}
    assert group_of(tmp_path, tensors).num_experts == E


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_the_config_may_name_the_count_in_any_way_and_at_any_depth(field: str, tmp_path: Path) -> None:
    group_of(tmp_path / "a", expert_tensors(E, H, I), **{field: 3})
    group_of(tmp_path / "b", expert_tensors(E, H, I), text_config={field: 3})
    group_of(tmp_path / "c", expert_tensors(E, H, I), **{field: [64, 3]})
    error = refused(tmp_path / "d", expert_tensors(E, H, I), text_config={field: 2})
    assert error.code == "num-experts-mismatch"
    assert "found 3 experts in the checkpoint, expected 2, as config.json says." in str(error)


@pytest.mark.parametrize("value", [None, 0, -1, "many"])
def test_a_count_that_is_no_number_of_experts_is_passed_over(value: object, tmp_path: Path) -> None:
    assert group_of(tmp_path, expert_tensors(E, H, I), num_experts=value).num_experts == E


def test_a_layer_may_have_its_own_count_if_the_config_has_both(tmp_path: Path) -> None:
    experts = experts_of(tmp_path, expert_tensors(E, H, I), num_experts=3, text_config={"moe_num_experts": 5})
    assert experts.group(GROUP).num_experts == 3


def test_groups_are_found_by_name_and_understood_once(tmp_path: Path) -> None:
    experts = experts_of(tmp_path, expert_tensors(E, H, I, layers=2))
    assert sorted(experts.names) == [GROUP, "layers.1.mlp.experts"]
    assert GROUP in experts
    assert "layers.2.mlp.experts" not in experts
    assert experts.group(GROUP) is experts.group(GROUP)
