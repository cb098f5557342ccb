"""Rows, expectations and cells, made by hand: what the tests of the matrix start from."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from loudmerge.compat.judging.cells import Cell, Expectation
from loudmerge.compat.judging.result import OK, CellResult, Figures, Tests

EXPECT = """
[expect]
kl_base_trained_at_least = 0.5
kl_float32_merge_at_most = 1e-8
kl_trained_merged_share = 1e-3
kl_base_merged_within = 0.01
kl_bfloat16_share = 0.01
delta_kept_at_least = 0.99
top1_at_least = 0.95
samples = "all"
samples_of = 3
merged = 192
tests_at_least = 10
suite_at_least = 1
families_at_least = 1
"""

FIGURES = Figures(
    kl_trained_merged=2.4137e-5,
    kl_base_trained=1.8612,
    kl_base_merged=1.8609,
    kl_float32_merge=3.16e-13,
    kl_floor=1.93e-4,
    kl_bfloat16_arithmetic=1.62e-4,
    top1_agreement=0.99871,
    samples=(3, 3),
    delta_kept=0.99914,
)

EXPECTED = Expectation(
    path="fused",
    orientation="standard",
    kl_base_trained_at_least=0.5,
    kl_float32_merge_at_most=1e-8,
    kl_trained_merged_share=1e-3,
    kl_base_merged_within=0.01,
    kl_bfloat16_share=0.01,
    delta_kept_at_least=0.99,
    top1_at_least=0.95,
    samples="all",
    samples_of=3,
    merged=192,
    tests_at_least=10,
    suite_at_least=1,
    families_at_least=1,
)

VERSIONS = {"transformers": "5.5.0", "peft": "0.19.1", "trl": "0.25.1"}


def result(**changes: Any) -> CellResult:
    """The row of a cell that shows everything, changed. A name of Figures changes the figures."""
    row = CellResult(
        cell="one",
        lane="released",
        status=OK,
        versions={**VERSIONS, "torch": "2.13.0+cpu", "python": "3.11.7"},
        path="fused",
        orientation="standard",
        merged=(192, 192),
        figures=FIGURES,
        tests=Tests(10, 0, 0, suite=1),
        families={"qwen3_moe": "ok"},
        crossed={"two": "ok"},
        seconds=12.5,
        stages={"environment": 2.5, "tests": 10.0},
        source="of this loudmerge",
    )
    names = {item.name for item in fields(Figures)}
    figures = replace(FIGURES, **{name: value for name, value in changes.items() if name in names})
    others = {name: value for name, value in changes.items() if name not in names}
    return replace(row, **{"figures": figures, **others})


def cell(name: str = "one", lane: str = "released", **changes: Any) -> Cell:
    """A cell that expects EXPECTED."""
    return replace(Cell(name, lane, VERSIONS, EXPECTED), **changes)
