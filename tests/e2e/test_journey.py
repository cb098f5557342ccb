"""The journey that every cell of the matrix makes, and that its figures go red when the merge is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import loudmerge
from loudmerge.arithmetic.factors import Factors, factors
from loudmerge.comparing import behaviour
from loudmerge.compat.inside import journey
from loudmerge.compat.inside.journey import CELL_RECIPE, Journey, Merge, Reference
from loudmerge.compat.judging import cells
from loudmerge.compat.judging.cells import Expectation
from loudmerge.compat.judging.result import FAILED, OK, CellResult, Tests
from loudmerge.compat.judging.verdict import judged
from loudmerge.errors import Mismatch
from loudmerge.executing import readahead
from loudmerge.executing.report import MergeReport
from loudmerge.layout import LoraBLayout
from loudmerge.planning.plan import Site
from loudmerge.system.memory import Array

MATRIX = Path(__file__).parents[2] / cells.FILE
MATRICES = CELL_RECIPE.layers * CELL_RECIPE.experts * 3
SOME_EXPERT = 5

FactorsOf = Callable[[Site, Array, Array], Factors]
RIGHT: FactorsOf = factors


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return journey.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def found(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    return journey.measure(reference, tmp_path_factory.mktemp("merged"))


def expectation(found: Journey) -> Expectation:
    """What matrix.toml expects of every cell, and the way of this one."""
    return replace(cells.load(MATRIX).cells[0].expects, path=found.path, orientation=found.orientation)


def checks(found: Journey) -> list[str]:
    """The checks by which a cell of this journey, all else in order, is red; none when it is green."""
    expected = expectation(found)
    row = CellResult(
        cell="this",
        lane="released",
        status=OK,
        versions=found.versions,
        path=found.path,
        orientation=found.orientation,
        merged=found.merged,
        figures=found.figures,
        tests=Tests(expected.tests_at_least, failed=0, skipped=0, suite=expected.suite_at_least),
        families={f"family_{number}": "ok" for number in range(expected.families_at_least)},
        unmoved=found.unmoved,
    )
    row = judged(expected, row)
    assert (row.status == FAILED) == bool(row.shortfalls)
    return [shortfall.check for shortfall in row.shortfalls]


def test_a_right_merge_is_green(found: Journey) -> None:
    assert checks(found) == [], found.figures
    assert found.merged == (MATRICES, MATRICES)


def test_the_training_moved_the_model_and_was_stable(found: Journey) -> None:
    assert found.figures.kl_base_trained >= 0.5
    assert len(found.losses) == 5
    assert max(found.losses) == found.losses[0]
    assert found.losses[-1] < found.losses[0] - 1


def test_a_float32_merge_is_the_trained_model_but_for_the_order_of_sums(found: Journey) -> None:
    assert found.figures.kl_float32_merge <= 1e-10


def test_bfloat16_arithmetic_would_hide_what_float32_shows(found: Journey) -> None:
    assert found.figures.kl_floor > found.figures.kl_trained_merged
    assert found.figures.kl_bfloat16_arithmetic > found.figures.kl_trained_merged


def test_the_samples_say_something(found: Journey, reference: Reference) -> None:
    """Each is the training's work, not the base's, varied, and unlike the others."""
    assert found.unmoved == 0
    assert len(set(found.samples)) == journey.SAMPLES
    different = [len(set(each.ids)) for each in reference.trained_run.continuations]
    assert min(different) >= 6, found.samples


def test_the_samples_differ_where_they_can() -> None:
    """The surest of all is continued twice."""

    def sure(first: int, logit: float) -> behaviour.Continuation:
        logits = torch.zeros(10, 40)
        logits[:, 0] = logit
        return behaviour.Continuation(tuple(range(first, first + 10)), logits.log_softmax(-1))

    assert journey._chosen([sure(0, 9.0), sure(0, 9.0), sure(1, 5.0), sure(2, 6.0)]) == [0, 2, 3]
    assert journey._chosen([sure(0, 9.0), sure(0, 9.0), sure(1, 5.0)]) == [0, 1, 2]


def test_samples_are_continued_at_once_as_each_would_be_alone(reference: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference.base, dtype=torch.float32)
    model = journey._evaluated(model)
    together = journey._continue_greedily(model, reference.passages.prompts, reference.ends)
    for prompt, found in zip(reference.passages.prompts, together, strict=True):
        alone = behaviour.continue_greedily(model, prompt, reference.ends)
        assert found.ids == alone.ids
        torch.testing.assert_close(found.log_probabilities, alone.log_probabilities)


def test_sequences_of_one_length_are_run_at_once_as_each_would_be_alone(reference: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference.base, dtype=torch.float32)
    sequences = [ids[:length] for ids in reference.passages.sequences for length in (20, 30)]
    sequences += reference.passages.sequences
    together = journey._logits(journey._evaluated(model), sequences)
    torch.testing.assert_close(together, behaviour.logits(model, sequences))


def test_a_model_computes_in_float32_as_if_it_were_cast_to_it(found: Journey, reference: Reference) -> None:
    """It was loaded in bfloat16, and is in bfloat16 again after each pass."""
    model, cast = (AutoModelForCausalLM.from_pretrained(found.out, dtype=torch.bfloat16) for _ in range(2))
    journey.compute_in_float32(journey._evaluated(model))
    sequences = reference.passages.sequences
    narrow = behaviour.logits(journey._evaluated(cast), sequences)
    wide = behaviour.logits(cast.float(), sequences)
    assert all(map(torch.equal, behaviour.logits(model, sequences), wide))
    assert not any(map(torch.equal, narrow, wide))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16


def test_what_it_leaves_can_be_merged_again(found: Journey, tmp_path: Path) -> None:
    loudmerge.merge(found.base, found.adapter, tmp_path / "again")
    for file in found.out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_training_that_moves_nothing_proves_nothing(tmp_path: Path) -> None:
    still = journey.run(tmp_path, replace(CELL_RECIPE, learning_rate=1e-8, layers=1), float32_merge=False)
    assert "kl_base_trained" in checks(still)
    assert still.unmoved == journey.SAMPLES


def drops_an_expert(site: Site, lora_a: Array, lora_b: Array) -> Factors:
    """The update of one expert of each layer is left out."""
    found = RIGHT(site, lora_a, lora_b)
    if site.num_experts > 1:
        left = found.left.copy()
        left[SOME_EXPERT] = 0
        return replace(found, left=left)
    is_its = f".experts.{SOME_EXPERT}." in site.pair.module
    return replace(found, left=np.zeros_like(found.left)) if is_its else found


def swaps_a_and_b(site: Site, lora_a: Array, lora_b: Array) -> Factors:
    """A transposed update is taken where it fits: in the fused gate and up, which are square here."""
    found = RIGHT(site, lora_a, lora_b)
    if found.left.shape[1] != found.right.shape[2]:
        return found
    return replace(found, left=found.right.transpose(0, 2, 1), right=found.left.transpose(0, 2, 1))


def reads_b_grouped(site: Site, lora_a: Array, lora_b: Array) -> Factors:
    """rank_major columns read as grouped_by_expert."""
    return RIGHT(replace(site, lora_b_layout=LoraBLayout.GROUPED_BY_EXPERT), lora_a, lora_b)


def merging_with(wrong: FactorsOf, *, verify: bool) -> Merge:
    """`loudmerge.merge` with this arithmetic in it."""

    def merge(*places: Any, **options: Any) -> MergeReport:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readahead, "factors", wrong)
            return loudmerge.merge(*places, **options, verify=verify)

    return merge


SABOTAGES = pytest.mark.parametrize("wrong", [drops_an_expert, swaps_a_and_b, reads_b_grouped])


def skip_what_cannot_be(wrong: FactorsOf, reference: Reference) -> None:
    if wrong is not drops_an_expert and not reference.fused:
        pytest.skip("each expert has Linears of its own: no packing to misread, none of them square")


@SABOTAGES
def test_a_wrong_merge_turns_the_cell_red(wrong: FactorsOf, reference: Reference, tmp_path: Path) -> None:
    """Every count is as ever: only how the merged model behaves tells."""
    skip_what_cannot_be(wrong, reference)
    wrongly = journey.measure(reference, tmp_path, merge=merging_with(wrong, verify=False))
    assert wrongly.merged == (MATRICES, MATRICES)
    assert {"kl_float32_merge", "kl_trained_merged", "kl_base_merged"} <= set(checks(wrongly))


@SABOTAGES
def test_verify_catches_a_wrong_merge_before_its_figures_are_taken(
    wrong: FactorsOf, reference: Reference, tmp_path: Path
) -> None:
    skip_what_cannot_be(wrong, reference)
    with pytest.raises(Mismatch, match="verification failed"):
        journey.measure(reference, tmp_path, merge=merging_with(wrong, verify=True))
    assert not (tmp_path / journey.MERGED).exists()
