"""What users may give to `merge` and `plan`."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

import loudmerge
from tests.unit.places import Place, content

INPUTS = ["base", "adapter"]
OPTIONS = [
    *("orientation", "lora_b_layout", "dtype", "rounding", "device", "threads"),
    *("overwrite", "verify", "progress"),
]


def test_merge_and_plan_take_what_is_documented_and_nothing_of_our_own() -> None:
    assert [*inspect.signature(loudmerge.merge).parameters] == [*INPUTS, "out", *OPTIONS, "resume"]
    assert [*inspect.signature(loudmerge.plan).parameters] == [*INPUTS, "out", *OPTIONS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounding", ["auto", "nearest", "stochastic", "peft"])
def test_the_default_dtype_of_the_process_changes_no_byte(
    place: Place, dtype: torch.dtype, rounding: str
) -> None:
    place.merge(place.root / "reference", rounding=rounding)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        place.merge(verify=True, rounding=rounding)
    finally:
        torch.set_default_dtype(before)
    found, wanted = content(place.out), content(place.root / "reference")
    reports = [json.loads(files.pop("merge_report.json")) for files in (found, wanted)]
    assert found == wanted
    assert reports[0]["delta_kept"] == reports[1]["delta_kept"]
