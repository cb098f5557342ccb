"""merge() equals a float64 reference on random models and adapters, and refuses every random corruption."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge.errors import REFUSAL_CODES
from tests.unit.corruptions import CORRUPTIONS, Damage, site_rank
from tests.unit.reference import DTYPES, Array, Built, Expected, build, rounded, ulp
from tests.unit.strategies import NAMED, cases, examples, must_merge, option_orientation, undecidable
from tests.unit.synthetic import SIDE_FILES, Case

UNIT32 = 2.0**-24
SEEDS = st.integers(0, 2**31)
# Thousands of small merges, each synced to disk, take minutes on a disk and seconds in memory.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts elements over the whole run: 0.01 % may differ from the correctly rounded reference.

    Four standard deviations of that count are allowed on top, so that chance fails no run; rounding twice
    would be off in about 3 %.
    """
    counter: Counter[str] = Counter()
    yield counter
    rounded_elements = sum(counter[dtype] for dtype in ("bfloat16", "float16"))
    allowed = 1e-4 * rounded_elements
    assert counter["off"] <= allowed + 4 * allowed**0.5


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of a checkpoint directory, and the file that holds it."""
    held: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for key in reader.keys():  # noqa: SIM118
                assert key not in held, f"{key} is in two files"
                held[key], where[key] = reader.get_tensor(key), file.name
    return held, where


def snapshot(*paths: Path) -> dict[str, str]:
    """The hash of every file below these directories."""
    files = [file for path in paths for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_tensor(key: str, got: torch.Tensor, want: Expected, rank: int, tally: Counter[str]) -> None:
    """One merged tensor: float32 within a few ulp of every term; else correctly rounded but for near ties."""
    assert (got.dtype, tuple(got.shape)) == (DTYPES[want.dtype], want.base.shape), key
    value = got.double().numpy()
    if want.delta is None or want.size is None:
        assert np.array_equal(value, want.base), f"{key} changed"
        return
    exact = want.base + want.delta
    # The float32 sum of rank products and a base: Higham's bound for a dot product of that length.
    error = UNIT32 * ((rank + 3) * want.size + 2 * np.abs(want.base))
    if want.dtype == "float32":
        assert (np.abs(value - exact) <= error + 0.5 * ulp(exact, "float32")).all(), key
        return
    right = rounded(exact, want.dtype)
    off = value != right
    tally[want.dtype] += off.size
    tally["off"] += int(off.sum())
    assert (np.abs(value - exact)[off] <= (0.5 * ulp(exact, want.dtype) + error)[off]).all(), key


def kept(built: Built, merged: dict[str, torch.Tensor]) -> float | None:
    """<W' - W, dW> / <dW, dW> over all merged tensors, in float64."""
    above = below = 0.0
    for key, want in built.expected.items():
        if want.delta is not None:
            step: Array = merged[key].double().numpy() - want.base
            above += float((step * want.delta).sum())
            below += float((want.delta * want.delta).sum())
    return above / below if below else None


def check_output(case: Case, built: Built, out: Path, tally: Counter[str]) -> None:
    """Keys, shards, dtypes, shapes, values, side files and the report of OUT."""
    merged, where = read(out)
    assert where == dict(built.shard_of)
    rank = max([case.rank, *case.rank_pattern.values()])
    # Hypothesis tries variants of one example: count a seed's elements once.
    seen = tally[f"seed {case.seed}"]
    tally[f"seed {case.seed}"] += 1
    for key, want in built.expected.items():
        check_tensor(key, merged[key], want, rank, Counter() if seen else tally)
    for name in ("config.json", *SIDE_FILES):
        assert (out / name).read_bytes() == (built.base / name).read_bytes(), name
    index = "model.safetensors.index.json"
    assert (out / index).exists() == (built.base / index).exists()
    if (out / index).exists():
        assert json.loads((out / index).read_text()) == json.loads((built.base / index).read_text())
    check_report(case, built, json.loads((out / "merge_report.json").read_text()), merged)


def check_report(case: Case, built: Built, report: dict[str, Any], merged: dict[str, torch.Tensor]) -> None:
    assert (report["status"], report["refusal"]) == ("merged", None)
    for name in ("expert", "dense", "replaced"):
        number = built.counts[name]
        assert report["counts"][name] == {"attempted": number, "applied": number}, name
    assert report["counts"]["copied"] == built.counts["copied"]
    assert report["adapter_tensors"] == {"total": built.adapter_tensors, "consumed": built.adapter_tensors}
    want = kept(built, merged)
    if want is not None:
        assert report["delta_kept"]["overall"] == pytest.approx(want, abs=1e-5)
    if case.fused and case.num_experts > 1:
        ranks = {site_rank(case, layer, name) for layer in case.fused_layers for name in case.fused}
        assert 1 in ranks or report["layout"]["lora_b_layout"] == case.packing
        assert report["layout"]["orientation"] == option_orientation(case)


def check_refused(built: Built, **options: Any) -> loudmerge.MergeRefused:
    """merge() refuses; OUT and its surroundings are as before, and so are the inputs."""
    root = built.base.parent
    before = snapshot(root)
    with pytest.raises(loudmerge.MergeRefused) as caught:
        loudmerge.merge(built.base, built.adapter, root / "out", rounding="nearest", **options)
    assert {problem.code for problem in caught.value.problems} <= REFUSAL_CODES
    assert str(caught.value).startswith(f"{caught.value.code}: ")
    assert sorted(path.name for path in root.iterdir()) == ["adapter", "base"]
    assert snapshot(root) == before
    return caught.value


@examples(in_ci=900)
@given(case=cases())
def test_merge_equals_the_float64_reference(case: Case, tally: Counter[str]) -> None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        before = snapshot(built.base, built.adapter)
        if not must_merge(case):
            event("undecidable")
            assert check_refused(built).code == "ambiguous-layout"
            return
        event(case.family.name)
        out = Path(directory) / "out"
        loudmerge.merge(built.base, built.adapter, out, rounding="nearest", verify=True)
        check_output(case, built, out, tally)
        assert snapshot(built.base, built.adapter) == before
        assert sorted(path.name for path in Path(directory).iterdir()) == ["adapter", "base", "out"]


@examples(in_ci=900)
@given(case=cases(), name=st.sampled_from(sorted(CORRUPTIONS)), seed=SEEDS)
def test_one_corruption_is_refused_and_nothing_is_written(case: Case, name: str, seed: int) -> None:
    assume(must_merge(case))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        codes = CORRUPTIONS[name](Damage(case, built, np.random.default_rng(seed)))
        assume(codes is not None)
        event(name)
        assert check_refused(built).code in (codes or ())


@examples(in_ci=150)
@given(case=undecidable())
def test_a_square_parameter_alone_is_ambiguous_until_the_user_says(case: Case, tally: Counter[str]) -> None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        refused = check_refused(built)
        assert refused.code == "ambiguous-layout"
        assert "--orientation" in refused.hint
        out = Path(directory) / "out"
        option = option_orientation(case)
        loudmerge.merge(built.base, built.adapter, out, rounding="nearest", orientation=option)
        check_output(case, built, out, tally)


@examples(in_ci=100)
@given(case=cases(kinds=("fused",)), seed=SEEDS)
def test_an_unmarked_adapter_of_unsloth_needs_the_packing(case: Case, seed: int, tally: Counter[str]) -> None:
    assume(must_merge(case))
    ranks = [case.rank, *case.rank_pattern.values()]
    assume(min(ranks) > 1 and case.num_experts > 1)
    packing = ("rank_major", "grouped_by_expert")[seed % 2]
    mapping = {"auto_mapping": {"base_model_class": "AnyForCausalLM", "unsloth_fixed": True}}
    case = replace(case, marker="", packing=packing, extra=mapping)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        refused = check_refused(built)
        assert refused.code == "ambiguous-layout"
        assert "--lora-b-layout" in refused.hint
        out = Path(directory) / "out"
        loudmerge.merge(built.base, built.adapter, out, rounding="nearest", lora_b_layout=packing)
        check_output(case, built, out, tally)


@examples(in_ci=100)
@given(case=cases(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_another_dtype_is_rounded_to_once_and_by_every_tensor(case: Case, dtype: str) -> None:
    assume(must_merge(case))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        out = Path(directory) / "out"
        loudmerge.merge(built.base, built.adapter, out, rounding="nearest", dtype=dtype)
        merged, where = read(out)
        assert where == dict(built.shard_of)
        rank = max([case.rank, *case.rank_pattern.values()])
        for key, want in built.expected.items():
            exact = replace(want, base=rounded(want.base, dtype)) if want.delta is None else want
            check_tensor(key, merged[key], replace(exact, dtype=dtype), rank, Counter())
        config = json.loads((out / "config.json").read_text())
        before = json.loads((built.base / "config.json").read_text())
        assert config == {**before, "torch_dtype": dtype}


@examples(in_ci=60)
@given(case=cases())
def test_rounding_as_peft_does_rounds_the_update_of_a_parameter_first(case: Case) -> None:
    """ParamWrapper.get_delta_weight casts to the parameter's dtype; Linear's `weight +=` rounds once."""
    assume(must_merge(case) and case.base_dtype != "float32")
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        built = build(case, Path(directory))
        loudmerge.merge(built.base, built.adapter, Path(directory) / "out", rounding="peft")
        merged, _ = read(Path(directory) / "out")
        rank = max([case.rank, *case.rank_pattern.values()])
        for key, want in built.expected.items():
            if not want.parameter or want.delta is None or want.size is None:
                check_tensor(key, merged[key], want, rank, Counter())
            else:
                twice = rounded(want.base + rounded(want.delta, want.dtype), want.dtype)
                off = merged[key].double().numpy() != twice
                error = UNIT32 * 8 * want.size
                tie = np.abs(want.delta - rounded(want.delta, want.dtype)) + error
                assert (tie[off] >= 0.5 * ulp(want.delta, want.dtype)[off] * (1 - 2**-9)).all(), key


def test_the_number_of_threads_does_not_change_a_byte(tmp_path: Path) -> None:
    family = NAMED["qwen3_moe"]
    both = ("gate_up", "down")
    case = Case(family, fused=both, layers=2, fused_layers=(0, 1), shards=3, base_dtype="bfloat16")
    built = build(case, tmp_path)
    hashes = []
    for threads in (1, 4):
        out = tmp_path / f"out{threads}"
        loudmerge.merge(built.base, built.adapter, out, threads=threads)
        files = snapshot(out).items()
        hashes.append({Path(name).name: value for name, value in files if "report" not in name})
    assert hashes[0] == hashes[1]


def test_a_base_without_safetensors_metadata_is_merged(tmp_path: Path) -> None:
    built = build(Case(NAMED["qwen3_moe"], fused=("down",)), tmp_path)
    file = built.base / "model.safetensors"
    save_file(load_file(file), file)
    loudmerge.merge(built.base, built.adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
