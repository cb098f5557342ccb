"""Modules whose output is more than weight times input: transformers' own, and what PEFT makes of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

import loudmerge
from loudmerge.evidence.provenance import FIELDS_SINCE
from loudmerge.planning.forwards import BEYOND_WEIGHT, SCALING, SCALING_WHERE_SAID
from tests.support import kinds, tiny
from tests.support.kinds import UNTIED, Kind

pytestmark = pytest.mark.filterwarnings("default")

MODELS = Path(transformers.__file__).parent / "models"

EMBEDDING = Kind(
    "an embedding that scales", "gemma3_text", {"target_modules": ["embed_tokens"]}, (), config=UNTIED
)
ROWS = Kind(
    "its rows",
    "gemma3_text",
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
    (),
    config=UNTIED,
)
BEYOND = (
    Kind("a norm", "inkling_text", {"target_modules": ["embed_tokens"]}, (), config=UNTIED),
    Kind(
        "rows and a norm",
        "inkling_text",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
        (),
        config=UNTIED,
    ),
    Kind("a logit scale", "dory", {"target_modules": ["lm_head"]}, (), config=UNTIED),
    Kind("positions", "bart", {"target_modules": ["embed_positions"]}, (), config=UNTIED),
)
INSTALLED = [kind for kind in BEYOND if (MODELS / kind.model.removesuffix("_text")).is_dir()]

NOT_LISTED = {
    "FalconLinear": "computes what a Linear does",
    "IdeficsDecoupledEmbedding": "its other rows have a weight of their own",
    "IdeficsDecoupledLinear": "its other features have a weight of their own",
    "DeepseekV4GroupedLinear": "PEFT's forward fails: shapes differ",
    "Llama4Router": "PEFT's forward fails: its output is a tuple",
    "PhimoeTopKRouter": "PEFT's forward fails: its output is a tuple",
    "Ovis2VisualEmbeddingTable": "PEFT's forward fails: its input are no indices",
}


def saved(kind: Kind, folder: Path) -> PeftModel:
    """Base and adapter, saved as the installed PEFT does; gives the live model."""
    kinds.build(kind).save_pretrained(folder / "base")
    live = kinds.attach(kinds.load(folder / "base"), kind)
    live.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return live


def refused(folder: Path) -> str:
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.merge(folder / "base", folder / "adapter", folder / "out")
    assert refusal.value.code == "unsupported-adapter", str(refusal.value)
    assert not (folder / "out").exists()
    return str(refusal.value)


def refused_live(model: PeftModel, folder: Path) -> str:
    with pytest.raises(loudmerge.MergeRefused) as refusal:
        loudmerge.save_pretrained_merged(model, folder / "out")
    assert refusal.value.code == "unsupported-adapter", str(refusal.value)
    assert not (folder / "out").exists()
    return str(refusal.value)


@pytest.mark.parametrize("kind", INSTALLED, ids=lambda kind: kind.name)
def test_what_no_weight_can_hold_is_refused(kind: Kind, tmp_path: Path) -> None:
    """PEFT's own merge computes something else than its live model."""
    live = saved(kind, tmp_path)
    assert "no weight of it computes the same" in refused(tmp_path)
    found = refused_live(live, tmp_path)
    assert "of the live model: found something trained on" in found
    assert "with a forward of its own: no weight of it computes the same" in found
    wanted = tiny.logits(live)
    assert (wanted - tiny.logits(live.merge_and_unload())).abs().max() > 1e-3


def as_before_0_18(adapter: Path) -> None:
    """The config as PEFT 0.17 would have written it."""
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text())
    for name in ("peft_version", *FIELDS_SINCE):
        fields.pop(name, None)
    config.write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", [EMBEDDING, ROWS], ids=lambda kind: kind.name)
def test_what_peft_before_0_18_trained_on_an_embedding_that_scales_is_refused(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = saved(kind, tmp_path)
    if hasattr(BaseTunerLayer, "_get_embed_scale"):
        loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "followed")
        torch.testing.assert_close(tiny.logits(kinds.load(tmp_path / "followed")), tiny.logits(live))
        loudmerge.save_pretrained_merged(live, tmp_path / "live")
        as_before_0_18(tmp_path / "adapter")
        monkeypatch.delattr(BaseTunerLayer, "_get_embed_scale")
    assert "which multiplies by its embed_scale, and no peft_version >= 0.18.0" in refused(tmp_path)
    assert "model.embed_tokens, which is a Gemma3TextScaledWordEmbedding" in refused_live(live, tmp_path)


def own_forwards(source: str) -> Iterator[str]:
    """The subclasses of nn.Linear and nn.Embedding in a file that have a forward of their own."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    kept = {"nn.Linear", "nn.Embedding"}
    for name, node in classes.items():
        if kept.intersection(map(ast.unparse, node.bases)):
            kept.add(name)
            if any(isinstance(part, ast.FunctionDef) and part.name == "forward" for part in node.body):
                yield name


def test_every_module_of_transformers_that_does_more_than_multiply_is_listed() -> None:
    """A class of a model that no table names is looked at, and named there or in NOT_LISTED."""
    scaling = SCALING | SCALING_WHERE_SAID
    found, missed = 0, []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        configs = "".join(path.read_text("utf-8") for path in file.parent.glob("configuration_*.py"))
        types = set(re.findall(r'^    model_type = "([^"]+)"', configs, re.MULTILINE))
        for name in own_forwards(file.read_text("utf-8")):
            found += 1
            scaled = "ScaledWordEmbedding" in name
            # PEFT before 0.18 runs on no transformers 5, which has more classes that scale.
            listed = not kinds.TRANSFORMERS_4 or types & scaling if scaled else types & BEYOND_WEIGHT.keys()
            if not listed and name not in NOT_LISTED:
                missed.append(f"{file.name}: {name}")
    assert not missed
    assert found > 30
