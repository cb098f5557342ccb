"""Qwen3-30B-A3B end to end where there is a GPU; the same code with a small config on the CPU."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loudmerge.compat import gpu
from loudmerge.compat.gpu import Options
from loudmerge.compat.inside import weights
from loudmerge.compat.inside.cell import source
from loudmerge.compat.inside.journey import Journey
from loudmerge.compat.judging.result import FAILED, NOT_RUN, OK, CellResult
from loudmerge.errors import EnvironmentFailed

SMALL = {
    **gpu.model_config(),
    "hidden_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "num_experts": 16,
    "vocab_size": 640,
    "initializer_range": 128**-0.5,
}
# The gains and the rate make the trained model sure of its samples, by 0.08 nats and more: arithmetic in
# bfloat16 differs from processor to processor, and so does what is trained.
ON_CPU = replace(
    gpu.RECIPE,
    device="cpu",
    vocabulary=512,
    tokens=64,
    learning_rate=7e-3,
    embedding_gain=20.0,
    head_gain=1.3,
    batch=8,
)
OPT_IN = "LOUDMERGE_E2E_GPU"
"""An environment variable: who only runs the tests has not asked for hours of a GPU and 129 GB of disk."""


def why_not() -> str | None:
    """Why the full size is not run here."""
    if not os.environ.get(OPT_IN):
        return f"takes hours and 129 GB: asked for by {OPT_IN}=1, or run by nox -s e2e_gpu"
    return gpu.why_not("cuda")


NO_GPU = why_not()


@dataclass(frozen=True)
class Ran:
    row: CellResult
    directory: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("gpu")
    yield Ran(gpu.run(directory, Options(recipe=ON_CPU, config=SMALL)), directory)
    shutil.rmtree(directory)


@pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")
def test_qwen3_30b_a3b_on_the_gpu(tmp_path: Path) -> None:
    try:
        row = gpu.run(tmp_path, Options())
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep three of them
    assert row.merged == (18432, 18432)
    assert row.status == OK, row.shortfalls


def test_the_full_size_is_run_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(OPT_IN, raising=False)
    assert why_not() == "takes hours and 129 GB: asked for by LOUDMERGE_E2E_GPU=1, or run by nox -s e2e_gpu"
    monkeypatch.setenv(OPT_IN, "1")
    assert why_not() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not() == f"torch {torch.__version__} finds no CUDA device"


def test_the_small_model_shows_what_the_large_one_must(ran: Ran) -> None:
    assert ran.row.status == OK, (ran.row.shortfalls, ran.row.figures)
    assert ran.row.merged == (3 * 16 * 3, 3 * 16 * 3)
    assert ran.row.figures is not None
    assert ran.row.figures.samples == (3, 3)


def test_the_row_is_one_of_the_table_and_names_its_memory(ran: Ran) -> None:
    assert ran.row.detail.startswith("3 layers, random weights; peak memory ")
    assert ran.row.date in (today(), f"{datetime.now(timezone.utc) - timedelta(days=1):%Y-%m-%d}")
    assert ran.row.source == source(Path.cwd())
    assert set(ran.row.stages) >= {"base", "train", "run trained", "run base", "merge", "run merged"}
    again = CellResult.from_json(json.loads(json.dumps(ran.row.to_json(), allow_nan=False)))
    assert repr(again) == repr(ran.row)  # nan is not equal to itself


def test_the_config_is_that_of_a_model_of_61_gb_and_18432_expert_matrices() -> None:
    config = gpu.model_config()
    tensors = [name for shapes in weights.shards(config) for name in shapes]
    assert weights.nbytes(config) == 61_064_245_248  # total_size of the Hub's index
    assert len(tensors) == 18_867
    assert sum(".experts." in name for name in tensors) == 18_432


def test_random_routers_are_sure_of_their_experts(ran: Ran) -> None:
    files = (ran.directory / "base").glob("*.safetensors")
    base = {name: tensor for file in files for name, tensor in load_file(file).items()}
    routers = [tensor.float().std() for name, tensor in base.items() if name.endswith("mlp.gate.weight")]
    others = [tensor.float().std() for name, tensor in base.items() if name.endswith("up_proj.weight")]
    assert len(routers) == 3
    assert min(routers) > 3.5 * max(others)


def test_the_first_layers_of_given_weights_are_trained(ran: Ran, tmp_path: Path) -> None:
    given = ran.directory / "base"
    row = gpu.run(tmp_path, Options(weights=str(given), layers=1, recipe=ON_CPU))
    assert row.cell == "gpu-qwen3-30b-a3b-1-layers"
    assert row.detail.startswith(f"1 layers, {given}; ")
    assert row.merged == (16 * 3, 16 * 3)
    kept = {name for file in (tmp_path / "base").glob("*.safetensors") for name in load_file(file)}
    shorter = {**SMALL, "num_hidden_layers": 1}
    assert kept == {name for shapes in weights.shards(shorter) for name in shapes}


def test_more_layers_than_there_are_is_an_error(ran: Ran, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 3 layers, expected at least 4"):
        weights.first_layers(ran.directory / "base", tmp_path / "base", 4)


def test_a_training_that_moves_nothing_falls_short(tmp_path: Path) -> None:
    still = replace(ON_CPU, learning_rate=1e-9)
    row = gpu.run(tmp_path, Options(recipe=still, config={**SMALL, "num_hidden_layers": 1}))
    assert [shortfall.check for shortfall in row.shortfalls] == ["kl_base_trained", "unmoved"]
    assert row.status == "failed"


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and merged model alone would take 122 GB."""
    monkeypatch.setattr(weights, "write_random", lambda *_: pytest.fail("61 GB would be written"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=123 * 10**9))
    with pytest.raises(EnvironmentFailed, match="found 123 GB free, expected 129 GB for base, adapter and "):
        gpu.run(tmp_path, Options(recipe=replace(gpu.RECIPE, device="cpu")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layers", "what"), [(None, "for adapter"), (1, "for base, adapter")])
def test_a_disk_that_is_too_small_for_given_weights_is_named_too(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int | None, what: str
) -> None:
    """All of them are read where they lie; the first layers are a base of their own."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    options = Options(weights=str(ran.directory / "base"), layers=layers, recipe=ON_CPU)
    with pytest.raises(EnvironmentFailed, match=rf"found 0 GB free, expected 0 GB {what} and merged model\."):
        gpu.run(tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_no_larger_than_the_disk_is_asked_for(ran: Ran) -> None:
    written = (ran.directory / "adapter" / "adapter_model.safetensors").stat().st_size
    asked = weights.lora_nbytes(SMALL, gpu.RECIPE.rank)
    assert 0.6 * asked < written <= asked + 100_000  # of names and shapes


def test_a_side_file_in_a_folder_comes_along(ran: Ran, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(ran.directory / "base", given)
    (given / "additional_chat_templates").mkdir()
    (given / "additional_chat_templates" / "tool.jinja").write_text("x", "utf-8")
    weights.first_layers(given, tmp_path / "base", 1)
    assert (tmp_path / "base" / "additional_chat_templates" / "tool.jinja").read_text("utf-8") == "x"


def test_without_a_gpu_the_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "results"), "--layers", "2"]) == 0
    document = json.loads((tmp_path / "results" / "gpu-qwen3-30b-a3b-2-layers.json").read_text("utf-8"))
    row = CellResult.from_json(document)
    assert row.status == NOT_RUN
    assert row.detail == f"torch {torch.__version__} finds no CUDA device"
    assert row.date == today()
    assert json.loads(capsys.readouterr().out) == document
    assert gpu.main(["--results", str(tmp_path / "results"), "--layers", "2", "--require"]) == 1
    assert json.loads(capsys.readouterr().out) == document


def today() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%d}"


@pytest.mark.parametrize("layers", ["0", "-1"])
def test_no_layers_at_all_is_a_usage_error(
    tmp_path: Path, layers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--results", str(tmp_path), "--device", "cpu", "--layers", layers])
    assert f"found {layers}, expected a number from 1 on" in capsys.readouterr().err


def left(results: Path) -> CellResult:
    """The one row there."""
    (file,) = results.iterdir()
    return CellResult.from_json(json.loads(file.read_text("utf-8")))


def test_a_run_that_ends_in_an_error_leaves_a_row_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    there = ["--results", str(results), "--device", "cpu", "--directory", str(tmp_path / "scratch")]
    assert gpu.main([*there, "--weights", str(tmp_path / "nothing")]) == 1
    row = left(results)
    assert (row.cell, row.status, row.lane, row.date) == (gpu.CELL, FAILED, "gpu", today())
    assert row.detail.startswith(f"the run ended in ValueError: {tmp_path / 'nothing'}")
    assert row.detail.rpartition("; ")[2].startswith("peak memory ")
    assert [(each.check, each.found) for each in row.shortfalls] == [("journey", row.detail)]
    said = capsys.readouterr()
    assert CellResult.from_json(json.loads(said.out)) == row
    assert "Traceback" in said.err


class CompilationError(Exception):
    """Of Triton: none of Python's own."""


@pytest.mark.parametrize("error", [CompilationError("at 3:4"), ImportError("Descriptors"), KeyError("x")])
def test_a_run_that_ends_in_any_other_error_is_a_row_that_names_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The memory that it had come to is said, too: of the GPU's, above all, when there was too little."""

    def fail(_: Path, __: Options, meter: gpu.Meter) -> None:
        meter("train")
        meter.gpu_bytes["train"] = 70 << 30
        raise error

    monkeypatch.setattr(gpu, "run", fail)
    with pytest.raises(type(error)):
        gpu.main(["--results", str(tmp_path), "--device", "cpu"])
    row = left(tmp_path)
    assert (row.status, row.source) == (FAILED, source(Path.cwd()))
    assert row.detail.startswith(
        f"the run ended in {type(error).__name__}: {error}; peak memory 70.0 GiB of GPU"
    )


class Killed(BaseException):
    """What no `except` is for."""


def test_a_run_that_is_stopped_leaves_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an older row that was ok, and not one without its versions where a package is missing."""

    def stop(*_: object) -> None:
        raise Killed

    def installed(package: str) -> str:
        if package == "trl":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(gpu, "run", stop)
    monkeypatch.setattr(gpu, "version", installed)
    older = CellResult(gpu.CELL, "gpu", OK, {})
    (tmp_path / f"{gpu.CELL}.json").write_text(json.dumps(older.to_json()), "utf-8")
    with pytest.raises(Killed):
        gpu.main(["--results", str(tmp_path), "--device", "cpu"])
    row = left(tmp_path)
    assert (row.status, row.detail) == (FAILED, "the run did not end: its log says why")
    assert row.versions == {"torch": "1", "transformers": "1", "peft": "1"}


def test_a_row_may_reach_what_the_original_table_has() -> None:
    versions = {"transformers": "5.5.0", "peft": "0.19.1", "trl": "1.4.0"}
    assert gpu.most_divergence(versions, 1e-6) == pytest.approx(2.1e-4)
    assert gpu.most_divergence({**versions, "trl": "0.25.1"}, 1e-6) == pytest.approx(gpu.KL_AT_MOST)


def fallen_short(ran: Ran, **figures: Any) -> list[str]:
    """The checks that the small model's run would have failed with other figures."""
    assert ran.row.figures is not None
    shown = Journey(
        replace(ran.row.figures, **figures),
        *("fused", "standard", (3 * 16 * 3, 3 * 16 * 3), Path(), Path(), Path()),
        *(ran.row.versions, (), ("one", "two", "three"), 0),
    )
    return [short.check for short in gpu.shortfalls(shown, SMALL)]


def test_bfloat16_arithmetic_need_not_be_better_than_its_own_noise(ran: Ran) -> None:
    assert fallen_short(ran, kl_bfloat16_arithmetic=1.5e-4, kl_floor=1.6e-4) == []
    assert fallen_short(ran, kl_bfloat16_arithmetic=1.7e-4, kl_floor=1.6e-4) == ["kl_bfloat16_arithmetic"]


@pytest.mark.parametrize("kl", [2e-4, math.nan])
def test_noise_excuses_nothing_in_float32_arithmetic(ran: Ran, kl: float) -> None:
    assert fallen_short(ran, kl_trained_merged=kl, kl_floor=1.0) == ["kl_trained_merged"]


def test_noise_that_was_not_measured_excuses_nothing(ran: Ran) -> None:
    found = fallen_short(ran, kl_bfloat16_arithmetic=1.1e-4, kl_floor=math.nan)
    assert found == ["kl_bfloat16_arithmetic"]
