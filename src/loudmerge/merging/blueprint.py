"""What a live model's class makes of its config: which tensors, and which of them are one.

OUT is loaded by that class. What the live model has beside it would be left out then, and what it shares
without the class would be two: one of them saved, the other one random.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loudmerge.errors import MergeRefused, Problem, some
from loudmerge.reading.checkpoint import Checkpoint, config_parts

if TYPE_CHECKING:
    from torch import Tensor, nn

Tied = Callable[[str], str]
"""A tensor's name -> what is the same for all names that the class ties, and for no other."""


@dataclass(frozen=True)
class Blueprint:
    """names: of all tensors. parameters: the shapes of those that are no buffers.

    first: of each name, the first tied to it. model: its parameters are on the meta device.
    """

    names: frozenset[str]
    parameters: Mapping[str, torch.Size]
    first: Mapping[str, str]
    model: nn.Module


def blueprint_of(base: Any) -> Blueprint | None:
    """A model of this class and config, what was taken out of the live one included; no weight is made.

    None where the class wants more than a config.
    """
    from accelerate import init_empty_weights  # noqa: PLC0415 - PEFT has it; nothing else here needs it
    from transformers import modeling_utils  # noqa: PLC0415

    try:
        inspect.signature(type(base)).bind(base.config)
    except TypeError:
        return None
    # transformers 4 initialises some (GraniteMoeHybrid's A_log) in a way that no meta tensor takes.
    uninitialised = getattr(modeling_utils, "no_init_weights", nullcontext)
    with uninitialised(), init_empty_weights(), torch.random.fork_rng(devices=[]):
        model = type(base)(copy.deepcopy(base.config))
    model.tie_weights()  # init_empty_weights parts what the class ties as it is made
    held = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    first: dict[int, str] = {}
    return Blueprint(
        frozenset(held),
        {name: tensor.shape for name, tensor in held.items() if name not in buffers},
        {name: first.setdefault(id(tensor), name) for name, tensor in held.items()},
        model,
    )


def ties_of(bare: Any, tensors: Mapping[str, Tensor], blueprint: Blueprint | None) -> Tied:
    """bare: the live model without PEFT's wrappers. tensors: its own, by all their names.

    Without a blueprint the config is asked: what it ties is the embedding, and what is one with it in memory.
    """
    if blueprint is not None:
        first = blueprint.first
        return lambda name: first.get(name, name)
    says = any(part.get("tie_word_embeddings") for _, part in config_parts(bare.config.to_dict()))
    weight = getattr(bare.get_input_embeddings(), "weight", None) if says else None
    one = {name for name, tensor in tensors.items() if weight is not None and _same(tensor, weight)}
    return lambda name: "" if name in one else name


def saved_apart(tensors: Mapping[str, Tensor], tied: Tied) -> dict[str, Tensor]:
    """The tensors as they can be saved: those that share memory, but that the class does not tie, are copied.

    transformers drops a shared tensor's names but one, or refuses to save it, whatever the config says.
    """
    homes: dict[int, str] = {}
    copies: dict[tuple[object, ...], Tensor] = {}
    saved = dict(tensors)
    for name, tensor in tensors.items():
        one = tied(name)
        if not tensor.numel() or homes.setdefault(_storage(tensor), one) == one:
            continue
        view = (one, *_view(tensor))
        if view not in copies:
            copies[view] = tensor.detach().clone(memory_format=torch.contiguous_format)
        saved[name] = copies[view]
    return saved


def refuse_left_out(base: Any, written: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Raises MergeRefused unless all was saved that `save_pretrained` was given.

    written: what it was given, as `saved_apart` has it; tied names count once, what the class computes anew
    not at all. The file may have other names, as where experts are fused in memory: elements are counted.
    """
    ignored = set(getattr(base, "_keys_to_ignore_on_save", None) or ())
    given = {_view(tensor): tensor for name, tensor in written.items() if name not in ignored}
    there = sum(math.prod(entry.shape) for entry in saved.entries.values())
    wanted = sum(tensor.numel() for tensor in given.values())
    if there < wanted:
        views = {_view(written[name]) for name in written if name in saved.entries}
        lost = {name for name in written if name not in ignored and _view(written[name]) not in views}
        raise MergeRefused(
            Problem(
                "unsupported-base",
                f"{some(lost)} of the live model",
                f"{there} elements in what transformers saved of the model",
                f"all {wanted} that it has in memory",
                "Save the adapter, and merge it into the checkpoint on disk with loudmerge.merge.",
            )
        )


def unlike_its_class(
    base: Any, tensors: Mapping[str, Tensor], blueprint: Blueprint | None
) -> Iterator[Problem]:
    """Tensors of the live model that its class has not, or in another shape, and those that it lacks.

    A head that is gone, or the last layers, are left to whoever took them out (`taken_out`). Without a
    blueprint only what torch makes a weight of is known to be none of the class's.
    """
    cls = type(base).__name__
    more = {name for name in tensors if _makes_a_weight(name, tensors)}
    if blueprint is not None:
        more = tensors.keys() - blueprint.names
    if more:
        yield Problem(
            "unsupported-base",
            f"{some(more)} of the live model",
            f"what no {cls} of this config has, and would be left out when OUT is loaded",
            f"the tensors of a {cls} only",
            "Make them part of its weights first (torch.nn.utils.prune.remove, or"
            " parametrize.remove_parametrizations), or put the modules back that were there.",
        )
    if more or blueprint is None:
        return
    if fewer := blueprint.parameters.keys() - tensors.keys() - taken_out(base, tensors, blueprint):
        yield Problem(
            "unsupported-base",
            f"{some(fewer)} of the live model",
            "none",
            f"as in every {cls} of this config: what loads OUT would make them up",
            "Put the modules back that were there, or say in the model's config that it has none.",
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name in blueprint.parameters}
    other = [name for name, shape in shapes.items() if shape != blueprint.parameters[name]]
    if other:
        wanted = list(blueprint.parameters[other[0]])
        yield Problem(
            "unsupported-base",
            f"{some(other)} of the live model",
            f"shape {list(shapes[other[0]])}",
            f"{wanted}, as in every {cls} of this config: what loads OUT refuses it",
            "Say the size in the model's config (resize_token_embeddings does), or put the modules back.",
        )


def _makes_a_weight(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether torch's pruning or parametrizations compute a weight of this tensor.

    Sources: torch/nn/utils/prune.py, `BasePruningMethod.apply`; torch/nn/utils/parametrize.py.
    """
    pruned = (name.removesuffix(part) for part in ("_orig", "_mask") if name.endswith(part))
    return ".parametrizations." in name or any(
        {f"{weight}_orig", f"{weight}_mask"} <= tensors.keys() for weight in pruned
    )


def taken_out(base: Any, tensors: Mapping[str, Tensor], blueprint: Blueprint) -> set[str]:
    """The class's parameters whose whole head is gone, or the whole layer, from the end of its list."""
    names = blueprint.parameters.keys() - tensors.keys()
    there = {key for key, _ in base.named_modules(remove_duplicate=False)} if names else set()
    tops = {base.base_model_prefix, *(name.partition(".")[0] for name in tensors)}
    gone = {name for name in names if name.partition(".")[0] not in tops}
    for name in names:
        parts = name.split(".")
        for at in (at for at, part in enumerate(parts) if part.isdecimal()):
            layers, layer = ".".join(parts[:at]), ".".join(parts[: at + 1])
            if layers in there and layer not in there:
                gone.add(name)
    return gone


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape
