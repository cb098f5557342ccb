"""What a live model computes with beside its weights and its config: no checkpoint holds it, a note says so.

A hook may only look on, and a forward compute the same in another way, so that none of this is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from loudmerge.errors import some
from loudmerge.merging.wrappers import plain_name

_LIBRARIES = frozenset(
    {"accelerate", "deepspeed", "kernels", "liger_kernel", "peft", "torch", "transformers", "trl"}
)
"""Whose hooks and forwards compute what the class does, or count in training alone: accelerate's move
tensors, Liger's fuse kernels, PEFT's ask for gradients, NEFTune's add noise."""

_KERNELS = frozenset({"deepspeed", "kernels", "liger_kernel"})
"""Whose modules stand for others, and compute what those do."""

_STATE = frozenset({"gradient_checkpointing", "layer_idx", "num_embeddings", "padding_idx", "training"})
"""Numbers of a module on which its output does not depend, in evaluation. num_embeddings: the weight's shape
is asked. padding_idx: of an embedding, whose row has no gradient."""

_PASSING = ("drop", "cache", "vocab_size")
"""In the names of what counts in training alone, or from one call to the next, or of what transformers does
not keep up when it resizes the vocabulary."""


def unsaved(model: nn.Module, bare: nn.Module, made: nn.Module | None) -> Iterator[str]:
    """Notes on all of it, one for each kind.

    model: the live PeftModel. bare: its base without PEFT's wrappers. made: a model of the base's class and
    config, its parameters on the meta device; without one, only hooks and forwards are told.
    """
    held = list(model.named_modules())
    # Dropout computes nothing in evaluation.
    there = () if made is None else made.named_modules()
    others = {key: other for key, other in there if "Drop" not in type(other).__name__}
    pairs = [(key, one, others[key]) for key, one in bare.named_modules() if key in others]
    found = {
        "forward hooks, which OUT has not: {}": [plain_name(key) for key, one in held if _hooked(one)],
        "another forward than its class, which OUT has not: {}": [
            plain_name(key) for key, one in held if _own_forward(one)
        ],
        "other modules than its class, which OUT has not: {}": [
            f"{key} ({type(one).__name__} for {type(other).__name__})"
            for key, one, other in pairs
            if _computes_otherwise(one, other)
        ],
        "other numbers than its config, by which OUT goes: {}": [
            difference for pair in pairs for difference in (*_numbers(*pair), *_buffers(*pair))
        ],
    }
    yield from (f"the live model has {kind.format(some(names))}" for kind, names in found.items() if names)


def _hooked(module: nn.Module) -> bool:
    hooks = (
        hook for place in ("_forward_hooks", "_forward_pre_hooks") for hook in vars(module)[place].values()
    )
    return any(_package(hook) not in _LIBRARIES for hook in hooks)


def _own_forward(module: nn.Module) -> bool:
    """Whether somebody has put another forward on the module, or on its class."""
    own = vars(module).get("forward")
    if own is not None:
        return _package(own) not in _LIBRARIES
    return _package(type(module).forward) not in {*_LIBRARIES, _package(type(module))}


def _computes_otherwise(one: nn.Module, other: nn.Module) -> bool:
    return type(one).forward is not type(other).forward and _package(type(one)) not in _KERNELS


def _numbers(key: str, one: nn.Module, other: nn.Module) -> Iterator[str]:
    for name, value in vars(other).items():
        live = vars(one).get(name)
        if not isinstance(value, int | float) or not isinstance(live, int | float) or live == value:
            continue
        if name not in _STATE and not name.startswith("_") and not any(map(name.count, _PASSING)):
            yield f"{key}.{name} ({live} for {value})".removeprefix(".")


def _buffers(key: str, one: nn.Module, other: nn.Module) -> Iterator[str]:
    """Those that are not saved, in the live one's dtype, but for RoPE's that change with what was run."""
    rope = str(vars(one).get("rope_type"))
    made = {} if "dynamic" in rope or "longrope" in rope else dict(other.named_buffers(recurse=False))
    unsaved = vars(one)["_non_persistent_buffers_set"].intersection(made)
    for name, live in one.named_buffers(recurse=False):
        alike = name not in unsaved or live.shape != made[name].shape
        if not alike and not torch.equal(live.cpu(), made[name].to(live.dtype)):
            yield f"{key}.{name}".removeprefix(".")


def _package(of: Callable[..., Any]) -> str:
    """Where it was written; of a partial that nobody gave a name, what it calls."""
    while isinstance(of, partial) and "__module__" not in vars(of):
        of = of.func
    return str(getattr(of, "__module__", None) or type(of).__module__).partition(".")[0]
