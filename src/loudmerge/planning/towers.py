"""Which part of the checkpoint an adapter is for, where the part was trained alone.

A model that is a part of another one has names without what precedes them there. In transformers 5
`encoder.layers.0…` may be `text_model.encoder.layers.0…` or `vision_model.encoder.layers.0…` of one
checkpoint. What proves which: the class that PEFT writes into the config, and shapes. Never the order.
The other way round, a base that was saved without its head may lack what precedes the adapter's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from loudmerge.errors import MergeRefused, Problem
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.families import Family
from loudmerge.reading.names import NUMBER
from loudmerge.system.tensorfile import TensorEntry

Sizes = Mapping[str, tuple[int, int] | None]
"""By trained module: the two sizes of its LoRA, None where no LoRA tells them."""

_SAME_WORD: Mapping[str, str] = {
    **dict.fromkeys(("language", "llm", "lm"), "text"),
    **dict.fromkeys(("visual", "image"), "vision"),
    **dict.fromkeys(("speech", "sound"), "audio"),
}
_NO_WORD = frozenset({"", "model", "tower"})
_KINDS = frozenset(_SAME_WORD.values())
_HEAD = "lm_head"


@dataclass(frozen=True)
class _Part:
    """A part of the checkpoint that the adapter's names may be in.

    root: what precedes them on disk. family: that has this root, or none, for the part that is usually meant.
    has: whether the part has such modules at all. fits: whether it has every trained one, in its size.
    disproved: whether a trained module has another size there.
    """

    root: str
    family: Family
    has: bool
    fits: bool
    disproved: bool

    @property
    def words(self) -> frozenset[str]:
        """What kind of model a class has to be named by for this part: {"vision"} for `vision_model.`."""
        return _words(re.split(r"[._]", self.root)) or frozenset({"text"})


def in_its_part(base: Checkpoint, adapter: Adapter, family: Family) -> Family:
    """The family, with the root of the part that was trained alone where the adapter is of such a part.

    Raises MergeRefused `ambiguous-layout` when its names may be in two parts, and nothing proves in which.
    """
    trained = _trained(adapter)
    if not trained or any(module in trained for key in base.entries for module in _around(key)):
        return family
    first = next(iter(trained))
    others = _roots(base.entries, first, family)
    if not others:
        return _of_the_whole(base, family, trained)
    parts = [_part(base, family, trained, _usual_root(base, family, first))]
    parts += [_part(base, replace(family, root=root), trained, root) for root in others]
    said = _class_words(adapter)
    named = _named([part for part in parts if part.has], said)
    if named is not None:
        return named.family
    usual, fitting = parts[0], [part for part in parts if part.fits]
    if not fitting:
        return family
    proved = len(fitting) == 1 and (usual.fits or usual.disproved or not usual.has)
    if proved and not _contradict(said, fitting[0].words):
        return fitting[0].family
    raise MergeRefused(
        _ambiguous(first, [part for part in parts if part.fits or (part is usual and part.has)])
    )


def _of_the_whole(base: Checkpoint, family: Family, trained: Sizes) -> Family:
    """The family, without what precedes the trained names where the base was saved from the model inside.

    So GPT-2, Bloom and BERT lie on the Hub: `h.0.attn…`, which is `transformer.h.0.attn…` of the model with a
    head; transformers loads it by the class's base_model_prefix.
    """
    first = {module.partition(".")[0] for module in trained}
    prefix = next(iter(first))
    if len(first) > 1 or any(key.startswith(f"{prefix}.") for key in base.entries):
        return family
    bare = replace(family, renames=((rf"^{re.escape(prefix)}\.", ""), *family.renames))
    whole = _part(base, bare, trained, "")
    return bare if whole.fits and not _part(base, family, trained, "").has else family


def _trained(adapter: Adapter) -> Sizes:
    found: dict[str, tuple[int, int] | None] = {}
    for pair in adapter.pairs:
        found[pair.module] = (pair.a.shape[-1], pair.b.shape[0]) if not pair.depth else None
    if not found:
        found = {full.name.rpartition(".")[0]: None for full in adapter.full}
        found.update((rows.module, None) for rows in adapter.rows)
    return {module: sizes for module, sizes in found.items() if module.rpartition(".")[2] != _HEAD}


def _around(name: str) -> Iterator[str]:
    """The modules around a tensor, at every level."""
    return (name[: dot.start()] for dot in re.finditer(r"\.", name))


def _roots(keys: Iterable[str], module: str, family: Family) -> list[str]:
    """What precedes the module's name on disk, but for what the usual names leave out. No layer is a part."""
    usual, mark = family.canonical(module), f".{module}."
    found = {key[: key.index(mark) + 1]: None for key in keys if mark in key}
    return [root for root in found if not NUMBER.search(root) and family.canonical(root + module) != usual]


def _usual_root(base: Checkpoint, family: Family, module: str) -> str:
    name = family.canonical(module)
    key = next((key for key in base.entries if family.canonical(key).startswith(f"{name}.")), "")
    return key.partition(name)[0] if name in key else ""


def _part(base: Checkpoint, family: Family, trained: Sizes, root: str) -> _Part:
    held = {family.canonical(key): entry for key, entry in base.entries.items()}
    modules = {module for name in held for module in _around(name)}
    names = {family.canonical(family.root + module): sizes for module, sizes in trained.items()}
    misfits = [name for name, sizes in names.items() if _misfits(held.get(f"{name}.weight"), sizes)]
    lists = {name[: index.start() - 1] for name in names if (index := NUMBER.search(name))}
    has = not modules.isdisjoint(lists | names.keys())
    return _Part(root, family, has, not misfits and names.keys() <= modules, bool(misfits))


def _misfits(weight: TensorEntry | None, sizes: tuple[int, int] | None) -> bool:
    """Whether the module has a matrix that no LoRA of these sizes is for, however its axes lie."""
    if weight is None or sizes is None or len(weight.shape) != 2:
        return False
    return sorted(weight.shape) != sorted(sizes)


def _class_words(adapter: Adapter) -> frozenset[str]:
    """The words of the name of the class that was trained.

    Source: peft/peft_model.py, `save_pretrained`, which writes it where there is no task_type.
    """
    mapping = adapter.config.raw.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return _words(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", str(name or "")))


def _named(parts: Iterable[_Part], said: frozenset[str]) -> _Part | None:
    """The part whose words are all in the class's name; of a part and a part of that, the one with more."""
    named = sorted((part for part in parts if part.words <= said), key=lambda part: -len(part.words))
    if not named or (len(named) > 1 and len(named[0].words) == len(named[1].words)):
        return None
    return named[0]


def _contradict(said: frozenset[str], words: frozenset[str]) -> bool:
    """Whether both name a kind of model, and not the same."""
    return bool(said & _KINDS and words & _KINDS and not said & words & _KINDS)


def _words(words: Iterable[str]) -> frozenset[str]:
    lower = (word.lower() for word in words)
    return frozenset(_SAME_WORD.get(word, word) for word in lower if word not in _NO_WORD)


def _ambiguous(module: str, parts: Iterable[_Part]) -> Problem:
    return Problem(
        "ambiguous-layout",
        module,
        f"parts of the base that it could be in: {' and '.join(part.root + module for part in parts)}",
        "one that the shapes, or the class that was trained, prove",
        "Write the class into adapter_config.json as PEFT does without a task_type:"
        ' "auto_mapping": {"base_model_class": "SiglipVisionModel"}, if that is the class.',
    )
