"""merge, then verify: what merge writes passes, what is changed afterwards does not."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loudmerge.errors import EnvironmentFailed, Mismatch
from loudmerge.merging.merge import merge
from loudmerge.system.memory import Array
from loudmerge.verifying.outfiles import list_out
from loudmerge.verifying.recompute import read_tensor
from loudmerge.verifying.verify import verify
from tests.unit.reference import DTYPES, build
from tests.unit.synthetic import FAMILIES, Case

NAMED = {family.name: family for family in FAMILIES}
MERGED = {
    "per-expert": Case(NAMED["qwen3_moe"], fused=("gate_up", "down"), dense=("q_proj",), layers=2,
                       fused_layers=(0, 1), shards=3, replaced=True, base_dtype="bfloat16"),
    "mixtral": Case(NAMED["mixtral"], fused=("gate_up", "down"), rslora=True, base_dtype="float16"),
    "swapped": Case(NAMED["qwen3_moe_fused"], fused=("gate_up", "down"), orientation="swapped",
                    peft="0.18.1", base_dtype="bfloat16"),
    "grouped": Case(NAMED["qwen3_moe"], fused=("gate_up", "down"), packing="grouped_by_expert",
                    marker="top", base_dtype="bfloat16"),
    "in-out": Case(NAMED["llama4_text"], fused=("gate_up", "down"), base_dtype="bfloat16"),
    "linears": Case(NAMED["qwen3_moe"], per_expert=("gate", "up", "down"), dense=("o_proj",)),
}  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "peft"])
@pytest.mark.parametrize("case", MERGED.values(), ids=MERGED.keys())
def test_what_merge_writes_is_verified(tmp_path: Path, case: Case, rounding: str) -> None:
    built = build(case, tmp_path)
    merge(built.base, built.adapter, tmp_path / "out", rounding=rounding, verify=False)
    stages: list[tuple[str, int, int]] = []
    found = verify(tmp_path / "out", built.base, built.adapter, progress=lambda *now: stages.append(now))
    assert found.ok, found.summary()
    assert (found.tensors, found.notes) == (len(built.expected), ())
    assert {stage for stage, _, _ in stages} == {"verify"}
    assert stages[-1][1] == stages[-1][2] == max(done for _, done, _ in stages)


def published(tmp_path: Path, **options: str) -> tuple[Path, Path, Path]:
    built = build(MERGED["per-expert"], tmp_path)
    merge(built.base, built.adapter, tmp_path / "out", verify=False, **options)  # type: ignore[arg-type]
    return tmp_path / "out", built.base, built.adapter


def test_the_options_of_the_report_are_used(tmp_path: Path) -> None:
    """Without the report the dtype that was asked for is not known, and every tensor has another one."""
    out, base, adapter = published(tmp_path, dtype="float32")
    assert verify(out, base, adapter).ok
    (out / "merge_report.json").unlink()
    found = verify(out, base, adapter)
    assert {m.what for m in found.mismatches} == {"dtype", "config"}
    assert "assumed that OUT was merged with the default options, rounding nearest" in found.notes[0]
    assert found.notes[0] in found.summary()


@pytest.mark.parametrize(("tensor", "said"), [(False, True), (True, False)])
def test_another_tools_config_is_told_from_its_tensors(tensor: bool, said: bool, tmp_path: Path) -> None:
    out, base, adapter = published(tmp_path)
    (out / "merge_report.json").unlink()
    config = out / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "0"}))
    if tensor:
        file = next(out.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 0x40
        file.write_bytes(content)
    found = verify(out, base, adapter)
    assert not found.ok
    assert any("every tensor is that of the merge" in note for note in found.notes) == said


def test_a_report_that_is_none_is_a_mismatch(tmp_path: Path) -> None:
    out, base, adapter = published(tmp_path)
    endless = "[" * 10**5 + "]" * 10**5
    options = [f'{{"options": {value}}}' for value in ("null", "[1]", '{"dtype": "int4"}', endless)]
    for text in ("{", "[]", *options):
        (out / "merge_report.json").write_text(text)
        with pytest.raises(Mismatch, match="is no report of a merge"):
            verify(out, base, adapter)


def test_a_config_of_out_that_is_nested_without_end_is_a_mismatch(tmp_path: Path) -> None:
    out, base, adapter = published(tmp_path)
    (out / "config.json").write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}")
    (found,) = verify(out, base, adapter).mismatches
    assert (found.key, found.what) == ("config.json", "unreadable")
    assert "nested more than 100 levels deep" in found.detail


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_a_config_with_what_is_no_number_or_no_text_is_kept_and_verified(tmp_path: Path, dtype: str) -> None:
    """NaN equals no NaN; and a lone surrogate cannot be encoded but as JSON's escape."""
    built = build(MERGED["per-expert"], tmp_path)
    file = built.base / "config.json"
    odd = {"nan": float("nan"), "more": [float("-inf"), {"nan": float("nan")}], "text": "\ud800"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
    merge(built.base, built.adapter, tmp_path / "out", dtype=dtype)
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.dumps({name: held[name] for name in odd}) == json.dumps(odd)
    (tmp_path / "out" / "config.json").write_text(json.dumps({**held, "more": [float("inf")]}))
    (found,) = verify(tmp_path / "out", built.base, built.adapter).mismatches
    assert found.detail.startswith("more: found [inf], expected [-inf, ")


def test_an_out_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says of such a file that there is none."""
    out, base, adapter = published(tmp_path)
    opened = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.parent == out and path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr("loudmerge.verifying.outfiles.safe_open", unreadable)
    with pytest.raises(PermissionError):
        verify(out, base, adapter)


def unreadable(file: Path, **_: object) -> NoReturn:
    raise FileNotFoundError(f"No such file or directory: {file}")


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        ("another tensor", "does not hold .*weight: it changed while it was verified"),
        ("no header", r"has no header \(Expecting value.*\): it changed while it was verified"),
    ],
)
def test_a_base_that_is_saved_anew_during_a_verification_is_no_defect(
    stage: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has read the headers: what is read later may be another file."""
    out, base, adapter = published(tmp_path)

    def saving(*arguments: Any, **options: Any) -> Any:
        for shard in base.glob("*.safetensors"):
            save_file({"other": torch.zeros(1)}, shard)
            if stage == "no header":
                shard.write_bytes(b"")
        return list_out(*arguments, **options)

    monkeypatch.setattr("loudmerge.verifying.verify.list_out", saving)
    with pytest.raises(EnvironmentFailed, match=found):
        verify(out, base, adapter)


def test_an_adapter_that_is_saved_anew_during_a_verification_is_no_defect(tmp_path: Path) -> None:
    """safetensors has an error of its own for what is not in a file."""
    file = tmp_path / "adapter_model.safetensors"
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(EnvironmentFailed, match=r"cannot be read \(.*\): it changed while it was verified"):
        read_tensor(file, "q_proj.lora_A.weight")


def test_every_bit_of_a_published_out_counts(tmp_path: Path) -> None:
    """A flipped bit anywhere in the data of any shard is found."""
    out, base, adapter = published(tmp_path)
    rng = np.random.default_rng(0)
    for file in sorted(out.glob("*.safetensors")):
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for place in rng.integers(header, len(content), 12):
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            assert not verify(out, base, adapter).ok, (file, place)
        file.write_bytes(content)
    assert verify(out, base, adapter).ok


@pytest.mark.parametrize("rounding", ["nearest", "peft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "bias", "embedding", "rows"])
def test_what_merge_makes_of_dense_adapters_is_verified(
    tmp_path: Path, kind: str, dtype: str, rounding: str
) -> None:
    base, adapter = dense(tmp_path, kind, dtype)
    merge(base, adapter, tmp_path / "out", rounding=rounding, verify=False)
    found = verify(tmp_path / "out", base, adapter)
    assert found.ok, found.summary()
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    key = {"dora": LINEAR, "bias": LINEAR.replace("weight", "bias")}.get(kind, "model.embed_tokens.weight")
    # The base's tensor instead of the merged one.
    held[key] = load_file(base / "model.safetensors")[key]
    save_file(held, file, metadata={"format": "pt"})
    assert [(m.key, m.what) for m in verify(tmp_path / "out", base, adapter).mismatches] == [(key, "value")]


@pytest.mark.parametrize("kind", ["dora", "bias", "embedding"])
def test_the_errors_that_float32_may_make_are_few_units(tmp_path: Path, kind: str) -> None:
    base, adapter = dense(tmp_path, kind, "float32")
    merge(base, adapter, tmp_path / "out", verify=False)
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    key = {"dora": LINEAR, "bias": LINEAR.replace("weight", "bias")}.get(kind, "model.embed_tokens.weight")
    # Of the largest, whose unit no sum of this size is far below.
    place = held[key].abs().view(-1).argmax()
    held[key].view(-1).view(torch.int32)[place] += 64
    save_file(held, file, metadata={"format": "pt"})
    (found,) = verify(tmp_path / "out", base, adapter).mismatches
    assert (found.key, found.wrong) == (key, 1)


LINEAR = "model.layers.0.self_attn.q_proj.weight"


def dense(root: Path, kind: str, dtype: str) -> tuple[Path, Path]:
    """A base without experts; an adapter with DoRA, a bias, a LoRA on the embedding, or token rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    weights = {
        LINEAR: draw(12, 16),
        LINEAR.replace("weight", "bias"): draw(12),
        "model.embed_tokens.weight": draw(11, 16),
        "lm_head.weight": draw(11, 16),
    }
    held = {key: value.to(DTYPES[dtype]) for key, value in weights.items()}
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{LINEAR.removesuffix('.weight')}"
    found = {f"{prefix}.lora_A.weight": draw(3, 16) / 4, f"{prefix}.lora_B.weight": draw(12, 3) / 4}
    fields: dict[str, object] = {"target_modules": ["q_proj"], "peft_version": "0.19.1"}
    if kind == "dora":
        found[f"{prefix}.lora_magnitude_vector"] = draw(12).abs() + 1
        fields["use_dora"] = True
    elif kind == "bias":
        found[f"{prefix}.lora_B.bias"] = draw(12)
        fields["lora_bias"] = True
    elif kind == "embedding":
        found["base_model.model.model.embed_tokens.lora_embedding_A"] = draw(3, 11)
        found["base_model.model.model.embed_tokens.lora_embedding_B"] = draw(16, 3)
        fields["target_modules"] = ["q_proj", "embed_tokens"]
    else:
        found["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = draw(2, 16)
        fields["trainable_token_indices"] = {"embed_tokens": [2, 9]}
    save_file(found, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6,
        "bias": "none",
        **fields,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def test_another_adapter_s_merge_is_found(tmp_path: Path) -> None:
    out, base, _ = published(tmp_path / "a")
    other = build(replace(MERGED["per-expert"], seed=1), tmp_path / "b")
    assert {m.what for m in verify(out, base, other.adapter).mismatches} == {"value", "bytes"}


def test_a_defect_of_the_merge_s_arithmetic_stops_it_before_out_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second path does not inherit it: here the merge reads lora_B in the other packing."""
    built = build(MERGED["per-expert"], tmp_path)

    def wrong(lora_b: Array, experts: int, rank: int, _: object) -> Array:
        each: Array = lora_b.reshape(-1, experts, rank).transpose(1, 0, 2)
        return each

    monkeypatch.setattr("loudmerge.arithmetic.factors.unpack_lora_b", wrong)
    with pytest.raises(Mismatch, match=r"not published: its verification failed.\nNOT verified"):
        merge(built.base, built.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
