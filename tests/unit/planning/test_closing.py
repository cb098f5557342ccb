"""What a last layer's MLP writes through: its names, and what `auto` does with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import loudmerge
from loudmerge.arithmetic.auto import chosen
from loudmerge.planning.closing import closing
from tests.unit.builders import PREFIX, lora, values, write_adapter, write_base
from tests.unit.neighbours import neighbours

INPUTS, OUTPUTS = 96, 128
DOWN = "model.layers.{}.mlp.down_proj"


def test_only_the_last_layer_of_each_stack_has_them() -> None:
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 10, 9)),
        *(f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight" for layer in (0, 10, 9) for e in (0, 12)),
        *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 10, 9)),
        "model.layers.10.mlp.down_proj.bias",
        "visual.blocks.0.mlp.fc2.weight",
        "visual.blocks.1.mlp.fc2.weight",
    ]
    found = {f"model.layers.10.mlp.experts.{e}.down_proj.weight" for e in (0, 12)}
    assert closing(names) == found | {"visual.blocks.1.mlp.fc2.weight"}


def test_a_last_layer_without_an_mlp_has_none() -> None:
    """The last but one writes to a layer that still computes."""
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mixer.out_proj.weight"]
    assert closing(names) == frozenset()
    assert closing(names, lambda name: ".1." in name) == {names[0]}


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: Mapping[str, tuple[str, dict[str, int], set[str]]] = {
    "llama": ("LlamaModel", {}, {"layers.1.mlp.down_proj.weight"}),
    "gpt2": ("GPT2Model", {}, {"h.1.attn.c_proj.weight", "h.1.mlp.c_proj.weight"}),
    "gptj": ("GPTJModel", {"rotary_dim": 4}, {"h.1.mlp.fc_out.weight"}),
    "gpt_neox": ("GPTNeoXModel", {}, {"layers.1.mlp.dense_4h_to_h.weight"}),
    "opt": ("OPTModel", {"ffn_dim": 32, "word_embed_proj_dim": 16}, {"decoder.layers.1.fc2.weight"}),
    "bert": (
        "BertModel",
        {},
        {"encoder.layer.1.attention.output.dense.weight", "encoder.layer.1.output.dense.weight"},
    ),
    "mixtral": ("MixtralModel", {"num_key_value_heads": 2}, {"layers.1.mlp.experts.down_proj"}),
    "distilbert": ("DistilBertModel", {}, {"transformer.layer.1.ffn.lin2.weight"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_names_of_transformers_models(kind: str) -> None:
    name, more, expected = MODELS[kind]
    config = transformers.AutoConfig.for_model(kind, **TINY, **more)
    made = getattr(transformers, name)  # imports it, which torch 2.6 cannot do on the device "meta"
    with torch.device("meta"):
        model = made(config)
    if kind == "mixtral" and transformers.__version__.startswith("4."):
        expected = {f"layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(8)}
    assert closing(model.state_dict()) == expected


@pytest.mark.parametrize(
    ("kept", "elsewhere", "last"),
    [
        (0.2, "balanced", "balanced"),
        (0.5, "balanced", "stochastic"),
        (0.98, "balanced", "stochastic"),
        (0.99, "nearest", "nearest"),
    ],
)
def test_what_auto_takes(kept: float, elsewhere: str, last: str) -> None:
    assert chosen(kept, closing=False) == elsewhere
    assert chosen(kept, closing=True) == last


def world(
    root: Path, size: float, layers: int = 2, outputs: int = OUTPUTS, seed: int = 0
) -> tuple[Path, Path]:
    """Two layers on disk, and as many with an update, of which the nearest keeps the most, or little."""
    keys = [DOWN.format(layer) for layer in range(2)]
    base = {f"{key}.weight": (values(outputs, INPUTS, seed=seed) * 0.02).bfloat16() for key in keys}
    pairs: dict[str, Tensor] = {}
    for key in keys[:layers]:
        pairs |= {name: tensor * size for name, tensor in lora(key, outputs, INPUTS, seed=seed).items()}
    adapter = write_adapter(root / "adapter", pairs)
    return write_base(root / "base", base, num_hidden_layers=layers), adapter


def merged(base: Path, adapter: Path, rounding: str) -> tuple[list[Tensor], dict[str, int]]:
    """The layers' matrices, and how they were rounded."""
    out = adapter.parent / rounding
    report = loudmerge.merge(base, adapter, out, rounding=rounding).to_json()
    made = load_file(out / "model.safetensors")
    return [made[f"{DOWN.format(layer)}.weight"] for layer in range(2)], report["rounding"]


@pytest.mark.parametrize(("size", "last"), [(0.001, "balanced"), (0.003, "stochastic")])
def test_the_last_layers_is_left_to_chance_where_the_nearest_keeps_the_most(
    size: float, last: str, tmp_path: Path
) -> None:
    base, adapter = world(tmp_path, size)
    found, counts = merged(base, adapter, "auto")
    made = {rounding: merged(base, adapter, rounding)[0] for rounding in ("balanced", "stochastic")}
    assert torch.equal(found[0], made["balanced"][0])
    assert torch.equal(found[1], made[last][1])
    assert counts == ({"balanced": 1, "stochastic": 1} if last == "stochastic" else {"balanced": 2})
    assert loudmerge.verify(tmp_path / "auto", base, adapter).ok


def test_layers_that_no_model_trains_are_not_the_last(tmp_path: Path) -> None:
    """As those for multi-token prediction, on disk after the last one."""
    base, adapter = world(tmp_path, 0.003, layers=1)
    assert merged(base, adapter, "auto")[1] == {"stochastic": 1}


@pytest.mark.parametrize("layer", [0, 1])
def test_one_element_at_its_other_neighbour_is_found(layer: int, tmp_path: Path) -> None:
    base, adapter = world(tmp_path, 0.003)
    merged(base, adapter, "auto")
    path, key = tmp_path / "auto" / "model.safetensors", f"{DOWN.format(layer)}.weight"
    tensors = load_file(path)
    value = float(load_file(base / "model.safetensors")[key][5, 6])
    pairs = load_file(adapter / "adapter_model.safetensors")
    a, b = (pairs[f"{PREFIX}{DOWN.format(layer)}.lora_{side}.weight"].double() for side in "AB")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    below, above = neighbours(tensors[key][5, 6])
    exact, written = value + float(b[5] @ a[:, 6]) * scaling, float(tensors[key][5, 6])
    tensors[key][5, 6] = float(above if written < exact else below)
    save_file(tensors, path, metadata={"format": "pt"})
    (mismatch,) = loudmerge.verify(tmp_path / "auto", base, adapter).mismatches
    assert (mismatch.key, mismatch.index) == (key, (5, 6))


def test_chance_alone_is_not_accepted_elsewhere(tmp_path: Path) -> None:
    base, adapter = world(tmp_path, 0.003)
    merged(base, adapter, "stochastic")
    merged(base, adapter, "auto")
    shutil.copy(tmp_path / "stochastic" / "model.safetensors", tmp_path / "auto")
    wrong = loudmerge.verify(tmp_path / "auto", base, adapter).mismatches
    assert [mismatch.key for mismatch in wrong] == [f"{DOWN.format(0)}.weight"]


def test_where_balance_and_chance_make_the_same_the_report_may_name_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "INPUTS", 3)
    base, adapter = world(tmp_path, 0.001, outputs=3, seed=6)
    found, counts = merged(base, adapter, "auto")
    assert counts == {"balanced": 2}
    assert torch.equal(found[1], merged(base, adapter, "stochastic")[0][1])
    assert not torch.equal(found[1], merged(base, adapter, "nearest")[0][1])
    assert loudmerge.verify(tmp_path / "auto", base, adapter).ok


HEAD, EMBED = "lm_head", "model.embed_tokens"


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_goes_to_the_nearest_however_little_that_keeps(tied: bool, tmp_path: Path) -> None:
    """A tied one becomes a weight of its own. What chance would have made of it is not accepted."""
    base = {f"{name}.weight": (values(OUTPUTS, INPUTS) * 0.02).bfloat16() for name in (HEAD, EMBED)}
    if tied:
        del base[f"{HEAD}.weight"]
    write_base(tmp_path / "base", base, tie_word_embeddings=tied)
    pairs = {name: tensor * 0.001 for name, tensor in lora(HEAD, OUTPUTS, INPUTS).items()}
    write_adapter(tmp_path / "adapter", pairs)
    made = {}
    for rounding in ("auto", "nearest", "balanced"):
        out = tmp_path / rounding
        report = loudmerge.merge(tmp_path / "base", tmp_path / "adapter", out, rounding=rounding)
        assert report.to_json()["rounding"] == {rounding if rounding != "auto" else "nearest": 1}
        made[rounding] = load_file(out / "model.safetensors")[f"{HEAD}.weight"]
        if rounding == "auto":
            assert report.to_json()["delta_kept"]["overall"] < 0.5
            assert "; --dtype float32 keeps it" in report.summary()
            assert loudmerge.verify(out, tmp_path / "base", tmp_path / "adapter").ok
    assert torch.equal(made["auto"], made["nearest"])
    shutil.copy(tmp_path / "balanced" / "model.safetensors", tmp_path / "auto")
    wrong = loudmerge.verify(tmp_path / "auto", tmp_path / "base", tmp_path / "adapter").mismatches
    assert wrong[0].key == f"{HEAD}.weight"


@pytest.mark.parametrize(
    ("kind", "key"), [("llama", "lm_head.weight"), ("deepseek_v4", "head.weight"), ("bert", "x.head.weight")]
)
def test_a_head_is_known_by_its_name_in_memory(kind: str, key: str, tmp_path: Path) -> None:
    """deepseek_v4's checkpoints say head.weight."""
    tensors = {key: (values(OUTPUTS, INPUTS) * 0.02).bfloat16(), f"{EMBED}.weight": values(OUTPUTS, INPUTS)}
    base = write_base(tmp_path / "base", tensors, model_type=kind, tie_word_embeddings=False)
    name = HEAD if kind != "bert" else "x.head"
    pairs = {key: tensor * 0.001 for key, tensor in lora(name, OUTPUTS, INPUTS).items()}
    report = loudmerge.merge(base, write_adapter(tmp_path / "adapter", pairs), tmp_path / "out")
    assert report.to_json()["rounding"] == {"balanced" if kind == "bert" else "nearest": 1}
