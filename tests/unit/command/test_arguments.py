"""What is no argument is said before anything is read, by `merge`, `plan` and for a live model alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loudmerge
from loudmerge.system.device import check_device

WRONG = [
    ({"threads": 0}, "threads is 0, expected a whole number from 1 on, or None"),
    ({"threads": -3}, "threads is -3, expected a whole number from 1 on, or None"),
    ({"device": "tpu"}, "device is 'tpu', expected one of cpu, cuda, cuda:N, auto"),
    ({"device": "cuda:x"}, "device is 'cuda:x', expected one of cpu, cuda, cuda:N, auto"),
    ({"device": "cpu "}, "device is 'cpu ', expected one of"),
    ({"rounding": "up"}, "rounding is 'up', expected one of auto, nearest"),
    ({"dtype": "int4"}, "dtype is 'int4', expected one of keep, bfloat16"),
]
CALLS: dict[str, Callable[..., Any]] = {
    "merge": lambda path, **options: loudmerge.merge(
        path / "base", path / "adapter", path / "out", **options
    ),
    "plan": lambda path, **options: loudmerge.plan(path / "base", path / "adapter", **options),
    "live": lambda path, **options: loudmerge.save_pretrained_merged(object(), path / "out", **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("options", "says"), WRONG)
def test_a_value_that_does_not_exist_names_its_argument_before_anything_is_read(
    tmp_path: Path, call: Callable[..., Any], options: dict[str, Any], says: str
) -> None:
    """There is no base, no adapter and no model: that is not what is said."""
    with pytest.raises(ValueError, match=says):
        call(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["orientation", "lora_b_layout"])
def test_verify_knows_no_other_layouts(tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {option: "sideways"}
    with pytest.raises(ValueError, match=f"{option} is 'sideways', expected one of auto, "):
        loudmerge.verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter", **options)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12", "auto"])
def test_what_names_a_device_passes_whether_there_is_one_or_not(name: str) -> None:
    check_device(name)


def test_what_is_no_text_names_no_device() -> None:
    with pytest.raises(ValueError, match="device is None, expected one of cpu"):
        check_device(None)
