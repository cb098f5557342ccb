"""What memory calls the layers that an adapter's experts are in: the adapter's own names say it.

A checkpoint may have other names there than the model (`language_model.model.blocks.` for what is
`model.language_model.layers.` in memory, or a text-only class's `model.layers.`). PEFT goes by memory's, and
drops LoRA under any other name, often in silence. So of the names on disk only what follows a layer's number
is taken.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from loudmerge.errors import MergeRefused, Problem
from loudmerge.planning.plan import Site
from loudmerge.reading.adapter import PREFIX, Adapter
from loudmerge.reading.families import Family
from loudmerge.reading.names import NUMBER, layer_list

Prefixes = Mapping[str, Mapping[str, str]]
"""By list of layers, `layers.` in canonical names: each name it has, with a module that has it."""

_RENAME = "Rename its tensors, and what adapter_config.json says of them, as the model in memory has them."


def prefixes(names: Iterable[str], family: Family) -> Prefixes:
    """What these names of modules and tensors call the lists of layers that they are in."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        found[layer_list(family.canonical(name))].setdefault(layer_list(name), name)
    return found


def own_linear(site: Site, module: str, key: str, family: Family) -> str:
    """What an expert's own Linear is called: up to the layer's number as in memory, then as on disk.

    module: the experts module in memory. key: of the expert's own matrix, without `.weight`.
    Raises MergeRefused `unsupported-base` where that would not be read as the same weight.
    """
    held, disk = list(NUMBER.finditer(module)), list(NUMBER.finditer(key))
    if held and [match[0] for match in held] == [match[0] for match in disk[: len(held)]]:
        name = module[: held[-1].end()] + key[disk[len(held) - 1].end() :]
        if family.canonical(f"{name}.weight") == family.canonical(f"{key}.weight"):
            return name
    raise MergeRefused(
        Problem(
            "unsupported-base",
            str(site.pair.a),
            f"experts that are {module} in memory, and {key} on disk",
            "names that are alike once what precedes the layer's number is left out",
            "Convert between the fused layouts, or merge it.",
        )
    )


class Layers:
    """What an adapter calls the layers of its model. linears: the modules that are experts' own Linears."""

    def __init__(self, adapter: Adapter, linears: Iterable[str], family: Family) -> None:
        own = set(linears)
        others = [pair.module for pair in adapter.pairs if pair.module not in own]
        others += [full.name for full in adapter.full]
        self._others = prefixes(others, family)
        self._own = prefixes(sorted(own), family)

    def experts(self, group: str, site: Site) -> str:
        """The experts module, as transformers 5 has it in memory, of a group that has only Linears.

        group: its canonical name. site: one of its Linears. What else has LoRA in these layers, or was saved
        whole, has memory's name for them; where there is nothing else, the Linears' own name was memory's.
        Raises MergeRefused `ambiguous-layout` where these names do not agree, or are not of transformers 5.
        """
        layers = layer_list(group)
        said = self._others.get(layers) or self._own.get(layers, {})
        if not layers or len(said) != 1:
            raise MergeRefused(_not_one(str(site.pair.a), said, layers))
        # nemotron_h's checkpoints say backbone where every class of transformers 5 says model.
        held = re.sub(r"^backbone\.", "model.", next(iter(said)))
        if not held.endswith(layers):
            raise MergeRefused(
                Problem(
                    "ambiguous-layout",
                    str(site.pair.a),
                    f"{held}, which is the checkpoint's name for the layers",
                    f"the name that a class with fused experts has for them, which ends with {layers}",
                    _RENAME,
                )
            )
        return held + group.removeprefix(layers)


def require_one_prefix(tensors: Iterable[str], experts: Iterable[str], family: Family) -> None:
    """Raises MergeRefused `ambiguous-layout` where PEFT would find some of these tensors and not others.

    tensors: all that are to be written. experts: the modules in memory whose LoRA is among them.
    """
    found = prefixes((key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors), family)
    for module in experts:
        layers = layer_list(family.canonical(module))
        if len(found[layers]) > 1:
            raise MergeRefused(_not_one(f"the LoRA of {module}", found[layers], layers))


def _not_one(where: str, said: Mapping[str, str], layers: str) -> Problem:
    found = ", and ".join(f"{held} in {name}" for held, name in sorted(said.items()))
    return Problem(
        "ambiguous-layout",
        where,
        f"several names for the same layers: {found}" if found else "no layer in the experts' names",
        f"one name for {layers or 'the layers'}, the model's in memory: PEFT drops LoRA under any other",
        _RENAME,
    )
