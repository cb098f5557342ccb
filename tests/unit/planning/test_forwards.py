"""What was trained on a module that does more than multiply by its weight is refused, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.evidence.provenance import knows_embed_scale
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


BIAS = torch.tensor([0.0] * (V - 1) + [0.5])
BIASED = {**UNTIED, "lm_head.bias": BIAS}
APART: dict[str, Any] = {"model_type": "phi", "tie_word_embeddings": False}
HEAD_ROWS = {key.replace(EMBED, "lm_head"): ROWS[key] for key in ROWS}
HEAD_INDICES = {"trainable_token_indices": {"lm_head": [1, 2]}}
TIED: dict[str, Any] = {"model_type": "bert", "tie_word_embeddings": True}
LOST = "a bias of the head that PEFT leaves out"


@pytest.mark.parametrize("name", ["lm_head", "cls.predictions.decoder"])
def test_token_rows_of_a_head_with_a_bias_are_refused(name: str, world: World) -> None:
    """BERT's bias may lie under the name of the module around the head."""
    base = {f"{name}.weight": values(V, H), f"{name.removesuffix('.decoder')}.bias": BIAS, **UNTIED}
    rows = {key.replace("lm_head", name): HEAD_ROWS[key] for key in HEAD_ROWS}
    spec = {"trainable_token_indices": {name: [1, 2]}}
    refused = world.refuse(base, rows, APART, **spec)
    assert refused.code == "unsupported-adapter"
    assert LOST in str(refused)
    zero = {key: tensor * 0 if "bias" in key else tensor for key, tensor in base.items()}
    assert world.plan(zero, rows, APART, **spec).counts.replaced == 1


@pytest.mark.parametrize("said", [True, None])
def test_token_rows_of_an_embedding_that_is_tied_to_a_head_with_a_bias_are_refused(
    said: bool | None, world: World
) -> None:
    """A config that says nothing leaves it to the class."""
    base = {f"{EMBED}.weight": values(V, H), "vocab_projector.bias": BIAS}
    model = {"model_type": "distilbert", "tie_word_embeddings": said}
    assert LOST in str(world.refuse(base, ROWS, model, **INDICES))
    world.plan({**base, "vocab_projector.bias": BIAS * 0}, ROWS, model, **INDICES)


def test_token_rows_of_an_embedding_leave_the_bias_of_a_head_of_its_own(world: World) -> None:
    assert world.plan(BIASED, ROWS, APART, **INDICES).counts.replaced == 1


def test_a_bias_that_is_added_behind_the_head_stays(world: World) -> None:
    base = {f"{EMBED}.weight": values(V, H), "lm_head.bias": BIAS}
    world.plan(base, ROWS, {**TIED, "model_type": "esm"}, **INDICES)
    assert LOST in str(world.refuse(base, ROWS, TIED, **INDICES))


def test_a_trained_bias_counts_as_it_was_trained(world: World) -> None:
    base = {**UNTIED, "lm_head.bias": BIAS * 0}
    trained = {**HEAD_ROWS, f"{PREFIX}lm_head.bias": BIAS}
    assert LOST in str(world.refuse(base, trained, APART, **HEAD_INDICES, bias="all"))


def test_the_head_that_ensure_weight_tying_makes_has_no_bias(world: World) -> None:
    base = {f"{EMBED}.weight": values(V, H), "lm_head.bias": BIAS}
    saved = {f"{PREFIX}{EMBED}.weight": values(V, H, seed=3)}
    fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert LOST in str(world.refuse(base, saved, TIED, **fields))
    world.plan({**base, "lm_head.bias": BIAS * 0}, saved, TIED, **fields)
    head = {f"{PREFIX}lm_head.weight": values(V, H, seed=3)}
    assert LOST in str(world.refuse(BIASED, {**saved, **head}, APART, **fields))
    world.plan(BIASED, {**saved, **head, f"{PREFIX}lm_head.bias": BIAS}, APART, **fields)
    classes = {"score.weight": values(V, H, seed=4), "score.bias": BIAS}
    fields["modules_to_save"] = ["embed_tokens", "score"]
    both = {**saved, **{f"{PREFIX}{key}": tensor for key, tensor in classes.items()}}
    assert LOST not in str(world.plan({f"{EMBED}.weight": values(V, H), **classes}, both, APART, **fields))
