"""What a live model computes with, and no checkpoint holds, is told; what changes nothing is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from loudmerge.merging.unsaved import unsaved


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.layer_idx, self.max_seq_len_cached, self.act = 2, 0, 8, "silu"
        self.linear, self.drop, self.norm = nn.Linear(2, 2), nn.Dropout(0.1), nn.LayerNorm(2)
        self.register_buffer("inv_freq", torch.tensor([0.1, 0.3]), persistent=False)
        self.register_buffer("bias", torch.zeros(2))


def model() -> nn.Sequential:
    return nn.Sequential(Router())


def doubled(*arguments: Any) -> Any:
    return 2 * arguments[-1]


def of(package: str) -> Callable[..., Any]:
    """A function of a library."""

    def hook(*_: Any) -> None:
        return None

    hook.__module__ = package
    return hook


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class Fused(nn.LayerNorm):
    """As if Liger had written it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input)


Fused.__module__ = Fused.forward.__module__ = "liger_kernel.transformers.rms_norm"


def dynamic_rope(one: Any) -> None:
    one.rope_type = "dynamic"
    one.inv_freq.mul_(0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one.register_forward_hook(doubled), "forward hooks, which OUT has not: 0"),
        (
            lambda one: one.linear.register_forward_pre_hook(partial(doubled)),
            "hooks, which OUT has not: 0.linear",
        ),
        (
            lambda one: setattr(one.linear, "forward", MethodType(doubled, one.linear)),
            "another forward than its class, which OUT has not: 0.linear",
        ),
        (
            lambda one: setattr(one, "linear", Doubling(2, 2)),
            r"other modules than its class, which OUT has not: 0.linear \(Doubling for Linear\)",
        ),
        (
            lambda one: setattr(one, "norm", nn.Identity()),
            r"other modules than its class, .*: 0.norm \(Identity for LayerNorm\)",
        ),
        (
            lambda one: setattr(one, "top_k", 1),
            r"other numbers than its config, by which OUT goes: 0.top_k \(1 for 2\)",
        ),
        (lambda one: one.inv_freq.mul_(0.5), "other numbers than its config, by which OUT goes: 0.inv_freq"),
    ],
)
def test_what_makes_another_function_of_the_same_weights_is_told(
    change: Callable[[Any], object], says: str
) -> None:
    live = model()
    change(live[0])
    (note,) = unsaved(live, live, model())
    assert re.fullmatch(f"the live model has .*{says}", note), note


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.train(),
        lambda one: one.register_forward_hook(of("accelerate.hooks")),
        lambda one: one.register_forward_hook(partial(of("peft.tuners"))),
        lambda one: setattr(one, "forward", update_wrapper(partial(doubled, one), of("transformers.models"))),
        lambda one: setattr(one, "norm", Fused(2)),
        lambda one: setattr(one, "drop", nn.Identity()),
        lambda one: setattr(one.drop, "p", 0.0),
        lambda one: one.eval(),
        lambda one: setattr(one, "layer_idx", 7),
        lambda one: setattr(one, "max_seq_len_cached", 64),
        lambda one: setattr(one, "act", "gelu"),
        lambda one: setattr(one, "more", 1),
        lambda one: one.bias.add_(1),
        lambda one: one.bfloat16(),
        lambda one: setattr(one, "inv_freq", torch.ones(5)),
        dynamic_rope,
    ],
)
def test_what_changes_nothing_or_is_saved_is_not(change: Callable[[Any], object]) -> None:
    live = model()
    change(live[0])
    assert list(unsaved(live, live, model())) == []


def test_without_a_model_of_the_class_hooks_and_forwards_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    live: Any = model()
    live[0].top_k = 1
    assert list(unsaved(live, live, None)) == []
    monkeypatch.setattr(nn.LayerNorm, "forward", doubled)  # on the class, as some patches do
    assert list(unsaved(live, live, None)) == [
        "the live model has another forward than its class, which OUT has not: 0.norm"
    ]
