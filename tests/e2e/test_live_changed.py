"""`save_pretrained_merged` of a model that is not as its class makes it: right in OUT, or refused.

The oracle is the live model itself: its logits, and those of the class that transformers loads from OUT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

import loudmerge
from tests.support import kinds, tiny
from tests.support.kinds import TIED, UNTIED, Kind, Options
from tests.support.live import LLAMA, LOGITS_BOUND, TRAINED, assert_logits, live_model, unchanged

pytestmark = pytest.mark.filterwarnings("default")

QUERY: dict[str, Any] = {"target_modules": ["q_proj"]}


def changed(change: Callable[[Any], object], lora: dict[str, Any], config: Options = UNTIED) -> PeftModel:
    """A live Llama whose base was changed before PEFT wrapped it."""
    kind = Kind("changed", "llama", lora, (), config=config)
    base = kinds.build(kind)
    change(base)
    return kinds.attach(base, kind)


def merged(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """Merges, compares OUT with the live model, and returns OUT's tensors."""
    wanted = kinds.trained_logits(model)
    with model.disable_adapter():
        assert (tiny.logits(model) - wanted).abs().max() >= TRAINED
    loudmerge.save_pretrained_merged(model, folder / "out")
    assert_logits(folder / "out", wanted)
    return load_file(folder / "out" / "model.safetensors")


# --- weights that share memory -------------------------------------------------------------------------


def say_untied(base: PreTrainedModel) -> None:
    base.config.tie_word_embeddings = False


def tie_in_memory(base: Any) -> None:
    base.lm_head.weight = base.model.embed_tokens.weight


@pytest.mark.parametrize(("change", "config"), [(say_untied, TIED), (tie_in_memory, UNTIED)])
@pytest.mark.parametrize(
    "lora",
    [
        QUERY,
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {**QUERY, "modules_to_save": ["lm_head"]},
        {**QUERY, "modules_to_save": ["embed_tokens"]},
        {**QUERY, "trainable_token_indices": [3, 7, 8]},
    ],
    ids=str,
)
def test_a_head_that_only_the_memory_ties_is_in_out(
    lora: dict[str, Any], change: Callable[[Any], None], config: Options, tmp_path: Path
) -> None:
    """transformers would leave it out of the file, and draw a new one when it loads OUT."""
    assert "lm_head.weight" in merged(changed(change, lora, config), tmp_path)


def test_a_head_that_the_config_ties_is_not_copied(tmp_path: Path) -> None:
    assert "lm_head.weight" not in merged(changed(lambda _: None, QUERY, TIED), tmp_path)


def share_between_layers(base: Any) -> None:
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight


def share_a_module(base: Any) -> None:
    base.model.layers[1].mlp = base.model.layers[0].mlp


def views_of_one_storage(base: Any) -> None:
    attention = base.model.layers[0].self_attn
    both = torch.stack([attention.k_proj.weight, attention.o_proj.weight.detach()], dim=2).detach()
    attention.k_proj.weight, attention.o_proj.weight = (nn.Parameter(both[..., at]) for at in (0, 1))


@pytest.mark.parametrize(
    ("change", "target"),
    [
        *((share_between_layers, target) for target in ("q_proj", "up_proj")),
        (share_a_module, "q_proj"),
        *((views_of_one_storage, target) for target in ("q_proj", "k_proj")),
    ],
)
def test_what_shares_memory_is_saved_under_each_name(
    change: Callable[[Any], None], target: str, tmp_path: Path
) -> None:
    model = changed(change, {"target_modules": [target]})
    assert merged(model, tmp_path).keys() == kinds.build(LLAMA).state_dict().keys()


def test_a_lora_that_peft_saves_for_one_of_the_layers_that_share_a_module_is_refused(tmp_path: Path) -> None:
    """Or, where the installed PEFT saves it for each of them, merged."""
    model = changed(share_a_module, {"target_modules": ["up_proj"]})
    held = {key for key in get_peft_model_state_dict(model) if "up_proj" in key}
    if len({key.partition(".layers.")[2].partition(".")[0] for key in held}) > 1:
        merged(model, tmp_path)
    else:
        unchanged(tmp_path, model, "missing-adapter-tensor")


class OfMoreThanAConfig(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: transformers.LlamaConfig, more: int) -> None:
        super().__init__(config)
        self.more = more


@pytest.mark.parametrize(("config", "saved"), [(UNTIED, True), (TIED, False)])
def test_of_a_class_that_nobody_else_can_make_the_config_says_what_is_tied(
    config: dict[str, bool], saved: bool, tmp_path: Path
) -> None:
    kind = Kind("more", "llama", QUERY, (), config=config)
    base = OfMoreThanAConfig(kinds.build(kind).config, more=1)
    tiny.fill(base, 0)
    tie_in_memory(base)
    model = kinds.attach(base.eval(), kind)
    assert ("lm_head.weight" in merged(model, tmp_path)) == saved


def test_what_a_class_does_not_save_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = live_model()
    save = PreTrainedModel.save_pretrained

    def save_less(self: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor]) -> None:
        del state_dict["model.norm.weight"]
        save(self, folder, state_dict=state_dict)

    monkeypatch.setattr(type(model.get_base_model()), "save_pretrained", save_less)
    message = unchanged(tmp_path, model, "unsupported-base")
    count = sum(tensor.numel() for tensor in kinds.build(LLAMA).state_dict().values())
    assert "unsupported-base: model.norm.weight of the live model: found " in message
    assert f"{count - 32} elements in what transformers saved of the model, expected all {count}" in message


# --- tensors that the class has not, and those that only the class has ---------------------------------


def pruned(attention: Any) -> None:
    prune.l1_unstructured(attention.k_proj, "weight", 0.5)  # type: ignore[no-untyped-call]


def pruned_under_lora(attention: Any) -> None:
    prune.l1_unstructured(attention.q_proj, "weight", 0.5)  # type: ignore[no-untyped-call]


def parametrized(attention: Any) -> None:
    parametrizations.weight_norm(attention.k_proj)


def in_a_sequential(attention: Any) -> None:
    attention.k_proj = nn.Sequential(attention.k_proj)


def with_a_bias(attention: Any) -> None:
    attention.k_proj.bias = nn.Parameter(torch.ones(attention.k_proj.out_features))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (pruned, "k_proj.weight_mask, model.layers.0.self_attn.k_proj.weight_orig"),
        (pruned_under_lora, "q_proj.weight_mask, model.layers.0.self_attn.q_proj.weight_orig"),
        (parametrized, "k_proj.parametrizations.weight.original0, model.layers.0.self_attn.k_proj.param"),
        (in_a_sequential, "k_proj.0.weight"),
        (with_a_bias, "k_proj.bias"),
    ],
)
def test_tensors_that_the_class_does_not_have_are_refused(
    change: Callable[[Any], None], names: str, tmp_path: Path
) -> None:
    """What loads OUT would leave them out, and make up the weight that they stand for."""
    model = changed(lambda base: change(base.model.layers[0].self_attn), QUERY)
    message = unchanged(tmp_path, model, "unsupported-base")
    assert message.startswith(f"unsupported-base: model.layers.0.self_attn.{names}")
    assert " of the live model: found what no LlamaForCausalLM of this config has" in message
    assert "torch.nn.utils.prune.remove" in message


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_they_are_refused_in_a_class_that_nobody_else_can_make(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    base = OfMoreThanAConfig(kinds.build(LLAMA).config, more=1)
    change(base.model.layers[0].self_attn)
    message = unchanged(tmp_path, kinds.attach(base, LLAMA), "unsupported-base")
    assert message.startswith("unsupported-base: model.layers.0.self_attn.k_proj.")


def test_another_method_than_lora_is_refused_with_one_word(tmp_path: Path) -> None:
    """Not for its vectors, which are no tensors of the base, nor for its config's fields."""
    model = get_peft_model(kinds.build(LLAMA), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    message = unchanged(tmp_path, model, "unsupported-adapter")
    assert message == (
        "unsupported-adapter: peft_type of the live model: found 'IA3', expected 'LORA'. "
        "Merge other kinds with PEFT's merge_and_unload, where they have one."
    )


def test_a_pruning_that_was_made_permanent_is_merged(tmp_path: Path) -> None:
    def prune_for_good(base: Any) -> None:
        pruned(base.model.layers[0].self_attn)
        prune.remove(base.model.layers[0].self_attn.k_proj, "weight")  # type: ignore[no-untyped-call]

    merged(changed(prune_for_good, QUERY), tmp_path)


def without_norm(base: Any) -> None:
    base.model.norm = nn.Identity()


def without_a_layers_part(base: Any) -> None:
    base.model.layers[1].mlp = nn.Identity()


def with_another_config(base: Any) -> None:
    base.config.attention_bias = True


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (without_norm, "model.norm.weight"),
        (without_a_layers_part, "model.layers.1.mlp.down_proj.weight"),
        (with_another_config, "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_tensors_that_only_the_class_has_are_refused(
    change: Callable[[Any], None], first: str, tmp_path: Path
) -> None:
    message = unchanged(tmp_path, changed(change, QUERY), "unsupported-base")
    assert message.startswith(f"unsupported-base: {first}")
    assert "found none, expected as in every LlamaForCausalLM of this config" in message


def test_a_weight_of_another_size_than_the_config_says_is_refused(tmp_path: Path) -> None:
    """What loads OUT would refuse it."""

    def replaced(base: Any) -> None:
        base.model.embed_tokens = nn.Embedding(120, 32)

    message = unchanged(tmp_path, changed(replaced, QUERY), "unsupported-base")
    assert message.startswith(
        "unsupported-base: model.embed_tokens.weight of the live model: found shape [120"
    )
    assert "as in every LlamaForCausalLM of this config: what loads OUT refuses it" in message


def test_what_no_checkpoint_holds_is_told_in_the_report(tmp_path: Path) -> None:
    """With a hook that changes what it gets, OUT computes otherwise: nobody else would say so."""
    model = changed(lambda base: base.config.update({"rms_norm_eps": 0.1}), QUERY)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    inner = model.get_base_model().model
    inner.layers[0].mlp.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    inner.layers[1].self_attn.q_proj.forward = lambda *_: torch.zeros(1)
    report = loudmerge.save_pretrained_merged(model, tmp_path / "out")
    hooks, forward, numbers = report.notes
    assert hooks == "the live model has forward hooks, which OUT has not: model.layers.0.mlp"
    assert forward.endswith("than its class, which OUT has not: model.layers.1.self_attn.q_proj")
    assert "model.layers.0.input_layernorm.variance_epsilon (1e-06 for 0.1)" in numbers
    assert hooks in report.summary()


@pytest.mark.skipif(
    tiny.model_class("qwen3_moe") is None or transformers.__version__ < "5", reason="no fused experts"
)
def test_experts_that_say_another_number_than_their_weights_have_are_refused(tmp_path: Path) -> None:
    """The live forward goes by the one, what loads OUT by the other."""
    base = tiny.build("qwen3_moe")
    parameters = tiny.expert_parameters(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    experts = next(one for one in base.modules() if type(one).__name__ == "Qwen3MoeExperts")
    experts.num_experts = 3
    message = unchanged(tmp_path, model, "num-experts-mismatch")
    assert message.startswith(
        "num-experts-mismatch: model.layers.0.mlp.experts of the live model: found the expert counts"
    )
    assert "[3, 4]" in message


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_in_torchs_checkpoint_wrapper_are_refused(when: str, tmp_path: Path) -> None:
    """PEFT would save the adapter under names with the wrapper's in them."""

    def wrap(base: Any) -> None:
        base.model.layers[0] = checkpoint_wrapper(base.model.layers[0])

    model = changed(wrap, QUERY) if when == "before" else live_model()
    wanted = tiny.logits(model)
    base = model.get_base_model()
    if when == "after":
        wrap(base)
    assert "_checkpoint_wrapped_module back in its place" in unchanged(tmp_path, model, "unsupported-base")
    base.model.layers[0] = base.model.layers[0]._checkpoint_wrapped_module
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted)


# --- what cannot be saved ------------------------------------------------------------------------------


def test_a_lora_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    model = live_model()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A.to("meta")
    message = unchanged(tmp_path, model, "unsupported-adapter")
    assert (
        "model.layers.0.self_attn.q_proj.lora_A.default.weight of the live model: found a tensor" in message
    )


def test_another_adapters_lora_may_be_on_the_meta_device(tmp_path: Path) -> None:
    model = live_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["second"].to("meta")
    merged(model, tmp_path)


def test_a_model_without_a_generation_config_is_merged(tmp_path: Path) -> None:
    model = live_model()
    model.get_base_model().generation_config = None
    wanted = tiny.logits(model)
    loudmerge.save_pretrained_merged(model, tmp_path / "out")
    assert model.get_base_model().generation_config is None
    assert model.get_base_model().can_generate()
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert_logits(tmp_path / "out", wanted)


def test_a_generation_config_that_transformers_does_not_save_is_refused(tmp_path: Path) -> None:
    model = live_model()
    settings = model.get_base_model().generation_config
    settings.do_sample, settings.temperature = False, 0.5
    message = unchanged(tmp_path, model, "unsupported-base")
    assert "generation_config of the live model: found what transformers does not save: " in message
    assert "temperature" in message
    settings.do_sample = True
    merged(model, tmp_path)


# --- what was trained where forward does not look ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "saved", "inner"),
    [
        ("llama", ["self_attn", "q_proj"], "self_attn.q_proj"),
        ("olmoe", ["self_attn", "norm"], "self_attn.q_norm"),
    ],
)
def test_a_module_to_save_inside_of_another_is_refused(
    name: str, saved: list[str], inner: str, tmp_path: Path
) -> None:
    """PEFT puts its wrapper on the outer one's wrapper, which calls a copy that has none."""
    kind = Kind("nested", name, {"target_modules": ["lm_head"], "modules_to_save": saved}, (), config=UNTIED)
    message = unchanged(tmp_path, live_model(kind), "unsupported-adapter")
    assert (
        f"modules_to_save names model.layers.0.{inner}, and model.layers.0.self_attn: PEFT saves" in message
    )


def encoder_decoder(cls: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"eos_token_id": 14, "pad_token_id": 1, "decoder_start_token_id": 2, "vocab_size": tiny.VOCABULARY}
    if cls.startswith("T5"):
        config: Any = transformers.T5Config(
            d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=2, **ids
        )
    else:
        kind = transformers.MBartConfig if cls.startswith("MBart") else transformers.BartConfig
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        config = kind(d_model=32, max_position_embeddings=40, **sizes, **heads, **ids)
    model: PreTrainedModel = getattr(transformers, cls)(config)
    return model.eval()


def outputs(model: nn.Module, cls: str) -> Tensor:
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        decoder = {"decoder_input_ids": ids} if cls == "T5ForConditionalGeneration" else {}
        found: Tensor = model(input_ids=ids, **decoder)[0]
    return found


def with_rows(cls: str) -> PeftModel:
    target = "q" if cls.startswith("T5") else "q_proj"
    lora = {"target_modules": [target], "trainable_token_indices": {"shared": [4, 5, 7]}}
    return kinds.attach(encoder_decoder(cls), Kind(cls, "", lora, ()))


def assert_same_outputs(model: PeftModel, cls: str, folder: Path) -> None:
    wanted = outputs(model, cls)
    with model.disable_adapter():
        assert (outputs(model, cls) - wanted).abs().max() > 0
    loudmerge.save_pretrained_merged(model, folder / "out")
    found = getattr(transformers, cls).from_pretrained(folder / "out").eval()
    assert (outputs(found, cls) - wanted).abs().max() <= LOGITS_BOUND * wanted.abs().max().clamp(min=1)


ROWS_APART = (
    *("BartForSequenceClassification", "BartForQuestionAnswering", "MBartForSequenceClassification"),
    "T5ForTokenClassification",
)


@pytest.mark.parametrize("cls", ROWS_APART)
def test_token_rows_that_no_forward_reads_are_refused(cls: str, tmp_path: Path) -> None:
    """They lie on `shared`, whose weight the encoder's embedding reads; PEFT ties the rows to heads only."""
    model = with_rows(cls)
    shared = next(key for key, _ in model.named_modules() if key.endswith("shared.token_adapter"))
    layer = model.get_submodule(shared)
    rows = layer.trainable_tokens_delta["default"]
    wanted = outputs(model, cls)
    with torch.no_grad():
        rows.add_(1.0)
    if not torch.equal(outputs(model, cls), wanted):
        pytest.skip("the installed PEFT ties them")
    with pytest.raises(loudmerge.MergeRefused, match="trained token rows of") as refusal:
        loudmerge.save_pretrained_merged(model, tmp_path / "out")
    apart = "encoder.embed_tokens.weight tied to the embedding, in modules without the rows"
    # transformers 4 has no tie here that a class without weights would show; its name is enough.
    assert apart in str(refusal.value) or f"which no forward of {cls} calls" in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cls", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_token_rows_that_peft_ties_are_merged(cls: str, tmp_path: Path) -> None:
    assert_same_outputs(with_rows(cls), cls, tmp_path)
