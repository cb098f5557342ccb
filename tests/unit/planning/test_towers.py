"""An adapter of one part of the checkpoint, whose names fit several: proof decides, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.builders import PREFIX, Tensors, World, full, lora, outputs, values

Q = "encoder.layers.0.q_proj"
V = "encoder.layers.1.q_proj"
TWO = {f"{part}_model.{name}.weight": values(8, 6) for part in ("text", "vision") for name in (Q, V)}
NARROW = {**TWO, f"text_model.{Q}.weight": values(4, 6)}
BOTH = {**lora(Q, 8, 6), **lora(V, 8, 6)}
AUDIO = {f"{part}.layers.0.q_proj.weight": values(8, 6) for part in ("model", "audio_tower")}
TALKER = {
    f"{part}.model.layers.0.q_proj.weight": values(8, 6)
    for part in ("thinker", "talker", "talker.code_predictor")
}
BERT = {f"bert.{Q}.weight": values(8, 6), "cls.weight": values(3, 6)}


def by_class(name: str) -> dict[str, Any]:
    return {"auto_mapping": {"base_model_class": name}}


def merged(path: Path, base: Tensors, adapter: Tensors, **fields: Any) -> set[str]:
    """The names of the tensors that the plan changes."""
    plan = World(path).plan(base, adapter, **fields)
    return {key for key, output in outputs(plan).items() if output.terms or output.replaced}


def test_a_name_of_two_parts_is_refused_where_nothing_tells_them_apart(tmp_path: Path) -> None:
    error = World(tmp_path).refuse(TWO, BOTH)
    assert error.code == "ambiguous-layout"
    assert f"found parts of the base that it could be in: text_model.{Q} and vision_model.{Q}" in str(error)
    assert "auto_mapping" in error.hint


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("SiglipVisionModel", "vision_model"), ("CLIPVisionModelWithProjection", "vision_model")),
        *(("SiglipTextModel", "text_model"), ("CLIPTextModel", "text_model")),
    ],
)
def test_the_class_that_was_trained_tells_the_part(name: str, part: str, tmp_path: Path) -> None:
    found = merged(tmp_path, TWO, BOTH, **by_class(name))
    assert found == {f"{part}.{Q}.weight", f"{part}.{V}.weight"}


@pytest.mark.parametrize("name", ["SiglipModel", "", 3, "SiglipVisionTextModel"])
def test_a_class_that_names_no_part_or_two_tells_nothing(name: Any, tmp_path: Path) -> None:
    assert World(tmp_path).refuse(TWO, BOTH, **by_class(name)).code == "ambiguous-layout"


def test_a_size_that_only_one_part_has_tells_it(tmp_path: Path) -> None:
    assert merged(tmp_path, NARROW, BOTH) == {f"vision_model.{name}.weight" for name in (Q, V)}


def test_a_size_that_only_the_usual_part_has_tells_it(tmp_path: Path) -> None:
    held = {**lora(Q, 4, 6), **lora(V, 8, 6)}
    assert merged(tmp_path, NARROW, held) == {f"text_model.{name}.weight" for name in (Q, V)}


def test_a_class_that_the_sizes_contradict_is_refused(tmp_path: Path) -> None:
    error = World(tmp_path).refuse(NARROW, BOTH, **by_class("SiglipTextModel"))
    assert error.code == "shape-mismatch"


def test_layers_that_only_another_part_has_do_not_tell_it(tmp_path: Path) -> None:
    """What the usual part lacks may have another name or form on disk there."""
    base = {key: value for key, value in TWO.items() if key != f"text_model.{V}.weight"}
    assert World(tmp_path).refuse(base, BOTH).code == "ambiguous-layout"
    assert World(tmp_path).refuse(base, BOTH, **by_class("CLIPTextModel")).code == "missing-base-tensor"


def test_the_part_of_full_tensors_alone_is_told_by_the_class(tmp_path: Path) -> None:
    held, fields = full(f"{Q}.weight", 8, 6), {"modules_to_save": ["encoder.layers.0.q_proj"]}
    assert World(tmp_path).refuse(TWO, held, **fields).code == "ambiguous-layout"
    found = merged(tmp_path, TWO, held, **fields, **by_class("CLIPVisionModel"))
    assert found == {f"vision_model.{Q}.weight"}


def test_the_part_of_token_rows_alone_is_found(tmp_path: Path) -> None:
    base = {**BERT, "bert.embeddings.word_embeddings.weight": values(9, 6)}
    rows = {f"{PREFIX}embeddings.word_embeddings.token_adapter.trainable_tokens_delta": values(2, 6)}
    plan = World(tmp_path).plan(base, rows, trainable_token_indices={"word_embeddings": [1, 2]})
    assert plan.counts.replaced == 1
    assert plan.notes == ("the adapter is read as one of bert, a part of the base",)


def test_patterns_of_the_config_match_the_names_that_were_trained(tmp_path: Path) -> None:
    fields = {"alpha_pattern": {f"^{Q}": 6}, **by_class("CLIPVisionModel")}
    plan = World(tmp_path).plan(TWO, BOTH, **fields)
    assert {site.parameter: site.scaling for site in plan.sites} == {f"{Q}.weight": 3.0, f"{V}.weight": 2.0}


def test_what_the_config_announces_is_missed_in_the_part_that_was_trained(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], **by_class("CLIPVisionModel")}
    error = World(tmp_path).refuse(TWO, lora(Q, 8, 6), **fields)
    assert (error.code, error.where, len(error.problems)) == ("missing-adapter-tensor", V, 1)
    base = {f"text_model.{Q}.bias": values(8), "vision_model.encoder.layers.0.norm.bias": values(8), **TWO}
    error = World(tmp_path).refuse(base, BOTH, bias="all", **fields)
    assert (error.where, len(error.problems)) == ("encoder.layers.0.norm.bias", 1)


def test_names_with_the_usual_part_before_them_are_the_usual_parts(tmp_path: Path) -> None:
    """A text model trained alone has `model.` before its layers, an audio tower has nothing."""
    assert merged(tmp_path, AUDIO, lora("model.layers.0.q_proj", 8, 6)) == {"model.layers.0.q_proj.weight"}
    named = {"model.language_model.layers.0.q_proj.weight": values(8, 6), **AUDIO}
    del named["model.layers.0.q_proj.weight"]
    held = lora("model.layers.0.q_proj", 8, 6)
    assert merged(tmp_path, named, held) == {"model.language_model.layers.0.q_proj.weight"}
    assert World(tmp_path).refuse(named, lora("layers.0.q_proj", 8, 6)).code == "ambiguous-layout"
    fields = by_class("Qwen2AudioEncoder")
    found = merged(tmp_path, named, lora("layers.0.q_proj", 8, 6), **fields)
    assert found == {"audio_tower.layers.0.q_proj.weight"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Qwen3OmniMoeThinkerForConditionalGeneration", "thinker"),
        ("Qwen3OmniMoeTalkerForConditionalGeneration", "talker"),
        ("Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration", "talker.code_predictor"),
    ],
)
def test_a_part_with_a_part_is_told_by_the_longest_name(name: str, part: str, tmp_path: Path) -> None:
    held = lora("model.layers.0.q_proj", 8, 6)
    assert World(tmp_path).refuse(TALKER, held).code == "ambiguous-layout"
    assert merged(tmp_path, TALKER, held, **by_class(name)) == {f"{part}.model.layers.0.q_proj.weight"}


def test_the_only_part_that_has_the_names_is_meant(tmp_path: Path) -> None:
    assert merged(tmp_path, BERT, lora(Q, 8, 6)) == {f"bert.{Q}.weight"}


def test_the_only_part_that_has_the_names_is_another_than_the_class_names(tmp_path: Path) -> None:
    base = {key: value for key, value in TWO.items() if key.startswith("vision_model")}
    assert merged(tmp_path, base, BOTH) == base.keys()
    assert merged(tmp_path, base, BOTH, **by_class("CLIPVisionModel")) == base.keys()
    error = World(tmp_path).refuse(base, BOTH, **by_class("CLIPTextModel"))
    assert error.code == "ambiguous-layout"
    assert f"could be in: vision_model.{Q}, expected one that" in str(error)


def test_a_part_inside_another_model_is_found_whatever_its_class_is_called(tmp_path: Path) -> None:
    base = {f"owlvit.{key}": value for key, value in TWO.items()}
    held = lora(f"text_model.{Q}", 8, 6)
    found = merged(tmp_path, base, held, **by_class("OwlViTTextModel"))
    assert found == {f"owlvit.text_model.{Q}.weight"}


def test_a_part_called_as_its_own_first_module_counts_too(tmp_path: Path) -> None:
    """Two BERTs as encoder and decoder: `encoder.encoder.layers.0…` and `decoder.bert.encoder.layers.0…`."""
    base = {f"{part}.{Q}.weight": values(8, 6) for part in ("encoder", "decoder.bert")}
    error = World(tmp_path).refuse(base, lora(Q, 8, 6))
    assert error.code == "ambiguous-layout"
    assert all(f"{part}.{Q}" in str(error) for part in ("encoder", "decoder.bert"))


def test_no_layer_is_a_part(tmp_path: Path) -> None:
    base = {"model.layers.0.attention.q_proj.weight": values(8, 6)}
    assert World(tmp_path).refuse(base, lora("attention.q_proj", 8, 6)).code == "missing-base-tensor"


def test_a_tower_has_the_same_name_with_and_without_vision_model(tmp_path: Path) -> None:
    """transformers 4 has `vision_model.` in the tower's names, on disk and in memory."""
    new, old = "model.vision_tower.encoder.0.q", "model.vision_tower.vision_model.encoder.0.q"
    for held, name in ((new, old), (old, new)):
        base = {f"{held}.weight": values(8, 6), "model.layers.0.q.weight": values(8, 6)}
        assert merged(tmp_path, base, lora(name, 8, 6)) == {f"{held}.weight"}


# --- a base that was saved from the model inside ----------------------------------------------------

BARE = {"h.0.attn.c_proj.weight": values(8, 6), "wte.weight": values(9, 6)}
TRAINED = lora("transformer.h.0.attn.c_proj", 8, 6)


def test_a_base_without_the_prefix_of_the_model_with_a_head_is_the_same_model(tmp_path: Path) -> None:
    assert merged(tmp_path, BARE, TRAINED) == {"h.0.attn.c_proj.weight"}


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (BARE, lora("transformer.h.1.attn.c_proj", 8, 6)),
        (BARE, lora("transformer.h.0.attn.c_proj", 8, 5)),
        (BARE, {**TRAINED, **lora("encoder.h.0.attn.c_proj", 8, 6)}),
        ({**BARE, "transformer.ln.weight": values(6)}, TRAINED),
    ],
    ids=["another layer", "another size", "two prefixes", "a part of that name"],
)
def test_a_prefix_is_left_out_only_where_all_that_was_trained_fits_then(
    base: Tensors, adapter: Tensors, tmp_path: Path
) -> None:
    assert World(tmp_path).refuse(base, adapter).code == "missing-base-tensor"
