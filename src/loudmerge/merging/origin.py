"""The checkpoint that a live model was loaded from: kept, where the model is still the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loudmerge.errors import MergeRefused
from loudmerge.reading.checkpoint import INDEX, Checkpoint, open_checkpoint
from loudmerge.reading.families import family_of
from loudmerge.reading.sidefiles import CONFIG, OF_TOKENIZERS
from loudmerge.system.tensorfile import FileReader, TensorEntry
from loudmerge.system.tensors import DTYPES, TensorReader

if TYPE_CHECKING:
    from torch import Tensor

    from loudmerge.merging.blueprint import Blueprint

_TOKENIZER_FILE = re.compile(f"token|chat_template|(?:^|/)(?:{'|'.join(map(translate, OF_TOKENIZERS))})")
"""Side files that a tokenizer given to `save_pretrained_merged` takes the place of; its code is one."""


def keep_disk_layout(
    weights: Path,
    base: Any,
    tensors: Mapping[str, Tensor],
    blueprint: Blueprint | None,
    *,
    with_tokenizer: bool,
) -> Path | None:
    """Puts links to the checkpoint that the base was loaded from in place of its copy in `weights`.

    Only where that checkpoint is a local directory whose type and sizes (layers, widths, experts) are the
    model's, has every tensor that the model saves with the same key, dtype and bytes, and none that the
    model's class has, but the model in memory not or not so. What it has beside them (tensors that no class
    knows, remote code, the tokenizer) then goes to OUT too. tensors: the base's, under all their names.

    Returns that directory; None where there is none, or it is not the model's.
    """
    name = getattr(base, "name_or_path", "")
    source = Path(name).absolute()
    if not name or not (source / CONFIG).is_file():
        return None
    try:
        disk = open_checkpoint(source)
    except (MergeRefused, OSError):
        return None  # The copy of the memory is complete without it.
    saved = open_checkpoint(weights)
    if disk.model_type != saved.model_type:
        return None
    loaded = type(base.config).from_pretrained(source).to_dict()
    if dict(_sizes(loaded)) != dict(_sizes(base.config.to_dict())) or not _same_tensors(saved, disk):
        return None
    if blueprint is None or blueprint.names - tensors.keys() or not _same_again(saved, disk, tensors):
        return None
    for shard in saved.shards:
        shard.unlink()
    (weights / INDEX).unlink(missing_ok=True)
    names = [shard.name for shard in disk.shards] + [INDEX] * (disk.index is not None)
    names += [name for name in disk.side_files if with_tokenizer or not _TOKENIZER_FILE.search(name)]
    for name in names:
        if not (weights / name).exists():
            (weights / name).parent.mkdir(parents=True, exist_ok=True)
            (weights / name).symlink_to(source / name)
    return source


def _sizes(config: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config, by dotted path; token ids are no sizes."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{path}", number) for path, number in _sizes(value))
        elif isinstance(value, int) and not isinstance(value, bool) and not str(name).endswith("_id"):
            yield str(name), value  # Aria's projector_patch_to_query_dict has numbers for names


def _same_tensors(saved: Checkpoint, disk: Checkpoint) -> bool:
    pairs = [(entry, disk.entries.get(name)) for name, entry in saved.entries.items()]
    if any(other is None or not other.is_like(mine) for mine, other in pairs):
        return False
    with FileReader() as reader:
        return all(other is not None and reader.same_bytes(mine, other) for mine, other in pairs)


def _same_again(saved: Checkpoint, disk: Checkpoint, tensors: Mapping[str, Tensor]) -> bool:
    """Whether what the model saves under one of a tied tensor's names is on disk under its others, if at all.

    The disk may have another one there: the model was tied in memory only. What has a name that the model has
    not, but the shape of a tied tensor, has to be the same: transformers may rename it on loading.
    """
    canonical = family_of(disk.model_type).canonical
    known: dict[str, list[Tensor]] = defaultdict(list)
    shared: dict[int, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        known[canonical(name)].append(tensor)
        shared[tensor.data_ptr()].append(tensor)
    tied = [tensor for held in shared.values() if len(held) > 1 for tensor in held]
    with TensorReader() as reader:
        for entry in (disk.entries[name] for name in disk.entries.keys() - saved.entries.keys()):
            mine = known[canonical(entry.name)] or [one for one in tied if one.shape == entry.shape]
            if not all(_is_in(one, entry, reader) for one in mine):
                return False
    return True


def _is_in(tensor: Tensor, entry: TensorEntry, reader: TensorReader) -> bool:
    return tensor.dtype == DTYPES.get(entry.dtype) and torch.equal(tensor.detach().cpu(), reader.read(entry))
