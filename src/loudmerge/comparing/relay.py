"""Re-lays an adapter in the layout that the installed PEFT reads. Moves numbers, computes none.

PEFT turned fused expert LoRA round between its versions (peft#3165), reads `lora_B` only rank-major,
and takes the experts class's `is_transposed` from the installed transformers. Loaded as it is, an
adapter of another regime is misread in silence wherever the shapes allow it. What the installed PEFT
does is found by trying it on a miniature of the model's own experts module, not from its version.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loudmerge.errors import EnvironmentFailed
from loudmerge.layout import Axes, LoraBLayout, Orientation
from loudmerge.planning.plan import OutputTensor, Site, Term
from loudmerge.reading.adapter import Adapter, LoraPair
from loudmerge.reading.adapter_config import CONFIG, WEIGHTS
from loudmerge.system.tensors import TensorReader

ADAPTER_NAME = "default"
_RANK = 2
_EXPERTS = 3
PER_EXPERT = re.compile(r"(?P<module>(?:^|.*\.)experts)\.(?P<expert>\d+)\.")
_PAIR_TAIL = re.compile(r"(?:\.base_layer)*\.lora_[AB](?:\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class Reading:
    """How the installed PEFT reads the LoRA of one fused parameter.

    depth: `base_layer` levels inside the module's outermost wrapper. orientation: in the axes of the
    parameter in memory.
    """

    depth: int
    orientation: Orientation
    lora_b_layout: LoraBLayout


def relay(
    adapter: Adapter,
    sites: Sequence[Site],
    model: nn.Module,
    axes: Callable[[Site], Axes],
    into: Path,
) -> Path:
    """Writes the adapter to the directory `into` such that the installed PEFT reads the same function.

    sites: the plan's. model: the loaded base. axes: the order of a fused site's matrix axes in `model`.
    Tensors that belong to no fused site are copied. Raises EnvironmentFailed where the installed PEFT
    has no layout for a site.
    """
    readings = read_sites(sites, model)
    fused = {id(site.pair): (site, reading) for site, reading in readings}
    with TensorReader() as reader:
        tensors = {name: reader.read(entry) for name, entry in adapter.entries.items()}
    for site, reading in fused.values():
        pair = tensors.pop(site.pair.a.name), tensors.pop(site.pair.b.name)
        a, b = relaid(*pair, site, reading, axes(site))
        stem = _stem(site.pair) + ".base_layer" * reading.depth
        # Two wrappers of one module may trade names: `pending` names never collide with what is still to pop.
        tensors[f"pending {stem}.lora_A.weight"] = a
        tensors[f"pending {stem}.lora_B.weight"] = b
    tensors = {name.removeprefix("pending "): tensor for name, tensor in tensors.items()}
    return write(tensors, adapter.config.raw, into)


def write(tensors: Mapping[str, Tensor], raw: Mapping[str, Any], into: Path) -> Path:
    """An adapter directory for the installed PEFT. raw: the config, of which it gets what it knows."""
    into.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), into / WEIGHTS, metadata={"format": "pt"})
    (into / CONFIG).write_text(json.dumps(_config(raw), indent=2), "utf-8")
    return into


def relaid(a: Tensor, b: Tensor, site: Site, reading: Reading, axes: Axes) -> tuple[Tensor, Tensor]:
    """One fused pair in another layout, bit for bit.

    a: (rank * experts, a), b: (b, rank * experts), as `site` describes them. axes: of the matrices in
    memory, by which "PEFT's lora_A reads the parameter's last axis" becomes "reads the input" or not.
    Flipping is A'_e = B_e^T and B'_e = A_e^T, since (B_e A_e)^T = A_e^T B_e^T.
    """
    return laid(*by_expert(a, b, site), reading, axes)


def by_expert(a: Tensor, b: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The factors R (experts, rank, in) and L (experts, out, rank) of a fused pair: dW_e = s * L_e @ R_e."""
    a_e = a.view(site.num_experts, site.rank, -1)
    b_e = unpack(b, site.num_experts, site.lora_b_layout or LoraBLayout.RANK_MAJOR)
    return (a_e, b_e) if site.reads_input else (b_e.transpose(1, 2), a_e.transpose(1, 2))


def laid(right: Tensor, left: Tensor, reading: Reading, axes: Axes) -> tuple[Tensor, Tensor]:
    """The pair that the installed PEFT reads as these factors."""
    if (reading.orientation is Orientation.STANDARD) != (axes is Axes.OUT_IN):
        right, left = left.transpose(1, 2), right.transpose(1, 2)
    return right.flatten(0, 1).contiguous(), pack(left, reading.lora_b_layout)


def unpack(b: Tensor, num_experts: int, layout: LoraBLayout) -> Tensor:
    """(b, rank * experts) to (experts, b, rank)."""
    if layout is LoraBLayout.RANK_MAJOR:
        return b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return b.view(b.shape[0], num_experts, -1).transpose(0, 1)


def pack(b_e: Tensor, layout: LoraBLayout) -> Tensor:
    """(experts, b, rank) to (b, rank * experts), contiguous."""
    order = (1, 2, 0) if layout is LoraBLayout.RANK_MAJOR else (1, 0, 2)
    return b_e.permute(order).flatten(1, 2).contiguous()


def read_sites(sites: Sequence[Site], model: nn.Module) -> Iterator[tuple[Site, Reading]]:
    """How the installed PEFT reads each fused site of `model`, whose weights may be on the meta device.

    Raises EnvironmentFailed when a site's module or parameter is not in `model`, or has another number
    of experts there, or when the installed PEFT computes no update of this parameter.
    """
    modules = dict(model.named_modules())
    fused: dict[str, set[str]] = defaultdict(set)
    for site in sites:
        _check_present(site, model, modules.get(site.pair.module))
        if site.num_experts:
            fused[site.pair.module].add(_leaf(site))
    readings = read_parameters(fused, model)
    for site in sites:
        if site.num_experts:
            yield site, readings[site.parameter]


def read_parameters(fused: Mapping[str, set[str]], model: nn.Module) -> dict[str, Reading]:
    """The same by full parameter name. fused: the targeted parameters of each module, by its name."""
    known: dict[object, Mapping[str, Reading]] = {}
    found: dict[str, Reading] = {}
    for name, leaves in fused.items():
        miniature = _miniature(model.get_submodule(name), leaves)
        kind = _kind(miniature)
        if kind not in known:
            known[kind] = probe(miniature)
        found |= {f"{name}.{leaf}": known[kind][leaf] for leaf in leaves}
    return found


def probe(module: nn.Module) -> Mapping[str, Reading]:
    """What the installed PEFT makes of each parameter of `module`, a small one. `module` gets wrapped.

    It is asked for the update that random factors make, and the answer is compared with every layout.
    Raises EnvironmentFailed when none fits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    root = nn.Module()
    root.experts = module
    targets = [f"experts.{name}" for name, _ in module.named_parameters(recurse=False)]
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=[], target_parameters=targets)
    with warnings.catch_warnings():
        # PEFT warns of every module class that is not its own; here that says nothing about the real model.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, root, adapter_name=ADAPTER_NAME)
    wrappers = {name: part for name, part in root.named_modules() if hasattr(part, "parameter_name")}
    return {
        wrapper.parameter_name: _reading(wrapper, name.count(".base_layer"))
        for name, wrapper in wrappers.items()
    }


def _reading(wrapper: Any, depth: int) -> Reading:
    linear_a, linear_b = wrapper.lora_A[ADAPTER_NAME], wrapper.lora_B[ADAPTER_NAME]
    parameter = wrapper.get_param()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (linear_a, linear_b):
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        delta = wrapper.get_delta_weight(ADAPTER_NAME)
        for orientation, layout in product(Orientation, LoraBLayout):
            expected = _update(linear_a.weight, linear_b.weight, parameter.shape[0], orientation, layout)
            if delta.shape[-2:] == parameter.shape[1:] == expected.shape[1:] and torch.allclose(
                delta.expand_as(expected), expected, atol=1e-5
            ):
                return Reading(depth, orientation, layout)
    raise EnvironmentFailed(
        f"the installed PEFT gives an update of shape {list(delta.shape)} for a parameter like "
        f"{wrapper.parameter_name} {list(parameter.shape)}, and none of the known layouts explains it. "
        "Compare under another version of peft."
    )


def _update(a: Tensor, b: Tensor, experts: int, orientation: Orientation, layout: LoraBLayout) -> Tensor:
    """(experts, d1, d2): what factors mean in one layout, at scaling 1."""
    update = unpack(b, experts, layout) @ a.view(experts, -1, a.shape[1])
    return update if orientation is Orientation.STANDARD else update.transpose(1, 2)


def _miniature(module: nn.Module, names: set[str]) -> nn.Module:
    """A copy of `module` with all it says of itself, whose only parts are small parameters `names`.

    PEFT decides by the module's attributes and by the order in which its parameters were registered;
    one expert takes another path than several, and there only a square matrix is told by its numbers.
    """
    miniature = copy.copy(module)
    vars(miniature).update(_modules={}, _buffers={}, _parameters={})
    for name, parameter in module.named_parameters(recurse=False):
        if name in names:
            experts, d1, d2 = parameter.shape
            small = (min(experts, _EXPERTS), 4, 4 if d1 == d2 else 5)
            miniature.register_parameter(name, nn.Parameter(torch.zeros(small)))
    return miniature


def _kind(miniature: nn.Module) -> object:
    """Equal for modules that PEFT cannot tell apart."""
    shapes = tuple((name, tuple(part.shape)) for name, part in miniature.named_parameters(recurse=False))
    return type(miniature), getattr(miniature, "is_transposed", None), shapes


def _check_present(site: Site, model: nn.Module, module: nn.Module | None) -> None:
    if module is None:
        raise EnvironmentFailed(_absent(site, model))
    if not site.num_experts:
        return
    parameter = dict(module.named_parameters(recurse=False)).get(_leaf(site))
    if parameter is None:
        raise EnvironmentFailed(_absent(site, model))
    if parameter.ndim != 3 or parameter.shape[0] != site.num_experts:
        raise EnvironmentFailed(
            f"{site.parameter}: found {list(parameter.shape)} in {type(model).__name__} of the installed "
            f"transformers, expected {site.num_experts} experts. Install the transformers version that the "
            "adapter was trained with."
        )


def _absent(site: Site, model: nn.Module) -> str:
    found = f"{site.parameter}: not in {type(model).__name__} as the installed transformers builds it."
    if PER_EXPERT.search(site.pair.module):
        return (
            f"{found} This adapter has a LoRA for each expert's Linear, and where the experts are fused in "
            "memory PEFT converts it with losses, so base+adapter can only be loaded faithfully under "
            "transformers < 5: pip install 'transformers<5'"
        )
    if site.num_experts:
        return (
            f"{found} This adapter updates fused expert parameters, so base+adapter can only be loaded where "
            "the experts are fused in memory: pip install 'transformers>=5'"
        )
    return f"{found} Install the transformers version that the adapter was trained with."


def _leaf(site: Site) -> str:
    return site.parameter.rpartition(".")[2]


def _stem(pair: LoraPair) -> str:
    """The adapter's own key of the module, with PEFT's prefix."""
    return _PAIR_TAIL.sub("", pair.a.name)


def _config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's config as the installed PEFT takes it.

    Keys that it does not know are left out (it would drop them with a warning), as the plan has understood
    them all, and so is null, which stands for a default. Dropout does nothing at inference, and PEFT refuses
    it on fused parameters.
    """
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    kept = {key: value for key, value in raw.items() if key in {*known, "peft_type"} and value is not None}
    return {**kept, "lora_dropout": 0.0, "inference_mode": True}


class MemoryAxes:
    """The order of an expert matrix's axes in a loaded model, found by looking for the file's numbers there.

    No adapter and no checkpoint records it, it moves with the transformers version, and shapes are silent
    where a matrix is square.
    """

    def __init__(self, sites: Sequence[Site], outputs: Sequence[OutputTensor], model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._places: dict[int, list[tuple[OutputTensor, Term]]] = defaultdict(list)
        for output in outputs:
            for term in output.terms:
                if term.expert == 0:
                    self._places[id(sites[term.site].pair)].append((output, term))

    def __call__(self, site: Site) -> Axes:
        """Raises EnvironmentFailed when the file's matrix is found in neither order, or in both."""
        matrix = self._parameters[site.parameter][0].detach().cpu()
        with TensorReader() as reader:
            parts = [
                (term.rows.places, rows_on_disk(reader, output, term))
                for output, term in self._places[id(site.pair)]
            ]
        fits = [axes for axes in Axes if parts and all(_lies(matrix, *part, axes) for part in parts)]
        if len(fits) == 1:
            return fits[0]
        raise EnvironmentFailed(
            f"{site.parameter}: found the file's values in {'both orders' if fits else 'no order'} of axes "
            "in the model as the installed transformers loads it, expected one. Install the transformers "
            "version that the adapter was trained with."
        )


def rows_on_disk(reader: TensorReader, output: OutputTensor, term: Term) -> Tensor:
    """(rows, in): the part of one matrix that a term updates, in the file's dtype."""
    entry = output.source
    if term.index >= 0:
        nbytes = entry.nbytes // entry.shape[0]
        start = entry.start + term.index * nbytes
        entry = replace(entry, shape=entry.shape[1:], start=start, nbytes=nbytes)
    matrix = reader.read(entry)
    return (matrix if term.axes is Axes.OUT_IN else matrix.T)[term.out.places]


def _lies(matrix: Tensor, rows: slice, on_disk: Tensor, axes: Axes) -> bool:
    found = (matrix if axes is Axes.OUT_IN else matrix.T)[rows]
    return found.shape == on_disk.shape and torch.equal(found, on_disk.to(found.dtype))
