"""Executes a plan into staged weight files: streaming, piece by piece, in a few threads.

A piece (`pieces.py`) is read, updated, rounded and written at its known place, so pieces may be done in
any order and the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from loudmerge.executing.outcome import Outcome
from loudmerge.executing.pieces import Piece, interleaved
from loudmerge.executing.preflight import check_weights
from loudmerge.executing.resume import Finished, ShardRecord
from loudmerge.executing.worker import Worker
from loudmerge.executing.writer import ShardFile
from loudmerge.planning.options import Progress
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.system.tensorfile import FileReader

SYNC_BYTES = 128 << 20
"""Bytes of a shard in the page cache that are sent on to the disk, which so works while others are computed.

What goes straight to the disk needs no such reminder: it would only wait for the disk's own cache each time.
"""

OPEN_SHARDS = 8
"""How many shards are open at a time: one that is written, the others on their way to the disk."""

AHEAD = 256 << 20
"""Elements that are copied while one core loads what computes: otherwise the disk would be idle."""

WRITERS = 6
"""How many threads may wait for the disk beside those that compute."""

SMALL_BYTES = 64 << 20
"""An OUT of less needs no second thread: they would only wait for each other."""


def execute(
    plan: MergePlan,
    directory: Path,
    *,
    device: str,
    threads: int,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> Outcome:
    """Writes every shard of the plan into `directory`, but for those that are `finished` already.

    threads: how many compute at a time.

    Raises MergeRefused `non-finite` when the adapter has a NaN or an infinity, or a result does not fit its
    dtype, and `corrupt-file` when an input ends early; OSError from the disk.
    """
    total = sum(output.nbytes for output in plan.outputs)
    threads_of_pool = threads + (WRITERS if total >= SMALL_BYTES else 0)
    # Left in the opposite order: no file is closed while a thread may still read or write it.
    with (
        FileReader() as reader,
        ExitStack() as shards,
        ThreadPoolExecutor(1, "loudmerge-sync") as syncer,
        ThreadPoolExecutor(1, "loudmerge-factors") as background,
        ThreadPoolExecutor(threads_of_pool, "loudmerge") as pool,
    ):
        notes = check_weights(plan.adapter, plan.sites, reader, pool)
        worker = Worker(plan, reader, device, notes, background, threads)
        begun = _begin(plan, directory, worker.outcome, finished)
        done = total - sum(output.nbytes for _, outputs in begun for output in outputs)
        finishes: list[Future[None]] = []
        ahead = AHEAD if worker.has_to_load else 0
        loaded = pool.submit(worker.load)
        for shard, outputs in begun:
            shards.enter_context(shard)
            syncs = _Syncs(shard, syncer)
            for nbytes in _in_order(pool, worker, shard, interleaved(outputs, ahead), threads_of_pool):
                done += nbytes
                syncs.wrote(nbytes)
                if progress is not None:
                    progress("merge", done, total)
            ahead = 0
            record = worker.outcome.record(outputs)
            finishes.append(syncer.submit(_finish, shard, syncs.started, record, finished))
            if len(finishes) >= OPEN_SHARDS:
                finishes[-OPEN_SHARDS].result()
        for finish in [loaded, *finishes]:
            finish.result()
        return worker.outcome


class _Syncs:
    """Has a shard brought to the disk in the background while it grows."""

    def __init__(self, shard: ShardFile, syncer: Executor) -> None:
        self._shard, self._syncer, self._unsynced = shard, syncer, 0
        self.started: list[Future[None]] = []

    def wrote(self, nbytes: int) -> None:
        self._unsynced += 0 if self._shard.direct else nbytes
        if self._unsynced >= SYNC_BYTES:
            self.started.append(self._syncer.submit(self._shard.sync))
            self._unsynced = 0


def shard_files(plan: MergePlan, directory: Path) -> list[tuple[ShardFile, list[OutputTensor]]]:
    """The shards of OUT as files of `directory`, of which none is made yet, each with its tensors."""
    shards: dict[str, list[OutputTensor]] = {path.name: [] for path in plan.base.shards}
    for output in plan.outputs:
        shards[output.shard].append(output)
    metadata = {path.name: {"format": "pt", **plan.base.metadata[path]} for path in plan.base.shards}
    return [(ShardFile(directory / name, held, metadata[name]), held) for name, held in shards.items()]


def _begin(
    plan: MergePlan, directory: Path, outcome: Outcome, finished: Finished | None
) -> list[tuple[ShardFile, list[OutputTensor]]]:
    """The shards that are to be written, each with its place on the disk; the others' outcome is restored."""
    begun = []
    for shard, outputs in shard_files(plan, directory):
        record = finished.get(shard.path.name) if finished is not None else None
        if record is not None:
            outcome.restore(record)
        else:
            shard.allocate()
            begun.append((shard, outputs))
    return begun


def _finish(
    shard: ShardFile, syncs: Sequence[Future[None]], record: ShardRecord, finished: Finished | None
) -> None:
    """Makes a shard durable, and only then says that it is finished."""
    for sync in syncs:
        # A write-back error is reported once: what these saw, the last sync does not.
        sync.result()
    shard.sync()
    shard.close()
    if finished is not None:
        finished.put(shard.path.name, record)


def _in_order(
    pool: ThreadPoolExecutor, worker: Worker, shard: ShardFile, pieces: Iterable[Piece], threads: int
) -> Iterator[int]:
    """Runs a shard's pieces with a bounded number in flight, and yields each one's bytes.

    So are their factors bounded: those of the next layer are asked for as the last one's are done with.
    """
    waiting: deque[tuple[Piece, Future[int]]] = deque()
    for piece in pieces:
        while waiting and worker.factor_bytes([piece, *(one for one, _ in waiting)]) > worker.factor_limit:
            yield waiting.popleft()[1].result()
        waiting.append((piece, pool.submit(worker.run, piece, shard, worker.prepare(piece))))
        if len(waiting) > 4 * threads:
            yield waiting.popleft()[1].result()
    for _, future in waiting:
        yield future.result()
