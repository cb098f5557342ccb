"""What an interrupted merge had finished: the shards that `--resume` need not write again.

A record is written once its shard is on the disk. It says for which merge it is, so that the shards of
other inputs or options are never taken for this one's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loudmerge import __version__
from loudmerge.errors import MergeRefused, Problem
from loudmerge.planning.plan import MergePlan

_IDENTITY = "identity"


@dataclass(frozen=True)
class ShardRecord:
    """What was merged in one shard.

    kept: (along, total) of delta_kept by key. rounded: the terms applied, by how they were rounded.
    """

    kept: Mapping[str, tuple[float, float]]
    rounded: Mapping[str, Collection[tuple[str, int, int]]]


class Finished:
    """The records of one merge, in a directory that outlives an interruption.

    Raises MergeRefused `out-exists` when the directory holds those of a merge of another `identity`.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)
        named = directory / _IDENTITY
        if not named.exists():
            for left_over in directory.iterdir():
                # Whose merge they are of was removed before them, by one that was killed then.
                left_over.unlink()
            _write_durably(named, identity)
        elif named.read_bytes() != identity.encode("ascii"):
            raise MergeRefused(
                Problem(
                    "out-exists",
                    str(directory.parent),
                    "an interrupted merge of other inputs, with other options or by another loudmerge",
                    "one of these inputs with these options",
                    "Run without --resume to start over, or with what was given before.",
                )
            )

    def get(self, shard: str) -> ShardRecord | None:
        """What was merged in a finished shard; None for one that is not, or whose record is damaged."""
        path = self._path(shard)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError:
            return None
        kept = {key: (along, total) for key, (along, total) in record["kept"].items()}
        rounded = {how: _terms(found) for how, found in record["rounded"].items()}
        return ShardRecord(kept, rounded)

    def put(self, shard: str, record: ShardRecord) -> None:
        """Says that a shard, which is on the disk, is finished."""
        _write_durably(self._path(shard), json.dumps(dataclasses.asdict(record)))

    def shards(self, weights: Path, sizes: Mapping[str, int]) -> list[str]:
        """The finished shards that lie in `weights` in full, by `sizes` in bytes. Removes others' records.

        A merge that was killed once it had published its shards, or while it removed them, left such records.
        So may a disk leave a record that no longer says anything: its shard is written again.
        """
        found = {path.name: path.stat().st_size for path in weights.iterdir() if path.is_file()}
        for shard in sizes:
            if found.get(shard) != sizes[shard] or self.get(shard) is None:
                self._path(shard).unlink(missing_ok=True)
        return [shard for shard in sizes if self._path(shard).exists()]

    def _path(self, shard: str) -> Path:
        return self._directory / f"{shard}.json"


def identity(plan: MergePlan) -> str:
    """A hash of all that decides the weights of OUT: the inputs' files, the options and our version.

    A file is known by its path, size and times of change, as build tools do: what copies a file may set its
    mtime to what it was, but not its ctime.
    """
    stats = {str(path.resolve()): _state(path.stat()) for path in plan.inputs}
    parts: dict[str, Any] = {
        "loudmerge": __version__,
        "files": dict(sorted(stats.items())),
        "base": plan.base.config,
        "adapter": plan.adapter.config.raw,
        "written as": plan.adapter.config.written_as,
        "options": dataclasses.asdict(plan.options),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _terms(found: Iterable[Sequence[Any]]) -> list[tuple[str, int, int]]:
    return [(key, index, start) for key, index, start in found]


def _write_durably(path: Path, text: str) -> None:
    """Either the whole text or no such file, whatever happens to the machine."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.rename(path)
