"""Executes a plan into staged weight files: streaming, piece by piece, in a few threads.

A piece (`pieces.py`) is read, updated, rounded and written at its known place, so pieces may be done in
any order and the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import LifoQueue

import torch
from torch import Tensor

from loudmerge.arithmetic.compiled import kernel
from loudmerge.arithmetic.delta import Factors, Kept, Update, Workspace, dora_weight
from loudmerge.arithmetic.rounding import DROPPED, Dither, chosen, dither_table, sampled
from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.executing.outcome import Outcome
from loudmerge.executing.pieces import PIECE_BYTES, Piece, interleaved
from loudmerge.executing.preflight import check_weights
from loudmerge.executing.readahead import ReadAhead
from loudmerge.executing.resume import Finished, ShardRecord
from loudmerge.executing.writer import ShardFile
from loudmerge.layout import Axes
from loudmerge.planning.options import Progress
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.system.memory import CPU, empty
from loudmerge.system.tensorfile import DTYPES, TensorEntry, TensorReader

FACTOR_BYTES = 192 << 20
"""Bytes of factors that are held at a time: a layer's, and some of the next, which is read ahead."""

SYNC_BYTES = 128 << 20
"""Bytes of a shard in the page cache that are sent on to the disk, which so works while others are computed.

What goes straight to the disk needs no such reminder: it would only wait for the disk's own cache each time.
"""

OPEN_SHARDS = 8
"""How many shards are open at a time: one that is written, the others on their way to the disk."""

COMPILED_BYTES = 1 << 30
"""Bytes to be computed from which on the compiled kernel is worth being loaded to round to the nearest: that
takes half a second once, which it saves with each of them on two cores."""

AHEAD = 256 << 20
"""Elements that are copied while one core loads the compiled kernel: otherwise the disk would be idle."""

WRITERS = 6
"""How many threads may wait for the disk beside those that compute."""

SMALL_BYTES = 64 << 20
"""An OUT of less needs no second thread: they would only wait for each other."""

WIDER = {
    "F16": "Give --dtype bfloat16 or --dtype float32, whose range is larger.",
    "BF16": "The range of --dtype float32 is a little larger. Are lora_alpha and r those of the training?",
}
WIDEST = "No --dtype has a larger range: are lora_alpha and r of adapter_config.json those of the training?"
BROKEN = "The adapter changes this tensor: get the base again, or mend it there; no --dtype helps."
UNTOUCHED = "Leave out --dtype: a tensor that the adapter does not change is then copied as it is."
"""What helps where a result is not finite: against an overflow, and where the base is not finite itself."""

Prepared = Sequence[Future[Factors]]
"""The factors of a piece's terms, in their order, as soon as they are read."""


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
        TensorReader() as reader,
        ExitStack() as shards,
        ThreadPoolExecutor(1, "loudmerge-sync") as syncer,
        ThreadPoolExecutor(1, "loudmerge-factors") as background,
        ThreadPoolExecutor(threads_of_pool, "loudmerge") as pool,
    ):
        notes = check_weights(plan.adapter, plan.sites, reader, pool)
        worker = Worker(plan, reader, torch.device(device), notes, background, threads)
        ahead = AHEAD if worker.compiled else 0
        if worker.compiled:
            pool.submit(kernel)
        begun = _begin(plan, directory, worker.outcome, finished)
        done = total - sum(output.nbytes for _, outputs in begun for output in outputs)
        finishes: list[Future[None]] = []
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
        for finish in finishes:
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
        while waiting and worker.factor_bytes([piece, *(one for one, _ in waiting)]) > FACTOR_BYTES:
            yield waiting.popleft()[1].result()
        waiting.append((piece, pool.submit(worker.run, piece, shard, worker.prepare(piece))))
        if len(waiting) > 4 * threads:
            yield waiting.popleft()[1].result()
    for _, future in waiting:
        yield future.result()


class Worker:
    """Does pieces. Shared by the threads, of which `computing` compute at a time, the others read and write.

    More would turn each other's buffers out of the processors' caches, and wait for Python's lock.
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: TensorReader,
        device: torch.device,
        notes: tuple[str, ...],
        background: Executor,
        computing: int = 1,
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._device = device
        self._local = threading.local()
        self._factors = ReadAhead(plan.sites, reader, device, background, FACTOR_BYTES)
        computed = (output for output in plan.outputs if not output.is_copied)
        halves = sum(output.nbytes for output in computed if output.source.dtype == output.dtype == "BF16")
        nearest = plan.rounding in {"auto", "balanced", "nearest"} and device.type == "cpu"
        self.compiled = nearest and halves >= COMPILED_BYTES
        self._spaces: LifoQueue[Workspace] = LifoQueue()
        for _ in range(computing):
            self._spaces.put(Workspace(device))
        self._lock = threading.Lock()
        self.outcome = Outcome(notes)

    def prepare(self, piece: Piece) -> Prepared:
        """Has the factors read that the piece will need: of each of its terms."""
        return [self._factors.ask(term.site) for term in piece.terms]

    def factor_bytes(self, pieces: Iterable[Piece]) -> int:
        """Bytes of the files that hold the factors of these pieces."""
        return self._factors.nbytes({term.site for piece in pieces for term in piece.terms})

    def run(self, piece: Piece, shard: ShardFile, prepared: Prepared) -> int:
        """Reads, updates and writes one piece; returns the bytes written."""
        output, source = piece.output, piece.output.source
        count = piece.rows * piece.columns
        if output.is_copied:
            itemsize = source.nbytes // max(math.prod(source.shape), 1)
            content = self._bytes("source", count * itemsize)
            self._reader.read_bytes(source, piece.offset * itemsize, content)
            shard.write(output.key, piece.offset * itemsize, content)
            return content.numel()
        result = self.compute(piece, prepared)
        shard.write(output.key, piece.offset * result.element_size(), result.cpu())
        return result.nbytes

    def compute(self, piece: Piece, prepared: Prepared) -> Tensor:
        """The piece as OUT has it, in a buffer of this thread, and its part of the outcome."""
        values, found = self._read(piece), [factors.result() for factors in prepared]
        self._local.space = self._spaces.get()
        try:
            return self._update(piece, values, found)
        finally:
            self._spaces.put(self._local.space)

    def _read(self, piece: Piece, buffer: str = "source") -> Tensor:
        source = piece.output.source
        dtype = DTYPES[source.dtype]
        content = self._bytes(buffer, piece.rows * piece.columns * dtype.itemsize)
        self._reader.read_bytes(source, piece.offset * dtype.itemsize, content)
        return content.view(dtype).view(piece.rows, piece.columns).to(self._device)

    def _update(self, piece: Piece, values: Tensor, found: Sequence[Factors]) -> Tensor:
        output = piece.output
        dtype = DTYPES[output.dtype]
        if output.dora is not None:
            result = self._dora(piece, values, output.dora, *found)
            kept = Kept(math.nan)
        else:
            result = values
            if values.dtype != dtype:
                result = self._bytes("result", values.numel() * dtype.itemsize, self._device).view(dtype)
                result = result.view(values.shape).copy_(values)
            kept = self._apply_terms(piece, values, result, found)
        if output.bias is not None:
            entry, scaling = output.bias
            added = self._reader.read(entry).to(self._device, torch.float32).view_as(values) * scaling
            result = (values.to(torch.float32) + added).to(dtype)
        if output.token_rows is not None:
            self._replace_rows(piece, result, *output.token_rows)
        # The sums over what was merged are finite only if the results are: then they need no second look.
        plain = values.dtype == dtype and not (output.replaced or output.bias or output.token_rows)
        if not (plain and math.isfinite(kept.along + kept.total)):
            self._check(piece, result)
        return result

    def _apply_terms(self, piece: Piece, values: Tensor, result: Tensor, found: Sequence[Factors]) -> Kept:
        total, dither = Kept(), None
        updates = [Update.of(term, its) for term, its in zip(piece.terms, found, strict=True)]
        rounding = self._rounding(piece, values, updates, result.dtype)
        if rounding in {"stochastic", "balanced"}:
            dither = Dither(dither_table(self._device), piece.output.key, max(piece.matrix, 0))
        for update in updates:
            space, first = self._local.space, piece.first
            total.add(update.apply(values, first, rounding, space, result, dither, compiled=self.compiled))
        if updates:
            self._record(piece, total, rounding)
        return total

    def _rounding(self, piece: Piece, values: Tensor, updates: Sequence[Update], dtype: torch.dtype) -> str:
        """How a piece is rounded, the same for all of a matrix.

        For "auto" it hangs on what the nearest keeps of the update of a few of its rows.
        """
        if self._plan.rounding == "balanced":
            return piece.output.balanced
        if self._plan.rounding != "auto":
            return self._plan.rounding
        if dtype not in DROPPED or not updates or piece.output.head:
            return "nearest"
        kept, rows = Kept(), piece.output.shape[-2]
        for first, last in sampled(rows):
            if piece.rows == rows:
                sample = values[first:last]
            else:
                offset = piece.offset + (first - piece.first) * piece.columns
                sample = self._read(piece._replace(first=first, rows=last - first, offset=offset), "sample")
            rounded = self._bytes("rounded", sample.numel() * dtype.itemsize, self._device)
            rounded = rounded.view(dtype).view(sample.shape)
            for update in updates:
                kept.add(update.apply(sample, first, "nearest", self._local.space, rounded))
        found = chosen(kept.ratio, closing=piece.output.closing)
        return piece.output.balanced if found == "balanced" else found

    def _replace_rows(
        self, piece: Piece, result: Tensor, indices: tuple[int, ...], entry: TensorEntry
    ) -> None:
        rows = self._reader.read(entry).to(self._device, result.dtype)
        for number, index in enumerate(indices):
            if piece.first <= index < piece.first + piece.rows:
                result[index - piece.first] = rows[number]

    def _dora(self, piece: Piece, values: Tensor, dora: TensorEntry, found: Factors) -> Tensor:
        (term,) = piece.terms
        delta = found.left[0] @ found.right[0] * found.scaling
        weight = values.to(torch.float32)
        plain = weight if term.axes is Axes.OUT_IN else weight.T
        magnitude = self._reader.read(dora).to(self._device, torch.float32)
        merged = dora_weight(plain, delta, magnitude)
        exact = merged if term.axes is Axes.OUT_IN else merged.T
        result = exact.to(DTYPES[piece.output.dtype])
        wanted = (exact - weight).reshape(-1)
        got = (result.to(torch.float32) - weight).reshape(-1)
        self._record(piece, Kept(float(torch.dot(got, wanted)), float(torch.dot(wanted, wanted))))
        return result.contiguous()

    def _record(self, piece: Piece, kept: Kept, rounding: str = "nearest") -> None:
        with self._lock:
            self.outcome.kept[piece.output.key].add(kept)
            done = {(piece.output.key, term.index, term.out.start) for term in piece.terms}
            self.outcome.rounded[rounding] |= done

    def _check(self, piece: Piece, result: Tensor) -> None:
        broken = ~result.isfinite()
        bad = int(broken.sum())
        if not bad:
            return
        output = piece.output
        inherited = int((broken & ~self._read(piece).isfinite()).sum())
        found = f"{plural(bad, 'value')} of the result that {output.dtype} cannot hold"
        hint = WIDER.get(output.dtype, WIDEST)
        if inherited == bad:
            found = f"{plural(bad, 'NaN or infinite value')} that the base itself has"
            hint = BROKEN if output.touched else UNTOUCHED
        elif inherited:
            found += f", of which the base itself has {inherited}"
        # Experts that lie apart have their number in the key.
        stacked = any(term.index >= 0 for term in output.terms)
        where = f"{output.key}, expert {piece.matrix}" if stacked else output.key
        raise MergeRefused(Problem("non-finite", where, found, "finite numbers", hint))

    def _bytes(self, name: str, nbytes: int, device: torch.device = CPU) -> Tensor:
        """A buffer of this thread, reused: fresh memory for every piece would cost its page faults."""
        held: dict[str, Tensor] = self._local.__dict__.setdefault("bytes", {})
        if name not in held or held[name].numel() < nbytes:
            held[name] = empty([max(nbytes, PIECE_BYTES)], torch.uint8, device)
        return held[name][:nbytes]
