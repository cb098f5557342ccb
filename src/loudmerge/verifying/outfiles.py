"""What lies in OUT, against what the plan says: files, keys, dtypes, shapes, index, config; no weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from loudmerge.errors import plural
from loudmerge.executing.writer import edited_json, index_json
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.reading.checkpoint import INDEX, SINGLE
from loudmerge.reading.sidefiles import CARD, CONFIG, is_card_of, is_read_by_loaders, is_weights, walk
from loudmerge.system.jsonfile import parse

What = Literal[
    "missing",
    "extra",
    "dtype",
    "shape",
    "bytes",
    "value",
    "index",
    "metadata",
    "config",
    "report",
    "unreadable",
]

COMPARED_AT_ONCE = 1 << 23
"""Bytes."""


@dataclass(frozen=True)
class TensorMismatch:
    """One difference between OUT and the merge of BASE and ADAPTER.

    key: the tensor; for a difference that is no tensor's, the file's name. shard: the file it is in.
    what: its kind. detail: what was found and what was expected.
    wrong: elements that differ. max_ulp: the largest error in units in the last place of OUT's dtype.
    index: of the first wrong element. expert, projection: which expert's matrix that is, None where there is
    none. experts: all experts with a wrong element.
    """

    key: str
    shard: str
    what: What
    detail: str
    wrong: int = 0
    max_ulp: float | None = None
    index: tuple[int, ...] | None = None
    expert: int | None = None
    projection: str | None = None
    experts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields by name; tuples are lists, and an infinite error is null beside its detail."""
        fields = asdict(self)
        fields["index"] = None if self.index is None else list(self.index)
        fields["experts"] = list(self.experts)
        if self.max_ulp == float("inf"):
            fields["max_ulp"] = None
        return fields

    def __str__(self) -> str:
        where = self.key if self.key == self.shard else f"{self.key} in {self.shard}"
        return f"{self.what}: {where}: {self.detail}"


@dataclass(frozen=True)
class Listing:
    """What OUT's files hold. comparable: numbers of the plan's outputs whose data can be compared."""

    mismatches: tuple[TensorMismatch, ...]
    comparable: tuple[int, ...]
    files: int


def list_out(plan: MergePlan, out: Path, files: Path, *, exact: bool = False) -> Listing:
    """Checks every file of OUT against the plan, and names the tensors that are there as planned.

    out: where the shards lie. files: where config, index and side files lie, the same in a published OUT.
    exact: config and index must be as this loudmerge writes them, byte for byte; else what they say counts.
    """
    mismatches: list[TensorMismatch] = []
    comparable: list[int] = []
    by_shard: dict[str, dict[str, int]] = {path.name: {} for path in plan.base.shards}
    for number, output in enumerate(plan.outputs):
        by_shard[output.shard][output.key] = number
    for shard, numbers in by_shard.items():
        mismatches += _check_shard(plan, out / shard, numbers, comparable)
    for directory in dict.fromkeys((out, files)):
        mismatches += _foreign(plan, directory, by_shard.keys())
    count = len(by_shard) + 1 + len(plan.side_files)
    if plan.base.index is not None or by_shard.keys() != {SINGLE} or (files / INDEX).exists():
        found = [*_check_index(plan, files / INDEX, [out / shard for shard in by_shard])]
        if exact and not found and plan.base.index is not None:
            found += _check_content(files / INDEX, index_json(plan.base.index, plan.outputs))
        mismatches += found
        count += 1
    found = [*_check_config(plan, files)]
    if exact and not found:
        content = (plan.base.path / CONFIG).read_bytes()
        found += _check_content(files / CONFIG, edited_json(content, plan.config_edits))
    mismatches += found
    for name in plan.side_files:
        mismatches += _check_side_file(plan.base.path, files, name)
    return Listing(tuple(mismatches), tuple(comparable), count)


def _check_shard(
    plan: MergePlan, file: Path, numbers: Mapping[str, int], comparable: list[int]
) -> Iterator[TensorMismatch]:
    if not file.is_file():
        yield TensorMismatch(
            file.name, file.name, "missing", f"no such file; it holds {plural(len(numbers), 'tensor')}"
        )
        return
    try:
        # safetensors' own word for a file that may not be read is that there is none.
        with file.open("rb"), safe_open(file, framework="pt", backend="pread") as opened:
            keys = set(opened.keys())
            headers = {}
            for key in keys & numbers.keys():
                view = opened.get_slice(key)
                headers[key] = (str(view.get_dtype()), tuple(view.get_shape()))
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        yield TensorMismatch(file.name, file.name, "unreadable", f"safetensors cannot open it: {error}")
        return
    expected = plan.base.metadata[plan.base.path / file.name].get("format", "pt")
    if metadata.get("format") != expected:
        detail = f"found format {metadata.get('format')!r}, expected {expected!r}"
        yield TensorMismatch(file.name, file.name, "metadata", detail)
    for key in sorted(keys - numbers.keys()):
        yield TensorMismatch(key, file.name, "extra", "a tensor that does not belong in this shard")
    for key, number in numbers.items():
        mismatch = _check_header(plan.outputs[number], headers.get(key))
        if mismatch is None:
            comparable.append(number)
        else:
            yield mismatch


def _check_header(output: OutputTensor, found: tuple[str, tuple[int, ...]] | None) -> TensorMismatch | None:
    if found is None:
        return TensorMismatch(output.key, output.shard, "missing", "the shard does not hold it")
    if found[0] != output.dtype:
        detail = f"found {found[0]}, expected {output.dtype}"
        return TensorMismatch(output.key, output.shard, "dtype", detail)
    if found[1] != output.shape:
        detail = f"found {list(found[1])}, expected {list(output.shape)}"
        return TensorMismatch(output.key, output.shard, "shape", detail)
    return None


def _foreign(plan: MergePlan, out: Path, shards: AbstractSet[str]) -> Iterator[TensorMismatch]:
    """What is not of the merge, but changes what a loader makes of it, or is loaded in its place."""
    planned = {CONFIG, INDEX, *shards, *plan.side_files}
    for file in sorted(walk(out)) if out.is_dir() else ():
        name = file.relative_to(out).as_posix()
        if name in planned:
            continue
        if is_weights(name):
            yield TensorMismatch(name, name, "extra", "a weight file or index that is no part of the merge")
        elif file.is_dir() or is_read_by_loaders(file.name):
            yield TensorMismatch(name, name, "extra", "read by loaders, and no part of the merge")


def _check_index(plan: MergePlan, file: Path, shards: Sequence[Path]) -> Iterator[TensorMismatch]:
    index = _json_object(file)
    if isinstance(index, TensorMismatch):
        yield index
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        yield TensorMismatch(INDEX, INDEX, "index", "it has no weight_map")
        return
    planned = {output.key: output.shard for output in plan.outputs}
    for key in planned.keys() | weight_map.keys():
        named, expected = weight_map.get(key), planned.get(key)
        if named != expected:
            detail = f"found {named or 'no entry'}, expected {expected or 'no entry'}"
            yield TensorMismatch(key, INDEX, "index", f"the shard named for it: {detail}")
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(_data_bytes(shard) for shard in shards if shard.is_file())
    if size != held:
        yield TensorMismatch(INDEX, INDEX, "index", f"found total_size {size}, expected {held} bytes")


def _data_bytes(file: Path) -> int:
    """Bytes of all tensors: what follows the header."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _check_config(plan: MergePlan, out: Path) -> Iterator[TensorMismatch]:
    found = _json_object(out / CONFIG)
    if isinstance(found, TensorMismatch):
        yield found
        return
    expected = copy.deepcopy(dict(plan.base.config))
    for path, value in plan.config_edits.items():
        *parents, name = path.split(".")
        part = expected
        for parent in parents:
            part = part[parent]
        part[name] = value
    for name in sorted(expected.keys() | found.keys()):
        absent = "nothing"
        # As JSON: a NaN is no other NaN's equal.
        pair = [json.dumps(held.get(name), sort_keys=True) for held in (found, expected)]
        if (name in expected) != (name in found) or pair[0] != pair[1]:
            detail = f"{name}: found {found.get(name, absent)!r}, expected {expected.get(name, absent)!r}"
            yield TensorMismatch(CONFIG, CONFIG, "config", detail)


def _check_content(file: Path, expected: bytes) -> Iterator[TensorMismatch]:
    found = file.read_bytes()
    if found != expected:
        place = f"from byte {_first_difference(found, expected)} on"
        detail = f"says what a merge of this base writes, but not in the same bytes, {place}"
        yield TensorMismatch(file.name, file.name, "bytes", detail)


def _first_difference(a: bytes, b: bytes) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))


def _json_object(file: Path) -> dict[str, Any] | TensorMismatch:
    if not file.is_file():
        return TensorMismatch(file.name, file.name, "missing", "no such file")
    try:
        value = parse(file.read_bytes())
    except ValueError as error:
        return TensorMismatch(file.name, file.name, "unreadable", f"no JSON: {error}")
    if not isinstance(value, dict):
        return TensorMismatch(file.name, file.name, "unreadable", f"a JSON {type(value).__name__}, no object")
    return value


def _check_side_file(base: Path, out: Path, name: str) -> Iterator[TensorMismatch]:
    if not (out / name).is_file():
        yield TensorMismatch(name, name, "missing", "a file of the base that OUT has to keep")
        return
    if name == CARD and is_card_of((out / name).read_bytes(), (base / name).read_bytes()):
        return
    position = 0
    with (base / name).open("rb") as expected, (out / name).open("rb") as found:
        while True:
            a, b = expected.read(COMPARED_AT_ONCE), found.read(COMPARED_AT_ONCE)
            if a != b:
                detail = f"differs from the base's from byte {position + _first_difference(a, b)} on"
                yield TensorMismatch(name, name, "bytes", detail)
                return
            if not a:
                return
            position += len(a)
