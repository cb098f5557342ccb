"""A name in memory means one tensor of the base, or none; where it could mean two, it is refused."""

from __future__ import annotations

from pathlib import Path

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
