"""The cases of the original repair (unslothai/unsloth-zoo#647), and the reference checked against PEFT.

Needs no transformers, except where a test says that PEFT is asked.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loudmerge
from loudmerge.merging.count import num_experts_of
from tests.unit.reference import Built, build, from_memory, to_disk
from tests.unit.strategies import NAMED
from tests.unit.synthetic import FAMILIES, Case, Family, dense_names, memory_size, parameter_name, version_of
from tests.unit.test_merge_properties import check_output

QWEN = NAMED["qwen3_moe"]
PARAMETERS = {"gate": "gate_up", "up": "gate_up", "down": "down"}
VERSION = {"standard": "0.19.1", "swapped": "0.18.1"}


# --- 48 merges: gate, up and down x orientation x rank x scaling, each merged and compared --------------


@pytest.mark.parametrize("scaling", [(2, False), (0.5, False), (3, True), (1, True)])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("orientation", ["standard", "swapped"])
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_projection_is_merged_exactly(
    projection: str, orientation: str, rank: int, scaling: tuple[float, bool], tmp_path: Path
) -> None:
    alpha, rslora = scaling
    case = Case(
        QWEN,
        seed=rank,
        fused=(PARAMETERS[projection],),
        orientation=orientation,
        peft=VERSION[orientation],
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        num_experts=5,
    )
    built = build(case, tmp_path)
    loudmerge.merge(built.base, built.adapter, tmp_path / "out", rounding="nearest", verify=False)
    check_output(case, built, tmp_path / "out", Counter())
    changed = {key for key, expected in built.expected.items() if expected.delta is not None}
    assert {f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight" for e in range(5)} <= changed


@pytest.mark.parametrize("orientation", ["standard", "swapped"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_gate_up_and_down_together_are_merged_exactly(
    family: Family, orientation: str, tmp_path: Path
) -> None:
    case = Case(family, fused=(family.first, "down"), orientation=orientation, peft=VERSION[orientation])
    case = replace(case, layers=2, fused_layers=(0, 1), shards=3)
    built = build(case, tmp_path)
    loudmerge.merge(built.base, built.adapter, tmp_path / "out", rounding="nearest")
    check_output(case, built, tmp_path / "out", Counter())


# --- the classifier ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("num_experts", [1, 4, 128])
@pytest.mark.parametrize(("out_dim", "in_dim"), [(40, 32), (32, 20), (20, 32)])
def test_shapes_that_are_not_square_prove_the_layout(
    out_dim: int, in_dim: int, num_experts: int, rank: int
) -> None:
    rows = rank * num_experts
    standard = ((rows, in_dim), (out_dim, rows))
    swapped = ((rows, out_dim), (in_dim, rows))
    assert loudmerge.detect_layout(*standard, num_experts, out_dim, in_dim) == ("standard", rank)
    assert loudmerge.detect_layout(*swapped, num_experts, out_dim, in_dim) == ("swapped", rank)


def test_the_classifier_takes_tensors() -> None:
    assert loudmerge.detect_layout(torch.zeros(8, 6), torch.zeros(10, 8), 4, 10, 6) == ("standard", 2)


def test_a_square_matrix_is_ambiguous() -> None:
    assert loudmerge.detect_layout((8, 6), (6, 8), 4, 6, 6) == ("ambiguous", 2)


@pytest.mark.parametrize(
    ("lora_a", "lora_b", "rank"),
    [
        ((8, 7), (10, 8), 2),  # fits no orientation
        ((8, 6), (10, 12), None),  # two ranks
        ((9, 6), (10, 9), None),  # no whole rank for 4 experts
        ((0, 6), (10, 0), None),  # no rank at all
        ((4, 2, 6), (10, 8), None),  # three axes
        ((8, 10), (10, 8), 2),  # one side right
    ],
)
def test_what_fits_nothing_is_unknown(
    lora_a: tuple[int, ...], lora_b: tuple[int, ...], rank: int | None
) -> None:
    """The repaired tool guessed rank 1 or the base weight here; a rank must be known, never guessed."""
    assert loudmerge.detect_layout(lora_a, lora_b, 4, 10, 6) == ("unknown", rank)


# --- the expert count of a live module --------------------------------------------------------------------


class Wrapper(nn.Module):
    """As PEFT's ParamWrapper: a module around another."""

    def __init__(self, base_layer: nn.Module | None = None) -> None:
        super().__init__()
        if base_layer is not None:
            self.base_layer = base_layer


class Experts(nn.Module):
    def __init__(self, num_experts: Any = 6) -> None:
        super().__init__()
        self.num_experts = num_experts


class Raising(nn.Module):
    """Attributes that raise, as those of sharded and offloaded modules may."""

    @property
    def num_experts(self) -> int:
        raise RuntimeError("not loaded")


def wrapped(module: nn.Module, hops: int) -> nn.Module:
    for _ in range(hops):
        module = Wrapper(module)
    return module


@pytest.mark.parametrize("hops", [0, 1, 2, 16])
def test_the_expert_count_is_found_through_the_base_layer_chain(hops: int) -> None:
    assert num_experts_of(wrapped(Experts(), hops)) == 6


def test_the_walk_ends_after_16_hops() -> None:
    with pytest.raises(loudmerge.MergeRefused) as caught:
        num_experts_of(wrapped(Experts(), 17))
    assert caught.value.code == "num-experts-mismatch"


def test_the_walk_survives_a_cycle() -> None:
    first, second = Wrapper(), Wrapper()
    first.__dict__["base_layer"], second.__dict__["base_layer"] = second, first
    with pytest.raises(loudmerge.MergeRefused, match=r"^num-experts-mismatch"):
        num_experts_of(first)


def test_the_walk_survives_a_module_that_is_its_own_base_layer() -> None:
    module = Wrapper()
    module.__dict__["base_layer"] = module
    with pytest.raises(loudmerge.MergeRefused, match=r"^num-experts-mismatch"):
        num_experts_of(module)


def test_the_walk_survives_attributes_that_raise() -> None:
    with pytest.raises(loudmerge.MergeRefused, match=r"^num-experts-mismatch"):
        num_experts_of(Wrapper(Raising()))


@pytest.mark.parametrize("value", [0, -1, "6", None, True, 2.0])
def test_a_count_that_is_no_positive_whole_number_is_unknown(value: Any) -> None:
    with pytest.raises(loudmerge.MergeRefused, match=r"^num-experts-mismatch"):
        num_experts_of(Wrapper(Experts(value)))


# --- refusals where the repaired tool fell back -------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_rank_that_is_not_whole_is_refused_and_never_guessed(rows: int, tmp_path: Path) -> None:
    built = build(Case(QWEN, fused=("down",)), tmp_path)
    file = built.adapter / "adapter_model.safetensors"
    a, b = "lora_A.weight", "lora_B.weight"
    held = {key.rpartition("lora_")[0]: key for key in load_file(file)}
    prefix = next(iter(held))
    save_file({prefix + a: torch.ones(rows, 4), prefix + b: torch.ones(6, rows)}, file)
    with pytest.raises(loudmerge.MergeRefused) as caught:
        loudmerge.merge(built.base, built.adapter, tmp_path / "out")
    assert caught.value.code in ("rank-mismatch", "num-experts-mismatch")
    assert not (tmp_path / "out").exists()


def test_one_layer_that_does_not_fit_stops_all_of_the_others(tmp_path: Path) -> None:
    """The repaired tool wrote the base weight there, counted a fallback, and went on."""
    built = build(Case(QWEN, layers=3, fused=("gate_up", "down"), fused_layers=(0, 1, 2)), tmp_path)
    file = built.adapter / "adapter_model.safetensors"
    held = load_file(file)
    key = next(key for key in held if ".layers.1." in key and key.endswith("lora_A.weight"))
    held[key] = torch.ones(held[key].shape[0], 99)
    save_file(held, file)
    with pytest.raises(loudmerge.MergeRefused, match=r"model\.layers\.1\.mlp\.experts"):
        loudmerge.merge(built.base, built.adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# --- the reference itself, against PEFT -------------------------------------------------------------------


def bare_model(case: Case, built: Built, transposed: bool) -> nn.Module:
    """A module tree with the memory's names and the base's weights (standard families: as on disk)."""
    root = nn.Module()

    def at(path: str) -> nn.Module:
        module = root
        for name in path.split("."):
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        return module

    for disk, memory, (out, into) in dense_names(case).values():
        parent, _, leaf = memory.rpartition(".")
        linear = nn.Linear(into, out, bias=False)
        linear.weight = nn.Parameter(torch.from_numpy(built.expected[f"{disk}.weight"].base).float())
        (at(parent) if parent else root).add_module(leaf, linear)
    for layer, parameter in itertools.product(range(case.layers), (case.family.first, "down")):
        module, _, leaf = parameter_name(case, layer, parameter).rpartition(".")
        shape = (case.num_experts, *memory_size(case, parameter))
        at(module).register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
        at(module).is_transposed = transposed  # type: ignore[assignment]
    return root


# (H, I): no square, a square gate_up, a square down.
SIZES = {
    ("first", "down"): ((6, 4), (6, 3), (4, 4)),
    ("first",): ((6, 4), (6, 3)),
    ("down",): ((6, 4), (4, 4)),
}
# In memory the others are like one of these, but for names; two parameters of each show those.
ALONE = ("qwen3_moe", "nemotron_h", "llama4_text", "gpt_oss", "granitemoe_55")


@pytest.mark.parametrize(
    ("family", "which"),
    [(family, which) for family in FAMILIES for which in SIZES if len(which) == 2 or family.name in ALONE],
    ids=lambda value: value.name if isinstance(value, Family) else "+".join(value),
)
@pytest.mark.parametrize("orientation", ["standard", "swapped"])
# PEFT 0.18 says so of any module that it wraps for a parameter, PEFT 0.20 of patterns that it does apply.
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_the_reference_agrees_with_peft(
    family: Family, orientation: str, which: tuple[str, ...], tmp_path: Path
) -> None:
    """PEFT's own merge_and_unload on a bare module tree gives the reference's deltas (square shapes too)."""
    peft = pytest.importorskip("peft")
    if version_of(peft.__version__) < (0, 19, 1) and orientation == "standard":
        pytest.skip("PEFT up to 0.19.0 writes swapped adapters only")
    for number, (hidden, inner) in enumerate(SIZES[which]):
        case = Case(
            family,
            fused=tuple(family.first if name == "first" else name for name in which),
            orientation=orientation,
            hidden=hidden,
            intermediate=inner,
            layers=2,
            fused_layers=(0, 1),
            rslora=number == 1,
            rank_pattern={rf"layers\.1\..*{family.memory_names[1]}": 3},
            alpha_pattern={family.memory_names[0]: 5.0},
            dense=("q_proj", "router", "lm_head"),
            peft=peft.__version__,
        )
        compare_with_peft(case, build(case, tmp_path / str(number)), peft)


def compare_with_peft(case: Case, built: Built, peft: Any) -> None:
    file = built.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))
    transposed = case.orientation == "swapped" and version_of(peft.__version__) >= (0, 19, 1)
    model = peft.PeftModel.from_pretrained(bare_model(case, built, transposed), str(built.adapter))
    state = model.merge_and_unload().state_dict()
    for disk, memory, _ in dense_names(case).values():
        want = built.expected[f"{disk}.weight"]
        exact = want.base if want.delta is None else want.base + want.delta
        np.testing.assert_allclose(state[f"{memory}.weight"].numpy(), exact, atol=1e-5)
    for layer in range(case.layers):
        got: dict[str, Any] = {}
        for parameter in (case.family.first, "down"):
            value = state[parameter_name(case, layer, parameter)].double().numpy()
            got |= from_memory(case, parameter, value)
        for key, value in to_disk(case, layer, got).items():
            delta = built.expected[key].delta
            np.testing.assert_allclose(value, np.zeros_like(value) if delta is None else delta, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_rounding_as_peft_does_gives_the_bits_of_pefts_own_merge(dtype: str, tmp_path: Path) -> None:
    """Experts, router and Linears; the base stores its experts as the memory does."""
    peft = pytest.importorskip("peft")
    old = version_of(peft.__version__) < (0, 19, 1)
    case = Case(
        NAMED["qwen3_moe_fused"],
        fused=("gate_up", "down"),
        orientation="swapped" if old else "standard",
        dense=("q_proj", "router", "lm_head"),
        num_experts=16,
        hidden=24,
        intermediate=20,
        rank=4,
        base_dtype=dtype,
        delta_scale=0.1,
        peft=peft.__version__,
    )
    built = build(case, tmp_path)
    file = built.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))
    model = bare_model(case, built, transposed=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(built.expected[name].base))
    model = model.to(getattr(torch, dtype))
    state = peft.PeftModel.from_pretrained(model, str(built.adapter)).merge_and_unload().state_dict()
    loudmerge.merge(built.base, built.adapter, tmp_path / "out", rounding="peft")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    changed = [key for key, expected in built.expected.items() if expected.delta is not None]
    assert len(changed) == 5
    for key in changed:
        assert torch.equal(merged[key], state[key]), key
