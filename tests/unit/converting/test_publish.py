"""What a conversion wrote is planned as a merge would plan it, before it is published."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loudmerge.converting.convert import convert
from loudmerge.converting.publish import Expected
from loudmerge.converting.rewrite import PER_EXPERT
from loudmerge.errors import MergeRefused
from loudmerge.merging.merge import plan
from loudmerge.planning.options import Options
from loudmerge.reading.adapter_config import WEIGHTS
from tests.unit.converting.test_convert import config, qwen, tensors
from tests.unit.reference import build


def without(adapter: Path, gone: Iterable[str]) -> None:
    held = {key: tensor for key, tensor in tensors(adapter).items() if not any(part in key for part in gone)}
    save_file(held, adapter / WEIGHTS)


def test_an_adapter_that_updates_less_than_before_is_not_published(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    expected = Expected(plan(built.base, built.adapter), Options(), ())
    expected.check(built.adapter)
    without(built.adapter, ["layers.1.mlp.experts."])
    raw = {**config(built.adapter), "target_parameters": []}
    raw["target_parameters"] = [f"layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    (built.adapter / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(AssertionError, match=r"updates other weights than before: model\.layers\.1"):
        expected.check(built.adapter)


def test_an_adapter_that_updates_more_than_before_is_not_published(tmp_path: Path) -> None:
    """But for experts that had no LoRA, in a parameter that holds all of them."""
    before = build(qwen(fused=("down",)), tmp_path / "before")
    after = build(qwen(), tmp_path / "after")
    planned = plan(before.base, before.adapter, orientation="standard")
    with pytest.raises(AssertionError, match=r"experts\.\d\.(gate|up)_proj"):
        Expected(planned, Options(), ()).check(after.adapter)
    Expected(planned, Options(), ["layers.0.mlp.experts", "layers.1.mlp.experts"]).check(after.adapter)


def test_an_adapter_that_a_merge_refuses_is_not_published(tmp_path: Path) -> None:
    built = build(qwen(), tmp_path)
    expected = Expected(plan(built.base, built.adapter), Options(), ())
    without(built.adapter, ["layers.1.mlp.experts.base_layer.lora_A"])
    with pytest.raises(MergeRefused, match="could not be merged any more: missing-adapter-tensor") as caught:
        expected.check(built.adapter)
    assert (caught.value.code, caught.value.where) == ("unsupported-adapter", str(built.adapter))


def test_what_a_conversion_writes_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(qwen(), tmp_path)
    name = "base_model.model.model.layers.1.mlp.experts.0.down_proj.lora_A.weight"

    def lose(held: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({key: tensor for key, tensor in held.items() if key != name}, path, metadata)

    monkeypatch.setattr("loudmerge.converting.publish.save_file", lose)
    with pytest.raises(MergeRefused, match=r"layers\.1\.mlp\.experts\.0\.down_proj"):
        convert(built.adapter, tmp_path / "out", PER_EXPERT, base=built.base)
    assert list(tmp_path.glob("*out*")) == []
