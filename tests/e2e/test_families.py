"""Every model family against PEFT itself: OUT, reloaded, is what `merge_and_unload` makes of the live model.

Bases are tiny random models of the real classes, saved by the installed transformers; adapters are made by
the installed PEFT. What loudmerge refuses by design is a table here, and every row is shown to be refused.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import loudmerge
from tests.support import tiny
from tests.support.bfloat16 import assert_rounded_alike

# The libraries' own deprecations; those that loudmerge itself raises are checked by the other tests.
pytestmark = pytest.mark.filterwarnings("default")

TRANSFORMERS_4 = transformers.__version__.startswith("4.")

FLOAT32_BOUND = 1e-6
"""The largest difference of a float32 weight, of the largest weight of its tensor."""
LOGITS_BOUND = 5e-5
"""The largest difference of a logit, of the largest logit: (W + BA)x and Wx + B(Ax) add up in another order.
The base itself must be a hundred times as far away."""

REFUSED: Mapping[str, str] = {
    "diffusion_gemma": "unsupported-base",
    "ernie4_5_vl_moe": "unsupported-base",
    "longcat_flash": "experts-incomplete",
}
"""Families whose fused experts are refused by design, and the code."""

APART_ON_DISK: Mapping[str, str] = {
    "lara_mini": r"linear_attn\.in_proj_",
    "minimax_m3_vl": r"shared_experts\.gate_up_proj",
}
"""Linears that are a part of another tensor on disk, or several: a LoRA on them is refused."""

_OTHER_TOWERS = (
    *("deepseek_ocr2", "dots3_note", "hy_v4_vl", "inkling2", "inkling2_loop", "inkling_mm_model"),
    *("kimi_k25", "minimax_m3_vl", "mistral_large4", "step3p7", "unlimited_ocr"),
)
TOWERS_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("diffusion_gemma", "ernie4_5_vl_moe"), "unsupported-base"),
    **dict.fromkeys(_OTHER_TOWERS, "missing-base-tensor"),
}
"""Families whose towers have other names or forms on disk, and the code."""

NOT_TRAINABLE: Mapping[str, str] = {
    "deepseek_v2": r"mlp\.gate$",
    "jamba": r"mamba\.dt_proj",
    "longcat_flash": r"router\.classifier",
    "nemotron_h": r"mixer\.out_proj",
}
"""Linears that PEFT refuses (nemotron_h), or whose `weight` the model reads past PEFT's LoRA."""

NO_FORWARD: Mapping[str, str] = {
    "llama4": "transformers 5.24.0 reads image features that a text does not have",
}
"""Families whose tiny model does not run on text alone: their weights are compared, their logits not."""

BFLOAT16 = (
    *(
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "mixtral",
        "phimoe",
        "olmoe",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
    ),
    *("llama4_text", "jamba", "granitemoe", "minimax", "ernie4_5_moe", "qwen3_vl_moe", "qwen3_5_moe"),
    *("deepseek_v4", "gemma4_text", "nemotron_h", "inkling2_text", "step3p7", "mistral4", "aria_text"),
)

_USUAL_NAMES = (
    *("dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "hunyuan_v1_moe", "jamba", "olmoe", "qwen2_moe"),
    *("qwen3_moe", "qwen3_next", "qwen3_omni_moe"),
)
_GATED = ("gate_proj", "up_proj", "down_proj")
BY_NAME: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_USUAL_NAMES, ("q_proj", "o_proj", *_GATED)),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "longcat_flash"), ("kv_b_proj", *_GATED)),
    **dict.fromkeys(("mixtral", "minimax", "phimoe"), ("q_proj", "w1", "w2", "w3")),
}
"""`target_modules` as people write them: per-expert Linears in transformers 4, the fused experts in 5."""

SWAPPED_ERA = ("qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "granitemoe", "qwen3_vl_moe", "aria_text")
TEXT_ONLY = tuple(
    name for name in ("llama4", "qwen3_5_moe", "qwen4_exp", "dots3_note") if name in tiny.BUILDABLE
)


class Case(NamedTuple):
    """A base on disk, its class, and what that loads, which no test changes: `fresh` is for that."""

    base: Path
    cls: type[PreTrainedModel]
    loaded: PreTrainedModel

    @classmethod
    def of(cls, base: Path, model: type[PreTrainedModel], dtype: torch.dtype = torch.float32) -> Case:
        return cls(base, model, tiny.load(base, model, dtype))

    def fresh(self) -> PreTrainedModel:
        """A copy to train: half of these tests' time would be loading."""
        return copy.deepcopy(self.loaded)


Bases = Callable[..., Case]


@pytest.fixture(scope="module", autouse=True)
def without_progress_bars() -> Iterator[None]:
    """There are hundreds."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Saved tiny models, each made once."""
    made: dict[tuple[str, torch.dtype], Case] = {}

    def base(model_type: str, dtype: torch.dtype = torch.float32) -> Case:
        if (model_type, dtype) not in made:
            if model_type not in tiny.BUILDABLE:
                pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
            path = tmp_path_factory.mktemp(model_type)
            model = tiny.build(model_type, dtype=dtype)
            model.save_pretrained(path)
            made[model_type, dtype] = Case.of(path, type(model), dtype)
        return made[model_type, dtype]

    return base


def everything(model: PreTrainedModel, model_type: str) -> dict[str, list[str]]:
    """LoRA on all experts, attention, shared experts and routers that PEFT and the checkpoint's form allow.

    PEFT >= 0.19 redirects `target_modules` named like an expert's projections to the experts, so that
    Linears of such names are targeted as parameters.
    """
    refused = re.compile(
        "|".join([r"$^", *(table.get(model_type, r"$^") for table in (APART_ON_DISK, NOT_TRAINABLE))])
    )
    linears = [name for name in tiny.text_linears(model) if not refused.search(name)]
    redirected = [
        name for name in linears if re.search(r"\.(gate_proj|up_proj|down_proj|w[123]|gate)$", name)
    ]
    redirected = [] if TRANSFORMERS_4 else redirected
    return {
        "target_modules": [name for name in linears if name not in redirected],
        "target_parameters": [
            *tiny.expert_parameters(model),
            *tiny.router_parameters(model),
            *(f"{name}.weight" for name in redirected),
        ],
    }


def attach(case: Case, adapter: Path, targets: Mapping[str, Any], **options: Any) -> PeftModel:
    """A random adapter on the live model, saved; every target got its LoRA."""
    peft_model = tiny.attach_random_lora(case.fresh(), save_to=adapter, **targets, **options)
    found = {
        name.partition(".lora_")[0].replace(".base_layer", "")
        for name in load_file(adapter / "adapter_model.safetensors")
    }
    wanted = {
        *targets.get("target_modules", ()),
        *(name.rpartition(".")[0] for name in targets.get("target_parameters", ())),
    }
    assert found == {f"base_model.model.{name}" for name in wanted}
    return peft_model


def runs(peft_model: PeftModel, model_type: str) -> bool:
    """Whether the live adapter model can run: PEFT < 0.20 wraps a router and hides the buffers it needs."""
    wrapped = [module for module in peft_model.modules() if isinstance(module, ParamWrapper)]
    hidden = [
        name
        for module in wrapped
        for name, _ in module.get_base_layer().named_buffers()
        if not hasattr(module, name)
    ]
    return model_type not in NO_FORWARD and not hidden


def assert_same(out: PreTrainedModel, oracle: torch.nn.Module, base: PreTrainedModel) -> None:
    """Every tensor of `out` is the oracle's, up to the last bits; and the oracle is not the base."""
    wanted, found, before = oracle.state_dict(), out.state_dict(), base.state_dict()
    assert wanted.keys() == found.keys()
    changed = 0
    for name, tensor in wanted.items():
        changed += not torch.equal(tensor, before[name])
        if torch.equal(tensor, found[name]):
            continue
        assert tensor.dtype == torch.float32, name
        difference = (tensor - found[name]).abs().max()
        assert difference <= FLOAT32_BOUND * tensor.abs().max(), f"{name}: {difference}"
    assert changed, "the adapter changed nothing"


def assert_same_logits(model: PreTrainedModel, trained: Tensor, base: PreTrainedModel) -> None:
    """The model says what the live adapter model said, and the base says something else."""
    bound = LOGITS_BOUND * float(trained.abs().max())
    assert (tiny.logits(model) - trained).abs().max() <= bound
    assert (tiny.logits(base) - trained).abs().max() > 100 * bound


def merge_and_compare(case: Case, peft_model: PeftModel, adapter: Path, out: Path) -> PreTrainedModel:
    """Merges, reloads, compares with PEFT's merge of the live model; gives the reloaded model."""
    report = loudmerge.merge(case.base, adapter, out, rounding="peft", verify=True)
    assert report.status == "merged"
    oracle = peft_model.merge_and_unload()
    reloaded = tiny.load(out, case.cls)
    assert_same(reloaded, oracle, case.loaded)
    return reloaded


@pytest.mark.parametrize("model_type", tiny.BUILDABLE)
def test_out_is_what_peft_makes_of_the_live_model(
    model_type: str, bases: Bases, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Experts, attention, shared experts and routers at once, in float32: same weights and same logits."""
    case = bases(model_type)
    peft_model = attach(case, tmp_path / "adapter", everything(case.loaded, model_type))
    if model_type in REFUSED and tiny.expert_parameters(case.loaded):
        with pytest.raises(loudmerge.MergeRefused) as refusal:
            loudmerge.merge(case.base, tmp_path / "adapter", tmp_path / "out")
        assert refusal.value.code == REFUSED[model_type]
        assert not (tmp_path / "out").exists()
        # The matrix's table tells it from a family that was merged.
        record_property("refused", refusal.value.code)
        return
    trained = tiny.logits(peft_model) if runs(peft_model, model_type) else None
    reloaded = merge_and_compare(case, peft_model, tmp_path / "adapter", tmp_path / "out")
    if trained is not None:
        assert_same_logits(reloaded, trained, case.loaded)


@pytest.mark.parametrize("which", ["gate_up", "down"])
@pytest.mark.parametrize("model_type", [name for name in tiny.BUILDABLE if name not in REFUSED])
def test_one_projection_alone(model_type: str, which: str, bases: Bases, tmp_path: Path) -> None:
    """A LoRA on gate and up alone, or on down alone: nothing in the keys says which."""
    case = bases(model_type)
    parameters = tiny.expert_parameters(case.loaded)
    is_down = re.compile(r"\.(down_proj|fc2\.weight|output_linear\.weight)$")
    chosen = [name for name in parameters if bool(is_down.search(name)) == (which == "down")]
    if not chosen:
        pytest.skip(f"{model_type} has no fused experts in transformers {transformers.__version__}")
    peft_model = attach(case, tmp_path / "adapter", {"target_parameters": chosen})
    merge_and_compare(case, peft_model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("model_type", BFLOAT16)
def test_bfloat16_is_bit_identical(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """`rounding="peft"` rounds as PEFT does."""
    case = bases(model_type, torch.bfloat16)
    peft_model = attach(case, tmp_path / "adapter", everything(case.loaded, model_type))
    loudmerge.merge(case.base, tmp_path / "adapter", tmp_path / "out", rounding="peft", verify=True)
    oracle = peft_model.merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out", case.cls, torch.bfloat16).state_dict()
    # What is kept in float32 in memory is bfloat16 on disk.
    assert_rounded_alike(found, oracle, others=2**-7)


@pytest.mark.parametrize("model_type", BY_NAME)
def test_targets_by_leaf_name(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """`target_modules` names as people write them; PEFT itself says what they mean in this version."""
    case = bases(model_type)
    peft_model = tiny.attach_random_lora(
        case.fresh(), target_modules=BY_NAME[model_type], save_to=tmp_path / "adapter"
    )
    if model_type == "longcat_flash" and any(
        ".experts.lora_A" in name for name, _ in peft_model.named_parameters()
    ):
        pytest.skip("longcat_flash's fused experts are refused")
    if TRANSFORMERS_4:
        assert any(".experts.0." in name and "lora_A" in name for name, _ in peft_model.named_parameters())
    merge_and_compare(case, peft_model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("model_type", SWAPPED_ERA)
def test_the_other_orientation(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """The same update as a PEFT of the other orientation writes it: factors exchanged and transposed."""
    case = bases(model_type)
    parameters = tiny.expert_parameters(case.loaded)
    if not parameters:
        pytest.skip(f"{model_type} has no fused experts in transformers {transformers.__version__}")
    peft_model = attach(case, tmp_path / "adapter", {"target_parameters": parameters})
    _exchange_factors(tmp_path / "adapter", experts=4)
    merge_and_compare(case, peft_model, tmp_path / "adapter", tmp_path / "out")


def _exchange_factors(adapter: Path, *, experts: int) -> None:
    """A_e becomes B_e^T and B_e becomes A_e^T for every expert, in PEFT's packing; the version goes, too."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        lora_A, lora_B = tensors[key], tensors[other]
        rank = lora_A.shape[0] // experts
        by_expert = lora_B.reshape(lora_B.shape[0], rank, experts).permute(2, 1, 0)
        packed = lora_A.reshape(experts, rank, lora_A.shape[1]).permute(2, 1, 0)
        tensors[key] = by_expert.reshape(rank * experts, -1).contiguous()
        tensors[other] = packed.reshape(-1, rank * experts).contiguous()
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config.pop("peft_version", None)
    # PEFT 0.17 writes this always, and no version: without it the config is nobody's.
    config.pop("corda_config", None)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", APART_ON_DISK)
def test_a_lora_on_a_part_of_a_tensor_is_refused(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """The checkpoint stores these Linears inside another tensor, or in pieces."""
    case = bases(model_type)
    linears = tiny.text_linears(case.loaded)
    parts = [name for name in linears if re.search(APART_ON_DISK[model_type], name)]
    attach(case, tmp_path / "adapter", {"target_modules": parts})
    with pytest.raises(loudmerge.MergeRefused, match=re.escape(f"{parts[0]}.weight")) as refusal:
        loudmerge.merge(case.base, tmp_path / "adapter", tmp_path / "out")
    assert refusal.value.code == "missing-base-tensor"
    assert not (tmp_path / "out").exists()


def test_stacked_experts_of_dbrx(bases: Bases, tmp_path: Path) -> None:
    """Three matrices of one shape in one module: a LoRA on one is clear, nested LoRA on all three is not."""
    case = bases("dbrx")
    one = ["experts.mlp.w1"]
    peft_model = tiny.attach_random_lora(case.fresh(), target_parameters=one, save_to=tmp_path / "one")
    merge_and_compare(case, peft_model, tmp_path / "one", tmp_path / "out")
    tiny.attach_random_lora(
        case.fresh(),
        target_parameters=[*one, "experts.mlp.v1", "experts.mlp.w2"],
        save_to=tmp_path / "three",
    )
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.merge(case.base, tmp_path / "three", tmp_path / "refused")
    assert refusal.value.code == "unsupported-adapter"


@pytest.mark.parametrize("model_type", tiny.BUILDABLE)
def test_vision_and_audio_towers(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """A LoRA on a tower is merged as PEFT merges it, or, where names or forms differ on disk, refused."""
    case = bases(model_type)
    towers = tiny.tower_linears(case.loaded)
    if not towers:
        pytest.skip(f"{model_type} has no tower")
    peft_model = tiny.attach_random_lora(case.fresh(), target_modules=towers, save_to=tmp_path / "adapter")
    if model_type in TOWERS_REFUSED:
        with pytest.raises(loudmerge.MergeRefused) as refusal:
            loudmerge.merge(case.base, tmp_path / "adapter", tmp_path / "out")
        assert refusal.value.code == TOWERS_REFUSED[model_type]
    else:
        merge_and_compare(case, peft_model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("model_type", TEXT_ONLY)
def test_an_adapter_of_the_text_class_alone(model_type: str, bases: Bases, tmp_path: Path) -> None:
    """Trained through AutoModelForCausalLM, whose names lack the composite's prefix; towers stay."""
    case = bases(model_type)
    text = AutoModelForCausalLM.from_pretrained(case.base)
    if isinstance(text, case.cls) or (model_type, transformers.__version__) == ("qwen3_5_moe", "5.5.0"):
        pytest.skip(f"transformers {transformers.__version__} has no text class that loads a {model_type}")
    text_case = Case.of(case.base, type(text))
    targets = {
        "target_modules": [name for name in tiny.text_linears(text) if "attn" in name],
        "target_parameters": tiny.expert_parameters(text),
    }
    peft_model = attach(text_case, tmp_path / "adapter", targets)
    trained = tiny.logits(peft_model)
    reloaded = merge_and_compare(text_case, peft_model, tmp_path / "adapter", tmp_path / "out")
    assert_same_logits(reloaded, trained, text_case.loaded)
    before, after = (load_file(path / "model.safetensors") for path in (case.base, tmp_path / "out"))
    assert before.keys() == after.keys()
    towers = [key for key in before if "vision" in key or "visual" in key]
    assert towers
    assert all(torch.equal(before[key], after[key]) for key in towers)
