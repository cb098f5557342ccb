"""A safetensors checkpoint directory: its config, index, headers and files. Knows nothing of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loudmerge.errors import MergeRefused, Problem
from loudmerge.jsonfile import read_json
from loudmerge.tensorfile import TensorEntry, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = "a checkpoint directory as save_pretrained writes it, with config.json and safetensors files"

WEIGHT_SUFFIXES = frozenset(
    {
        ".bin",
        ".ckpt",
        ".gguf",
        ".h5",
        ".mlmodel",
        ".msgpack",
        ".npz",
        ".onnx",
        ".onnx_data",
        ".ot",
        ".pickle",
        ".pkl",
        ".pt",
        ".pth",
        ".safetensors",
        ".tflite",
    }
)
"""Files that hold weights in some format; OUT holds no weights but the merged ones."""

NOT_COPIED = frozenset({CONFIG, INDEX, "merge_report.json", "adapter_config.json"})

_QUANTISED_CODE = re.compile(r"F[468](_|$)")

QUANTISED_SUFFIXES = (
    *("_blocks", "_scales", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed"),
    *(".SCB", ".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory.

    entries: every tensor by its key. shards: weight files in order.
    index: the parsed model.safetensors.index.json, None for a single file.
    metadata: the `__metadata__` of each shard. side_files: the other files to keep, as relative paths.
    """

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    shards: tuple[Path, ...]
    index: Mapping[str, Any] | None
    metadata: Mapping[Path, Mapping[str, str]]
    side_files: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    def config_values(self, *names: str) -> list[Any]:
        """The values of these config fields, at any depth: multimodal configs nest the text model's."""
        return list(_values(self.config, frozenset(names)))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory: config, index, and the headers of all shards; no weights.

    Raises MergeRefused: `unsupported-base` (no config, no safetensors, quantised), `corrupt-file`
    (a shard that cannot be opened, an index that disagrees with the shards), `unsafe-file`.
    """
    config = read_json(path / CONFIG, "unsupported-base", WANTED)
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
    problems += _quantised(path, config, entries)
    if problems:
        raise MergeRefused(problems)
    shards = tuple(path / name for name in names)
    return Checkpoint(path, config, entries, shards, index, metadata, _side_files(path))


def _weight_files(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    # transformers looks for the single file first, so a stale index beside it is not read.
    if (path / SINGLE).is_file():
        return None, [SINGLE]
    if not (path / INDEX).is_file():
        raise MergeRefused(_no_weights(path))
    index = read_json(path / INDEX, "unsupported-base", WANTED)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeRefused(
            Problem("corrupt-file", str(path / INDEX), "no weight_map", "a map from keys to shards")
        )
    names = sorted({str(name) for name in weight_map.values()})
    problems = [problem for name in names for problem in _shard_problems(path, name)]
    problems += _numbering_problems(path, names)
    if problems:
        raise MergeRefused(problems)
    return index, names


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
    elif not (path / name).is_file():
        yield Problem(
            "corrupt-file",
            f"weight_map in {path / INDEX}",
            f"no file {name}",
            "every shard that the index names",
            "Download the missing shard.",
        )


def _numbering_problems(path: Path, names: Sequence[str]) -> Iterable[Problem]:
    """The names of a set of shards say how many there are: model-00001-of-00003.safetensors."""
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-0*(\d+)\.safetensors$", name))}
    if len(totals) == 1 and len(names) != max(totals):
        yield Problem(
            "corrupt-file",
            f"weight_map in {path / INDEX}",
            f"{len(names)} shards",
            f"{max(totals)}, as their names say",
            "Get the checkpoint again.",
        )


def _no_weights(path: Path) -> Problem:
    pickled = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return Problem(
            "unsafe-file",
            str(path / pickled[0]),
            "only pickled weights, which can run code when they are loaded",
            f"{SINGLE} or {INDEX}",
            "Load them with transformers where you trust them, and save_pretrained them as safetensors.",
        )
    return Problem("unsupported-base", str(path), f"neither {SINGLE} nor {INDEX}", "a safetensors checkpoint")


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
        if _QUANTISED_CODE.match(entry.dtype) or entry.name.endswith(QUANTISED_SUFFIXES):
            found = f"a quantised tensor ({entry.dtype})"
            return [Problem("unsupported-base", str(entry), found, "unquantised weights", hint)]
    return []


def _side_files(path: Path) -> tuple[str, ...]:
    names = []
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not hidden and not weights and str(relative) not in NOT_COPIED:
            names.append(relative.as_posix())
    return tuple(names)


def _values(config: Mapping[str, Any], names: frozenset[str]) -> Iterable[Any]:
    for name, value in config.items():
        if name in names:
            yield value
        elif isinstance(value, dict):
            yield from _values(value, names)
