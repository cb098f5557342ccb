"""`compare --adapter-only`: a converted adapter computes what the original does, on a tiny real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from loudmerge.comparing.equivalence import Equivalence, compare_adapters
from loudmerge.comparing.regroup import regroup
from loudmerge.converting.convert import convert
from loudmerge.converting.rewrite import GROUPED, LAYOUTS, PEFT_018, PEFT_019, PER_EXPERT
from loudmerge.errors import EnvironmentFailed, MergeRefused
from loudmerge.merging.merge import plan
from tests.support import tiny
from tests.support.command import Ended, run_inside

pytestmark = pytest.mark.filterwarnings("default")

APART = transformers.__version__.startswith("4.")
EXPERTS, TOKENS = 4, 128
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return partial(run_inside, capsys)


def make(root: Path, model_type: str, *, square: str | None = None) -> Path:
    """A base, and a random adapter on its experts and attention by the installed PEFT."""
    model = tiny.build_square(model_type, which=square) if square else tiny.build(model_type, experts=EXPERTS)
    model.save_pretrained(root / "base")
    experts = tiny.expert_parameters(model)
    leaves = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    apart = [name for name in tiny.text_linears(model) if name.rpartition(".")[2] in leaves]
    attention = [name for name in tiny.text_linears(model) if name.endswith("q_proj")]
    tiny.attach_random_lora(
        model,
        target_modules=[*attention, *([] if experts else apart)],
        target_parameters=experts,
        save_to=root / "adapter",
    )
    return root


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a conversion into each layout, in a directory of the layout's name."""
    root = make(tmp_path_factory.mktemp("made"), request.param)
    for layout in LAYOUTS:
        convert(root / "adapter", root / layout, layout, base=root / "base")
    return root


def compare(converted: Path, root: Path) -> Equivalence:
    return compare_adapters(converted, root / "base", root / "adapter", tokens=TOKENS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversion_computes_what_the_original_does(
    layout: str, made: Path, run: Callable[..., Ended]
) -> None:
    inputs = ("--base", made / "base", "--adapter", made / "adapter", "--adapter-only")
    ended = run("compare", made / layout, *inputs, "--json")
    document = ended.document
    assert (ended.code, document["status"], document["inconclusive"]) == (0, "ok", False)
    assert document["kl_base_original"] > 1e-3
    assert document["kl_original_converted"] < 1e-10
    assert document["top1_agreement"] == 1.0
    assert (document["samples"]["matched"], document["samples"]["total"]) == (3, 3)


def apart(made: Path, into: Path) -> Path:
    """A per-expert adapter whose gate and up do not share their lora_A, as two fused into one would."""
    convert(made / "adapter", into, PER_EXPERT, base=made / "base")
    tensors = load_file(into / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for key in sorted(tensors):
        if "experts" in key:
            tensors[key] = torch.randn(tensors[key].shape, generator=generator) * 0.1
    save_file(tensors, into / WEIGHTS, metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("layout", [PEFT_018, PEFT_019, GROUPED])
def test_gate_and_up_of_their_own_become_one_of_both_ranks(layout: str, tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe")
    own = apart(made, tmp_path / "own")
    convert(own, tmp_path / layout, layout, base=made / "base")
    found = compare_adapters(tmp_path / layout, made / "base", own, tokens=TOKENS)
    assert found.ok, found.summary()
    assert found.kl_base_original > 1e-3
    assert not compare_adapters(made / "adapter", made / "base", own, tokens=TOKENS).ok


def broken(made: Path, into: Path, layout: str, change: Callable[[Tensor], Tensor]) -> Path:
    """The conversion with `change` made to every lora_B of experts."""
    shutil.copytree(made / layout, into)
    tensors = load_file(into / WEIGHTS)
    for key, tensor in tensors.items():
        if "experts" in key and "lora_B" in key:
            tensors[key] = change(tensor).contiguous()
    save_file(tensors, into / WEIGHTS, metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_b_in_another_order_are_a_mismatch(
    layout: str, made: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    wrong = broken(made, tmp_path / "wrong", layout, lambda b: b.roll(1, dims=1))
    inputs = ("--base", made / "base", "--adapter", made / "adapter", "--adapter-only")
    ended = run("compare", wrong, *inputs)
    assert ended.code == 4
    assert ended.stdout.startswith(f"mismatch: {wrong} does not compute what {made / 'adapter'} does")


def test_two_experts_that_changed_places_are_a_mismatch(made: Path, tmp_path: Path) -> None:
    """Apart, an expert is what its name says."""
    wrong = tmp_path / "wrong"
    shutil.copytree(made / PER_EXPERT, wrong)
    tensors = load_file(wrong / WEIGHTS)
    for key in [key for key in tensors if ".experts.0." in key]:
        other = key.replace(".experts.0.", ".experts.2.")
        tensors[key], tensors[other] = tensors[other], tensors[key]
    save_file(tensors, wrong / WEIGHTS, metadata={"format": "pt"})
    assert not compare(wrong, made).ok


@pytest.mark.parametrize(("layout", "marker"), [(PEFT_019, "grouped_by_expert"), (GROUPED, "rank_major")])
def test_a_wrong_marker_shows(layout: str, marker: str, made: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(made / layout, wrong)
    config = wrong / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"lora_B_layout": marker}), "utf-8")
    if APART:
        # gate and up of Linears, fused, leave zeros in lora_B that prove how it is packed.
        with pytest.raises(MergeRefused, match=r"ambiguous-layout: lora_B of gate_up_proj.*\(the marker"):
            compare(wrong, made)
        return
    found = compare(wrong, made)
    assert not found.ok
    assert found.kl_original_converted > found.kl_base_original / 10


@pytest.mark.parametrize(
    ("layout", "which"),
    [(PEFT_018, "down"), (PEFT_019, "gate_up"), (GROUPED, "down"), (PER_EXPERT, "gate_up")],
)
def test_square_matrices_too(layout: str, which: str, tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe", square=which)
    convert(made / "adapter", made / layout, layout, base=made / "base")
    found = compare(made / layout, made)
    assert found.ok, found.summary()
    assert found.kl_base_original > 1e-3
    assert found.kl_original_converted < 1e-10


@pytest.mark.skipif(APART, reason="transformers 4 has no fused experts")
def test_an_adapter_that_no_file_describes_is_compared_as_it_was_converted(
    tmp_path: Path, run: Callable[..., Ended]
) -> None:
    """Packed by expert, without the marker."""
    made = make(tmp_path, "qwen3_moe")
    convert(made / "adapter", made / "grouped", GROUPED, base=made / "base")
    config = made / "grouped" / "adapter_config.json"
    raw = json.loads(config.read_text("utf-8"))
    del raw["lora_B_layout"]
    config.write_text(json.dumps(raw), "utf-8")
    told = ("--lora-b-layout", "grouped_by_expert")
    inputs = ("--base", made / "base", *told)
    assert run("convert", made / "grouped", made / "repaired", "--to", PEFT_019, *inputs).code == 0
    sides = ("--adapter", made / "grouped", "--adapter-only", *inputs)
    assert run("compare", made / "repaired", *sides).code == 0
    assert run("compare", made / "adapter", *sides).code == 0
    assert run("compare", made / "repaired", *sides[:-2]).code == 4, "taken for rank_major"


def test_an_adapter_without_effect_tells_nothing(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe")
    tensors = load_file(made / "adapter" / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.zero_()
    save_file(tensors, made / "adapter" / WEIGHTS, metadata={"format": "pt"})
    convert(made / "adapter", made / PEFT_018, PEFT_018, base=made / "base")
    found = compare(made / PEFT_018, made)
    assert found.ok
    assert found.inconclusive
    assert found.summary().startswith("ok: inconclusive: ")


@pytest.mark.skipif(APART, reason="transformers 4 reads these as they are")
def test_what_a_fused_parameter_cannot_have_is_said(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe")
    convert(made / "adapter", made / "apart", PER_EXPERT, base=made / "base")
    tensors = load_file(made / "apart" / WEIGHTS)
    stem = "base_model.model.model.layers.0.mlp.experts.1.down_proj"
    tensors[f"{stem}.lora_A.weight"] = torch.cat([tensors[f"{stem}.lora_A.weight"]] * 2)
    tensors[f"{stem}.lora_B.weight"] = torch.cat([tensors[f"{stem}.lora_B.weight"]] * 2, dim=1)
    save_file(tensors, made / "apart" / WEIGHTS, metadata={"format": "pt"})
    config = made / "apart" / "adapter_config.json"
    pattern = {"rank_pattern": {"layers.0.mlp.experts.1.down_proj": 8}}
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | pattern), "utf-8")
    with pytest.raises(EnvironmentFailed, match="several ranks or scalings among its experts"):
        compare(made / "apart", made)


@pytest.mark.skipif(APART, reason="transformers 4 reads these as they are")
def test_matrices_that_their_numbers_do_not_tell_apart_are_not_guessed(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe")
    convert(made / "adapter", made / "apart", PER_EXPERT, base=made / "base")
    file = made / "base" / "model.safetensors"
    tensors = load_file(file)
    stem = "model.layers.1.mlp.experts.2"
    tensors[f"{stem}.up_proj.weight"] = tensors[f"{stem}.gate_proj.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EnvironmentFailed, match=r"experts\.2\.gate_proj: found its matrix in no one place"):
        compare(made / "apart", made)


@pytest.mark.skipif(not APART, reason="transformers 5 has them fused")
def test_experts_that_the_model_lacks_are_said(tmp_path: Path) -> None:
    """Another model's base under the plan: what is looked for is not in memory."""
    made = make(tmp_path, "qwen3_moe")
    convert(made / "adapter", made / "fused", PEFT_019, base=made / "base")
    planned = plan(made / "base", made / "fused")
    model = tiny.build("qwen3_moe", experts=EXPERTS, seed=1)
    with pytest.raises(EnvironmentFailed, match=r"experts\.0\.\w+: found its matrix in no one place"):
        regroup(planned, model, tmp_path / "into")
