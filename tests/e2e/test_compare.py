"""`compare` on tiny real models: a right merge passes, each way of getting it wrong does not."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loudmerge.comparing.compare import Comparison, compare
from loudmerge.comparing.equivalence import compare_adapters
from loudmerge.errors import EnvironmentFailed, Mismatch
from loudmerge.merging.merge import merge
from tests.support import kinds
from tests.support.kinds_vocabulary import VOCABULARY
from tests.support.tiny import BUILDABLE, attach_random_lora, build, build_square, expert_parameters

EXPERTS, RANK, TOKENS = 4, 4, 192
SOME_TENSOR = "model.layers.1.self_attn.k_proj.weight"
ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
FUSED = [
    name
    for name in ("qwen3_moe", "gpt_oss", "qwen3_vl_moe")
    if name in BUILDABLE and expert_parameters(build(name))
]
"""gate_up before down, concatenated or interleaved; the last is a conditional-generation class."""


@pytest.fixture(autouse=True)
def third_party_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Inputs:
    """A base and an adapter on disk, and where to merge them."""

    base: Path
    adapter: Path
    out: Path


def make_inputs(
    directory: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    square: str | None = None,
    only: str | None = None,
) -> Inputs:
    """Random LoRA on q_proj and the fused experts, or `only` one parameter of them, by the installed PEFT."""
    model = build_square(family, which=square, dtype=dtype) if square else build(family, dtype=dtype)
    model.save_pretrained(directory / "base")
    leaves = {f"experts.{name.rpartition('.')[2]}" for name in expert_parameters(model)}
    attach_random_lora(
        model.float(),
        target_parameters=sorted(leaf for leaf in leaves if only is None or leaf.endswith(only)),
        target_modules=["q_proj"],
        r=RANK,
        save_to=directory / "adapter",
    )
    return Inputs(directory / "base", directory / "adapter", directory / "out")


def run(made: Inputs) -> Comparison:
    return compare(made.out, made.base, made.adapter, tokens=TOKENS)


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def say(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_a_right_merge_is_ok(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family, dtype=dtype)
    merge(made.base, made.adapter, made.out)
    found = run(made)
    assert found.ok, found.summary()
    assert not found.inconclusive
    assert found.kl_base_trained > 1e-3
    assert found.kl_base_merged == pytest.approx(found.kl_base_trained, rel=0.02)
    assert found.kl_trained_merged < (1e-9 if dtype is torch.float32 else found.kl_base_trained / 50)
    assert (found.kl_bfloat16 is None) == (dtype is torch.float32)
    assert found.stored == str(dtype).removeprefix("torch.")
    assert "pseudo-random token ids" in found.text


@pytest.mark.parametrize("family", FUSED)
def test_the_base_shipped_as_merged_is_not_ok(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family, dtype=torch.bfloat16)
    shutil.copytree(made.base, made.out)
    found = run(made)
    assert not found.ok
    assert found.kl_base_merged == 0.0
    assert found.kl_trained_merged == pytest.approx(found.kl_base_trained, rel=0.05)


@pytest.mark.parametrize("family", FUSED)
def test_one_experts_update_dropped_is_not_ok(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family, dtype=torch.bfloat16)
    sabotaged = tmp_path / "sabotaged"
    shutil.copytree(made.adapter, sabotaged)

    def drop(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "layers.0." in key and "experts" in key and "lora_B" in key:
                tensor[:, 1::EXPERTS] = 0

    rewrite(sabotaged / ADAPTER_FILE, drop)
    merge(made.base, sabotaged, made.out)
    found = run(made)
    assert not found.ok, found.summary()


@pytest.mark.parametrize("family", FUSED)
def test_a_rank_major_adapter_merged_as_grouped_is_not_ok(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family, dtype=torch.bfloat16)
    merge(made.base, made.adapter, made.out, lora_b_layout="grouped_by_expert")
    options = json.loads((made.out / "merge_report.json").read_text("utf-8"))["options"]
    say(made.out / "merge_report.json", options=options | {"lora_b_layout": "rank_major"})
    found = run(made)
    assert not found.ok
    assert found.kl_trained_merged > found.kl_base_trained / 2


@pytest.mark.skipif("qwen3_moe" not in FUSED, reason="this transformers does not fuse qwen3_moe's experts")
def test_a_square_parameter_merged_in_the_other_orientation_is_not_ok(tmp_path: Path) -> None:
    made = make_inputs(tmp_path, "qwen3_moe", square="down", only="down_proj")
    wrong = {"standard": "swapped", "swapped": "standard"}[installed_orientation()]
    merge(made.base, made.adapter, made.out, orientation=wrong, lora_b_layout="rank_major")
    assert run(made).ok, "by the options that OUT was merged with"
    right = {"orientation": installed_orientation(), "lora_b_layout": "rank_major"}
    say(made.out / "merge_report.json", options=right)
    found = run(made)
    assert not found.ok
    assert found.kl_trained_merged > found.kl_base_trained / 10


def installed_orientation() -> str:
    """What the installed PEFT saves for an out-in experts module without `is_transposed`."""
    from peft import LoraConfig, get_peft_model

    root = torch.nn.Module()
    root.experts = torch.nn.Module()
    root.experts.register_parameter("w", torch.nn.Parameter(torch.zeros(2, 3, 5)))
    peft_model = get_peft_model(root, LoraConfig(target_modules=[], target_parameters=["experts.w"], r=1))
    (a,) = [part for name, part in peft_model.named_parameters() if "lora_A" in name]
    return "standard" if a.shape[1] == 5 else "swapped"


@pytest.mark.parametrize("family", FUSED)
def test_an_adapter_that_the_installed_peft_would_misread_is_read_as_the_plan_says(
    family: str, tmp_path: Path
) -> None:
    """Packed by expert, in the other orientation: merged, it has to behave as the adapter that was saved."""
    made = make_inputs(tmp_path, family)
    other = tmp_path / "other"
    shutil.copytree(made.adapter, other)
    rewrite(other / ADAPTER_FILE, flip_and_group)
    say(other / "adapter_config.json", lora_B_layout="grouped_by_expert", peft_version=None)
    merge(made.base, other, made.out)
    for adapter in (other, made.adapter):
        assert compare(made.out, made.base, adapter, tokens=TOKENS).ok


def flip_and_group(tensors: dict[str, Tensor]) -> None:
    for key_a in [key for key in tensors if key.endswith("lora_A.weight") and "experts" in key]:
        key_b = key_a.replace("lora_A", "lora_B")
        a, b = tensors[key_a], tensors[key_b]
        tensors[key_a] = torch.cat([b[:, e::EXPERTS].T for e in range(EXPERTS)]).contiguous()
        tensors[key_b] = torch.cat(
            [a[e * RANK : (e + 1) * RANK].T for e in range(EXPERTS)], dim=1
        ).contiguous()


def per_expert_adapter(directory: Path, template: Path) -> Path:
    """An adapter as transformers 4 has it: a LoRA on each expert's Linear of qwen3_moe."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}
    tensors = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (out, into) in sizes.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.1
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.1
    shutil.copytree(template, directory)
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    say(directory / "adapter_config.json", target_modules=sorted(sizes), target_parameters=None)
    return directory


def test_a_per_expert_adapter_is_compared_where_the_experts_are_apart_and_refused_elsewhere(
    tmp_path: Path,
) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    attach_random_lora(model, target_modules=["q_proj"], r=RANK, save_to=tmp_path / "template")
    adapter = per_expert_adapter(tmp_path / "adapter", tmp_path / "template")
    merge(tmp_path / "base", adapter, tmp_path / "out")
    if "qwen3_moe" in FUSED:
        with pytest.raises(
            EnvironmentFailed, match="only be loaded faithfully under transformers < 5: pip install"
        ):
            compare(tmp_path / "out", tmp_path / "base", adapter, tokens=TOKENS)
    else:
        found = compare(tmp_path / "out", tmp_path / "base", adapter, tokens=TOKENS)
        assert found.ok
        assert found.kl_base_trained > 1e-3


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("base/config.json", {"hidden_size": "x"}, r"base: transformers \S+ cannot load it: \w+: "),
        ("base/config.json", {"num_attention_heads": 0}, "cannot load it: ZeroDivisionError: "),
        ("base/config.json", {"architectures": [True]}, r"found architectures \[True\], expected a model"),
        ("base/config.json", {"vocab_size": 0}, "found vocab_size 0, expected how many tokens"),
        (
            "base/config.json",
            {"num_experts_per_tok": -1},
            "as its config.json makes it, cannot be run: RuntimeError: ",
        ),
        ("base/generation_config.json", {"eos_token_id": [[1]]}, r"found eos_token_id \[\[1\]\], expected"),
    ],
)
@pytest.mark.parametrize("family", FUSED[:1])
def test_what_merges_but_the_installed_libraries_do_not_take_is_said(
    family: str, file: str, value: dict[str, object], says: str, tmp_path: Path
) -> None:
    """The weights are as they should be; who wrote the config had other versions, or no care."""
    made = make_inputs(tmp_path, family)
    say(tmp_path / file, **value)
    merge(made.base, made.adapter, made.out)
    with pytest.raises(EnvironmentFailed, match=says):
        run(made)
    with pytest.raises(EnvironmentFailed, match=says):
        compare_adapters(made.adapter, made.base, made.adapter, tokens=TOKENS)


@pytest.mark.parametrize("family", FUSED[:1])
def test_a_field_that_is_null_has_its_default(family: str, tmp_path: Path) -> None:
    """PEFT itself cannot load `"bias": null`, which the merge reads as it reads none."""
    made = make_inputs(tmp_path, family)
    say(made.adapter / "adapter_config.json", bias=None)
    merge(made.base, made.adapter, made.out)
    assert run(made).ok


@pytest.mark.parametrize("family", FUSED[:1])
def test_out_without_a_tensor_is_a_mismatch(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family)
    merge(made.base, made.adapter, made.out)

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[SOME_TENSOR]

    rewrite(made.out / MODEL_FILE, lose)
    with pytest.raises(Mismatch, match=rf"found no tensor for {re.escape(SOME_TENSOR)}, expected every"):
        run(made)


def test_a_base_whose_names_the_installed_transformers_does_not_have_is_no_fault_of_out(
    tmp_path: Path,
) -> None:
    """As nemotron_h's `backbone.embedding` has none in some releases: OUT lacks no more than the base."""
    made = make_inputs(tmp_path, FUSED[0])

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")

    rewrite(made.base / MODEL_FILE, rename)
    merge(made.base, made.adapter, made.out)
    with pytest.raises(
        EnvironmentFailed, match=r"base: transformers .* finds no tensor for model\.norm\.weight"
    ):
        run(made)


@pytest.mark.parametrize("family", FUSED[:1])
def test_numbers_that_are_not_finite_are_a_mismatch(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family)
    merge(made.base, made.adapter, made.out)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[SOME_TENSOR].fill_(torch.nan)

    rewrite(made.out / MODEL_FILE, spoil)
    with pytest.raises(Mismatch, match="found logits that are not finite"):
        run(made)


@pytest.mark.parametrize("family", FUSED[:1])
def test_an_update_that_hardly_shows_is_inconclusive_not_failed(family: str, tmp_path: Path) -> None:
    made = make_inputs(tmp_path, family, dtype=torch.bfloat16)

    def weaken(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.mul_(0.03)

    rewrite(made.adapter / ADAPTER_FILE, weaken)
    merge(made.base, made.adapter, made.out, rounding="nearest")
    found = run(made)
    assert found.ok, found.summary()
    assert found.inconclusive
    assert found.summary().startswith("ok: inconclusive: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_pefts_own_merge_is_wrong_only_a_right_one_is_ok(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT merges LoRA on a tied head into the embedding, too. That is no rounding, and allows nothing."""
    (kind,) = (kind for kind in VOCABULARY if kind.name == "LoRA on the head, tied")
    model = kinds.build(kind, dtype)
    model.save_pretrained(tmp_path / "base")
    live = kinds.attach(model.float(), kind)
    live.save_pretrained(tmp_path / "adapter")
    live.merge_and_unload().to(dtype).save_pretrained(tmp_path / "by-peft")
    made = Inputs(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge(made.base, made.adapter, made.out)
    right = run(made)
    assert right.ok, right.summary()
    assert not right.inconclusive
    assert right.kl_peft > 0.1 * right.kl_base_trained
    for wrong in (made.base, tmp_path / "by-peft"):
        found = run(replace(made, out=wrong))
        assert not found.ok, found.summary()
        assert not found.inconclusive
        assert found.summary().startswith("mismatch: ")
