"""What users may give to `merge` and `plan`."""

from __future__ import annotations

import inspect

import loudmerge

INPUTS = ["base", "adapter"]
OPTIONS = [
    *("orientation", "lora_b_layout", "dtype", "rounding", "device", "threads"),
    *("overwrite", "verify", "progress"),
]


def test_merge_and_plan_take_what_is_documented_and_nothing_of_our_own() -> None:
    assert [*inspect.signature(loudmerge.merge).parameters] == [*INPUTS, "out", *OPTIONS, "resume"]
    assert [*inspect.signature(loudmerge.plan).parameters] == [*INPUTS, "out", *OPTIONS]
