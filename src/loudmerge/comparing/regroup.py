"""The LoRA of experts in the other form than the adapter has it, for the installed transformers and PEFT.

transformers 4 holds a Linear for each expert, transformers 5 one parameter for all of them, and an adapter is
of either kind. PEFT's own way between them loses parts (peft/utils/transformers_weight_conversion.py). Here
each expert's matrix is looked for in the model by its numbers: nothing of `convert` decides where an update
goes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loudmerge.comparing.relay import PER_EXPERT, by_expert, laid, read_parameters, rows_on_disk, write
from loudmerge.converting.rewrite import Rewritten
from loudmerge.errors import EnvironmentFailed
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import MergePlan, OutputTensor, Site, Term
from loudmerge.system.tensors import TensorReader

_MEMORY = "Install the transformers version that the adapter was trained with."


class _Place(NamedTuple):
    """Where a model holds a matrix (out, in): rows of the out axis of one expert of a fused parameter."""

    parameter: str
    expert: int
    axes: Axes
    rows: Span


class _Part(NamedTuple):
    """The factors (rank, in) and (out, rank) of one matrix's update, and where it is."""

    place: _Place
    right: Tensor
    left: Tensor
    scaling: float


def needed(sites: Sequence[Site], model: nn.Module) -> bool:
    """Whether the model holds experts in the other form than the adapter has their LoRA."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return any(
        site.parameter not in parameters if site.num_experts else site.pair.module not in modules
        for site in sites
        if _of_experts(site)
    )


def regroup(plan: MergePlan, model: nn.Module, into: Path) -> int:
    """Writes the adapter to the directory `into` in the form that `model`, loaded, has; returns its pairs.

    The factors stay as they are, but for zeros between those of gate and up. Raises EnvironmentFailed where a
    matrix is not found in the model, or the form cannot hold what the adapter says.
    """
    experts = [index for index, site in enumerate(plan.sites) if _of_experts(site)]
    dense = [site.pair.module for index, site in enumerate(plan.sites) if index not in set(experts)]
    with TensorReader() as reader:
        tensors = {name: reader.read(entry) for name, entry in plan.adapter.entries.items()}
        regrouping = _Regrouping(plan, model, reader, tensors)
        draft = Rewritten(plan.adapter.config, tensors, ())
        parameters, modules = set[str](), set[str]()
        if any(plan.sites[index].num_experts for index in experts):
            modules = regrouping.apart(draft, experts)
        else:
            parameters = regrouping.fused(draft, experts)
    raw = {**draft.raw, "target_modules": sorted({*dense, *modules})}
    raw["target_parameters"] = sorted(parameters) or None
    write(draft.tensors, raw, into)
    return len(dense) + draft.sites


def _of_experts(site: Site) -> bool:
    return bool(site.num_experts or PER_EXPERT.match(site.pair.module))


class _Regrouping:
    def __init__(
        self, plan: MergePlan, model: nn.Module, reader: TensorReader, tensors: dict[str, Tensor]
    ) -> None:
        self._plan, self._model, self._reader, self._tensors = plan, model, reader, tensors
        self._parameters = {name: part.detach() for name, part in model.named_parameters()}
        self._module: dict[str, str] = {}
        self._terms: dict[int, list[tuple[OutputTensor, Term]]] = defaultdict(list)
        for output in plan.outputs:
            for term in output.terms:
                self._terms[term.site].append((output, term))

    def fused(self, draft: Rewritten, experts: Sequence[int]) -> set[str]:
        """Adds one pair for each fused parameter; returns their names."""
        by_parameter: dict[str, list[_Part]] = defaultdict(list)
        for index in experts:
            part = self._part(index)
            by_parameter[part.place.parameter].append(part)
        leaves: dict[str, set[str]] = defaultdict(set)
        for name in by_parameter:
            module, _, leaf = name.rpartition(".")
            leaves[module].add(leaf)
        readings = read_parameters(leaves, self._model)
        for name, parts in by_parameter.items():
            right, left = _stacked(name, self._parameters[name], parts)
            pair = laid(right, left, readings[name], parts[0].place.axes)
            draft.add(name.rpartition(".")[0], readings[name].depth, *pair)
            draft.settle([name], re.escape(name), right.shape[1], parts[0].scaling)
        return set(by_parameter)

    def apart(self, draft: Rewritten, experts: Sequence[int]) -> set[str]:
        """Adds one pair for each expert's Linear; returns their names."""
        modules = dict(self._model.named_modules())
        names: dict[tuple[int, str], list[str]] = defaultdict(list)
        for index in experts:
            site = self._plan.sites[index]
            right, left = by_expert(*self._take(site), site)
            for output, term in self._terms[index]:
                module = output.key.removesuffix(".weight")
                weight = getattr(modules.get(module), "weight", None)
                found = rows_on_disk(self._reader, output, term)
                if weight is None or not torch.equal(weight.detach().cpu(), found.to(weight.dtype)):
                    raise EnvironmentFailed(_not_found(module, self._model))
                draft.add(module, 0, right[term.expert], left[term.expert][term.rows.places])
                names[index, re.sub(r"\.\d+\.(?=[^.]+$)", r".*.", module)].append(module)
        for (index, kind), members in names.items():
            site = self._plan.sites[index]
            draft.settle(members, re.escape(kind).replace(r"\*", r"\d+"), site.rank, site.scaling)
        return {name for members in names.values() for name in members}

    def _take(self, site: Site) -> tuple[Tensor, Tensor]:
        return self._tensors.pop(site.pair.a.name), self._tensors.pop(site.pair.b.name)

    def _part(self, index: int) -> _Part:
        site = self._plan.sites[index]
        if site.pair.bias is not None or site.pair.magnitude is not None:
            raise EnvironmentFailed(
                f"{site.pair.a}: a bias or DoRA on one expert's Linear, which a fused parameter cannot have. "
                "Compare under transformers < 5: pip install 'transformers<5'"
            )
        right, left = self._take(site)
        return _Part(self._find(index), right, left, site.scaling)

    def _find(self, index: int) -> _Place:
        """Where the model holds the matrix of one expert's Linear."""
        module = self._plan.sites[index].pair.module
        named = PER_EXPERT.match(module)
        ((output, term),) = self._terms[index]
        on_disk = rows_on_disk(self._reader, output, term)
        if named is None:
            raise ValueError(f"{module} is no expert's Linear")
        group, expert = named["module"], int(named["expert"])
        # All experts of a layer lie in one module: it is looked for once.
        known = self._module.get(group, "")
        candidates = {
            name: part
            for name, part in self._parameters.items()
            if part.ndim == 3 and part.shape[0] > expert and name.startswith(known)
        }
        found = list(_places(on_disk, expert, candidates))
        if len(found) != 1:
            raise EnvironmentFailed(_not_found(module, self._model))
        self._module[group] = found[0].parameter.rpartition(".")[0] + "."
        return found[0]


def _places(on_disk: Tensor, expert: int, parameters: Mapping[str, Tensor]) -> Iterator[_Place]:
    """Where (out, in) is in one expert's matrix: all of it, its first or second half, or every other row."""
    count, into = on_disk.shape
    for name, parameter in parameters.items():
        wanted = on_disk.to(parameter.device, parameter.dtype)
        for axes in Axes:
            matrix = parameter[expert] if axes is Axes.OUT_IN else parameter[expert].T
            if matrix.shape[1] != into or matrix.shape[0] not in (count, 2 * count):
                continue
            spans = [Span(0, count), Span(count, count), Span(0, count, 2), Span(1, count, 2)]
            for rows in spans if matrix.shape[0] == 2 * count else spans[:1]:
                if torch.equal(matrix[rows.start], wanted[0]) and torch.equal(matrix[rows.places], wanted):
                    yield _Place(name, expert, axes, rows)


def _stacked(name: str, parameter: Tensor, parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """R (experts, ranks, in) and L (experts, out, ranks): gate's and up's ranks one after the other."""
    kinds = {(part.right.shape[0], part.scaling, part.place.axes, part.right.dtype) for part in parts}
    if len(kinds) != 1:
        raise EnvironmentFailed(
            f"{name}: found LoRA of several ranks or scalings among its experts, which PEFT cannot hold in"
            " one parameter. Compare under transformers < 5: pip install 'transformers<5'"
        )
    rank, _, axes, dtype = kinds.pop()
    spans = sorted({part.place.rows for part in parts}, key=lambda rows: rows.start)
    experts, d1, d2 = parameter.shape
    out, into = (d1, d2) if axes is Axes.OUT_IN else (d2, d1)
    right = torch.zeros(experts, rank * len(spans), into, dtype=dtype)
    left = torch.zeros(experts, out, rank * len(spans), dtype=dtype)
    for part in parts:
        first = spans.index(part.place.rows) * rank
        right[part.place.expert, first : first + rank] = part.right
        left[part.place.expert, part.place.rows.places, first : first + rank] = part.left
    return right, left


def _not_found(module: str, model: nn.Module) -> str:
    return (
        f"{module}: found its matrix in no one place in {type(model).__name__} as the installed transformers "
        f"loads it, expected one. {_MEMORY}"
    )
