"""What the config announces and the base has must be in the adapter's file, or the file is not complete.

Only what is sure is missed. A part of the base is known to have been in memory where it lies beside something
trained, and its name there where no rename changes what the config says of it. What `target_modules` means
for experts is left to `siblings.py`: no file says in which form they were in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from loudmerge.errors import Problem
from loudmerge.planning.draft import EMBEDDING, HEAD
from loudmerge.planning.siblings import is_extra_layer
from loudmerge.planning.sites import Placement
from loudmerge.planning.tiedrows import is_tied
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.adapter_config import ends_with
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.experts import Experts, split_expert_name
from loudmerge.reading.families import FUSED_LEAVES, GATE, PROJECTION_LEAVES, UP, Family
from loudmerge.reading.names import Names, layer_list, template, with_indices
from loudmerge.system.tensorfile import TensorEntry

_WITH_HEAD = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Values of task_type under which a model has its head; under PEFT's other ones it has another, or none."""

_ROUTERS = frozenset({"gate", "router"})
"""Names of routers, which are Linears in some releases of transformers only."""


class Announced:
    """Compares what a config announces with an adapter whose every tensor has its place."""

    def __init__(
        self, base: Checkpoint, adapter: Adapter, names: Names, family: Family, placement: Placement
    ) -> None:
        self._base, self._adapter, self._names, self._family = base, adapter, names, family
        self._config = adapter.config
        self._as_on_disk = Family(root=family.root)
        self._pairs = {template(family.canonical(pair.module)) for pair in adapter.pairs}
        self._full = {family.canonical(full.name): full.name for full in adapter.full}
        self._fused = {parameter.name for module in placement.modules for parameter in module.parameters}
        self._dense = {item.parameter for item in placement.dense}
        experts = (split_expert_name(family.canonical(item.parameter)) for item in placement.dense)
        # What experts' own Linears have LoRA for: where there were such, `target_parameters` named nothing.
        self._apart = {PROJECTION_LEAVES[parts[2]] for parts in experts if parts and parts[1] is not None}
        # Of each list of layers with something trained, `layers.`: what precedes it in memory.
        self._prefixes: dict[str, set[str]] = defaultdict(set)
        for name in (*(pair.module for pair in adapter.pairs), *self._full.values()):
            layers, held = layer_list(family.canonical(name)), layer_list(name)
            if layers and held.endswith(layers):
                self._prefixes[layers].add(held.removesuffix(layers))
        # The parent of such a list on disk, `model.`: the list.
        self._parents = {
            _parent(layer_list(key)): layers
            for key, canonical in names.canonical.items()
            if (layers := layer_list(canonical)) in self._prefixes
        }
        self._known = self._in_memory()

    def missing(self, experts: Experts) -> list[Problem]:
        """A problem for each module, tensor or target that is announced, and not in the file."""
        return [
            *self._missing_pairs(),
            *self._missing_parameters(experts),
            *self._missing_modules(),
            *self._missing_biases(),
            *self._missing_rows(),
        ]

    def _in_memory(self) -> dict[str, tuple[TensorEntry, set[str]]]:
        """By canonical name: each tensor that the model in training had, and what it may have called it."""
        joined = {entry.name for entry, _ in self._names.parts.values()}
        known = {
            self._names.canonical[key]: (entry, names)
            for key, entry in self._base.entries.items()
            if key not in joined and (names := self._names_in_memory(key))
        }
        for name, (entry, _) in self._names.parts.items():
            whole = template(_module(self._names.canonical[entry.name]))  # in the memory of other classes
            prefixes = self._prefixes.get(layer_list(name), ())
            if prefixes and whole not in self._pairs and not is_extra_layer(self._base, name):
                known[name] = (entry, {prefix + name for prefix in prefixes})
        embedding = self._names.find(EMBEDDING)
        if embedding is not None and is_tied(self._base, self._names) and self._has_head():
            known.setdefault(HEAD, (embedding, {HEAD}))
        return known

    def _names_in_memory(self, key: str) -> set[str]:
        canonical = self._names.canonical[key]
        if canonical.startswith("lm_head."):
            return {canonical} if self._has_head() else set()
        if "experts" in canonical.split(".") or is_extra_layer(self._base, canonical):
            return set()
        layers = layer_list(canonical) or self._parents.get(_parent(_module(key)), "")
        names = (canonical, self._as_on_disk.canonical(key))
        return {prefix + name for prefix in self._prefixes.get(layers, ()) for name in names}

    def _has_head(self) -> bool:
        whole = any(prefix.startswith("model.") for found in self._prefixes.values() for prefix in found)
        return whole and self._config.raw.get("task_type") in _WITH_HEAD

    def _is_the_other(self, canonical: str, trained: Iterable[str]) -> bool:
        """Whether this is the head of a tied embedding, or that, and the other of the two was trained."""
        ends = {EMBEDDING, HEAD, _module(EMBEDDING), _module(HEAD)}
        return canonical in ends and is_tied(self._base, self._names) and not ends.isdisjoint(trained)

    def _missing_pairs(self) -> Iterable[Problem]:
        """Modules of a kind that has no LoRA at all; of a kind that has, the others are for `siblings.py`."""
        for canonical, (entry, names) in self._known.items():
            module = _module(canonical)
            matrix = all(name.endswith(".weight") for name in names) and len(entry.shape) == 2
            if not matrix or self._config.all_linear or template(module) in self._pairs:
                continue
            if self._may_be_another(module.rpartition(".")[2]):
                continue
            if self._config.raw.get("ensure_weight_tying") and self._is_the_other(module, self._pairs):
                continue
            modules = {_module(name) for name in names}
            if all(map(self._config.targets_module, modules)):
                yield _missing(min(modules), "no LoRA", "target_modules")

    def _may_be_another(self, leaf: str) -> bool:
        """Whether a Linear of this name on disk may have been none in memory.

        Beside fused LoRA PEFT >= 0.19 takes the projections' names for the fused experts'. And some families
        have one Linear for gate and up (minimax_m3_vl's shared experts).
        """
        projection = PROJECTION_LEAVES.get(leaf)
        joined = self._family.known and projection in (GATE, UP)
        return leaf in _ROUTERS or joined or bool(projection and self._fused)

    def _missing_parameters(self, experts: Experts) -> Iterable[Problem]:
        fused = set(self._fused_parameters(experts))
        for target in sorted(self._config.target_parameters):
            if any(ends_with(name, target) for name in self._fused | self._dense):
                continue
            whole = self._family.canonical(target)
            found = [name for name in fused if name == whole or ends_with(name, target)]
            found += [
                min(names) for _, names in self._known.values() if all(ends_with(n, target) for n in names)
            ]
            if found:
                yield _missing(min(found), f"no LoRA for {target}", "target_parameters")

    def _fused_parameters(self, experts: Experts) -> Iterable[str]:
        """Canonical names of the parameters that the base's experts have in memory where they are fused."""
        for group in experts.names:
            if layer_list(group) in self._prefixes and not is_extra_layer(self._base, group):
                untrained = experts.projections(group) - self._apart
                yield from (
                    f"{group}.{leaf}" for leaf, needs in FUSED_LEAVES.items() if untrained.issuperset(needs)
                )

    def _missing_modules(self) -> Iterable[Problem]:
        saved = {template(canonical): name for canonical, name in self._full.items()}
        for canonical, (_, names) in self._known.items():
            if canonical in self._full or not canonical.endswith((".weight", ".bias")):
                continue
            if self._config.raw.get("ensure_weight_tying") and self._is_the_other(canonical, self._full):
                continue
            sibling = saved.get(template(canonical))
            found = names if sibling is None else {with_indices(sibling, canonical)}
            if all(self._config.saves_module(_module(name)) for name in found):
                yield _missing(min(found), "no full tensor", "modules_to_save")

    def _missing_biases(self) -> Iterable[Problem]:
        """What bias="all" trained; but on modules with LoRA, which `draft.py` looks after."""
        for canonical, (entry, names) in self._known.items():
            vector = all(name.endswith(".bias") for name in names) and len(entry.shape) == 1
            if self._config.bias != "all" or not vector or canonical in self._full:
                continue
            if template(_module(canonical)) not in self._pairs:
                yield _missing(min(names), "no trained bias", "bias")

    def _missing_rows(self) -> Iterable[Problem]:
        spec = self._config.raw.get("trainable_token_indices") or {}
        trained = [rows.module for rows in self._adapter.rows]
        if isinstance(spec, list) and not trained:
            yield _missing("the input embedding", "no trained token rows", "trainable_token_indices")
        if isinstance(spec, list):
            return
        for name in (name for name, indices in spec.items() if indices):
            held = (key for key in self._base.entries if ends_with(key, f"{name}.weight"))
            key = next(held, None)
            if key is None or any(ends_with(module, name) for module in trained):
                continue
            if not self._is_the_other(self._names.canonical[key], map(self._family.canonical, trained)):
                yield _missing(_module(key), "no trained token rows", "trainable_token_indices")


def _parent(name: str) -> str:
    """`model.` of `model.layers.` and of `model.norm`."""
    return name[: name.removesuffix(".").rfind(".") + 1]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _missing(where: str, found: str, field: str) -> Problem:
    return Problem(
        "missing-adapter-tensor",
        where,
        f"{found}, though {field} in the config announces it",
        "everything that the config announces and the base has",
        "The adapter file is not complete; or the model in training had no such part, and"
        f" {field} in adapter_config.json should not announce it.",
    )
