"""OUT as a loader reads it: which of its files count, and what lies beside the tensors.

Right tensors do not make a right model: a stale shard, an adapter that is loaded on top, or a config of
another model changes what the folder computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loudmerge.system.jsonfile import parse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"

FREE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}
"""What a tool may write into config.json as it likes: nothing of the merge depends on it."""


@dataclass(frozen=True)
class Loaded:
    """tensors: as a loader finds them. wrong: what is wrong with the files. form: what is merely unusual."""

    tensors: Mapping[str, Tensor]
    wrong: tuple[str, ...] = ()
    form: tuple[str, ...] = ()


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files. Raises SafetensorError."""
    return {name: tensor for tensors in _files(folder).values() for name, tensor in tensors.items()}


def as_loaded(folder: Path) -> Loaded:
    """model.safetensors, else the shards that the index names, as transformers looks for them.

    Raises SafetensorError or OSError for a file that cannot be read, ValueError for an index that is none.
    """
    files = _files(folder)
    index = _object(folder / INDEX).get("weight_map", {}) if (folder / INDEX).is_file() else {}
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{INDEX} has a weight_map that is none")
    chosen = [SINGLE] if SINGLE in files else sorted(set(index.values()) & files.keys())
    form = []
    if files and not chosen:
        chosen = list(files)
        form.append(f"{chosen[0]} is there, no loader looks for it without {INDEX}")
    tensors = {name: tensor for file in chosen for name, tensor in files[file].items()}
    wrong = [*_index_problems(index, files), *_second_values(files, chosen, tensors)]
    if (folder / ADAPTER).is_file():
        wrong.append(f"{ADAPTER} is in OUT: transformers adds the adapter to what has it already")
    return Loaded(tensors, tuple(wrong), tuple(form))


def _files(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors")) if file.is_file()}


def _index_problems(index: Mapping[str, str], files: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    for name, file in sorted(index.items()):
        if name not in files.get(file, {}):
            yield f"{INDEX}: {name} is not in {file}, as it says"
    for file in sorted(set(index.values()) & files.keys()):
        for name in sorted(files[file].keys() - index.keys()):
            yield f"{INDEX}: {name} of {file} is not named"


def _second_values(
    files: Mapping[str, Mapping[str, Tensor]], chosen: list[str], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Loaders differ in which file they take, and a shard may be read after another."""
    seen = {name: file for file in chosen for name in files[file]}
    for file, held in files.items():
        for name, tensor in held.items():
            if name in tensors and not _same(tensor, tensors[name]):
                yield f"{name}: {seen[name]} and {file} hold other values"


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, NaN included."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def beside(base: Path, out: Path, changes: Mapping[str, Any]) -> list[str]:
    """What is wrong with OUT's config.json and generation_config.json. changes: fields of config.json that
    the merge has to change, with their values.

    Releases of transformers rename fields and drop them where they are the default: a field that both
    configs have has to be the same, and a size may have another name.
    """
    try:
        found = dict(_flat(_object(out / CONFIG)))
    except FileNotFoundError:
        return [f"{CONFIG} is not in OUT"]
    except ValueError as error:
        return [str(error)]
    wanted = {key: value for key, value in _flat(_object(base / CONFIG)) if _counts(key, value)}
    problems = [
        f"{CONFIG}: found {key} {found.get(key)!r}, expected {value!r}"
        for key, value in {**wanted, **changes}.items()
        if (key in found or key in changes or key == "model_type") and found.get(key) != value
    ]
    sizes = {key: value for key, value in wanted.items() if type(value) is int and key not in changes}
    values = [value for value in found.values() if type(value) is int]
    problems += [f"{CONFIG}: found no {key}, expected {n}" for key, n in sizes.items() if n not in values]
    if (base / GENERATION).is_file() and not (out / GENERATION).is_file():
        problems.append(f"{GENERATION} is not in OUT: a chat model would run past its end")
    return problems


def _counts(key: str, value: Any) -> bool:
    """Whether a field is a plain value that a merge has to leave: parts are named anew by transformers."""
    plain = isinstance(value, (bool, int, float, str))
    return plain and key not in FREE and not key.endswith((".model_type", ".dtype"))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no object itself, by its path: `text_config.hidden_size`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, FileNotFoundError where there is none."""
    try:
        found = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no JSON object")  # noqa: TRY004 - a wrong value of a file
    return found
