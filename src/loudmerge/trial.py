"""Runs pieces of a plan through the merge's own code, and writes nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch

from loudmerge.delta import Kept
from loudmerge.execute import Worker
from loudmerge.outcome import Outcome
from loudmerge.pieces import Piece
from loudmerge.plan import MergePlan
from loudmerge.tensorfile import TensorReader


class Trial:
    """Computes pieces as `execute` would."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> Trial:
        self._reader = self._stack.enter_context(TensorReader())
        self._pool = self._stack.enter_context(ThreadPoolExecutor(1, "loudmerge-factors"))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def measure(self, piece: Piece, rounding: str | None = None) -> tuple[Kept, str]:
        """What a piece would keep of its update, and how it would be rounded: by the plan, or as said.

        Raises MergeRefused `non-finite` as `execute` does.
        """
        worker = self._worker(rounding or self._plan.rounding)
        worker.outcome = Outcome()
        worker.compute(piece, worker.prepare(piece))
        (rounded,) = worker.outcome.rounded
        return worker.outcome.overall, rounded

    def _worker(self, rounding: str) -> Worker:
        if rounding not in self._workers:
            plan = replace(self._plan, rounding=rounding)
            self._workers[rounding] = Worker(plan, self._reader, torch.device("cpu"), (), self._pool)
        return self._workers[rounding]
