"""The names of a checkpoint's tensors, as memory knows them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from loudmerge.errors import MergeRefused, Problem
from loudmerge.layout import Span
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.families import Family
from loudmerge.reading.renames import Block
from loudmerge.system.tensorfile import TensorEntry

NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")
"""A layer's or an expert's number in a name."""


class Names:
    """The checkpoint's tensors by canonical name.

    canonical: the canonical name of each key. parts: by canonical name, what is a tensor in memory, and in
    the checkpoint some rows of one.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._entries = checkpoint.entries
        self._family = family
        self.canonical: Mapping[str, str] = {key: family.canonical(key) for key in checkpoint.entries}
        self._keys: dict[str, list[str]] = defaultdict(list)
        self.parts: dict[str, tuple[TensorEntry, Span]] = {}
        for key, name in self.canonical.items():
            self._keys[name].append(key)
            for block in family.blocks:
                self.parts |= _parts(block, name, checkpoint.entries[key], checkpoint.text_config)

    def find(self, name: str) -> TensorEntry | None:
        """The tensor that a name in memory means, None when the base has none.

        Raises MergeRefused `unsupported-base` when it could mean two.
        """
        if name in self._entries:
            return self._entries[name]
        keys = self._keys.get(self._family.canonical(name), [])
        if len(keys) > 1:
            raise MergeRefused(
                Problem(
                    "unsupported-base",
                    name,
                    f"two tensors it could mean: {self._entries[keys[0]]} and {self._entries[keys[1]]}",
                    "one",
                    "Two models seem to share this checkpoint; say so in a bug report.",
                )
            )
        return self._entries[keys[0]] if keys else None

    def place(self, name: str) -> tuple[TensorEntry, Span | None] | None:
        """As `find`, and as `part`: the rows are None where the name means a whole tensor."""
        entry = self.find(name)
        return self.part(name) if entry is None else (entry, None)

    def part(self, name: str) -> tuple[TensorEntry, Span] | None:
        """The tensor of which a name in memory means these rows, None when it means none's."""
        return self.parts.get(self._family.canonical(name))


def _parts(
    block: Block, name: str, entry: TensorEntry, config: Mapping[str, Any]
) -> dict[str, tuple[TensorEntry, Span]]:
    """The parts of a tensor by canonical name; none where its rows cannot be divided so."""
    shares: list[Any] = [config.get(field) for field in block.shares] or [1] * len(block.linears)
    rows = entry.shape[0] if entry.shape else 0
    if not re.search(block.tensor, name) or not all(isinstance(one, int) and one > 0 for one in shares):
        return {}
    unit, left = divmod(rows, sum(shares))
    if left or not unit:
        return {}
    counts = [one * unit for one in shares]
    return {
        re.sub(block.tensor, linear, name): (entry, Span(sum(counts[:place]), counts[place]))
        for place, linear in enumerate(block.linears)
    }


def layer_list(name: str) -> str:
    """What precedes a name's first index: `model.layers.` of `model.layers.3.mlp`; "" without an index."""
    index = NUMBER.search(name)
    return name[: index.start()] if index else ""


def template(name: str) -> str:
    """The name without its indices."""
    return NUMBER.sub("*", name)


def with_indices(module: str, name: str) -> str:
    """`module` with the indices of `name`; renames keep the number and order of indices."""
    indices = iter(NUMBER.findall(name))
    return NUMBER.sub(lambda match: next(indices, match[0]), module)
