"""What a live model has in training where its forward does not look: OUT would have it, the model has not.

PEFT wraps each module that it is told to by itself. A wrapper inside of another's module to save is called by
nobody, and nor is one around an embedding of which others read the weight.
Source: peft/utils/other.py, `_set_trainable`, `set_additional_trainable_modules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from loudmerge.adapter import LEVELS, PREFIX
from loudmerge.errors import Problem, some
from loudmerge.wrappers import plain_attribute, wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loudmerge.blueprint import Tied


def unused_modules(model: Any, adapter: str) -> Iterator[Problem]:
    """A problem for each module to save inside of another, unless both have the same values for it."""
    found = _wrapping(model, "modules_to_save", adapter)
    saved: dict[str, nn.Module] = {name: copies[adapter] for name, _, copies in found}
    for name, module in saved.items():
        for outer in (other for other in saved if name.startswith(f"{other}.")):
            if not _has_within(saved[outer], name.removeprefix(f"{outer}."), module):
                yield Problem(
                    "unsupported-adapter",
                    f"{name} of the live model",
                    f"a module to save inside of another, {outer}, whose forward does not call it",
                    "one of the two in modules_to_save",
                    "What PEFT would save of it is not what the model computes with. Train again with"
                    f" {outer} alone, or with whole names in modules_to_save.",
                )


def unused_rows(model: Any, adapter: str, tensors: Mapping[str, Tensor], tied: Tied) -> Iterator[Problem]:
    """A problem for the token rows of an embedding that is tied to modules which PEFT did not wrap.

    These read the weight, and never the rows: OUT, in which all of them are one, would have them everywhere.
    """
    wrapped = {wrapper.name for wrapper in wrappers(model)}
    for module, layer, rows in _wrapping(model, "trainable_tokens_delta", adapter):
        name = f"{module}.weight"
        if torch.equal(rows[adapter].to(tensors[name]), tensors[name][layer.token_indices[adapter]]):
            continue
        without = {
            other
            for other, tensor in tensors.items()
            if tied(other) == tied(name)
            and tensor.data_ptr() == tensors[name].data_ptr()
            and other.rpartition(".")[0] not in wrapped
        }
        if without:
            yield Problem(
                "unsupported-base",
                f"the trained token rows of {module} of the live model",
                f"{some(without)} tied to the embedding, in modules without the rows",
                "an embedding that PEFT has tied its rows to, wherever the model ties its weight",
                "Untie the base before training (tie_word_embeddings false in all parts of its config), or"
                " train the rows on a class where PEFT ties these modules (one for conditional generation).",
            )


def _wrapping(model: Any, field: str, adapter: str) -> Iterator[tuple[str, Any, Any]]:
    """(module's name in memory, its wrapper, what that has in this field by adapter)."""
    for key, module in model.named_modules(remove_duplicate=False):
        held: Any = plain_attribute(module, field)
        if plain_attribute(module, "_active_adapter") is not None and held is not None and adapter in held:
            parts = key.removeprefix(PREFIX).split(".")
            yield ".".join(part for part in parts if part not in LEVELS), module, held


def _has_within(outer: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module has, at this path, the same tensors as another."""
    there = {
        name.removeprefix(f"{path}."): tensor
        for name, tensor in outer.state_dict().items()
        if name.startswith(f"{path}.")
    }
    mine = module.state_dict()
    return mine.keys() == there.keys() and all(torch.equal(there[name], mine[name]) for name in mine)
