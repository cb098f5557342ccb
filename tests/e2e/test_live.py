"""`save_pretrained_merged`: what a live PeftModel computes is in OUT, and the model is left as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import loudmerge
from tests.support import kinds, tiny
from tests.support.kinds import UNTIED, Kind
from tests.support.kinds_linear import LINEAR
from tests.support.kinds_vocabulary import VOCABULARY

pytestmark = pytest.mark.filterwarnings("default")

LOGITS_BOUND = 1e-5
TRAINED = 100 * LOGITS_BOUND

UNKNOWN = "?"
NAMED = {kind.name: kind for kind in (*LINEAR, *VOCABULARY)}
LLAMA = Kind("Llama", "llama", {"target_modules": ["q_proj", "down_proj"]}, (), config=UNTIED)
LIVE = (
    *("experts, router, shared expert and attention", "patterns under rslora", "LoRA on fused experts"),
    *("DoRA", "DoRA on Conv1D", "LoRA biases", "bias lora_only", "bias all", "all-linear"),
    *("modules_to_save: head, embedding, norm", "modules_to_save: router"),
    *("modules_to_save: head and embedding, tied", "modules_to_save: embedding, tied"),
    *("token indices, list", "token indices of embedding and head", "token indices, dict, tied"),
    *("LoRA on embedding and head", "LoRA on the embedding, tied", "LoRA on the head, tied"),
    *("resized vocabulary", "resized vocabulary, tied", "resized vocabulary and LoRA on both"),
    *("resized vocabulary and modules_to_save", "resized vocabulary and token indices"),
    *("ensure_weight_tying, modules_to_save", "ensure_weight_tying, LoRA on the embedding"),
)


def live_model(kind: Kind = LLAMA, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A live model whose base was never on disk."""
    return kinds.attach(kinds.build(kind, dtype), kind)


def snapshot(model: PeftModel) -> dict[str, Any]:
    """Everything about a live model that saving it must not change."""
    base = model.get_base_model()
    return {
        "modules": {
            name: (
                type(module),
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                getattr(module, "active_adapters", None),
                getattr(module, "merged_adapters", None),
            )
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (id(parameter), parameter.requires_grad, parameter.device, parameter.dtype)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "configs": (id(base.config), base.config.to_dict(), id(base.generation_config)),
        "generation": base.generation_config.to_dict(),
        "adapters": {name: (id(found), found.to_dict()) for name, found in model.peft_config.items()},
        "active": list(model.active_adapters),
        "threads": torch.get_num_threads(),
    }


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_logits(out: Path, wanted: Tensor) -> None:
    assert (tiny.logits(kinds.load(out)) - wanted).abs().max() <= LOGITS_BOUND


@pytest.mark.parametrize("name", LIVE)
def test_out_computes_what_the_live_model_computes_and_the_model_is_unchanged(
    name: str, tmp_path: Path
) -> None:
    kind = NAMED[name]
    if kind.why_not():
        pytest.skip(kind.why_not())
    model = live_model(kind)
    wanted = kinds.trained_logits(model)
    with model.disable_adapter():
        assert "bias" in name or (tiny.logits(model) - wanted).abs().max() >= TRAINED
    before, held = snapshot(model), weights(model)
    report = loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert report.status == "merged"
    assert_logits(tmp_path / "out", wanted)
    assert snapshot(model) == before
    now = model.state_dict()
    assert now.keys() == held.keys()
    assert all(torch.equal(tensor, now[key]) for key, tensor in held.items())
    assert torch.equal(tiny.logits(model), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_in_training_stays_in_training(tmp_path: Path) -> None:
    model = live_model()
    wanted = tiny.logits(model)
    model.train()
    before = snapshot(model)
    calls = []
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert calls == []
    handle.remove()
    assert snapshot(model) == before
    assert_logits(tmp_path / "out", wanted)


def test_bfloat16_is_what_peft_merges(tmp_path: Path) -> None:
    model = live_model(NAMED["experts, router, shared expert and attention"], torch.bfloat16)
    loudmerge.save_pretrained_merged(model, tmp_path / "out", rounding="peft")
    found = kinds.load(tmp_path / "out", torch.bfloat16).state_dict()
    wanted = model.merge_and_unload().state_dict()
    assert wanted.keys() == found.keys()
    differing = sum(int((tensor != found[name]).sum()) for name, tensor in wanted.items())
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in wanted.values())


def a_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate([UNKNOWN, "a", "mixture", "of", "experts"])}
    inner = Tokenizer(WordLevel(words, UNKNOWN))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=UNKNOWN)


@pytest.mark.parametrize("active", ["default", "second"])
def test_of_two_adapters_the_active_one_is_merged(active: str, tmp_path: Path) -> None:
    kind = Kind(
        "two", "qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, (), config=UNTIED
    )
    model = live_model(kind)
    model.add_adapter(
        "second", LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"], modules_to_save=["norm"])
    )
    model.set_adapter("second")
    kinds.train(model, seed=1)
    model.set_adapter(active)
    model.eval()
    wanted, before = kinds.trained_logits(model), snapshot(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)
    assert snapshot(model) == before
    model.set_adapter("second" if active == "default" else "default")
    assert (tiny.logits(model) - wanted).abs().max() >= TRAINED


def test_tokenizer_and_generation_config_are_in_out(tmp_path: Path) -> None:
    model = live_model()
    model.get_base_model().generation_config.max_new_tokens = 7
    loudmerge.save_pretrained_merged(model, tmp_path / "out", a_tokenizer())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a mixture of experts")["input_ids"] == [1, 2, 3, 4]


def from_disk(folder: Path, dtype: torch.dtype = torch.float32, kind: Kind = LLAMA) -> PeftModel:
    """A live model whose base lies in folder/base: in shards, with a tensor and files that no class knows."""
    base = folder / "base"
    kinds.build(kind).save_pretrained(base, max_shard_size="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    first = base / min(index["weight_map"].values())
    save_file({**load_file(first), "mtp.weight": torch.full((3,), 5.0)}, first, metadata={"format": "pt"})
    index["weight_map"]["mtp.weight"] = first.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "modeling_custom.py").write_text("# code\n")
    (base / "tokenizer.json").write_text("{}")
    (base / "merges.txt").write_text("a b")
    loaded = type(kinds.build(kind)).from_pretrained(base, dtype=dtype)
    return kinds.attach(loaded, kind)


def shards(folder: Path) -> dict[str, list[str]]:
    return {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def test_an_unchanged_checkpoint_on_disk_keeps_its_shards_and_what_no_class_knows(tmp_path: Path) -> None:
    model = from_disk(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model.peft_config["default"].base_model_name_or_path = None
    wanted, kept = tiny.logits(model), snapshot(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert snapshot(model) == kept
    assert shards(tmp_path / "out") == shards(tmp_path / "base")
    assert len(shards(tmp_path / "out")) > 2
    assert {"modeling_custom.py", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    found = type(model.get_base_model()).from_pretrained(tmp_path / "out").eval()
    assert (tiny.logits(found) - wanted).abs().max() <= LOGITS_BOUND
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_a_tokenizer_that_is_given_takes_the_place_of_that_on_disk(tmp_path: Path) -> None:
    """And is not written into the base's directory."""
    model = from_disk(tmp_path)
    loudmerge.save_pretrained_merged(model, tmp_path / "out", a_tokenizer())
    assert (tmp_path / "base" / "tokenizer.json").read_text() == "{}"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [1]
    assert (tmp_path / "out" / "modeling_custom.py").is_file()
    assert not (tmp_path / "out" / "merges.txt").exists()


@pytest.mark.parametrize("change", ["one element", "dtype", "layers", "file is gone"])
def test_what_was_changed_in_memory_is_in_out(change: str, tmp_path: Path) -> None:
    """The checkpoint on disk is not the base any more, so that the memory is written."""
    dtype = torch.bfloat16 if change == "dtype" else torch.float32
    model = from_disk(tmp_path, dtype)
    base = model.get_base_model()
    if change == "one element":
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    elif change == "layers":
        base.model.layers = base.model.layers[:1]
        base.config.num_hidden_layers = 1
    elif change == "file is gone":
        max((tmp_path / "base").glob("*.safetensors")).unlink()
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "mtp.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if change != "dtype":
        assert_logits(tmp_path / "out", wanted)


def unchanged(folder: Path, model: PeftModel, code: str, **options: Any) -> None:
    """Refused with this code; the model, and what lies beside OUT, are as before."""
    before, beside = snapshot(model), sorted(folder.rglob("*"))
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.save_pretrained_merged(model, folder / "out", **options)
    assert refusal.value.code == code, str(refusal.value)
    assert snapshot(model) == before
    assert sorted(folder.rglob("*")) == beside


@pytest.mark.parametrize(("field", "value"), [("is_quantized", True), ("hf_quantizer", object())])
def test_a_quantised_base_is_refused(field: str, value: object, tmp_path: Path) -> None:
    model = live_model()
    setattr(model.get_base_model(), field, value)
    unchanged(tmp_path, model, "unsupported-base")


def test_an_adapter_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = live_model()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = math.nan
    unchanged(tmp_path, model, "non-finite")


def test_an_initialisation_that_changes_the_base_is_refused(tmp_path: Path) -> None:
    """The live base is the residual that the file would need, but the adapter's config does not say which."""
    kind = Kind(
        "PiSSA", "llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, (), config=UNTIED
    )
    unchanged(tmp_path, live_model(kind), "unsupported-adapter")


def test_merged_adapters_are_refused(tmp_path: Path) -> None:
    """The base in memory already holds the update: it would be added twice."""
    model = live_model()
    wanted = tiny.logits(model)
    model.merge_adapter()
    unchanged(tmp_path, model, "unsupported-base")
    model.unmerge_adapter()
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    model = live_model()
    model.get_base_model().lm_head.to("meta")
    unchanged(tmp_path, model, "unsupported-base")


def test_an_existing_out_is_refused_and_replaced_when_asked(tmp_path: Path) -> None:
    model = live_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    unchanged(tmp_path, model, "out-exists")
    loudmerge.save_pretrained_merged(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert_logits(tmp_path / "out", tiny.logits(model))


def test_what_is_no_peft_model_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"LlamaForCausalLM, expected a peft\.PeftModel"):
        loudmerge.save_pretrained_merged(kinds.build(LLAMA), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_disabled_adapters_are_a_value_error(tmp_path: Path) -> None:
    model = live_model()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_active_adapters_are_a_value_error(tmp_path: Path) -> None:
    model = live_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\], expected exactly one"):
        loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
