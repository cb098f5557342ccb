"""The names of a checkpoint's tensors, as memory knows them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from loudmerge.errors import MergeRefused, Problem
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.families import Family
from loudmerge.system.tensorfile import TensorEntry

NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")
"""A layer's or an expert's number in a name."""


class Names:
    """The checkpoint's tensors by canonical name. `canonical` is the canonical name of each key."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._entries = checkpoint.entries
        self._family = family
        self.canonical: Mapping[str, str] = {key: family.canonical(key) for key in checkpoint.entries}
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key, name in self.canonical.items():
            self._keys[name].append(key)

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
