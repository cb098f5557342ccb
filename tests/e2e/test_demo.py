"""The demo, as `loudmerge demo` runs it: real training, and what it then claims."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from loudmerge import EnvironmentFailed, MergeRefused
from loudmerge.demo import demo, training
from loudmerge.demo.demo import DemoResult
from loudmerge.demo.training import ATTENTION, Recipe
from loudmerge.system.threads import one_torch_thread

RECIPE = Recipe()
EXPERT_MATRICES = RECIPE.layers * RECIPE.experts * 3
ATTENTION_MATRICES = RECIPE.layers * len(ATTENTION)


@dataclass(frozen=True)
class Ran:
    result: DemoResult
    directory: Path
    stdout: str
    stages: frozenset[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    directory = tmp_path_factory.mktemp("demo") / "new"
    printed, stages = io.StringIO(), set()
    with redirect_stdout(printed):
        result = demo.run(directory, progress=lambda stage, _done, _total: stages.add(stage))
    return Ran(result, directory, printed.getvalue(), frozenset(stages))


def test_the_merged_model_is_the_trained_one(ran: Ran) -> None:
    assert ran.result.ok, ran.result.summary()


def test_training_moved_the_model_by_more_than_a_merge_may_lose(ran: Ran) -> None:
    found = ran.result.comparison
    assert found.kl_base_trained >= demo.PROVES_SOMETHING
    assert found.kl_base_merged == pytest.approx(found.kl_base_trained, rel=0.02)
    assert found.kl_trained_merged < 0.01 * found.kl_base_trained
    assert ran.result.trained.losses[-1] < ran.result.trained.losses[0]
    assert len(ran.result.trained.losses) == RECIPE.steps


def test_experts_and_attention_are_trained_and_merged(ran: Ran) -> None:
    counts = ran.result.merge.to_json()["counts"]
    assert counts["expert"] == {"attempted": EXPERT_MATRICES, "applied": EXPERT_MATRICES}
    assert counts["dense"] == {"attempted": ATTENTION_MATRICES, "applied": ATTENTION_MATRICES}


def test_every_matrix_of_the_adapter_was_trained(ran: Ran) -> None:
    tensors = load_file(ran.directory / "adapter" / "adapter_model.safetensors")
    untrained = [name for name, tensor in tensors.items() if "lora_B" in name and not tensor.any()]
    assert any(".experts." in name for name in tensors)
    assert not untrained


def test_the_experts_are_targeted_as_the_installed_transformers_has_them(ran: Ran) -> None:
    model = AutoModelForCausalLM.from_pretrained(ran.directory / "base", dtype=torch.bfloat16)
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    config = json.loads((ran.directory / "adapter" / "adapter_config.json").read_text("utf-8"))
    expected = set(training.FUSED_EXPERTS) if fused else set()
    assert set(config.get("target_parameters") or ()) == expected
    assert set(config["target_modules"]) == {*ATTENTION, *(() if fused else training.EXPERT_LINEARS)}


def test_a_model_can_be_loaded_from_each_of_the_directories_it_names(ran: Ran) -> None:
    for name in ("base", demo.MERGED):
        model = AutoModelForCausalLM.from_pretrained(ran.directory / name, dtype=torch.bfloat16)
        assert model.config.model_type == "qwen3_moe"


def test_standard_output_is_left_to_the_caller(ran: Ran) -> None:
    assert ran.stdout == ""


def test_the_merge_reports_its_progress(ran: Ran) -> None:
    assert ran.stages


def test_the_result_is_a_json_document(ran: Ran) -> None:
    document = json.loads(json.dumps(ran.result.to_json(), allow_nan=False))
    assert document["status"] == "ok"
    assert document["merge"]["status"] == "merged"
    assert document["verify"]["ok"] is True
    assert document["directory"] == str(ran.directory)


def test_the_summary_names_the_directory_and_the_versions(ran: Ran) -> None:
    summary = ran.result.summary()
    assert str(ran.directory) in summary
    assert f"torch {metadata.version('torch')}" in summary  # torch itself may add its CUDA version
    assert f"{EXPERT_MATRICES}/{EXPERT_MATRICES}" in summary


def test_a_training_that_changed_nothing_proves_nothing(ran: Ran) -> None:
    barely = replace(ran.result, comparison=replace(ran.result.comparison, kl_base_trained=0.09))
    assert not barely.ok
    assert "too little to prove anything" in barely.summary()


def test_what_is_there_is_not_overwritten(ran: Ran) -> None:
    before = (ran.directory / "base" / "config.json").read_bytes()
    with pytest.raises(MergeRefused, match="base: found a file or directory, expected nothing") as caught:
        demo.run(ran.directory)
    assert caught.value.code == "out-exists"
    assert len(caught.value.problems) == 3
    assert (ran.directory / "base" / "config.json").read_bytes() == before


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(EnvironmentFailed, match=r"(?s)trl .*pip install 'loudmerge\[demo\]'"):
        demo.run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_libraries_are_loud_again_afterwards() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with training.quiet_libraries():
        warnings.warn("not raised", FutureWarning, stacklevel=1)
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with pytest.warns(FutureWarning, match="raised"):
        warnings.warn("raised", FutureWarning, stacklevel=1)


def test_the_random_state_of_torch_is_the_callers(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    training.train(tmp_path, replace(RECIPE, steps=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_torch_has_its_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_torch_thread():
            raise KeyError(torch.get_num_threads())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_the_demo_imports_no_framework() -> None:
    frameworks = {"torch", "transformers", "peft", "trl"}
    code = f"import loudmerge.demo.demo, sys; print(sorted({frameworks} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
