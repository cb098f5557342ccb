"""Token rows of a live model where its forward does not look: OUT would have them, the model has not.

PEFT wraps an embedding by itself, and what is tied to it only where the whole model's class says so.
Source: peft/utils/other.py, `set_additional_trainable_modules`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loudmerge.errors import Problem, some
from loudmerge.merging.wrappers import Wrapper, plain_attribute, plain_name

if TYPE_CHECKING:
    from torch import Tensor

    from loudmerge.merging.blueprint import Tied


def unused_rows(
    model: Any, found: Collection[Wrapper], adapter: str, tensors: Mapping[str, Tensor], tied: Tied
) -> Iterator[Problem]:
    """A problem for the token rows of an embedding that is tied to modules which PEFT did not wrap.

    These read the weight, and never the rows: OUT, in which all of them are one, would have them everywhere.
    """
    wrapped = {wrapper.name for wrapper in found}
    for module in _with_rows(model, adapter):
        name = f"{module}.weight"
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


def _with_rows(model: Any, adapter: str) -> Iterator[str]:
    """The embeddings, by their names in memory, that have trained token rows."""
    for key, module in model.named_modules(remove_duplicate=False):
        held: Any = plain_attribute(module, "trainable_tokens_delta")
        if plain_attribute(module, "_active_adapter") is not None and held is not None and adapter in held:
            yield plain_name(key)
