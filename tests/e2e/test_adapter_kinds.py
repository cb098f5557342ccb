"""Every kind of adapter against PEFT itself: OUT, reloaded, computes what the live PeftModel computed.

Bases are tiny random models, saved by the installed transformers; adapters are made, filled with random
values and saved by the installed PEFT. What must be refused is refused with its code, and leaves no OUT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loudmerge
from tests.support import kinds, tiny
from tests.support.bfloat16 import assert_rounded_alike
from tests.support.kinds import UNTIED, Kind
from tests.support.kinds_linear import LINEAR
from tests.support.kinds_vocabulary import VOCABULARY

# The libraries' own warnings; those that loudmerge itself raises are checked by the other tests.
pytestmark = pytest.mark.filterwarnings("default")

KINDS = (*LINEAR, *VOCABULARY)

FLOAT32_BOUND = 1e-6
"""The largest difference of a float32 weight, of the largest weight of its tensor."""
LOGITS_BOUND = 1e-5
"""The largest difference of a logit; logits are up to 4."""
TRAINED = 100 * LOGITS_BOUND
"""The least that an adapter must change the logits."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _cases(*, merged_only: bool = False) -> list[Any]:
    cases = []
    for kind in KINDS:
        if kind.refused and merged_only:
            continue
        marks = [pytest.mark.skip(kind.why_not())] if kind.why_not() else []
        if kind.bug and not marks:
            marks = [pytest.mark.xfail(strict=True, reason=kind.bug)]
        cases.append(pytest.param(kind, id=kind.name, marks=marks))
    return cases


def make(kind: Kind, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Saves the base and the adapter; gives the live model. The adapter's file has the kind's tensors."""
    kinds.build(kind, dtype).save_pretrained(folder / "base")
    if kind.stored_twice:
        weights = folder / "base" / "model.safetensors"
        held = load_file(weights)
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
        save_file(held, weights, {"format": "pt"})
    live = kinds.attach(kinds.load(folder / "base", dtype), kind)
    live.save_pretrained(folder / "adapter", **kind.save)
    names = load_file(folder / "adapter" / WEIGHTS).keys()
    for expression in kind.keys:
        assert any(re.search(expression, name) for name in names), f"no {expression} in {sorted(names)}"
    return live


def unload(live: PeftModel, kind: Kind) -> dict[str, Tensor]:
    """PEFT's own merge, in place. It forgets that training parted tied weights: those are parted first."""
    if kind.parted:
        _untie(live)
    merged: dict[str, Tensor] = live.merge_and_unload().state_dict()
    return merged


def _untie(model: nn.Module) -> None:
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            elif parameter is not None:
                seen.add(id(parameter))


@pytest.mark.parametrize("kind", _cases())
def test_out_computes_what_the_live_model_computed(kind: Kind, tmp_path: Path) -> None:
    """float32: the same logits, and the weights of PEFT's own merge."""
    live = make(kind, tmp_path)
    trained = kinds.trained_logits(live)
    if kind.refused:
        refused(tmp_path, kind.refused)
        return
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    out = kinds.load(tmp_path / "out")
    assert (tiny.logits(out) - trained).abs().max() <= LOGITS_BOUND
    before = tiny.logits(kinds.load(tmp_path / "base"))
    shared = min(before.shape[-1], trained.shape[-1])
    assert kind.resize or (before[..., :shared] - trained[..., :shared]).abs().max() >= TRAINED
    if kind.parted:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    wanted, found = unload(live, kind), out.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.shape == found[name].shape, name
        assert (tensor - found[name]).abs().max() <= FLOAT32_BOUND * tensor.abs().max(), name


def _unsaid(config: dict[str, Any], field: str) -> None:
    """Leaves a field of a config to the defaults of its classes."""
    config.pop(field, None)
    for part in config.values():
        if isinstance(part, dict):
            _unsaid(part, field)


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma"])
@pytest.mark.parametrize("at_the_top", [False, True])
def test_a_trained_head_of_a_base_that_is_tied_by_default_is_found_again(
    model_type: str, at_the_top: bool, tmp_path: Path
) -> None:
    """transformers 5 asks the whole config whether a head is tied, 4 the text model's part of it."""
    config = tiny.config(model_type)
    for part in (config, config.text_config):
        part.tie_word_embeddings = True
    cls = tiny.model_class(model_type)
    assert cls is not None
    model = cls(config)
    tiny.fill(model, 0)
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    saved = tmp_path / "base" / "config.json"
    said = json.loads(saved.read_text())
    _unsaid(said, "tie_word_embeddings")
    saved.write_text(json.dumps({**said, "tie_word_embeddings": True} if at_the_top else said))
    live = get_peft_model(
        tiny.load(tmp_path / "base", cls),
        LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"]),
    )
    tiny.fill(live.get_output_embeddings().modules_to_save, 1)
    live.save_pretrained(tmp_path / "adapter")
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out = tiny.load(tmp_path / "out", cls)
    trained = tiny.logits(live.eval())
    assert (tiny.logits(out) - trained).abs().max() <= LOGITS_BOUND
    assert (tiny.logits(tiny.load(tmp_path / "base", cls)) - trained).abs().max() >= TRAINED


@pytest.mark.parametrize("kind", _cases(merged_only=True))
def test_bfloat16_is_bit_identical_with_rounding_peft(kind: Kind, tmp_path: Path) -> None:
    live = make(kind, tmp_path, torch.bfloat16)
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="peft", verify=True)
    found = kinds.load(tmp_path / "out", torch.bfloat16).state_dict()
    assert_rounded_alike(found, unload(live, kind))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_initialisation_is_an_ordinary_lora(init: str, rslora: bool, tmp_path: Path) -> None:
    """path_initial_model_for_weight_conversion: rank 2r over the base on disk, not the live one."""
    base = kinds.build(LLAMA)
    base.save_pretrained(tmp_path / "base")
    live = _initialised(kinds.load(tmp_path / "base"), init, rslora=rslora)
    assert not torch.equal(live.state_dict()[BASE_WEIGHT], base.state_dict()[LIVE_WEIGHT])
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "initial")
    live.peft_config["default"].init_lora_weights = init
    kinds.train(live)
    live.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out = tiny.logits(kinds.load(tmp_path / "out"))
    assert (out - tiny.logits(live)).abs().max() <= LOGITS_BOUND
    assert (out - tiny.logits(base)).abs().max() >= TRAINED


LLAMA = Kind("Llama", "llama", {"target_modules": ["q_proj", "up_proj"]}, (r"q_proj\.lora_A",), config=UNTIED)
GPT_OSS = next(kind for kind in KINDS if kind.name == "LoRA on fused experts")
LIVE_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
BASE_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def _initialised(model: nn.Module, init: Any, *, rslora: bool = False) -> PeftModel:
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"], init_lora_weights=init, use_rslora=rslora
    )
    live = get_peft_model(model, config)
    assert isinstance(live, PeftModel)
    return live.eval()


def refused(folder: Path, code: str, match: str = "") -> None:
    """The merge of folder/base and folder/adapter is refused with this code, and nothing is beside them."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(loudmerge.MergeRefused, match=match) as refusal:
        loudmerge.merge(folder / "base", folder / "adapter", folder / "out")
    assert refusal.value.code == code, str(refusal.value)
    assert str(refusal.value).startswith(f"{code}: ")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changed_the_base_is_refused(init: str, tmp_path: Path) -> None:
    """Saved without conversion, the adapter belongs to a base that is nowhere on disk."""
    kinds.build(LLAMA).save_pretrained(tmp_path / "base")
    live = _initialised(kinds.load(tmp_path / "base"), init)
    kinds.train(live)
    live.save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "unsupported-adapter", "init_lora_weights")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_such_an_adapter_that_says_true_is_for_the_base_that_was_trained_on(
    init: str, tmp_path: Path
) -> None:
    """As LLaMA-Factory saves pissa_backup: by init_lora_weights it would be an ordinary LoRA of any base."""
    kinds.build(LLAMA).save_pretrained(tmp_path / "base")
    live = _initialised(kinds.load(tmp_path / "base"), init)
    before = tiny.logits(live)
    with torch.no_grad():
        for seed, factor in enumerate(part for part in live.parameters() if part.requires_grad):
            noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed))
            factor.add_(noise * factor.std() * 0.2)  # as training moves it: not anew, as `kinds.train`
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "unsupported-adapter", "holds a part of the weight itself")
    trained = tiny.logits(live)
    assert (trained - before).abs().max() >= TRAINED
    live.unload().save_pretrained(tmp_path / "trained on")
    loudmerge.merge(tmp_path / "trained on", tmp_path / "adapter", tmp_path / "out")
    assert (tiny.logits(kinds.load(tmp_path / "out")) - trained).abs().max() <= LOGITS_BOUND


CRAFTED: dict[str, Any] = {
    "init_lora_weights": ["corda", "loftq", "lora_ga", "anything"],
    "use_qalora": [True],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2}],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 1e-4}],
    "monteclora_config": [{"samples": 2}],
    "alora_invocation_tokens": [[1, 2]],
    "field_of_tomorrow": [3],
    "peft_type": ["lora", None],
}
"""Fields of adapter_config.json that make it another function, or that need what is not installed here."""


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in CRAFTED for value in CRAFTED[field]]
)
def test_a_config_that_is_not_plain_lora_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    make(LLAMA, tmp_path)
    edit(tmp_path / "adapter", **{field: value})
    refused(tmp_path, "unsupported-adapter", field)


def edit(adapter: Path, **fields: Any) -> None:
    """Changes fields of adapter_config.json."""
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **fields}))


OTHER_TYPES = sorted(
    str(getattr(kind, "value", kind))
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    if getattr(kind, "value", kind) != "LORA"
)


@pytest.mark.parametrize("peft_type", OTHER_TYPES)
def test_every_other_peft_type_is_refused(peft_type: str, tmp_path: Path) -> None:
    """All that the installed PEFT has: the config it writes for the type, over LoRA's tensors."""
    make(LLAMA, tmp_path)
    edit(tmp_path / "adapter", peft_type=peft_type)
    refused(tmp_path, "unsupported-adapter", peft_type)


MADE: dict[str, Callable[[], Any]] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[3]
    ),
    "aLoRA": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]
    ),
    "replicated layers": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_an_adapter_of_another_function_is_refused(name: str, tmp_path: Path) -> None:
    """Made and saved by PEFT."""
    if name == "aLoRA" and kinds.PEFT < (0, 18):
        pytest.skip(f"peft {peft.__version__} has no aLoRA")
    kinds.build(LLAMA).save_pretrained(tmp_path / "base")
    live = get_peft_model(kinds.load(tmp_path / "base"), MADE[name]())
    kinds.train(live)
    live.save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "unsupported-adapter")


def test_dora_on_fused_experts_is_refused(tmp_path: Path) -> None:
    """PEFT cannot make it; a file that says so is not believed."""
    make(GPT_OSS, tmp_path)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[name].shape[0])
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    edit(tmp_path / "adapter", use_dora=True)
    refused(tmp_path, "unsupported-adapter", "DoRA or a LoRA bias on fused experts")


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    make(
        Kind(
            "DoRA on the embedding",
            "llama",
            {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            (r"embed_tokens\.lora_magnitude_vector",),
            config=UNTIED,
        ),
        tmp_path,
    )
    refused(tmp_path, "unsupported-adapter", "DoRA on an embedding")


def test_a_lora_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    """PEFT merges it into a new bias, which no file of this model could hold."""
    make(
        Kind(
            "bias",
            "llama",
            {"target_modules": ["q_proj"], "lora_bias": True},
            (r"lora_B\.bias",),
            config=UNTIED,
        ),
        tmp_path,
    )
    refused(tmp_path, "missing-base-tensor", "a LoRA bias")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    live = make(LLAMA, tmp_path)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    live.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    refused(tmp_path, "unsafe-file")


def named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def test_a_second_copy_that_differs_is_refused(tmp_path: Path) -> None:
    """With a resized vocabulary PEFT saves a module to save three times."""
    make(named("resized vocabulary and modules_to_save"), tmp_path)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    tensors["base_model.model.lm_head.modules_to_save.weight"][7, 3] += 0.5
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    refused(tmp_path, "unconsumed-adapter-tensor", "lm_head")


@pytest.mark.parametrize("kind", ["bias all", "bias all on Conv1D"])
def test_a_trained_bias_that_the_file_lacks_is_missed(kind: str, tmp_path: Path) -> None:
    make(named(kind), tmp_path)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[
        next(name for name in sorted(tensors) if re.search(r"(q_proj|c_attn)\.(base_layer\.)?bias$", name))
    ]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    refused(tmp_path, "missing-adapter-tensor", "bias")
