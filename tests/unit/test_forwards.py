"""What was trained on a module that does more than multiply by its weight is refused, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loudmerge.provenance import knows_embed_scale
from tests.unit.builders import EMBED, PREFIX, Tensors, World, config, lora, values

H, V = 6, 9
UNTIED = {f"{EMBED}.weight": values(V, H, seed=7), "lm_head.weight": values(V, H, seed=8)}
OLD: dict[str, Any] = {}
NEW = {"peft_version": "0.18.0"}
ROWS = {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": values(2, H)}
INDICES = {"trainable_token_indices": {"embed_tokens": [1, 2]}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def embedding_lora(module: str = EMBED, rows: int = V) -> dict[str, Any]:
    return {
        f"{PREFIX}{module}.lora_embedding_A": values(2, rows),
        f"{PREFIX}{module}.lora_embedding_B": values(H, 2),
    }


def whole(module: str) -> Tensors:
    return {f"{module}.weight": values(V, H, seed=9), **UNTIED}


@pytest.mark.parametrize(
    ("version", "fields", "knows"),
    [
        (None, {}, False),
        (None, {"arrow_config": None}, True),
        ("0.17.1", {}, False),
        ("0.18.0.dev0", {}, False),
        ("0.18", {}, True),
        ("0.18.0", {}, True),
        ("0.18.1.dev0", {}, False),
        ("0.19.0.dev0", {}, True),
        ("1.0", {}, True),
        ("newest", {}, False),
    ],
)
def test_which_peft_follows_an_embeddings_scale(version: str | None, fields: Any, knows: bool) -> None:
    named = {} if version is None else {"peft_version": version}
    assert knows_embed_scale(config(**named, **fields)) is knows


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        {"model_type": "mbart"},
        {"model_type": "m2m_100", "scale_embedding": True},
        {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "trocr"}},
    ],
)
@pytest.mark.parametrize(("trained", "fields"), [(embedding_lora(), {}), (ROWS, INDICES)])
def test_an_embedding_that_scales_and_a_peft_that_did_not_are_refused(
    model: dict[str, Any], trained: Tensors, fields: dict[str, Any], world: World
) -> None:
    refused = world.refuse(UNTIED, trained, model, **fields)
    assert refused.code == "unsupported-adapter"
    assert f"trained on {EMBED}, which multiplies by its embed_scale, and no peft_version >=" in str(refused)
    world.plan(UNTIED, trained, model, **fields, **NEW)


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gemma2"},
        {"model_type": "qwen3_moe"},
        {"model_type": "mbart", "scale_embedding": False},
        {
            "model_type": "vision-encoder-decoder",
            "decoder": {"model_type": "trocr", "scale_embedding": False},
        },
    ],
)
def test_an_embedding_that_does_not_scale_is_merged(model: dict[str, Any], world: World) -> None:
    world.plan(UNTIED, embedding_lora(), model)


def test_other_modules_and_whole_embeddings_of_a_model_that_scales_are_merged(world: World) -> None:
    model = {"model_type": "gemma3_text"}
    world.plan(UNTIED, lora("lm_head", V, H), model)
    saved = {f"{PREFIX}{EMBED}.weight": values(V, H, seed=3)}
    world.plan(UNTIED, saved, model, modules_to_save=["embed_tokens"])


@pytest.mark.parametrize(
    ("model", "module", "trained", "does"),
    [
        ("inkling_text", EMBED, embedding_lora(), "norms its rows"),
        ("t5gemma2_text", EMBED, embedding_lora(), "has a row of its own for the end of an image"),
        ("dory", "lm_head", lora("lm_head", V, H), "multiplies its output by logit_scale"),
        (
            "opt",
            "model.decoder.embed_positions",
            embedding_lora("model.decoder.embed_positions"),
            "computes its indices from other inputs",
        ),
    ],
)
def test_a_module_that_does_more_than_multiply_is_refused_by_name(
    model: str, module: str, trained: Tensors, does: str, world: World
) -> None:
    base = whole(module) if "positions" in module else UNTIED
    refused = world.refuse(base, trained, {"model_type": model}, **NEW)
    assert refused.code == "unsupported-adapter"
    assert f"found something trained on {module}, which {does}: no weight of it computes the" in str(refused)


def test_the_head_of_a_tied_model_and_token_rows_are_refused_too(world: World) -> None:
    tied = {f"{EMBED}.weight": UNTIED[f"{EMBED}.weight"]}
    model = {"model_type": "dory", "tie_word_embeddings": True}
    assert "trained on lm_head, which multiplies" in str(world.refuse(tied, lora("lm_head", V, H), model))
    refused = world.refuse(UNTIED, ROWS, {"model_type": "muse_spark_text"}, **INDICES, **NEW)
    assert f"trained on {EMBED}, which norms its rows" in str(refused)


def test_a_lora_on_the_weight_itself_is_merged(world: World) -> None:
    """target_parameters change the weight, which the module then scales as it does any other."""
    plan = world.plan(
        UNTIED, lora("lm_head", V, H), {"model_type": "dory"}, target_parameters=["lm_head.weight"], **NEW
    )
    assert plan.counts.dense == 1
