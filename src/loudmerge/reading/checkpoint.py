"""A safetensors checkpoint directory: its config, index, headers and files. Knows nothing of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import CONFIG, find_side_files
from loudmerge.system.jsonfile import read_json
from loudmerge.system.placeholders import link_to_nothing
from loudmerge.system.tensorfile import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = "a checkpoint directory as save_pretrained writes it, with config.json and safetensors files"

_QUANTISED_CODE = re.compile(r"F[468](_|$)")

_PACKED_CODES = frozenset({"I8", "U8", "I32"})
"""What quantised weights are packed into, and MXFP4's scales."""

_QUANTISED_SUFFIXES = (
    *("_blocks", "_scales", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed"),
    *(".SCB", ".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
)


_TEXT_CONFIGS = ("text_config", "thinker_config", "llm_config", "language_config")
"""Where multimodal configs keep the text model's fields."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory.

    entries: every tensor by its key. shards: weight files in order.
    index: the parsed model.safetensors.index.json, None for a single file.
    metadata: the `__metadata__` of each shard. side_files: the other files to keep, as relative paths.
    left_out: other weights, which are not to be kept.
    """

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    shards: tuple[Path, ...]
    index: Mapping[str, Any] | None
    metadata: Mapping[Path, Mapping[str, str]]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the text model: all of it, where it has no parts."""
        return self.text_parts[-1][1]

    @property
    def text_parts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The config and, each in the one before, the parts that lead to the text model's, which is the last.

        Each with what leads there: `thinker_config.text_config.`
        """
        found: list[tuple[str, Mapping[str, Any]]] = [("", self.config)]
        while names := [name for name in _TEXT_CONFIGS if isinstance(found[-1][1].get(name), dict)]:
            place, part = found[-1]
            found.append((f"{place}{names[0]}.", part[names[0]]))
        return found

    @property
    def vocabulary_sizes(self) -> list[int]:
        """Every `vocab_size` of the config that is a number; parts may leave theirs open."""
        return [size for size in self.config_values("vocab_size") if type(size) is int]

    def config_values(self, *names: str) -> list[Any]:
        """The values of these config fields, at any depth: multimodal configs nest the text model's."""
        return list(_values(self.config, frozenset(names)))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory: config, index, and the headers of all shards; no weights.

    Raises MergeRefused: `unsupported-base` (no config, no safetensors, quantised), `corrupt-file`
    (a shard that cannot be opened, an index that disagrees with the shards, a link to nothing),
    `unsafe-file`. Raises OSError for a folder that cannot be read.
    """
    config = _read_config(path)
    index, names = _weight_files(path)
    entries: dict[str, TensorEntry] = {}
    metadata = {}
    problems = []
    for name in names:
        found, metadata[path / name] = read_header(path / name)
        problems += [_twice(entries[key], found[key]) for key in sorted(entries.keys() & found.keys())]
        entries.update(found)
    if index is not None:
        problems += _index_problems(path / INDEX, index, entries)
    problems += _other_weights_named(path, config, index, names)
    problems += _quantised(path, config, entries)
    side = find_side_files(path, [*names, INDEX] if index is not None else names)
    problems += side.problems
    if problems:
        raise MergeRefused(problems)
    shards = tuple(path / name for name in names)
    return Checkpoint(path, config, entries, shards, index, metadata, side.copied, side.left_out)


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file() and (path / ADAPTER_CONFIG).is_file():
        found = f"no {CONFIG}, but the {ADAPTER_CONFIG} of an adapter"
        hint = "Name the base first, then the adapter, whose base_model_name_or_path says which base."
        raise MergeRefused(Problem("unsupported-base", str(path), found, WANTED, hint))
    return read_json(path / CONFIG, "unsupported-base", WANTED)


def _weight_files(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    single = (path / SINGLE).is_file()
    if not (path / INDEX).is_file():
        if not single:
            raise MergeRefused(_no_weights(path))
        return None, [SINGLE]
    index = read_json(path / INDEX, "unsupported-base", WANTED)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeRefused(_bad_index(path / INDEX, "no weight_map", "a map from keys to shards"))
    if not isinstance(index.get("metadata") or {}, dict):
        found = f"a {type(index['metadata']).__name__} as metadata"
        raise MergeRefused(_bad_index(path / INDEX, found, "a map, or none"))
    names = sorted({str(name) for name in weight_map.values()})
    # transformers looks for the single file first: an index that does not name it is another save's. One that
    # names files beside it is kept for what they hold: layers for multi-token prediction.
    if single and (SINGLE not in names or names == [SINGLE]):
        return None, [SINGLE]
    problems = [problem for name in names for problem in _shard_problems(path, name)]
    problems += _numbering_problems(path, names)
    if problems:
        raise MergeRefused(problems)
    return index, names


def _bad_index(file: Path, found: str, expected: str) -> Problem:
    return Problem("corrupt-file", str(file), found, expected, "Get the index again.")


def _shard_problems(path: Path, name: str) -> Iterable[Problem]:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or len(pure.parts) != 1 or "\\" in name:
        yield Problem(
            "unsafe-file",
            f"weight_map in {path / INDEX}",
            f"the shard name {name!r}",
            "a plain file name beside the index",
            "Do not use this checkpoint before you know who wrote that index.",
        )
    elif not name.endswith(".safetensors"):
        # transformers 5.24 unpickles a shard of any other name (modeling_utils.py, `load_state_dict`).
        yield Problem(
            "unsupported-base",
            f"weight_map in {path / INDEX}",
            f"the shard name {name!r}",
            "a name that ends in .safetensors, as loaders need it",
            "Rename the shard, in the index too.",
        )
    elif not (path / name).is_file():
        yield Problem(
            "corrupt-file",
            f"weight_map in {path / INDEX}",
            f"no file {name}",
            "every shard that the index names",
            "Download the missing shard.",
        )


def _numbering_problems(path: Path, names: Sequence[str]) -> Iterable[Problem]:
    """The names of a set of shards say how many there are: model-00001-of-00003.safetensors.

    A file without a number may lie beside the set, mtp.safetensors for one.
    """
    numbered = [match for name in names if (match := re.search(r"-of-0*(\d{1,9})\.safetensors$", name))]
    totals = {int(match[1]) for match in numbered}
    if len(totals) == 1 and len(numbered) != max(totals):
        yield Problem(
            "corrupt-file",
            f"weight_map in {path / INDEX}",
            plural(len(numbered), "shard"),
            f"{max(totals)}, as their names say",
            "Get the checkpoint again.",
        )


def _other_weights_named(
    path: Path, config: Mapping[str, Any], index: Mapping[str, Any] | None, names: Sequence[str]
) -> Iterable[Problem]:
    """transformers >= 5 loads the file that `transformers_weights` names, whatever else is there."""
    found = config.get("transformers_weights")
    loaded = [SINGLE] * (SINGLE in names) + [INDEX] * (index is not None)
    if found is not None and found not in loaded:
        yield Problem(
            "unsupported-base",
            f"transformers_weights in {path / CONFIG}",
            repr(found),
            f"{' or '.join(loaded)}, the weights that are merged",
            "Remove the field, if those are the weights you mean.",
        )


def _no_weights(path: Path) -> Problem:
    for name in (SINGLE, INDEX):
        if (problem := link_to_nothing(path / name)) is not None:
            return problem
    pickled = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return Problem(
            "unsafe-file",
            str(path / pickled[0]),
            "only pickled weights, which can run code when they are loaded",
            f"{SINGLE} or {INDEX}",
            "Load them with transformers where you trust them, and save_pretrained them as safetensors.",
        )
    return Problem(
        "unsupported-base",
        str(path),
        f"neither {SINGLE} nor {INDEX}",
        "a safetensors checkpoint",
        "Give the directory that transformers' save_pretrained wrote.",
    )


def _twice(first: TensorEntry, second: TensorEntry) -> Problem:
    return Problem(
        "corrupt-file",
        str(second),
        f"the same key in {first.file.name}",
        "every key in one shard",
        "Remove what is left of another save from the directory.",
    )


def _index_problems(
    file: Path, index: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> Iterable[Problem]:
    weight_map: Mapping[str, str] = index["weight_map"]
    for key, name in weight_map.items():
        held = entries.get(key)
        if held is None or held.file.name != name:
            found = "no such tensor in any shard" if held is None else f"it in {held.file.name}"
            yield Problem(
                "corrupt-file", f"{key} in {file}", found, f"it in {name}", "Get the checkpoint again."
            )
    for key in entries.keys() - weight_map.keys():
        yield Problem(
            "corrupt-file",
            str(entries[key]),
            "a tensor that the index does not name",
            "every tensor of the shards in the index",
            "Remove what is left of another save from the directory.",
        )


def _quantised(path: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[Problem]:
    hint = "Merge into the unquantised checkpoint, then quantise the result."
    for field in ("quantization_config", "compression_config"):
        for value in _values(config, frozenset({field})):
            if value:
                method = value.get("quant_method", "an unnamed method") if isinstance(value, dict) else value
                where = f"{field} in {path / CONFIG}"
                found = f"weights quantised with {method}"
                return [Problem("unsupported-base", where, found, "unquantised weights", hint)]
    for entry in entries.values():
        if _QUANTISED_CODE.match(entry.dtype) or _is_part_of_packed(entry, entries):
            found = f"a quantised tensor ({entry.dtype})"
            return [Problem("unsupported-base", str(entry), found, "unquantised weights", hint)]
    return []


def _is_part_of_packed(entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> bool:
    """A packed weight, or the scales of one: `vision.layer_scales` in floats scales no weight."""
    for suffix in _QUANTISED_SUFFIXES:
        if entry.name.endswith(suffix):
            stem = entry.name.removesuffix(suffix)
            parts = (entry, entries.get(stem), entries.get(f"{stem}.weight"))
            return any(part is not None and part.dtype in _PACKED_CODES for part in parts)
    return False


def config_parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config and those in it, at any depth, each with what leads there: `text_config.`"""
    yield place, config
    for name, part in config.items():
        if isinstance(part, dict) and "." not in name:  # a name with a dot would be taken for a path
            yield from config_parts(part, f"{place}{name}.")


def _values(config: Mapping[str, Any], names: frozenset[str]) -> Iterable[Any]:
    for name, value in config.items():
        if name in names:
            yield value
        elif isinstance(value, dict):
            yield from _values(value, names)
