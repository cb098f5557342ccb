"""Does pieces: reads, has them computed, checks and writes them."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from loudmerge.arithmetic.compiled import kernel
from loudmerge.arithmetic.factors import Factors
from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.executing.content import Content
from loudmerge.executing.lanes import Done, HalfLane
from loudmerge.executing.outcome import Outcome
from loudmerge.executing.pieces import Piece
from loudmerge.executing.readahead import ReadAhead
from loudmerge.executing.writer import ShardFile
from loudmerge.planning.plan import MergePlan
from loudmerge.system.arrays import as_numbers
from loudmerge.system.memory import Array, Bytes
from loudmerge.system.tensorfile import ITEM_BYTES, FileReader
from loudmerge.system.threads import one_torch_thread

if TYPE_CHECKING:
    from loudmerge.executing.tensorlane import TensorLane

FACTOR_BYTES = 192 << 20
"""Bytes of factors that are held at a time: a layer's, and some of the next, which is read ahead."""

COMPILED_BYTES = 1 << 30
"""Bytes to be computed from which on the compiled kernel is worth being loaded to round to the nearest: that
takes half a second once, which it saves with each of them on two cores."""

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


class Worker:
    """Does pieces. Shared by the threads, of which `computing` read and compute at a time, the others write.

    More would turn each other's buffers out of the processors' caches, and wait for Python's lock.
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: FileReader,
        device: str,
        notes: tuple[str, ...],
        background: Executor,
        computing: int = 1,
    ) -> None:
        self._rounding, self._device, self._reader = plan.rounding, device, reader
        self._content = Content(reader)
        self.factor_limit = FACTOR_BYTES
        self._factors = ReadAhead(plan.sites, reader, background, self.factor_limit)
        computed = [output for output in plan.outputs if not output.is_copied]
        halves = sum(output.nbytes for output in computed if output.source.dtype == output.dtype == "BF16")
        helps = plan.rounding in {"auto", "balanced", "nearest"} and device == "cpu"
        self._asks_kernel, self._is_idle = helps and halves >= COMPILED_BYTES, not computed
        self._computing = threading.Semaphore(computing)
        self._lock, self._lanes = threading.Lock(), threading.Lock()
        self._halves: HalfLane | None = None
        self._tensors: TensorLane | None = None
        self._torch_is_new = "torch" not in sys.modules
        self.outcome = Outcome(notes)

    @property
    def has_to_load(self) -> bool:
        """Whether `load` takes its time: a second at most, in which others may copy."""
        return not self._is_idle and (self._asks_kernel or self._torch_is_new)

    def load(self) -> None:
        """Loads what computes most of the plan, once."""
        if self._halves is not None:
            return
        with self._lanes:
            if self._asks_kernel:
                self._asks_kernel, found = False, kernel()
                if found is not None and self._rounding != "balanced":
                    self._halves = HalfLane(found, self._content, self._rounding)
        if self._halves is None and not self._is_idle:
            self._tensor_lane()

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
            content = self._content.read(piece, itemsize)
        else:
            itemsize, content = ITEM_BYTES[output.dtype], self.compute(piece, prepared)
        shard.write(output.key, piece.offset * itemsize, content)
        return count * itemsize

    def compute(self, piece: Piece, prepared: Prepared) -> Bytes:
        """The piece as OUT has it, in memory of this thread, and its part of the outcome."""
        found = [factors.result() for factors in prepared]
        self.load()
        with self._computing:
            # Not before: what was just read is still in a cache.
            values = self._content.read(piece, ITEM_BYTES[piece.output.source.dtype])
            done = self._update(piece, values, found)
        if done.broken is not None:
            self._check(piece, done.broken)
        if piece.terms:
            self._record(piece, done)
        return done.content

    def _update(self, piece: Piece, values: Bytes, found: Sequence[Factors]) -> Done:
        done = self._halves.compute(piece, values, found) if self._halves is not None else None
        if done is not None:
            return done
        lane = self._tensor_lane()
        # The caller had no number of threads to be given back: one for what it does, thread by thread.
        with one_torch_thread() if self._torch_is_new else nullcontext():
            return lane.compute(piece, values, found)

    def _tensor_lane(self) -> TensorLane:
        with self._lanes:
            if self._tensors is None:
                from loudmerge.executing.tensorlane import TensorLane  # noqa: PLC0415 - it imports torch

                self._tensors = TensorLane(self._device, self._content, self._reader, self._rounding)
            return self._tensors

    def _record(self, piece: Piece, done: Done) -> None:
        with self._lock:
            self.outcome.kept[piece.output.key].add(done.kept)
            merged = {(piece.output.key, term.index, term.out.start) for term in piece.terms}
            self.outcome.rounded[done.rounding] |= merged

    def _check(self, piece: Piece, broken: Array) -> None:
        """Raises MergeRefused `non-finite` where an element is broken."""
        bad = int(broken.sum())
        if not bad:
            return
        output, code = piece.output, piece.output.source.dtype
        before = as_numbers(self._content.read(piece, ITEM_BYTES[code]), code).reshape(broken.shape)
        inherited = int((broken & ~np.isfinite(before)).sum())
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
