"""Embedding and head: resized together, tied or apart as training left them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.errors import MergeRefused
from loudmerge.merging.merge import merge
from loudmerge.planning.plan import Counts, MergePlan
from tests.unit.builders import (
    EMBED,
    PREFIX,
    Q_PROJ,
    Tensors,
    World,
    full,
    lora,
    outputs,
    plan_of,
    values,
    write_adapter,
    write_base,
)

H, V = 6, 9
Q = {f"{Q_PROJ}.weight": values(8, H)}
TIED = {f"{EMBED}.weight": values(V, H, seed=7), **Q}
UNTIED = {**TIED, "lm_head.weight": values(V, H, seed=8)}
TIE = {"tie_word_embeddings": True}
ROWS = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def embedding_lora(rows: int = V) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{EMBED}.lora_embedding_A": values(2, rows),
        f"{PREFIX}{EMBED}.lora_embedding_B": values(H, 2),
    }


# --- the vocabulary ------------------------------------------------------------------------------


WTE = "transformer.wte.weight"
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": V}


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["wte", "lm_head"]}])
def test_a_resized_vocabulary_of_an_embedding_of_another_name_edits_the_config(
    fields: dict[str, Any], world: World
) -> None:
    base = {WTE: values(V, H), "lm_head.weight": values(V, H, seed=8)}
    plan = world.plan(base, full(WTE, V + 3, H) | full("lm_head.weight", V + 3, H), GPT2, **fields)
    assert plan.config_edits == {"vocab_size": V + 3}
    assert {output.shape for output in plan.outputs} == {(V + 3, H)}


@pytest.mark.parametrize("alone", [WTE, "lm_head.weight"])
@pytest.mark.parametrize("other", ["lm_head.weight", "score.bias"])
def test_what_has_a_row_for_each_token_is_resized_with_an_embedding_of_another_name(
    alone: str, other: str, world: World
) -> None:
    base = {WTE: values(V, H), "lm_head.weight": values(V, H, seed=8), "score.bias": values(V)}
    held = full(alone, V + 3, H) | (full("lm_head.weight", V + 3, H) if other == "score.bias" else {})
    refused = world.refuse(base, held, GPT2)
    assert refused.code == "shape-mismatch"
    assert f"found vocabularies of {V + 3} and {V}, expected one size" in str(refused)


def test_another_tensor_of_another_size_is_no_resized_vocabulary(world: World) -> None:
    """Its name or its rows are not those of an embedding of tokens."""
    base = {"transformer.wpe.weight": values(V, H), "vision.embeddings.weight": values(V - 1, H)}
    for name in base:
        saved = {"modules_to_save": [name.removesuffix(".weight")]}
        assert world.refuse(base, full(name, V + 3, H), GPT2, **saved).code == "shape-mismatch"


@pytest.mark.parametrize("size", [V + 3, V - 2])
def test_a_resized_vocabulary_edits_the_config(size: int, world: World) -> None:
    held = full(f"{EMBED}.weight", size, H) | full("lm_head.weight", size, H)
    plan = world.plan(UNTIED, held, {"vocab_size": V})
    assert plan.config_edits == {"vocab_size": size}
    assert outputs(plan)["lm_head.weight"].shape == (size, H)
    assert any(f"the vocabulary is resized to {size}" in note for note in plan.notes)


def test_a_resized_vocabulary_edits_the_text_models_part(world: World) -> None:
    held = full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V + 1, H)
    plan = world.plan(UNTIED, held, {"text_config": {"vocab_size": V}})
    assert plan.config_edits == {"text_config.vocab_size": V + 1}


def test_a_resized_vocabulary_is_said_where_the_config_leaves_it_to_a_class(world: World) -> None:
    held = full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V + 1, H)
    plan = world.plan(UNTIED, held, {"text_config": {"x": 1}})
    assert plan.config_edits == {"text_config.vocab_size": V + 1}


def test_a_resized_vocabulary_edits_every_place_that_has_it_and_no_other_models(world: World) -> None:
    held = full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V + 1, H)
    model = {
        "vocab_size": V,
        "thinker_config": {"text_config": {"vocab_size": V}},
        "audio": {"vocab_size": 5},
    }
    plan = world.plan(UNTIED, held, model)
    assert plan.config_edits == {"vocab_size": V + 1, "thinker_config.text_config.vocab_size": V + 1}


def test_a_tied_model_may_resize_its_embedding_alone(world: World) -> None:
    plan = world.plan(TIED, full(f"{EMBED}.weight", V + 1, H), {"vocab_size": V, "tie_word_embeddings": True})
    assert plan.config_edits == {"vocab_size": V + 1}
    assert set(outputs(plan)) == set(TIED)


@pytest.mark.parametrize(
    "held",
    [
        full(f"{EMBED}.weight", V + 1, H),
        full("lm_head.weight", V + 1, H),
        full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V + 2, H),
        full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V, H),
    ],
    ids=["embedding alone", "head alone", "two sizes", "one resized"],
)
def test_embedding_and_head_are_resized_together_or_refused(
    held: dict[str, torch.Tensor], world: World
) -> None:
    error = world.refuse(UNTIED, held)
    assert error.code == "shape-mismatch"
    assert re.search(
        r"found vocabularies of \d+ and \d+, expected one size for embedding and head", str(error)
    )
    assert error.hint == (
        "Save the adapter with save_embedding_layers=True, "
        "or merge the live model with save_pretrained_merged."
    )


def test_a_resized_trained_embedding_of_a_tied_model_has_no_head_to_go_with_it(world: World) -> None:
    """modules_to_save unties it; the head it was trained with has the new rows, and is not in the file."""
    error = world.refuse(TIED, full(f"{EMBED}.weight", V + 1, H), TIE, modules_to_save=["embed_tokens"])
    assert error.code in {"shape-mismatch", "missing-adapter-tensor"}


def test_a_head_that_is_saved_for_a_tied_model_has_the_embeddings_size(world: World) -> None:
    held = full(f"{EMBED}.weight", V + 1, H) | full("lm_head.weight", V, H)
    assert world.refuse(TIED, held, TIE).code == "shape-mismatch"


# --- tied embeddings -----------------------------------------------------------------------------


def test_a_lora_on_the_head_of_a_tied_model_makes_a_head_of_its_own(world: World) -> None:
    plan = world.plan(TIED, lora("lm_head", V, H), TIE)
    found = outputs(plan)
    head, embedding = found["lm_head.weight"], found[f"{EMBED}.weight"]
    assert (head.source, head.shape, head.dtype, len(head.terms)) == (embedding.source, (V, H), "F32", 1)
    assert head.shard == embedding.shard
    assert not embedding.touched
    assert plan.config_edits == {"tie_word_embeddings": False}
    assert plan.counts == Counts(expert=0, dense=1, replaced=0, copied=2)
    assert plan.notes == ("lm_head.weight becomes a weight of its own: the base ties it to the embedding",)


def test_a_lora_on_the_embedding_of_a_tied_model_leaves_the_head_as_it_was(world: World) -> None:
    plan = world.plan(TIED, embedding_lora(), TIE)
    found = outputs(plan)
    assert len(found[f"{EMBED}.weight"].terms) == 1
    assert not found["lm_head.weight"].touched
    assert found["lm_head.weight"].source.name == f"{EMBED}.weight"
    assert plan.config_edits == {"tie_word_embeddings": False}


def test_loras_on_both_of_a_tied_model_stay_apart(world: World) -> None:
    found = outputs(world.plan(TIED, embedding_lora() | lora("lm_head", V, H), TIE))
    assert len(found[f"{EMBED}.weight"].terms) == len(found["lm_head.weight"].terms) == 1
    assert found[f"{EMBED}.weight"].terms[0].site != found["lm_head.weight"].terms[0].site


def test_weights_that_training_kept_tied_stay_tied(world: World) -> None:
    plan = world.plan(TIED, embedding_lora(), TIE, ensure_weight_tying=True)
    assert set(outputs(plan)) == set(TIED)
    assert plan.config_edits == {}


def test_token_rows_keep_a_tied_model_tied(world: World) -> None:
    plan = world.plan(TIED, {ROWS: values(2, H)}, TIE, trainable_token_indices=[5, 0])
    found = outputs(plan)
    assert set(found) == set(TIED)
    rows = found[f"{EMBED}.weight"].token_rows
    assert rows is not None
    assert rows[0] == (5, 0)
    assert (plan.config_edits, plan.counts) == ({}, Counts(0, 0, 1, 1))


def test_a_trained_embedding_of_a_tied_model_leaves_the_head_as_it_was(world: World) -> None:
    held = full(f"{EMBED}.weight", V, H)
    plan = world.plan(TIED, held, TIE, modules_to_save=["embed_tokens"])
    found = outputs(plan)
    assert found[f"{EMBED}.weight"].replaced
    assert (found["lm_head.weight"].replaced, found["lm_head.weight"].source.name) == (
        False,
        f"{EMBED}.weight",
    )
    assert plan.config_edits == {"tie_word_embeddings": False}


def test_an_embedding_that_was_only_saved_keeps_a_tied_model_tied(world: World) -> None:
    """save_embedding_layers writes it, trained or not."""
    plan = world.plan(TIED, full(f"{EMBED}.weight", V, H), TIE)
    assert set(outputs(plan)) == set(TIED)
    assert plan.config_edits == {}


def test_a_saved_head_of_a_tied_model_becomes_a_weight_of_its_own(world: World) -> None:
    held = full("lm_head.weight", V, H)
    plan = world.plan(TIED, held, TIE, modules_to_save=["lm_head"])
    head = outputs(plan)["lm_head.weight"]
    assert (head.replaced, head.source.name) == (True, f"{PREFIX}lm_head.weight")
    assert plan.counts == Counts(0, 0, 1, 2)
    assert plan.config_edits == {"tie_word_embeddings": False}


@pytest.mark.parametrize("adapter", [lora("lm_head", V, H), embedding_lora()], ids=["head", "embedding"])
def test_a_tied_model_that_stores_both_is_untied_by_training_one(adapter: Tensors, world: World) -> None:
    plan = world.plan(UNTIED, adapter, TIE)
    assert plan.config_edits == {"tie_word_embeddings": False}
    assert set(outputs(plan)) == set(UNTIED)


def test_a_nested_tied_model_that_stores_both_is_untied_too(world: World) -> None:
    model = {"text_config": {"tie_word_embeddings": True}}
    base = {key: value for key, value in UNTIED.items() if "embed" not in key}
    base["model.language_model.embed_tokens.weight"] = values(V, H)
    plan = world.plan(base, lora("lm_head", V, H), model)
    assert plan.config_edits == {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}


def test_a_tied_model_whose_head_is_not_trained_keeps_its_config(world: World) -> None:
    assert world.plan(UNTIED, lora(Q_PROJ, 8, H), TIE).config_edits == {}


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_the_new_head_stands_where_transformers_looks_for_it(embedding: str, head: str, world: World) -> None:
    plan = world.plan({**Q, embedding: values(V, H)}, lora("lm_head", V, H), TIE)
    assert set(outputs(plan)) == {*Q, embedding, head}


def test_a_head_without_a_known_place_is_refused(world: World) -> None:
    error = world.refuse({**Q, "thinker.model.embed_tokens.weight": values(V, H)}, lora("lm_head", V, H), TIE)
    assert error.code == "missing-base-tensor"
    assert "found a head of its own for a tied model" in str(error)
    assert error.hint.startswith("Set tie_word_embeddings to false in the base's config.json")


def test_a_head_without_any_embedding_is_refused(world: World) -> None:
    for held in (lora("lm_head", V, H), full("lm_head.weight", V, H)):
        error = world.refuse(Q, held, TIE)
        assert error.code == "missing-base-tensor"
        assert "found what was trained on lm_head, expected a tensor that lm_head.weight in memory" in str(
            error
        )


def test_a_head_that_a_checkpoint_lacks_though_it_is_not_tied_is_refused(world: World) -> None:
    """A lost tensor: the embedding is no substitute."""
    for held in (lora("lm_head", V, H), full("lm_head.weight", V, H)):
        error = world.refuse(TIED, held, {"tie_word_embeddings": False})
        assert error.code == "missing-base-tensor"


def test_a_config_that_does_not_say_is_tied_where_the_head_is_not_on_disk(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", TIED)
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    plan = plan_of(base, write_adapter(tmp_path / "adapter", lora("lm_head", V, H)))
    assert plan.config_edits == {"tie_word_embeddings": False}


def test_where_peft_saved_both_tied_weights_both_are_written(world: World) -> None:
    """ensure_weight_tying trains one weight for both, and saves it under both names."""
    plan = world.plan(TIED, lora("lm_head", V, H) | embedding_lora(), TIE, ensure_weight_tying=True)
    assert len(outputs(plan)["lm_head.weight"].terms) == len(outputs(plan)[f"{EMBED}.weight"].terms) == 1
    assert plan.config_edits == {"tie_word_embeddings": False}


def test_a_tied_embedding_of_another_name_that_was_trained_is_refused(world: World) -> None:
    """What was trained on it would reach the head too."""
    base = {**Q, "model.wte.weight": values(V, H)}
    held = {key.replace(EMBED, "model.wte"): value for key, value in embedding_lora().items()}
    error = world.refuse(base, held, TIE)
    assert error.code == "unsupported-base"
    assert "found something trained on a matrix that embedding and head share" in str(error)
    assert world.plan(base, held, {"tie_word_embeddings": False}).counts.dense == 1


def test_a_lora_on_the_head_of_a_tied_model_with_a_resized_vocabulary_is_on_the_new_rows(
    world: World,
) -> None:
    held = full(f"{EMBED}.weight", V + 1, H) | lora("lm_head", V + 1, H)
    plan = world.plan(TIED, held, {**TIE, "vocab_size": V})
    head = outputs(plan)["lm_head.weight"]
    assert (head.shape, head.source.name) == ((V + 1, H), f"{PREFIX}{EMBED}.weight")
    assert plan.config_edits == {"tie_word_embeddings": False, "vocab_size": V + 1}


def test_a_saved_head_of_another_width_is_refused(world: World) -> None:
    error = world.refuse(TIED, full("lm_head.weight", V, H + 1), TIE)
    assert error.code == "shape-mismatch"


def test_a_lora_on_a_tied_head_must_fit_the_embedding(world: World) -> None:
    error = world.refuse(TIED, lora("lm_head", V + 1, H), TIE)
    assert error.code == "shape-mismatch"
    assert "found a LoRA from 6 to 10, expected from 6 to 9" in str(error)


@pytest.mark.parametrize(
    ("extra", "fields"), [("lora_magnitude_vector", {"use_dora": True}), ("lora_B.bias", {"lora_bias": True})]
)
def test_dora_and_a_bias_on_a_tied_head_are_refused(extra: str, fields: dict[str, Any], world: World) -> None:
    held = lora("lm_head", V, H) | {f"{PREFIX}lm_head.{extra}": values(V)}
    error = world.refuse(TIED, held, TIE, **fields)
    assert error.code == "unsupported-adapter"
    assert "found DoRA or a LoRA bias on a head that the base ties to its embedding" in str(error)


# --- trained token rows ---------------------------------------------------------------------------

HEAD_ROWS = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
SOME = {ROWS: values(2, H)}
PICKED: dict[str, Any] = {"trainable_token_indices": [5, 0]}


def test_a_tied_head_that_is_stored_too_has_the_embeddings_rows(world: World) -> None:
    """PEFT ties them; with the embedding's alone the two would differ, and no longer be tied."""
    plan = world.plan(UNTIED, SOME, TIE, **PICKED)
    found = outputs(plan)
    assert found[f"{EMBED}.weight"].token_rows is not None
    assert found["lm_head.weight"].token_rows == found[f"{EMBED}.weight"].token_rows
    assert (plan.config_edits, plan.counts) == ({}, Counts(0, 0, 2, 1))


def test_rows_of_an_embedding_leave_an_untied_head_alone(world: World) -> None:
    plan = world.plan(UNTIED, SOME, {"tie_word_embeddings": False}, **PICKED)
    assert not outputs(plan)["lm_head.weight"].touched


def test_the_whole_models_config_says_whether_rows_are_the_heads_too(world: World) -> None:
    """qwen3_vl_moe's text part says true by default; PEFT asks the whole, and so does transformers 5."""
    model = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert not outputs(world.plan(UNTIED, SOME, model, **PICKED))["lm_head.weight"].touched


def test_rows_where_nothing_says_if_the_stored_head_is_tied_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", UNTIED)
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(MergeRefused) as caught:
        plan_of(base, write_adapter(tmp_path / "adapter", SOME, **PICKED))
    assert caught.value.code == "unsupported-base"
    assert "config.json that does not say if the head is tied to it" in str(caught.value)


@pytest.mark.parametrize("base", [TIED, UNTIED], ids=["stored once", "stored twice"])
def test_rows_under_a_lora_on_the_tied_head_are_refused(base: Tensors, world: World) -> None:
    """PEFT adds the LoRA to the rows, too: no other rows are so made."""
    error = world.refuse(base, SOME | lora("lm_head", V, H), TIE, **PICKED)
    assert error.code == "unsupported-adapter"
    assert "a LoRA on the head that PEFT lays over the same rows" in str(error)


def test_rows_of_the_head_of_a_tied_model_are_those_of_a_head_of_its_own(world: World) -> None:
    both = {"trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [1]}}
    plan = world.plan(TIED, SOME | {HEAD_ROWS: values(1, H)}, TIE, **both)
    found = outputs(plan)
    rows = {key: output.token_rows and output.token_rows[0] for key, output in found.items()}
    assert (rows[f"{EMBED}.weight"], rows["lm_head.weight"]) == ((5, 0), (1,))
    assert found["lm_head.weight"].source.name == f"{EMBED}.weight"
    assert (plan.config_edits, plan.counts) == ({"tie_word_embeddings": False}, Counts(0, 0, 2, 1))


def test_a_head_that_was_saved_for_a_tied_model_has_the_embeddings_rows(world: World) -> None:
    """Its own, where PEFT saved them, else those of the embedding that it is tied to."""
    held = SOME | full("lm_head.weight", V, H)
    found = outputs(world.plan(TIED, held, TIE, **PICKED))["lm_head.weight"]
    assert (found.replaced, found.token_rows and found.token_rows[0]) == (True, (5, 0))


def test_rows_of_a_tied_head_must_lie_in_it(world: World) -> None:
    held = SOME | {HEAD_ROWS: values(1, H)}
    error = world.refuse(TIED, held, TIE, trainable_token_indices={"embed_tokens": [5, 0], "lm_head": [V]})
    assert error.code == "shape-mismatch"
    assert f"found token index {V}, expected indices under {V}" in str(error)


# --- other names of embeddings, and what else is shared --------------------------------------------


def test_a_parameter_that_is_a_tied_embedding_of_another_name_is_refused(world: World) -> None:
    """target_parameters wraps any parameter."""
    base = {**Q, "model.wte.weight": values(V, H)}
    held, fields = lora("model.wte", V, H), {"target_parameters": ["wte.weight"]}
    error = world.refuse(base, held, {**TIE, "vocab_size": V}, **fields)
    assert error.code == "unsupported-base"
    assert "model.wte.weight" in str(error)
    untied = {"tie_word_embeddings": False, "vocab_size": V}
    assert world.plan(base, held, untied, **fields).counts.dense == 1


def test_an_embedding_of_positions_is_none_of_tokens(world: World) -> None:
    base = {**Q, "model.wpe.weight": values(V - 1, H)}
    held = {key.replace(EMBED, "model.wpe"): value for key, value in embedding_lora(V - 1).items()}
    assert world.plan(base, held, {**TIE, "vocab_size": V}).counts.dense == 1


@pytest.mark.parametrize(
    ("held", "fields"),
    [
        (lora("lm_head", V, H), {}),
        ({HEAD_ROWS: values(1, H)}, {"trainable_token_indices": {"lm_head": [1]}}),
    ],
    ids=["lora", "rows"],
)
def test_what_was_trained_on_the_one_matrix_of_a_tied_model_that_is_stored_as_its_head_is_refused(
    held: Tensors, fields: dict[str, Any], world: World
) -> None:
    """Loaded, it would be the embedding, too."""
    error = world.refuse({**Q, "lm_head.weight": values(V, H)}, held, TIE, **fields)
    assert error.code == "unsupported-base"
    assert "a matrix that embedding and head share" in str(error)


def test_peft_018_ties_no_lora(world: World) -> None:
    """Its ensure_weight_tying is about modules_to_save and token rows."""
    held, fields = embedding_lora(), {"ensure_weight_tying": True}
    assert "lm_head.weight" in outputs(world.plan(TIED, held, TIE, **fields, peft_version="0.18.1"))
    assert "lm_head.weight" not in outputs(world.plan(TIED, held, TIE, **fields, peft_version="0.19.0"))


@pytest.mark.parametrize(
    ("model", "block"),
    [
        ("zamba2", "model.layers.1.shared_transformer.self_attn.q_proj"),
        ("neomme", "model.embed_tokens.embedding_projection"),
        ("udop", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ],
)
def test_a_lora_on_a_block_that_layers_share_is_refused(model: str, block: str, world: World) -> None:
    """Stored once. Zamba2 has a LoRA for each layer that runs it; the others tie it to a second module."""
    error = world.refuse({f"{block}.weight": values(8, H)}, lora(block, 8, H), {"model_type": model})
    assert error.code == "unsupported-base"
    assert "a weight that several layers share" in str(error)


# --- rows that PEFT may not have tied to the head ---------------------------------------------------

SINCE_018 = {**PICKED, "peft_version": "0.18.0"}
NESTED = {"text_config": {"tie_word_embeddings": True}}
LANGUAGE = "model.language_model.embed_tokens"
NESTED_ROWS = {f"{PREFIX}{LANGUAGE}.token_adapter.trainable_tokens_delta": values(2, H)}


def nested_world(tmp_path: Path, config: dict[str, Any], *, head: bool = False) -> MergePlan:
    tensors = {**Q, f"{LANGUAGE}.weight": values(V, H)} | ({"lm_head.weight": values(V, H)} if head else {})
    base = write_base(tmp_path / "base", tensors)
    (base / "config.json").write_text(json.dumps(config))
    return plan_of(base, write_adapter(tmp_path / "adapter", NESTED_ROWS, **SINCE_018))


@pytest.mark.parametrize("head", [False, True], ids=["stored once", "stored twice"])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "blip-2", **NESTED},
        {"model_type": "blip-2"} | {"text_config": {"model_type": "opt", "tie_word_embeddings": True}},
        {"model_type": "shieldgemma2", **TIE, **NESTED},
        {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2", **TIE}},
        {"model_type": "vision-encoder-decoder", **TIE, "decoder": {"model_type": "gpt2", **TIE}},
        {"model_type": "qwen2_vl", **NESTED},
        {"model_type": "none_that_is_known", **TIE, **NESTED},
    ],
)
def test_rows_of_a_nested_model_that_peft_may_not_have_tied_are_refused(
    config: dict[str, Any], head: bool, tmp_path: Path
) -> None:
    """PEFT asks the whole model's config and class; loaded, the head that is tied in OUT has the rows."""
    with pytest.raises(MergeRefused) as caught:
        nested_world(tmp_path, config, head=head)
    assert caught.value.code == "unsupported-base"
    said = str(caught.value)
    assert f"for {LANGUAGE}.weight [9, 6] F32" in said
    assert "found trained token rows of an embedding that lm_head.weight" in said
    nests = (
        f"nests another and says tie_word_embeddings {config.get('tie_word_embeddings', 'nothing')} itself"
    )
    assert f"{nests}, for model_type {config['model_type']!r}" in said
    assert "Untie the base before training" in said


def test_rows_of_a_nested_model_whose_config_unties_it_in_the_whole_but_stores_no_head_are_refused(
    tmp_path: Path,
) -> None:
    config = {"model_type": "qwen3_vl_moe", "tie_word_embeddings": False, **NESTED}
    with pytest.raises(MergeRefused, match="says tie_word_embeddings False itself"):
        nested_world(tmp_path, config)
    assert nested_world(tmp_path / "with a head", config, head=True).counts.replaced == 1


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", **NESTED},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        {"model_type": "qwen2_vl", **TIE, **NESTED},
        {"model_type": "llava", **TIE, **NESTED},
    ],
)
def test_rows_of_a_nested_model_that_peft_ties_keep_it_tied(config: dict[str, Any], tmp_path: Path) -> None:
    plan = nested_world(tmp_path, config)
    assert (plan.counts.replaced, plan.config_edits) == (1, {})


def test_rows_of_towers_without_a_head_are_merged_whatever_their_configs_say(tmp_path: Path) -> None:
    """transformers 4 wrote tie_word_embeddings for all of them."""
    assert nested_world(tmp_path, {"model_type": "clip", **NESTED}).counts.replaced == 1


def test_rows_of_an_untied_nested_model_are_merged(tmp_path: Path) -> None:
    config = {"model_type": "blip-2", "text_config": {"tie_word_embeddings": False}}
    assert nested_world(tmp_path, config, head=True).counts.replaced == 1


def test_rows_of_both_of_a_nested_model_are_merged_apart(world: World) -> None:
    both = {"trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [1]}}
    model = {"model_type": "blip-2", **TIE, **NESTED}
    held = NESTED_ROWS | {HEAD_ROWS: values(1, H)}
    for head in ({}, {"lm_head.weight": values(V, H, seed=8)}):
        plan = world.plan({**Q, f"{LANGUAGE}.weight": values(V, H), **head}, held, model, **both)
        assert plan.counts.replaced == 2


@pytest.mark.parametrize(
    ("embedding", "module", "lacks"),
    [
        ("model.embed_tokens", "embed_tokens", "model."),
        ("model.language_model.embed_tokens", "language_model.embed_tokens", "model."),
        ("model.language_model.embed_tokens", "embed_tokens", "model.language_model."),
        ("language_model.model.embed_tokens", "language_model.embed_tokens", "model."),
        ("language_model.model.embed_tokens", "embed_tokens", "language_model.model."),
    ],
)
@pytest.mark.parametrize("head", [{}, {"lm_head.weight": values(V, H)}], ids=["stored once", "stored twice"])
def test_rows_that_were_trained_in_a_part_without_the_tied_head_are_refused(
    embedding: str, module: str, lacks: str, head: Tensors, world: World
) -> None:
    """get_peft_model(model.model, ...): PEFT sees no head that it could tie."""
    base = {**Q, f"{embedding}.weight": values(V, H), **head}
    held = {f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": values(2, H)}
    model = {"model_type": "gemma3" if "language" in embedding else "llama", "vocab_size": V}
    error = world.refuse(base, held, {**model, **TIE}, **SINCE_018)
    assert error.code == "unsupported-base"
    assert f"a key without '{lacks}': they were trained in a part that has no head" in str(error)
    if head:
        untied = {**model, "tie_word_embeddings": False}
        assert world.plan(base, held, untied, **SINCE_018).counts.replaced == 1


def test_rows_of_a_text_model_that_has_the_head_with_it_are_merged(world: World) -> None:
    """The causal text model of an older Gemma 3, whose head is beside it."""
    base = {**Q, "language_model.model.embed_tokens.weight": values(V, H)}
    plan = world.plan(base, SOME, {"model_type": "gemma3", **TIE, **NESTED}, **SINCE_018)
    assert plan.counts.replaced == 1


SHARED = {"shared.weight": values(V, H), "encoder.block.0.q.weight": values(8, H)}
SHARED_ROWS = {f"{PREFIX}shared.token_adapter.trainable_tokens_delta": values(2, H)}


@pytest.mark.parametrize(
    ("name", "task", "refused"),
    [
        *(("BartForSequenceClassification", None, True), ("T5ForTokenClassification", None, True)),
        *(("MBartForQuestionAnswering", None, True), ("T5ForQuestionAnswering", None, False)),
        *(("T5ForConditionalGeneration", "SEQ_CLS", True), ("T5ForConditionalGeneration", None, False)),
        *(("MarianModel", None, True), ("BartModel", "FEATURE_EXTRACTION", False)),
    ],
)
def test_rows_of_shared_are_refused_where_the_class_ties_nothing_to_it(
    name: str, task: str | None, refused: bool, world: World
) -> None:
    model = {"model_type": "t5", "architectures": [name], "tie_word_embeddings": True}
    if refused:
        error = world.refuse(SHARED, SHARED_ROWS, model, **PICKED, task_type=task)
        assert error.code == "unsupported-adapter"
        assert "trained token rows of shared, which no forward of" in str(error)
    else:
        assert world.plan(SHARED, SHARED_ROWS, model, **PICKED, task_type=task).counts.replaced == 1


def test_a_weight_of_a_layer_is_no_embedding_by_the_chance_of_its_size(world: World) -> None:
    base = {"h.0.query_key_value.weight": values(V, H), "word_embeddings.weight": values(V, H)}
    model = {"model_type": "bloom", "tie_word_embeddings": True, "vocab_size": V}
    assert world.plan(base, lora("h.0.query_key_value", V, H), model).counts.dense == 1


TIED_WTE = {WTE: values(V, H), "transformer.h.0.q.weight": values(8, H)}
BOTH_RESIZED = {**full(WTE, V + 1, H), **full("lm_head.weight", V + 1, H)}
GPT2_TIED: dict[str, Any] = {"model_type": "gpt2", "tie_word_embeddings": True, "vocab_size": V}


def test_a_resized_tied_matrix_that_peft_saved_twice_is_one(world: World) -> None:
    """As embedding and as head, with the same bytes: so GPT-2, OPT or Falcon with one more token."""
    plan = world.plan(TIED_WTE, BOTH_RESIZED, GPT2_TIED)
    assert outputs(plan)[WTE].shape == (V + 1, H)
    assert "lm_head.weight" not in outputs(plan)
    assert plan.config_edits["vocab_size"] == V + 1
    assert [(first.name, copy.name) for first, copy in plan.adapter.copies] == [
        (f"{PREFIX}{WTE}", f"{PREFIX}lm_head.weight")
    ]


@pytest.mark.parametrize(
    ("held", "fields"),
    [
        (BOTH_RESIZED, {"modules_to_save": ["lm_head"]}),
        ({**full(WTE, V + 1, H), **full("lm_head.weight", V + 2, H)}, {}),
        (full("lm_head.weight", V + 1, H), {}),
    ],
    ids=["trained apart", "two sizes", "the head alone"],
)
def test_a_head_that_is_no_copy_of_the_tied_matrix_is_refused(
    held: Tensors, fields: dict[str, Any], world: World
) -> None:
    error = world.refuse(TIED_WTE, held, GPT2_TIED, **fields)
    assert error.code == "missing-base-tensor"
    assert "found what was trained on lm_head" in str(error)


def test_two_copies_of_a_tied_matrix_that_differ_are_refused(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", TIED_WTE, **GPT2_TIED), tmp_path / "adapter"
    write_adapter(adapter, {**BOTH_RESIZED, f"{PREFIX}lm_head.weight": values(V + 1, H, seed=3)})
    with pytest.raises(MergeRefused, match=f"found other values than {PREFIX}{WTE}"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
