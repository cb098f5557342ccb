"""`save_pretrained_merged`: what a live PeftModel computes is in OUT, and the model is left as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import loudmerge
from loudmerge.merging.live import base_state_dict
from loudmerge.merging.wrappers import unwrapped, wrappers
from tests.support import kinds, tiny
from tests.support.kinds import UNTIED, Kind
from tests.support.kinds_linear import LINEAR
from tests.support.kinds_vocabulary import VOCABULARY
from tests.support.live import (
    LLAMA,
    LOGITS_BOUND,
    TRAINED,
    assert_logits,
    live_model,
    snapshot,
    unchanged,
)

pytestmark = pytest.mark.filterwarnings("default")

UNKNOWN = "?"
NAMED = {kind.name: kind for kind in (*LINEAR, *VOCABULARY)}
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


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_class_whose_initialisation_sets_the_data_of_its_weights_is_merged(tmp_path: Path) -> None:
    """GraniteMoeHybrid's A_log in transformers 4."""
    kind = Kind("mamba", "granitemoehybrid", {"target_modules": ["q_proj", "in_proj"]}, ())
    model = live_model(kind)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", kinds.trained_logits(model))


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


GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
WAYS = (
    *(("qwen3_vl_moe", leaves) for leaves in ((GATE_UP,), (DOWN,), (GATE_UP, DOWN))),
    *((family, (GATE_UP, DOWN)) for family in ("aria", "gpt_oss", "llama4_text")),
)


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize(
    ("family", "leaves"), WAYS, ids=[f"{family} {' '.join(leaves)}" for family, leaves in WAYS]
)
def test_experts_that_are_on_disk_otherwise_than_in_memory_are_saved(
    family: str, leaves: tuple[str, ...], loaded: bool, tmp_path: Path
) -> None:
    """transformers looks up how the model has qwen3_vl_moe's: PEFT's wrapper has them under no such name."""
    if family not in tiny.BUILDABLE:
        pytest.skip(f"transformers has no {family}")
    kind = Kind(family, family, {"target_parameters": list(leaves)}, ())
    base = kinds.build(kind)
    names = [name for name, _ in base.named_parameters()]
    if not all(any(name.endswith(leaf) for name in names) for leaf in leaves):
        pytest.skip(f"transformers {transformers.__version__} has {family}'s experts under other names")
    if loaded:
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model = kinds.attach(base, kind)
    wanted, before = kinds.trained_logits(model), snapshot(model)
    with model.disable_adapter():
        assert (tiny.logits(model) - wanted).abs().max() >= TRAINED
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert snapshot(model) == before
    found = type(base).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (tiny.logits(found) - wanted).abs().max() <= LOGITS_BOUND


@pytest.mark.parametrize("name", LIVE)
def test_unwrapped_a_base_has_its_own_tensors_and_none_of_pefts(name: str) -> None:
    kind = NAMED[name]
    if kind.why_not():
        pytest.skip(kind.why_not())
    base = live_model(kind).get_base_model()
    bare = unwrapped(base)
    assert type(bare) is type(base)
    assert not list(wrappers(bare))
    wanted = {key: tensor.data_ptr() for key, tensor in base_state_dict(base).items()}
    assert {key: tensor.data_ptr() for key, tensor in bare.state_dict().items()} == wanted


def test_the_base_is_as_it_was_while_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may use it."""
    model = live_model(NAMED["experts, router, shared expert and attention"])
    cls, before, during = type(model.get_base_model()), snapshot(model), []

    def save(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        PreTrainedModel.save_pretrained(self, *args, **options)
        during.append(snapshot(model))

    monkeypatch.setattr(cls, "save_pretrained", save)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert during == [before]


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
    assert inputs_named(tmp_path) == ("the live model's base", "the live model's adapter 'default'")
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
    assert inputs_named(tmp_path) == (str(tmp_path / "base"), "the live model's adapter 'default'")
    model.save_pretrained(tmp_path / "adapter")
    assert loudmerge.verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter").ok


def inputs_named(folder: Path) -> tuple[str, str]:
    """What the report of OUT says that was merged. No temporary folder is named anywhere in it."""
    text = (folder / "out" / "merge_report.json").read_text()
    assert ".live-" not in text
    document = json.loads(text)
    return document["base"]["path"], document["adapter"]["path"]


def test_a_tokenizer_that_is_given_takes_the_place_of_that_on_disk(tmp_path: Path) -> None:
    """And is not written into the base's directory. Beside it, no other tokenizer's file is left."""
    model = from_disk(tmp_path)
    others = ("tekken.json", "source.spm", "bpe.codes", "dict.txt", "additional_chat_templates/x.jinja")
    for name in others:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("x")
    loudmerge.save_pretrained_merged(model, tmp_path / "out", a_tokenizer())
    assert (tmp_path / "base" / "tokenizer.json").read_text() == "{}"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [1]
    assert (tmp_path / "out" / "modeling_custom.py").is_file()
    assert not [name for name in ("merges.txt", *others) if (tmp_path / "out" / name).exists()]


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
    shown = f"the live model's base, loaded from {tmp_path / 'base'}"
    assert inputs_named(tmp_path) == (shown, "the live model's adapter 'default'")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "mtp.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if change != "dtype":
        assert_logits(tmp_path / "out", wanted)


def tie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_head_that_was_tied_in_memory_is_tied_in_out(name: str, tmp_path: Path) -> None:
    """The head that the checkpoint on disk has is not the model's any more."""
    kinds.build(replace(LLAMA, model=name)).save_pretrained(tmp_path / "base")
    base = kinds.load(tmp_path / "base")
    tie(base)
    model = kinds.attach(base, Kind(name, name, {"target_modules": ["q_proj"]}, ()))
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_head_that_is_the_tied_embedding_stays_on_disk(tmp_path: Path) -> None:
    tied = replace(LLAMA, config=kinds.TIED)
    kinds.build(tied).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    held = load_file(file)
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    model = kinds.attach(kinds.load(tmp_path / "base"), tied)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "base")
    assert_logits(tmp_path / "out", tiny.logits(model))


@pytest.mark.parametrize("gone", ["model.layers.1.", "lm_head."])
def test_what_was_taken_out_of_the_model_does_not_come_back_from_disk(gone: str, tmp_path: Path) -> None:
    """Though its config is as it was."""
    model = from_disk(tmp_path)
    base = model.get_base_model()
    if gone == "lm_head.":
        base.lm_head = nn.Identity()
    else:
        base.model.layers = base.model.layers[:1]
    report = loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert report.notes[0].startswith(f"the live model has no {gone}")
    assert report.notes[0].endswith("what loads OUT makes them up")
    assert not any(key.startswith(gone) for keys in shards(tmp_path / "out").values() for key in keys)
    assert inputs_named(tmp_path)[0].startswith("the live model's base")


class OfMoreThanAConfig(LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: LlamaConfig, more: int) -> None:
        super().__init__(config)
        self.more = more


def test_a_class_that_is_made_of_more_than_a_config_is_written_from_memory(tmp_path: Path) -> None:
    kinds.build(LLAMA).save_pretrained(tmp_path / "base")
    model = kinds.attach(OfMoreThanAConfig.from_pretrained(tmp_path / "base", more=1).eval(), LLAMA)
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert inputs_named(tmp_path)[0].startswith("the live model's base")
    assert_logits(tmp_path / "out", wanted)


def test_a_config_that_has_numbers_for_names_is_compared(tmp_path: Path) -> None:
    """Aria's projector_patch_to_query_dict."""
    aria = tiny.build("aria")
    aria.save_pretrained(tmp_path / "base")
    base = type(aria).from_pretrained(tmp_path / "base").eval()
    model = kinds.attach(base, Kind("aria", "aria", {"target_modules": ["q_proj"]}, ()))
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert inputs_named(tmp_path)[0] == str(tmp_path / "base")
    found = type(aria).from_pretrained(tmp_path / "out").eval()
    assert (tiny.logits(found) - wanted).abs().max() <= LOGITS_BOUND


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


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialisation_that_changes_the_base_is_merged_into_the_changed_one(
    initialisation: str, tmp_path: Path
) -> None:
    """In a file nobody could say which base it belongs to. The base in memory is the one."""
    options = {"target_modules": ["q_proj"], "init_lora_weights": initialisation}
    kind = Kind(initialisation, "llama", options, (), config=UNTIED)
    base = kinds.build(kind)
    base.save_pretrained(tmp_path / "base")
    model = kinds.attach(type(base).from_pretrained(tmp_path / "base", dtype=torch.float32), kind)
    wanted, before = kinds.trained_logits(model), snapshot(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert snapshot(model) == before
    assert_logits(tmp_path / "out", wanted)
    assert (tiny.logits(base) - wanted).abs().max() >= TRAINED
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(loudmerge.MergeRefused, match=f"found '{initialisation}'"):
        loudmerge.plan(tmp_path / "base", tmp_path / "adapter")


def test_an_initialisation_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """It may make the adapter another function."""
    model = live_model()
    model.peft_config["default"].init_lora_weights = "of tomorrow"
    assert "init_lora_weights" in unchanged(tmp_path, model, "unsupported-adapter")


def test_a_model_within_another_is_refused(tmp_path: Path) -> None:
    inner = live_model()
    outer = get_peft_model(inner, LoraConfig(target_modules=["v_proj"]), adapter_name="outer")
    found = unchanged(tmp_path, outer, "unsupported-base")
    assert "found a PeftModel within another, expected one around the model itself" in found


def test_merged_adapters_are_refused(tmp_path: Path) -> None:
    """The base in memory already holds the update: it would be added twice."""
    model = live_model()
    wanted = tiny.logits(model)
    model.merge_adapter()
    unchanged(tmp_path, model, "unsupported-base")
    model.unmerge_adapter()
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)


def test_a_refusal_leaves_no_parents_of_out(tmp_path: Path) -> None:
    model = live_model()
    model.merge_adapter()
    with pytest.raises(loudmerge.MergeRefused):
        loudmerge.save_pretrained_merged(model, tmp_path / "a" / "b" / "out")
    model.unmerge_adapter()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with pytest.raises(loudmerge.MergeRefused, match="non-finite"):
        loudmerge.save_pretrained_merged(model, tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    model = live_model()
    model.get_base_model().lm_head.to("meta")
    unchanged(tmp_path, model, "unsupported-base")


@pytest.mark.parametrize("part", ["model", "layers"])
def test_modules_that_were_compiled_are_refused_unless_in_place(part: str, tmp_path: Path) -> None:
    """Their names, with _orig_mod, would be in no checkpoint."""
    model = live_model()
    wanted = tiny.logits(model)
    base = model.get_base_model()
    decoder = base.model
    if part == "model":
        base.model = torch.compile(decoder)
    else:
        decoder.layers[1] = torch.compile(decoder.layers[1])
    assert "model.compile()" in unchanged(tmp_path, model, "unsupported-base")
    base.model = decoder
    if part == "layers":
        decoder.layers[1] = decoder.layers[1]._orig_mod
    decoder.layers[0].compile()
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": True}, ValueError, "resume is True, expected False: a live model is written anew"),
        ({"named": ("a", "b")}, TypeError, "save_pretrained_merged.. has no option 'named'"),
        ({"base": "b"}, TypeError, "has no option 'base'"),
        ({"dtypes": "bfloat16"}, TypeError, "has no option 'dtypes'"),
    ],
)
def test_an_option_that_there_is_not_is_an_error_before_anything_is_written(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = live_model()
    monkeypatch.setattr(model, "save_pretrained", None)
    with pytest.raises(error, match=message):
        loudmerge.save_pretrained_merged(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_options_of_merge_may_be_given_as_they_are_by_default(tmp_path: Path) -> None:
    loudmerge.save_pretrained_merged(live_model(), tmp_path / "out", resume=False, verify=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_out_may_have_any_name_that_a_file_may_have(tmp_path: Path) -> None:
    loudmerge.save_pretrained_merged(live_model(), tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_the_checkpoint_that_the_model_was_loaded_from_is_not_replaced(tmp_path: Path) -> None:
    model = from_disk(tmp_path)
    (tmp_path / "base").rename(tmp_path / "out")
    model.get_base_model().name_or_path = str(tmp_path / "out")
    message = unchanged(tmp_path, model, "out-exists", overwrite=True)
    assert f"found {tmp_path / 'out'}/" in message
    assert ".live-" not in message


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


# --- what was set on the live model --------------------------------------------------------------------


def lora_layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def set_scale(model: PeftModel) -> None:
    for layer in lora_layers(model):
        layer.set_scale("default", 0.25)


def scale_layer(model: PeftModel) -> None:
    for layer in lora_layers(model):
        layer.scale_layer(0.5)


def scale_each_otherwise(model: PeftModel) -> None:
    for number, layer in enumerate(lora_layers(model)):
        layer.scaling["default"] = -0.7 * number


def change_the_config(model: PeftModel) -> None:
    """The layers keep what they were made with."""
    model.peft_config["default"].lora_alpha = 100
    model.peft_config["default"].alpha_pattern = {"q_proj": 3}


@pytest.mark.parametrize("name", ["Llama", "patterns under rslora", "LoRA on fused experts", "DoRA"])
@pytest.mark.parametrize("change", [set_scale, scale_layer, scale_each_otherwise, change_the_config])
def test_the_scaling_of_the_live_layers_is_what_is_merged(
    change: Callable[[PeftModel], None], name: str, tmp_path: Path
) -> None:
    kind = {**NAMED, LLAMA.name: LLAMA}[name]
    if kind.why_not():
        pytest.skip(kind.why_not())
    model = live_model(kind)
    first = tiny.logits(model)
    change(model)
    wanted, before = kinds.trained_logits(model), snapshot(model)
    assert change is change_the_config or (wanted - first).abs().max() >= TRAINED
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert snapshot(model) == before
    assert_logits(tmp_path / "out", wanted)


def test_inside_rescale_adapter_scale_the_rescaled_adapter_is_merged(tmp_path: Path) -> None:
    model = live_model()
    with rescale_adapter_scale(model, 0.5):
        wanted = tiny.logits(model)
        loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert (tiny.logits(model) - wanted).abs().max() >= TRAINED
    assert_logits(tmp_path / "out", wanted)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_of_the_keys_of_a_pattern_the_one_that_the_model_was_made_with_counts(
    field: str, tmp_path: Path
) -> None:
    """PEFT saves the keys sorted, so that ".*" comes before the one that was first."""
    lora = {"target_modules": ["q_proj", "down_proj"], field: {"self_attn.q_proj": 3, ".*": 1}}
    model = live_model(Kind("overlapping", "llama", lora, (), config=UNTIED))
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)


QUERY = "model.layers.0.self_attn.q_proj"


def with_a_second_adapter() -> PeftModel:
    model = live_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model


@pytest.mark.parametrize(
    ("module", "active", "message"),
    [
        (QUERY, ["second"], "found ['second'] active, expected 'default' active, as in the model."),
        (QUERY, ["default", "second"], "found ['default', 'second'] active, expected 'default' active"),
        (QUERY, [], "found [] active, expected 'default' active"),
        (QUERY.replace("q_", "v_"), ["second"], "found ['second'] active, expected none of them active"),
    ],
)
def test_a_module_whose_active_adapter_is_not_the_models_is_refused(
    module: str, active: list[str], message: str, tmp_path: Path
) -> None:
    model = with_a_second_adapter()
    model.get_base_model().get_submodule(module).set_adapter(active)
    found = unchanged(tmp_path, model, "unsupported-adapter")
    assert f"unsupported-adapter: {module} of the live model: {message}" in found
    assert "Call set_adapter('default') and enable_adapter_layers on the model first." in found
    model.set_adapter("default")
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", tiny.logits(model))


@pytest.mark.parametrize(
    ("module", "lora"),
    [
        (QUERY, {}),
        ("lm_head", {"modules_to_save": ["lm_head"]}),
        ("model.embed_tokens", {"trainable_token_indices": [4, 5]}),
    ],
)
def test_one_module_whose_adapters_are_disabled_is_refused(
    module: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    kind = Kind("disabled", "llama", {"target_modules": ["q_proj"], **lora}, (), config=UNTIED)
    model = live_model(kind)
    model.get_base_model().get_submodule(module).enable_adapters(False)
    found = unchanged(tmp_path, model, "unsupported-adapter")
    assert f"{module} of the live model: found its adapters disabled, expected 'default' active" in found
