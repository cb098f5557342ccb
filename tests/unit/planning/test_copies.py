"""An embedding that lies on disk again under other names: the copies get its rows, or nothing is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.builders import PREFIX, Q_PROJ, Tensors, World, outputs, values

H, V = 6, 9
WORDS, HEAD = "bert.embeddings.word_embeddings", "cls.predictions.decoder.weight"
MATRIX = values(V, H, seed=7)
BERT = {f"{WORDS}.weight": MATRIX, HEAD: MATRIX.clone(), f"{Q_PROJ}.weight": values(8, H)}
TIED = {"model_type": "bert", "tie_word_embeddings": True, "vocab_size": V}
APART = {**TIED, "tie_word_embeddings": False}
ROWS = {f"{PREFIX}{WORDS}.token_adapter.trainable_tokens_delta": values(2, H)}
INDICES = {"trainable_token_indices": {"word_embeddings": [1, 2]}}
LORA = {
    f"{PREFIX}{WORDS}.lora_embedding_A": values(2, V),
    f"{PREFIX}{WORDS}.lora_embedding_B": values(H, 2),
}
SHARED = {
    "shared.weight": MATRIX,
    "encoder.embed_tokens.weight": MATRIX.clone(),
    "decoder.embed_tokens.weight": MATRIX.clone(),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def with_rows(world: World, base: Tensors, model: dict[str, Any]) -> set[str]:
    """The tensors that get the trained rows."""
    plan = world.plan(base, ROWS, model, **INDICES)
    return {key for key, output in outputs(plan).items() if output.token_rows is not None}


def test_all_copies_of_a_tied_embedding_get_its_rows(world: World) -> None:
    assert with_rows(world, BERT, TIED) == {f"{WORDS}.weight", HEAD}


def test_the_count_says_how_many_tensors_have_rows(world: World) -> None:
    assert world.plan(BERT, ROWS, TIED, **INDICES).counts.replaced == 2


def test_both_copies_of_a_shared_embedding_get_its_rows(world: World) -> None:
    rows = {f"{PREFIX}shared.token_adapter.trainable_tokens_delta": values(2, H)}
    spec = {"trainable_token_indices": {"shared": [1, 2]}}
    plan = world.plan(SHARED, rows, {**TIED, "model_type": "t5"}, **spec)
    assert all(output.token_rows is not None for output in outputs(plan).values())
    assert world.refuse(SHARED, rows, {**APART, "model_type": "t5"}, **spec).code == "unsupported-base"


@pytest.mark.parametrize(
    "other",
    [values(V, H, seed=8), MATRIX[:-1].clone(), MATRIX.to(torch.bfloat16), torch.cat([MATRIX, MATRIX])],
)
def test_what_is_not_the_same_matrix_is_left_as_it_is(other: torch.Tensor, world: World) -> None:
    assert with_rows(world, {**BERT, HEAD: other}, TIED) == {f"{WORDS}.weight"}


def test_a_head_that_the_config_says_is_apart_is_left_as_it_is(world: World) -> None:
    assert with_rows(world, BERT, APART) == {f"{WORDS}.weight"}
    plan = world.plan(BERT, LORA, APART)
    assert [key for key, output in outputs(plan).items() if output.touched] == [f"{WORDS}.weight"]


def test_an_embedding_of_a_layer_that_no_model_trains_is_left_as_it_is(world: World) -> None:
    base = {"model.embed_tokens.weight": MATRIX, "lm_head.weight": values(V, H, seed=8)}
    base |= {"model.layers.2.embed_tokens.weight": MATRIX.clone(), "mtp.embed_tokens.weight": MATRIX.clone()}
    model = {"num_hidden_layers": 2, "vocab_size": V}
    plan = world.plan(base, {key.replace(WORDS, "model.embed_tokens"): LORA[key] for key in LORA}, model)
    assert [key for key, o in outputs(plan).items() if o.touched] == ["model.embed_tokens.weight"]


def test_copies_of_which_the_config_does_not_say_that_they_are_tied_are_refused(world: World) -> None:
    unsaid = world.refuse(BERT, ROWS, {**TIED, "tie_word_embeddings": None}, **INDICES)
    again = {**BERT, "bert.embeddings.again.weight": MATRIX.clone()}
    for refused in (unsaid, world.refuse(again, ROWS, APART, **INDICES)):
        assert refused.code == "unsupported-base"
        assert "found something trained on an embedding that lies in the base again, as " in str(refused)


@pytest.mark.parametrize("trained", ["lora", "whole"])
def test_what_peft_trains_on_one_of_the_copies_is_refused(trained: str, world: World) -> None:
    base = {**BERT, "encoder.embed_tokens.weight": MATRIX.clone()}
    whole = {f"{PREFIX}{WORDS}.weight": values(V, H, seed=3)}
    fields: dict[str, Any] = {} if trained == "lora" else {"modules_to_save": ["word_embeddings"]}
    refused = world.refuse(base, LORA if trained == "lora" else whole, APART, **fields)
    assert refused.code == "unsupported-base"
    assert "as encoder.embed_tokens.weight [9, 6] F32" in str(refused)


def test_a_part_whose_vocabulary_is_open_is_no_size(world: World) -> None:
    fields = {**APART, "audio_config": {"vocab_size": None}}
    plan = world.plan({f"{WORDS}.weight": MATRIX, "a.weight": values(8, H)}, LORA, fields)
    assert plan.counts.dense == 1


def test_rows_of_two_copies_are_refused(world: World) -> None:
    two = {f"{PREFIX}{name}.token_adapter.trainable_tokens_delta": values(2, H) for name in ("a.embed", "b")}
    base = {"a.embed.weight": MATRIX, "b.weight": MATRIX.clone()}
    spec = {"trainable_token_indices": {"embed": [1, 2], "b": [1, 2]}}
    assert world.refuse(base, two, TIED, **spec).code == "unsupported-base"


def test_rows_of_t5_with_a_head_of_its_own_are_refused(world: World) -> None:
    """config.json says the head is apart; transformers 5 says in memory that it is tied, which PEFT asks."""
    base = {"shared.weight": MATRIX, "lm_head.weight": values(V, H, seed=8)}
    rows = {f"{PREFIX}shared.token_adapter.trainable_tokens_delta": values(2, H)}
    spec = {"trainable_token_indices": {"shared": [1, 2]}}
    refused = world.refuse(base, rows, {**APART, "model_type": "mt5"}, **spec)
    assert refused.code == "unsupported-adapter"
    assert "that PEFT gives the same rows under transformers 5, not under 4" in str(refused)
    assert world.plan(base, rows, {**APART, "model_type": "switch_transformers"}, **spec).counts.replaced == 1
    del base["lm_head.weight"]
    assert world.plan(base, rows, {**APART, "model_type": "mt5"}, **spec).counts.replaced == 1
