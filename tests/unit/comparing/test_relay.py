from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loudmerge.comparing.models import attach
from loudmerge.comparing.relay import MemoryAxes, pack, probe, read_sites, relay, unpack
from loudmerge.errors import EnvironmentFailed
from loudmerge.layout import Axes, LoraBLayout, Orientation, Span
from loudmerge.planning.plan import OutputTensor, Site, Term
from loudmerge.reading.adapter import Adapter, LoraPair, read_adapter
from loudmerge.system.tensorfile import TensorEntry, read_header
from tests.support.tiny import BUILDABLE, attach_random_lora, build, build_square, expert_parameters

IN_OUT_FAMILIES = frozenset({"gpt_oss", "llama4_text"})
IDS = torch.arange(1, 12)[None]
EXPERTS, RANK = 4, 4

GROUPED, RANK_MAJOR = LoraBLayout.GROUPED_BY_EXPERT, LoraBLayout.RANK_MAJOR
STANDARD, SWAPPED = Orientation.STANDARD, Orientation.SWAPPED


@pytest.fixture(autouse=True)
def third_party_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fused_parameters(model: nn.Module) -> list[str]:
    """The experts' parameters that PEFT can target, as `target_parameters` of a user would name them."""
    return [name for name in expert_parameters(model) if model.get_parameter(name).shape[0] == EXPERTS]


FAMILIES = [
    name
    for name in ("qwen3_moe", "gpt_oss", "granitemoe", "llama4_text")
    if name in BUILDABLE and fused_parameters(build(name))
]
"""Whose experts the installed transformers fuses: out-in and in-out, `is_transposed` or not."""


@dataclass(frozen=True)
class Trained:
    """An adapter that the installed PEFT saved, and what the model with it says."""

    directory: Path
    parameters: list[str]
    logits: Tensor
    orientation: Orientation


def train(model: PreTrainedModel, directory: Path) -> Trained:
    """Random LoRA on every fused parameter and the attention's q_proj."""
    parameters = fused_parameters(model)
    leaves = sorted({name.split(".experts.")[-1].split("block_sparse_moe.")[-1] for name in parameters})
    peft_model = attach_random_lora(
        model, target_parameters=leaves, target_modules=["q_proj"], r=RANK, save_to=directory
    )
    return Trained(directory, parameters, logits(peft_model), saved_orientation(model, directory))


TrainedOn = Callable[[str], Trained]


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> TrainedOn:
    """By family; each is trained once, and its directory is left as it is."""

    @cache
    def once(family: str) -> Trained:
        return train(build(family), tmp_path_factory.mktemp(family) / "saved")

    return once


def saved_orientation(model: nn.Module, directory: Path) -> Orientation:
    """From the shapes of one pair that is not square; PEFT takes all of a class in one orientation."""
    tensors = load_file(directory / "adapter_model.safetensors")
    shapes = {tuple(part.shape[1:]) for name, part in model.named_parameters() if "lora" not in name}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight") and "q_proj" not in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            fits = {
                orientation
                for orientation, shape in (
                    (STANDARD, (b.shape[0], a.shape[1])),
                    (SWAPPED, (a.shape[1], b.shape[0])),
                )
                if shape in shapes
            }
            if len(fits) == 1 and a.shape[1] != b.shape[0]:
                return fits.pop()
    raise AssertionError("no pair tells its orientation")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def rewritten(
    trained: Trained, into: Path, *, flip: bool, layout: LoraBLayout, trade_nesting: bool = False
) -> Adapter:
    """The same function in another layout, written out by hand: no code of the relay is used."""
    tensors = load_file(trained.directory / "adapter_model.safetensors")
    fused = [key for key in tensors if key.endswith("lora_A.weight") and "q_proj" not in key]
    for key_a in fused:
        key_b = key_a.replace("lora_A", "lora_B")
        a, b = tensors[key_a], tensors[key_b]
        a_e = [a[e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]
        b_e = [b[:, e::EXPERTS] for e in range(EXPERTS)]
        if flip:
            a_e, b_e = [b.T for b in b_e], [a.T for a in a_e]
        tensors[key_a] = torch.cat(a_e).contiguous()
        wide = torch.cat(b_e, dim=1) if layout is GROUPED else torch.stack(b_e, dim=2).flatten(1)
        tensors[key_b] = wide.contiguous()
    if trade_nesting:
        tensors = {traded(key): tensor for key, tensor in tensors.items()}
    into.mkdir()
    save_file(tensors, into / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained.directory / "adapter_config.json").read_text("utf-8"))
    config |= {"lora_B_layout": layout.value, "from_the_future": None}
    (into / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return read_adapter(into)


def traded(key: str) -> str:
    """Inner and outer wrapper of an experts module have traded places."""
    if "experts" not in key:
        return key
    return (
        key.replace("experts.base_layer.", "experts.")
        if "base_layer" in key
        else key.replace("experts.", "experts.base_layer.")
    )


def axes_of(model: PreTrainedModel) -> Axes:
    return Axes.IN_OUT if model.config.model_type in IN_OUT_FAMILIES else Axes.OUT_IN


def sites_of(
    adapter: Adapter,
    model: PreTrainedModel,
    parameter_of: dict[tuple[str, int], str],
    orientation: Orientation,
    layout: LoraBLayout,
) -> tuple[Site, ...]:
    axes = axes_of(model)
    return tuple(
        dense_site(pair)
        if "q_proj" in pair.module
        else Site(
            pair=pair,
            parameter=parameter_of[pair.module, pair.depth],
            num_experts=EXPERTS,
            rank=RANK,
            scaling=2.0,
            reads_input=(orientation is STANDARD) == (axes is Axes.OUT_IN),
            orientation=orientation,
            lora_b_layout=layout,
        )
        for pair in adapter.pairs
    )


def dense_site(pair: LoraPair) -> Site:
    return Site(pair, f"{pair.module}.weight", 0, RANK, 2.0, True, None, None)


def nesting(parameters: list[str], *, trade: bool = False) -> dict[tuple[str, int], str]:
    """(module, depth) to parameter: PEFT's outer wrapper holds the parameter registered last."""
    found: dict[tuple[str, int], str] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
        members = [name for name in parameters if name.rpartition(".")[0] == module]
        for depth, name in enumerate(members if trade else reversed(members)):
            found[module, depth] = name
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("flip", "layout"), list(product((False, True), LoraBLayout)))
def test_an_adapter_of_another_layout_becomes_bit_for_bit_what_the_installed_peft_saved(
    family: str, flip: bool, layout: LoraBLayout, trained_on: TrainedOn, tmp_path: Path
) -> None:
    trained = trained_on(family)
    adapter = rewritten(trained, tmp_path / "other", flip=flip, layout=layout)
    model = build(family)
    orientation = trained.orientation.flipped() if flip else trained.orientation
    sites = sites_of(adapter, model, nesting(trained.parameters), orientation, layout)

    relay(adapter, sites, model, lambda _: axes_of(model), tmp_path / "relaid")

    expected = load_file(trained.directory / "adapter_model.safetensors")
    found = load_file(tmp_path / "relaid" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    peft_model = attach(model, tmp_path / "relaid", adapter, len(sites), "cpu")
    assert torch.equal(logits(peft_model), trained.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_relay_a_grouped_adapter_is_misread_in_silence(
    family: str, trained_on: TrainedOn, tmp_path: Path
) -> None:
    trained = trained_on(family)
    rewritten(trained, tmp_path / "other", flip=False, layout=GROUPED)
    misread = PeftModel.from_pretrained(build(family), str(tmp_path / "other")).eval()
    assert (logits(misread) - trained.logits).abs().max() > 1e-2


@pytest.mark.skipif("qwen3_moe" not in FAMILIES, reason="this transformers does not fuse qwen3_moe's experts")
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_square_parameters_are_flipped_as_the_site_says(which: str, tmp_path: Path) -> None:
    trained = train(build_square("qwen3_moe", which=which), tmp_path / "saved")
    adapter = rewritten(trained, tmp_path / "other", flip=True, layout=GROUPED)
    model = build_square("qwen3_moe", which=which)
    orientation = trained.orientation.flipped()
    sites = sites_of(adapter, model, nesting(trained.parameters), orientation, GROUPED)

    relay(adapter, sites, model, lambda _: Axes.OUT_IN, tmp_path / "relaid")

    peft_model = attach(model, tmp_path / "relaid", adapter, len(sites), "cpu")
    assert torch.equal(logits(peft_model), trained.logits)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "granitemoe"])
def test_wrappers_nested_the_other_way_round_trade_their_names(
    family: str, trained_on: TrainedOn, tmp_path: Path
) -> None:
    trained = trained_on(family)
    adapter = rewritten(trained, tmp_path / "other", flip=True, layout=RANK_MAJOR, trade_nesting=True)
    model = build(family)
    places = nesting(trained.parameters, trade=True)
    sites = sites_of(adapter, model, places, trained.orientation.flipped(), RANK_MAJOR)

    relay(adapter, sites, model, lambda _: axes_of(model), tmp_path / "relaid")

    peft_model = attach(model, tmp_path / "relaid", adapter, len(sites), "cpu")
    assert torch.equal(logits(peft_model), trained.logits)


def test_the_relaid_config_leaves_out_markers_and_what_the_installed_peft_does_not_know(
    trained_on: TrainedOn, tmp_path: Path
) -> None:
    family = FAMILIES[0]
    trained = trained_on(family)
    adapter = rewritten(trained, tmp_path / "other", flip=False, layout=GROUPED)
    model = build(family)
    sites = sites_of(adapter, model, nesting(trained.parameters), trained.orientation, GROUPED)
    relay(adapter, sites, model, lambda _: axes_of(model), tmp_path / "relaid")
    config = json.loads((tmp_path / "relaid" / "adapter_config.json").read_text("utf-8"))
    assert not {"lora_B_layout", "from_the_future"} & config.keys()
    assert (config["r"], config["lora_alpha"]) == (RANK, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_modules": []}, r"ignores .*q_proj\.lora_A.* so base\+adapter is not what the adapter says"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"finds nothing in it for .*k_proj\.lora_A"),
        ({"r": 2 * RANK}, r"cannot load it: .*size mismatch"),
    ],
    ids=["ignored", "missing", "another rank"],
)
def test_what_peft_does_not_load_of_an_adapter_is_an_error(
    change: dict[str, object], says: str, trained_on: TrainedOn, tmp_path: Path
) -> None:
    family = FAMILIES[0]
    saved = Path(shutil.copytree(trained_on(family).directory, tmp_path / "saved"))
    adapter = read_adapter(saved)
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(EnvironmentFailed, match=f"(?s){says}"):
        attach(build(family), saved, adapter, len(adapter.pairs), "cpu")


def test_another_number_of_adapted_modules_than_sites_is_an_error(trained_on: TrainedOn) -> None:
    family = FAMILIES[0]
    trained = trained_on(family)
    adapter = read_adapter(trained.directory)
    found = len(adapter.pairs)
    with pytest.raises(
        EnvironmentFailed, match=f"adapts {found} modules and parameters, expected {found + 1}"
    ):
        attach(build(family), trained.directory, adapter, found + 1, "cpu")


@pytest.mark.parametrize("layout", list(LoraBLayout))
def test_packing_is_undone_by_unpacking(layout: LoraBLayout) -> None:
    b = torch.arange(3 * 8.0).view(3, 8)
    unpacked = unpack(b, EXPERTS, layout)
    assert torch.equal(pack(unpacked, layout), b)
    assert torch.equal(unpacked[1], b[:, 2:4] if layout is GROUPED else b[:, 1::EXPERTS])


def module_with(shapes: dict[str, tuple[int, ...]], **attributes: object) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    vars(module).update(attributes)
    return module


def test_the_probe_sees_that_is_transposed_turns_what_peft_reads_or_not() -> None:
    """Up to 0.18.1 PEFT ignores the attribute; later versions turn the orientation by it (peft#3165)."""
    plain = probe(module_with({"w": (3, 4, 5)}))["w"]
    transposed = probe(module_with({"w": (3, 4, 5)}, is_transposed=True))["w"]
    assert plain.lora_b_layout is transposed.lora_b_layout is RANK_MAJOR
    assert (plain.orientation, transposed.orientation) in {
        (STANDARD, SWAPPED),
        (SWAPPED, STANDARD),
        (SWAPPED, SWAPPED),
    }
    real = nn.Parameter(torch.zeros(3, 4, 5))
    assert plain.orientation is saved_by_peft(real, is_transposed=False)
    assert transposed.orientation is saved_by_peft(real, is_transposed=True)


def saved_by_peft(parameter: nn.Parameter, *, is_transposed: bool) -> Orientation:
    from peft import LoraConfig, get_peft_model

    root = nn.Module()
    root.experts = module_with({"w": tuple(parameter.shape)}, is_transposed=is_transposed)
    peft_model = get_peft_model(root, LoraConfig(target_modules=[], target_parameters=["experts.w"], r=2))
    (a,) = [part for name, part in peft_model.named_parameters() if "lora_A" in name]
    return STANDARD if a.shape[1] == parameter.shape[2] else SWAPPED


def test_the_parameter_registered_first_is_the_inner_one() -> None:
    readings = probe(module_with({"first": (3, 4, 5), "second": (3, 6, 7)}))
    assert {name: reading.depth for name, reading in readings.items()} == {"first": 1, "second": 0}


def test_a_single_square_expert_takes_the_plain_path_in_every_peft() -> None:
    """PEFT's `ParamWrapper.get_delta_weight`: with E = 1 it is s*B*A, whatever the module says."""
    for attributes in ({}, {"is_transposed": True}):
        assert probe(module_with({"w": (1, 4, 4)}, **attributes))["w"].orientation is STANDARD


def test_a_single_expert_that_the_installed_peft_cannot_update_is_refused() -> None:
    """Non-square and read swapped: PEFT's update of E = 1 comes out transposed and would not fit."""
    # 0.19.0 alone reads a transposed module as standard, and the others swapped.
    swapped = {"is_transposed": version("peft") != "0.19.0"}
    with pytest.raises(EnvironmentFailed, match=r"update of shape \[5, 4\] .* w \[1, 4, 5\]"):
        probe(module_with({"w": (1, 4, 5)}, **swapped))


def pair_of(module: str) -> LoraPair:
    entry = TensorEntry(f"base_model.model.{module}.lora_A.weight", "F32", (RANK, 8), Path("a"), 0, 0)
    return LoraPair(module, 0, entry, entry)


def test_a_lora_for_each_experts_linear_is_refused_where_the_experts_are_fused() -> None:
    family = FAMILIES[0]
    model = build(family)
    experts = fused_parameters(model)[0].rpartition(".")[0].removesuffix(".input_linear")
    site = dense_site(pair_of(f"{experts}.experts.3.gate_proj"))
    with pytest.raises(EnvironmentFailed, match=r"under transformers < 5: pip install 'transformers<5'"):
        list(read_sites([site], model))


def test_a_fused_adapter_is_refused_where_the_experts_are_apart() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(8, 8)])
    site = Site(pair_of("experts"), "experts.gate_up_proj", EXPERTS, RANK, 1.0, True, STANDARD, RANK_MAJOR)
    with pytest.raises(EnvironmentFailed, match=r"experts.gate_up_proj: not in Module .* 'transformers>=5'"):
        list(read_sites([site], model))


def test_another_number_of_experts_in_memory_is_refused() -> None:
    model = nn.Module()
    model.experts = module_with({"w": (3, 4, 5)})
    site = Site(pair_of("experts"), "experts.w", EXPERTS, RANK, 1.0, True, STANDARD, RANK_MAJOR)
    with pytest.raises(EnvironmentFailed, match=r"experts.w: found \[3, 4, 5\] .* expected 4 experts"):
        list(read_sites([site], model))


def checkpoint_with(matrix: Tensor, directory: Path) -> OutputTensor:
    """A fused parameter (experts, rows, columns) on disk, to be updated in all rows."""
    save_file({"w": matrix}, directory / "model.safetensors")
    entry = read_header(directory / "model.safetensors")[0]["w"]
    rows = Span(0, matrix.shape[1])
    terms = tuple(Term(0, expert, rows, expert, Axes.OUT_IN, rows) for expert in range(len(matrix)))
    return OutputTensor("w", "model.safetensors", entry, "F32", tuple(matrix.shape), terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_axes_of_a_square_matrix_in_memory_are_found_by_its_numbers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    matrix = torch.randn(3, 4, 4).to(dtype)
    output = checkpoint_with(matrix, tmp_path)
    site = Site(pair_of("m"), "m.w", 3, RANK, 1.0, True, STANDARD, RANK_MAJOR)
    for values, axes in ((matrix, Axes.OUT_IN), (matrix.transpose(1, 2), Axes.IN_OUT)):
        model = nn.Module()
        model.m = module_with({"w": (3, 4, 4)})
        model.get_parameter("m.w").data.copy_(values)
        assert MemoryAxes([site], [output], model)(site) is axes


def test_axes_are_refused_when_the_numbers_do_not_tell_or_are_not_there(tmp_path: Path) -> None:
    model = nn.Module()
    model.m = module_with({"w": (3, 4, 4)})
    site = Site(pair_of("m"), "m.w", 3, RANK, 1.0, True, STANDARD, RANK_MAJOR)
    for matrix, says in ((torch.zeros(3, 4, 4), "in both orders"), (torch.ones(3, 4, 4), "in no order")):
        output = checkpoint_with(matrix, tmp_path)
        with pytest.raises(EnvironmentFailed, match=f"m.w: found the file's values {says} of axes"):
            MemoryAxes([site], [output], model)(site)
