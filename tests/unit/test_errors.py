"""The exception tree, and what a refusal says."""

from __future__ import annotations

import pickle

import pytest

from loudmerge.errors import (
    REFUSAL_CODES,
    SHOWN_PROBLEMS,
    EnvironmentFailed,
    MergeRefused,
    Mismatch,
    Problem,
    plural,
)

SHAPE = Problem(
    "shape-mismatch",
    "model.layers.0.mlp.experts.gate_up_proj (gate, expert 3)",
    "lora_A [64, 40]",
    "[64, 48]",
    "Pass the base that the adapter was trained on.",
)


def problems(count: int) -> list[Problem]:
    return [Problem("missing-base-tensor", f"w{i}", "nothing", "a tensor", "Get it.") for i in range(count)]


def test_the_refusal_codes_are_those_of_the_contract() -> None:
    contract = """
        ambiguous-layout unknown-layout shape-mismatch rank-mismatch num-experts-mismatch experts-incomplete
        unconsumed-adapter-tensor missing-adapter-tensor missing-base-tensor unsupported-adapter
        unsupported-base non-finite corrupt-file unsafe-file out-exists
    """
    assert set(contract.split()) == REFUSAL_CODES


@pytest.mark.parametrize("error", [MergeRefused, Mismatch, EnvironmentFailed])
def test_every_exception_is_a_runtime_error_and_none_is_another(error: type[Exception]) -> None:
    """`except RuntimeError` is what callers of peft's merge have; an exit code belongs to exactly one."""
    assert error.__bases__ == (RuntimeError,)


def test_an_unknown_refusal_code_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="'shape_mismatch' is not a refusal code"):
        Problem("shape_mismatch", "w", "a", "b", "Do.")


def test_a_problem_names_its_code_place_finding_expectation_and_help() -> None:
    assert str(SHAPE) == (
        "shape-mismatch: model.layers.0.mlp.experts.gate_up_proj (gate, expert 3): "
        "found lora_A [64, 40], expected [64, 48]. Pass the base that the adapter was trained on."
    )


def test_a_problem_without_help_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"^w: a refusal names the option or step that helps$"):
        Problem("non-finite", "w", "NaN", "numbers", "")


def test_a_refusal_for_one_problem_is_that_problem() -> None:
    refusal = MergeRefused(SHAPE)
    assert (refusal.code, refusal.where, refusal.hint) == (SHAPE.code, SHAPE.where, SHAPE.hint)
    assert refusal.problems == (SHAPE,)
    assert str(refusal) == str(SHAPE)


def test_a_refusal_opens_with_the_code_of_its_first_problem() -> None:
    refusal = MergeRefused([SHAPE, *problems(2)])
    assert refusal.code == str(refusal).split(":")[0] == "shape-mismatch"


def test_a_refusal_gives_the_first_problem_in_full_and_lists_the_rest() -> None:
    lines = str(MergeRefused([SHAPE, *problems(2)])).splitlines()
    assert lines == [str(SHAPE), "2 more problems:", *(f"  {problem}" for problem in problems(2))]


def test_one_more_problem_is_not_a_plural() -> None:
    assert "1 more problem:" in str(MergeRefused(problems(2)))


def test_a_long_list_of_problems_is_cut_and_counted() -> None:
    refusal = MergeRefused(problems(1 + SHOWN_PROBLEMS + 5))
    assert len(refusal.problems) == 1 + SHOWN_PROBLEMS + 5
    lines = str(refusal).splitlines()
    assert lines[-1] == "  … and 5 more"
    assert lines[-2] == f"  {refusal.problems[SHOWN_PROBLEMS]}"


def test_exactly_as_many_problems_as_are_shown_are_not_cut() -> None:
    assert "…" not in str(MergeRefused(problems(1 + SHOWN_PROBLEMS)))


def test_a_refusal_survives_pickling() -> None:
    """Process pools and distributed launchers carry exceptions home by pickle."""
    error = MergeRefused([SHAPE, *problems(3)])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (again.problems, str(again)) == (error.problems, str(error))


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 matrices"), (1, "1 matrix"), (2, "2 matrices")],
)
def test_one_is_no_plural(number: int, said: str) -> None:
    assert plural(number, "matrix", "matrices") == said
    assert plural(number, "site") == said.replace("matrices", "sites").replace("matrix", "site")
