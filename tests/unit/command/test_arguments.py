"""What is no argument is said before anything is read, by `merge`, `plan` and for a live model alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loudmerge
from loudmerge.comparing.compare import compare
from loudmerge.comparing.equivalence import compare_adapters
from loudmerge.converting.convert import convert
from loudmerge.converting.rewrite import PEFT_019
from loudmerge.inspecting.inspect import inspect
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


def compared(call: Callable[..., Any], path: Path, options: dict[str, Any]) -> Any:
    return call(path / "out", path / "base", path / "adapter", **options)


LAID: dict[str, Callable[..., Any]] = {
    "verify": lambda path, **options: compared(loudmerge.verify, path, options),
    "compare": lambda path, **options: compared(compare, path, options),
    "compare --adapter-only": lambda path, **options: compared(compare_adapters, path, options),
    "convert": lambda path, **options: convert(path / "adapter", path / "out", PEFT_019, **options),
    "inspect": lambda path, **options: inspect(path / "adapter", **options),
}


@pytest.mark.parametrize("call", LAID.values(), ids=LAID.keys())
@pytest.mark.parametrize("option", ["orientation", "lora_b_layout"])
def test_no_other_layouts_are_known_before_anything_is_read(
    tmp_path: Path, call: Callable[..., Any], option: str
) -> None:
    with pytest.raises(ValueError, match=f"{option} is 'sideways', expected one of auto, "):
        call(tmp_path, **{option: "sideways"})


ASKED = [
    ({"device": "tpu"}, "device is 'tpu', expected one of cpu"),
    ({"prompts": []}, "prompts is empty, expected some, or None for the default ones"),
    ({"prompts": ["a", ""]}, "an empty prompt has nothing to continue"),
    ({"tokens": 0}, "tokens is 0, expected a whole number from 1 on"),
]


@pytest.mark.parametrize("call", ["compare", "compare --adapter-only"])
@pytest.mark.parametrize(("options", "says"), ASKED)
def test_what_leaves_nothing_to_compare_is_said_before_anything_is_read(
    tmp_path: Path, call: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        LAID[call](tmp_path, **options)


def test_what_is_no_version_of_transformers_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'new' is no version of transformers, such as 5\.24"):
        LAID["convert"](tmp_path, transformers="new")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12", "auto"])
def test_what_names_a_device_passes_whether_there_is_one_or_not(name: str) -> None:
    check_device(name)


def test_what_is_no_text_names_no_device() -> None:
    with pytest.raises(ValueError, match="device is None, expected one of cpu"):
        check_device(None)
