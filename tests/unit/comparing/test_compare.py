from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn

from loudmerge.comparing import behaviour, models
from loudmerge.comparing.behaviour import Continuation, divergence, make_passages, preference, top1_agreement
from loudmerge.comparing.compare import Comparison, Sample, compare
from loudmerge.errors import EnvironmentFailed, Mismatch

SAME = Sample("p", "x y", "x y", "x y", None)
RIGHT = Comparison(
    out=Path("out"),
    base=Path("base"),
    adapter=Path("adapter"),
    kl_base_trained=0.2,
    kl_base_merged=0.2,
    kl_trained_merged=6e-4,
    kl_rounding=6e-4,
    kl_peft=1e-9,
    kl_bfloat16=2e-3,
    top1_agreement=0.99,
    samples=(SAME, SAME),
    tokens=512,
    text="text",
    stored="bfloat16",
    versions={"torch": "2", "transformers": "5", "peft": "0"},
)
STRICT = [getattr(hub_errors, "StrictDataclassFieldValidationError", None)]
"""What huggingface_hub raises for a field of a config, where it checks them: an Exception, no more."""


SMALL: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "is_decoder": True,
}  # fmt: skip


def test_a_merge_that_differs_by_rounding_is_ok() -> None:
    assert RIGHT.ok
    assert not RIGHT.inconclusive
    assert RIGHT.summary().startswith("ok: out behaves as base + adapter.")


@pytest.mark.parametrize("kl", [0.2, 0.4, 0.01, math.nan, math.inf])
def test_a_merge_without_the_update_or_with_a_wrong_one_is_a_mismatch(kl: float) -> None:
    wrong = replace(RIGHT, kl_trained_merged=kl)
    assert not wrong.ok
    assert wrong.summary().startswith("mismatch: out does not behave as base + adapter")


def test_the_update_that_rounding_mostly_swallowed_is_told_from_a_base_shipped_as_merged() -> None:
    """An upcycled 135M model after 5 steps at 2e-4: base || trained 0.0095, trained || merged 1.3e-3."""
    gentle = replace(RIGHT, kl_base_trained=0.0095, kl_trained_merged=1.3e-3, kl_rounding=1.3e-3)
    assert gentle.ok
    assert not gentle.inconclusive
    assert not replace(gentle, kl_trained_merged=0.0095).ok


def test_an_update_that_rounding_swallowed_is_said_to_be_inconclusive_not_failed() -> None:
    swallowed = replace(RIGHT, kl_base_trained=1e-4, kl_trained_merged=1e-4, kl_rounding=1e-4)
    assert swallowed.ok
    assert swallowed.inconclusive
    assert "bfloat16 rounds so much of this small update away" in swallowed.summary()
    assert "--rounding auto" in swallowed.summary()


def test_an_adapter_that_changes_nothing_is_said_to_be_inconclusive() -> None:
    nothing = replace(RIGHT, kl_base_trained=0.0, kl_trained_merged=0.0, kl_rounding=0.0)
    assert nothing.ok
    assert "the adapter changes next to nothing on this text" in nothing.summary()


def test_in_float32_almost_nothing_is_allowed() -> None:
    exact = replace(RIGHT, kl_base_trained=1e-3, kl_trained_merged=3e-5, kl_rounding=1e-12, stored="float32")
    assert exact.allowance == pytest.approx(2e-5)
    assert not exact.ok


@pytest.mark.parametrize(
    ("sample", "ok"),
    [
        (Sample("p", "x y", "x z", "x z", 5.0), True),
        (Sample("p", "x y", "x z", "x y", 0.3), True),
        (Sample("p", "x y", "x z", "x y", 0.7), False),
        (Sample("p", "x y", "x y z", "x y", math.inf), False),
    ],
    ids=["as PEFT's rounded merge", "near tie", "clear preference", "went past the end"],
)
def test_a_sample_may_part_only_where_rounding_explains_it(sample: Sample, ok: bool) -> None:
    found = replace(RIGHT, samples=(SAME, sample))
    assert found.ok is ok
    assert found.matched == 1
    assert "1/2 equal" in found.summary()
    assert ("(by rounding)" if ok else "(not by rounding)") in found.summary()


def test_a_sample_as_peft_merges_is_not_explained_where_that_is_another_model() -> None:
    as_peft = replace(RIGHT, samples=(Sample("p", "x y", "x z", "x z", 5.0),))
    assert as_peft.ok
    assert not replace(as_peft, kl_peft=0.1).ok


def test_the_json_holds_what_a_compatibility_cell_reads_and_no_infinity() -> None:
    found = replace(RIGHT, samples=(SAME, Sample("p", "x", "x z", "x", math.inf)))
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["status"] == "mismatch"
    assert (document["samples"]["matched"], document["samples"]["total"]) == (1, 2)
    assert document["samples"]["texts"][1] == {
        "prompt": "p",
        "trained": "x",
        "merged": "x z",
        "matched": False,
        "preference": None,
    }
    for name in ("base_trained", "base_merged", "trained_merged", "rounding", "peft", "bfloat16"):
        assert document[f"kl_{name}"] == getattr(found, f"kl_{name}")
    assert document["versions"]["peft"] == "0"


def test_the_divergence_is_the_mean_over_all_tokens_in_nats() -> None:
    torch.manual_seed(0)
    p, q = [torch.randn(200, 7), torch.randn(3, 7)], [torch.randn(200, 7), torch.randn(3, 7)]
    log_p, log_q = torch.cat(p).double().log_softmax(-1), torch.cat(q).double().log_softmax(-1)
    expected = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert divergence(p, q) == pytest.approx(float(expected), rel=1e-12)
    assert divergence(p, p) == 0.0
    half = [torch.log(torch.tensor([[0.5, 0.5]]))]
    assert divergence(half, [torch.log(torch.tensor([[0.25, 0.75]]))]) == pytest.approx(
        0.5 * math.log(4 / 3), rel=1e-6
    )


def test_top1_agreement_counts_positions() -> None:
    p = [torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    q = [torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0]])]
    assert top1_agreement(p, q) == 0.75


def test_another_vocabulary_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match=r"found logits of shape \[2, 4\], expected \[2, 3\]"):
        divergence([torch.zeros(2, 3)], [torch.zeros(2, 4)])


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(Mismatch, match="found logits that are not finite"):
        behaviour.check_finite([torch.tensor([[0.0, math.nan]])], Path("out"), Mismatch)
    behaviour.check_finite([torch.zeros(2, 2)], Path("out"), Mismatch)


def continuation(*ids: int) -> Continuation:
    rows = torch.full((len(ids), 8), -9.0)
    for position, number in enumerate(ids):
        rows[position, number] = -0.5
    return Continuation(ids, rows)


def test_the_preference_is_taken_where_two_samples_first_differ() -> None:
    assert preference(continuation(1, 2, 3), continuation(1, 2, 3)) is None
    assert preference(continuation(1, 2, 3), continuation(1, 4, 3)) == pytest.approx(8.5)
    assert preference(continuation(1, 2), continuation(1, 2, 3)) == math.inf


class Counter(nn.Module):
    """A language model that always continues with the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return type("Output", (), {"logits": self.weight[(input_ids + 1) % 8]})


class Classifier(Counter):
    """One row of labels for each sequence, as `…ForSequenceClassification` has it."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return type("Output", (), {"logits": self.weight[input_ids[:, -1] % 8, :3]})


def test_what_classifies_sequences_has_a_row_for_each() -> None:
    """Its labels are no tokens, each a position of its own."""
    found = behaviour.logits(Classifier(), [torch.tensor([4, 1]), torch.tensor([3, 2])], together=2)
    assert [each.tolist() for each in found] == [[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]


class Reward(Counter):
    """A number for each sequence, as `…ForSequenceClassification` has it with one label."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return type("Output", (), {"logits": input_ids[:, -1:].float()})


def test_two_reward_models_that_differ_diverge() -> None:
    """A softmax over one number is 1, whatever it is: a wrong merge of a reward model would pass."""
    high, low = (behaviour.logits(Reward(), [torch.tensor([4, last])]) for last in (3, 1))
    assert high[0].tolist() == [[0.0, 3.0]]
    assert divergence(high, low) > 0.1


def test_a_greedy_sample_ends_with_the_end_of_the_text() -> None:
    found = behaviour.continue_greedily(Counter(), torch.tensor([1, 2]), frozenset({5}))
    assert found.ids == (3, 4, 5)
    endless = behaviour.continue_greedily(Counter(), torch.tensor([1, 2]), frozenset())
    assert len(endless.ids) == behaviour.NEW_TOKENS


def test_a_greedy_sample_ends_where_the_model_has_no_more_positions() -> None:
    found = behaviour.continue_greedily(Counter(), torch.tensor([1, 2]), frozenset(), 4)
    assert found.ids == (3, 4, 5)  # the last one is made of four
    assert behaviour.continue_greedily(Counter(), torch.tensor([1, 2]), frozenset(), 2).ids == (3,)


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (("GPT2", {"n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2}), 20),
        (("Roberta", {"max_position_embeddings": 20, "pad_token_id": 1, **SMALL}), 18),
        (("Bert", {"max_position_embeddings": 20, "pad_token_id": 0, **SMALL}), 20),
        (("Mpt", {"max_seq_len": 20, "d_model": 8, "n_layers": 1, "n_heads": 2}), 20),
        (("Bloom", {"hidden_size": 8, "n_layer": 1, "n_head": 2}), None),
    ],
    ids=["gpt2", "roberta", "bert", "mpt", "bloom"],
)
def test_a_model_of_few_positions_is_run_on_as_many(
    model: tuple[str, dict[str, Any]], positions: int | None, tmp_path: Path
) -> None:
    """It raised an IndexError, or another error, of 128."""
    name, fields = model
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **fields)
    made = transformers.AutoModelForCausalLM.from_config(config)
    assert models.positions(made) == positions
    passages = make_passages(tmp_path, {}, 64, None, 150, positions)
    assert passages.tokens == 150
    run = behaviour.run(made.eval(), passages, frozenset())
    assert [len(rows) for rows in run.logits] == [len(ids) for ids in passages.sequences]
    assert max(map(len, passages.sequences)) == (positions or behaviour.SEQUENCE)
    expected = min(behaviour.NEW_TOKENS, (positions or 99) - 8 + 1)
    assert {len(one.ids) for one in run.continuations} == {expected}


def test_of_a_prompt_that_is_too_long_the_last_tokens_are_continued(tokenizer_directory: Path) -> None:
    found = make_passages(tokenizer_directory, {}, 256, ["abcdef", "d"], 9, 4)
    assert [len(ids) for ids in found.sequences] == [4, 2, 1]
    assert [found.text(ids.tolist()) for ids in found.prompts] == ["c d e f", "d"]


def test_a_tokenizer_of_another_model_is_told(tokenizer_directory: Path) -> None:
    with pytest.raises(
        EnvironmentFailed, match=r"makes the token id \d+, expected one of the model's 9\. Put"
    ):
        make_passages(tokenizer_directory, {}, 9, None, 4)


def test_without_tokenizer_files_the_models_run_on_fixed_ids_that_mean_nothing_special(
    tmp_path: Path,
) -> None:
    config = {
        "pad_token_id": 3,
        "text_config": {"image_token_id": 4, "eos_token_id": [5, 6]},
        "bos_token_id": None,
    }
    found = make_passages(tmp_path, config, 10, None, 300)
    again = make_passages(tmp_path, config, 10, None, 300)
    assert found.tokens == 300
    assert found.source == "pseudo-random token ids (no tokenizer files)"
    assert [len(ids) for ids in found.sequences] == [128, 128, 44]
    assert set(torch.cat(found.sequences).tolist()) == {0, 1, 2, 7, 8, 9}
    assert all(map(torch.equal, found.sequences, again.sequences))
    assert len(found.prompts) == 3


def test_ids_that_are_all_special_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="all 2 token ids are special ones, expected some for text"):
        make_passages(tmp_path, {"eos_token_id": [0, 1]}, 2, None, 8)


def test_a_tokenizer_that_makes_no_tokens_is_refused(tokenizer_directory: Path) -> None:
    tokenizer = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    tokenizer["model"].update(vocab={}, merges=[])
    (tokenizer_directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EnvironmentFailed, match="the tokenizer makes no token of 'abc', expected some"):
        make_passages(tokenizer_directory, {}, 256, ["abc"], 4)


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tokenizer_directory: Path) -> None:
    (tokenizer_directory / "tokenizer_config.json").write_text("[]")
    with pytest.raises(EnvironmentFailed, match=r"the tokenizer cannot be loaded: \w+Error: "):
        make_passages(tokenizer_directory, {}, 256, ["abc"], 4)


def test_given_prompts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="found no tokenizer files, expected one of"):
        make_passages(tmp_path, {}, 10, ["a"], 10)


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_text_is_the_prompts_and_the_standard_librarys_documentation(tokenizer_directory: Path) -> None:
    found = make_passages(tokenizer_directory, {}, 256, None, 600)
    assert found.tokens == 600
    assert "3 prompts and pydoc_data.topics of Python" in found.source
    assert max(map(len, found.sequences)) == behaviour.SEQUENCE
    assert len(found.prompts) == 3


def test_given_prompts_are_all_that_is_run(tokenizer_directory: Path) -> None:
    found = make_passages(tokenizer_directory, {}, 256, ["abc", "de"], 4)
    assert [len(ids) for ids in found.sequences] == [3, 1]
    assert [len(ids) for ids in found.prompts] == [3, 2]
    assert found.source == "2 prompts"


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFailed, match=r"the extra `compare`: pip install 'loudmerge\[compare\]'"):
        compare("out", "base", "adapter")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, r"\[\]"),
        ({"architectures": ["NoSuchModel"]}, r"\['NoSuchModel'\]"),
        ({"architectures": ["AutoModel"]}, "AutoModel"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"architectures": 3}, "3"),
        ({"architectures": {"a": 1}}, "{'a': 1}"),
        ({"architectures": [True]}, r"\[True\]"),
    ],
)
def test_an_architecture_that_transformers_does_not_have_is_refused(
    config: dict[str, Any], found: str
) -> None:
    with pytest.raises(
        EnvironmentFailed, match=f"config.json: found architectures .*{found}.* code from a checkpoint"
    ):
        models.model_class(config, Path("base"))


def test_an_encoder_decoder_is_refused() -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    with pytest.raises(EnvironmentFailed, match="found an encoder-decoder"):
        models.model_class(config, Path("base"))


RAISED = [
    *(OSError("x"), ValueError("x"), RuntimeError("x"), TypeError("x"), AttributeError("x"), KeyError("x")),
    *(IndexError("x"), ZeroDivisionError("x"), AssertionError("x"), ImportError("x")),
    *(strict("field", TypeError("x")) for strict in STRICT if strict is not None),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_a_library_raises_is_said_with_its_class(error: Exception) -> None:
    """A KeyError's own text is only the key."""
    says = f"^base: cannot load it: {type(error).__name__}: "
    with pytest.raises(EnvironmentFailed, match=says) as caught, models.blamed("base: cannot load it"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopIteration(), MemoryError()])
def test_what_is_no_fault_of_a_config_is_left_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)), models.blamed("base"):
        raise error


def test_torch_s_memory_that_runs_out_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: not enough"), models.blamed("base"):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")


@pytest.mark.parametrize("found", [None, 0, "x"])
def test_a_model_that_reads_no_text_is_refused(found: object) -> None:
    config = SimpleNamespace(vocab_size=found)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    with pytest.raises(EnvironmentFailed, match=f"base/config.json: found vocab_size {found}, expected"):
        models.vocabulary(model, Path("base"))


@pytest.mark.parametrize("found", [[[1]], {"a": 1}, "x"])
def test_an_end_of_text_that_is_no_id_is_refused(found: object) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=found))
    with pytest.raises(EnvironmentFailed, match=r"found eos_token_id .*, expected a token id or a list"):
        models.ends(model)


def test_tensors_that_out_lacks_or_has_too_many_are_a_mismatch() -> None:
    model: Any = nn.Linear(1, 1)
    complete = models.Loaded(model, frozenset(), frozenset({"mtp"}))
    models.check_complete(Path("out"), complete)
    models.check_no_extra(Path("out"), frozenset({"mtp"}), complete)
    with pytest.raises(Mismatch, match=r"out: found no tensor for a, b, c and 1 more"):
        models.check_complete(Path("out"), replace(complete, missing=frozenset("abcd")))
    with pytest.raises(Mismatch, match=r"out: found x, expected only tensors that the base has"):
        models.check_no_extra(Path("out"), frozenset({"mtp", "x"}), complete)


def test_only_parameters_that_the_files_dtype_can_hold_are_rounded() -> None:
    model = nn.ParameterDict(
        {"exact": nn.Parameter(torch.ones(2)), "fine": nn.Parameter(torch.full((2,), 1 / 3))}
    )
    names = models.exact_names(model, torch.bfloat16)
    assert names == {"exact"}
    model["exact"].data += 1e-3
    models.round_parameters(model, names, torch.bfloat16)
    assert torch.equal(model["exact"], torch.ones(2))
    assert torch.equal(model["fine"], torch.full((2,), 1 / 3))
