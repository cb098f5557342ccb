"""A name in memory means one tensor of the base, or none; where it could mean two, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.layout import Span
from loudmerge.reading.families import family_of
from tests.unit.builders import World, lora, outputs, values

TWO = {"model.layers.0.a.weight": values(8, 6), "language_model.layers.0.a.weight": values(8, 6)}


def test_a_name_that_two_tensors_could_mean_is_refused(tmp_path: Path) -> None:
    error = World(tmp_path).refuse(TWO, lora("text_model.layers.0.a", 8, 6))
    assert error.code == "unsupported-base"
    assert "text_model.layers.0.a.weight: found two tensors it could mean: " in str(error)
    assert all(f"{name} [8, 6] F32 in model.safetensors" in str(error) for name in TWO)


def test_the_very_name_is_taken_before_others_that_could_be_meant(tmp_path: Path) -> None:
    plan = World(tmp_path).plan(TWO, lora("language_model.layers.0.a", 8, 6))
    assert {key: len(output.terms) for key, output in outputs(plan).items()} == {
        "model.layers.0.a.weight": 0,
        "language_model.layers.0.a.weight": 1,
    }


@pytest.mark.parametrize(
    ("model_type", "disk", "memory"),
    [
        ("vit", "vit.encoder.layer.3.attention.attention.query", "vit.layers.3.attention.q_proj"),
        ("vit", "encoder.layer.3.attention.output.dense", "layers.3.attention.o_proj"),
        ("beit", "beit.encoder.layer.3.output.dense.weight", "beit.layers.3.mlp.fc2.weight"),
        ("dinov2", "encoder.layer.3.attention.attention.value", "encoder.layer.3.attention.v_proj"),
        (
            "swin",
            "encoder.layers.1.blocks.0.attention.self.key",
            "encoder.layers.1.blocks.0.attention.k_proj",
        ),
        ("segformer", "segformer.encoder.block.1.0.mlp.dense2", "segformer.stages.1.blocks.0.mlp.fc2"),
        ("vit_mae", "decoder.decoder_encoder.layer.0.intermediate.dense", "decoder.decoder_layers.0.mlp.fc1"),
        ("exaone", "transformer.wte.weight", "embed_tokens.weight"),
        ("exaone", "transformer.h.3.attn.attention.out_proj.weight", "layers.3.self_attn.o_proj.weight"),
        ("exaone", "transformer.h.3.mlp.c_fc_1.weight", "layers.3.mlp.up_proj.weight"),
        ("cosmos3_omni", "layers.3.self_attn.to_out.weight", "layers.3.self_attn.o_proj.weight"),
        ("cosmos3_omni", "blocks.3.attn.proj.weight", "visual.blocks.3.attn.proj.weight"),
        ("cosmos3_edge", "layers.3.mlp.up_proj.weight", "layers.3.mlp.fc1.weight"),
        # As the Hub's files have them, and as transformers saves a model with a head.
        ("gte", "new.encoder.layer.3.attention.o_proj.weight", "layers.3.self_attn.o_proj.weight"),
        ("gte", "gte.encoder.layer.3.mlp.down_proj.weight", "layers.3.mlp.down_proj.weight"),
        ("nomic_bert", "encoder.layers.3.mlp.fc12.weight", "layers.3.mlp.gate_proj.weight"),
        ("nomic_bert", "bert.encoder.layers.3.attn.out_proj.weight", "layers.3.self_attn.o_proj.weight"),
        ("jina_embeddings_v3", "roberta.encoder.layers.3.mlp.fc1.weight", "layers.3.mlp.fc1.weight"),
        ("qianfan_ocr", "language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        (
            "qianfan_ocr",
            "vision_model.encoder.layers.3.attn.proj.bias",
            "vision_tower.layers.3.attention.projection_layer.bias",
        ),
        ("hrm_text", "H_module.layers.3.attn.o_proj.weight", "H_module.layers.3.self_attn.o_proj.weight"),
    ],
)
def test_names_of_a_model_on_disk_and_in_memory_are_one(model_type: str, disk: str, memory: str) -> None:
    family = family_of(model_type)
    assert family.canonical(disk) == family.canonical(memory) == memory


HEADS = {"model_type": "sarvam_moe", "num_attention_heads": 4, "num_key_value_heads": 1}
JOINED = "model.layers.0.attention.query_key_value.weight"
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(("name", "rows"), [("q", Span(0, 8)), ("k", Span(8, 2)), ("v", Span(10, 2))])
def test_a_linear_may_be_some_rows_of_a_tensor(name: str, rows: Span, tmp_path: Path) -> None:
    """By the numbers of heads: queries, keys, values."""
    held = lora(f"{ATTENTION}.{name}_proj", rows.count, 6)
    (term,) = outputs(World(tmp_path).plan({JOINED: values(12, 6)}, held, HEADS))[JOINED].terms
    assert (term.index, term.out) == (-1, rows)


@pytest.mark.parametrize(
    ("tensor", "model"),
    [
        (values(13, 6), HEADS),
        (values(12, 6), {**HEADS, "num_key_value_heads": None}),
        (values(12, 6), {**HEADS, "num_key_value_heads": 0}),
        (torch.tensor(1.0), HEADS),
    ],
)
def test_rows_that_cannot_be_divided_have_no_linears(
    tensor: torch.Tensor, model: dict[str, Any], tmp_path: Path
) -> None:
    error = World(tmp_path).refuse({JOINED: tensor}, lora(f"{ATTENTION}.q_proj", 8, 6), model)
    assert error.code == "missing-base-tensor"
    assert f"{ATTENTION}.q_proj.weight in memory" in str(error)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_lora_for_a_tensor_and_one_for_some_of_its_rows_are_refused(name: str, tmp_path: Path) -> None:
    rows = 8 if name == "q" else 2
    held = lora("model.layers.0.attention.query_key_value", 12, 6) | lora(f"{ATTENTION}.{name}_proj", rows, 6)
    error = World(tmp_path).refuse({JOINED: values(12, 6)}, held, HEADS)
    assert error.code == "unsupported-adapter"
    assert "found a second LoRA for weights that the LoRA of " in str(error)


def test_a_lora_of_other_rows_than_a_linears_is_refused(tmp_path: Path) -> None:
    error = World(tmp_path).refuse({JOINED: values(12, 6)}, lora(f"{ATTENTION}.q_proj", 4, 6), HEADS)
    assert error.code == "shape-mismatch"


def test_only_the_text_models_queries_of_mistral_large_4_keep_their_rows() -> None:
    """transformers permutes the rows of the vision model's on loading: it trains another tensor."""
    canonical = family_of("mistral_large4").canonical
    assert canonical("layers.0.attention.wq.weight") == "layers.0.self_attn.q_proj.weight"
    vision = "vision_tower.transformer.layers.0.attention"
    assert canonical(f"{vision}.wq.weight") != canonical(f"{vision}.q_proj.weight")
