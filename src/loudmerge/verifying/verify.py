"""Recomputes every tensor of OUT by a second path and compares; every element, nothing sampled.

The plan, made anew, says which slices of which tensors make up an output tensor, what changes in the config,
and which is a head or of the last layer: a mistake there is the merge's, too. All arithmetic (`recompute`,
`judge`, `bounds`) is this side's own: float64, from the adapter's own file, independent of `delta.py` and
`merge.py`; so is what `auto` takes. Differences are collected, never raised.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loudmerge import __version__
from loudmerge.errors import MergeRefused, plural
from loudmerge.executing.report import TensorKept, one_rounding
from loudmerge.hub.client import directory
from loudmerge.planning.options import Progress, check_options
from loudmerge.planning.plan import MergePlan, OutputTensor
from loudmerge.planning.planner import make_plan
from loudmerge.reading.adapter import read_adapter
from loudmerge.reading.checkpoint import open_checkpoint
from loudmerge.reading.sidefiles import CONFIG, REPORT
from loudmerge.system.threads import one_torch_thread
from loudmerge.verifying.judge import MatrixResult, check_matrix
from loudmerge.verifying.outfiles import COMPARED_AT_ONCE, TensorMismatch, list_out
from loudmerge.verifying.outreport import (
    Recomputed,
    check_counts,
    check_fields,
    check_layout,
    check_measured,
    check_status,
    read_report,
    recorded_options,
    unreadable_so,
)
from loudmerge.verifying.recompute import Buffers, FactorCache, Matrix, RawFiles, matrices

__all__ = ["TensorMismatch", "Verification", "verify", "verify_plan"]

SHOWN_MISMATCHES = 10
"""How many mismatches the summary names before it only counts them."""

SAVED_ANEW = (
    "every tensor is that of the merge; the files below differ, as they do where a tool saves the model anew"
)

_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True)
class Verification:
    """What `verify` found. tensors, files: how many were compared, every element and byte of them.

    delta_kept: <W' - W, dW> / <dW, dW> over the merged tensors, with the exact dW; None without an update.
    notes: what was assumed. seconds: wall-clock time. details: of every merged tensor, in the plan's order.
    """

    tensors: int
    files: int
    mismatches: tuple[TensorMismatch, ...]
    delta_kept: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    details: tuple[TensorKept, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {
            "schema": 1,
            "ok": self.ok,
            "tensors": self.tensors,
            "files": self.files,
            "mismatches": [mismatch.to_json() for mismatch in self.mismatches],
            "delta_kept": self.delta_kept,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }

    def summary(self) -> str:
        """Some lines for a person."""
        read = f"{plural(self.tensors, 'tensor')} and {plural(self.files, 'file')}"
        compared = f"{read} compared in {self.seconds:.1f} s"
        kept = "" if self.delta_kept is None else f"; delta kept {self.delta_kept:.4f}"
        lines = [f"{'verified' if self.ok else 'NOT verified'}: {compared}{kept}", *self.notes]
        if self.mismatches:
            lines.append(f"{plural(len(self.mismatches), 'mismatch', 'mismatches')}:")
            lines += [f"  {mismatch}" for mismatch in self.mismatches[:SHOWN_MISMATCHES]]
        if len(self.mismatches) > SHOWN_MISMATCHES:
            lines.append(f"  … and {len(self.mismatches) - SHOWN_MISMATCHES} more")
        return "\n".join(lines)


def verify(
    out: str | Path,
    base: str | Path,
    adapter: str | Path,
    *,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Plans the merge of `base` and `adapter` anew and compares every tensor and file of `out` with it.

    The options are those of OUT's merge_report.json; without one the defaults are assumed, with rounding to
    nearest. orientation, lora_b_layout: how `adapter` is laid, where no file tells; what a report says has to
    agree. What else it says is compared, too. Raises MergeRefused when base and adapter cannot be merged at
    all, Mismatch for a report that is none, or that says another layout.
    """
    out = Path(out)
    laid = {"orientation": orientation, "lora_b_layout": lora_b_layout}
    made, report = plan_again(out, base, adapter, **laid)
    found = verify_plan(made, out, progress=progress, report=report)
    notes = [*_assumed(report, laid), *found.notes]
    others = {CONFIG, *made.side_files}
    if report is None and not found.ok and all(one.shard in others for one in found.mismatches):
        notes.append(SAVED_ANEW)
    return replace(found, notes=tuple(notes))


def plan_again(
    out: Path, base: str | Path, adapter: str | Path, **laid: str
) -> tuple[MergePlan, Mapping[str, Any] | None]:
    """The plan that `out` was made by, and OUT's report, None where it has none.

    The options are the report's, but for what `laid` says of the layout. Raises as `verify` does.
    """
    report = read_report(out / REPORT)
    asked = {name: value for name, value in laid.items() if value != "auto"}
    options = replace(recorded_options(report, out / REPORT), **asked)
    check_options(options)
    inputs = open_checkpoint(directory(base)), read_adapter(directory(adapter))
    try:
        made = make_plan(*inputs, options)
    except MergeRefused as refusal:
        unsaid = replace(options, **laid)
        if unsaid != options:
            make_plan(*inputs, unsaid)  # raises where it is not the report's word that is wrong
            raise unreadable_so(options, out / REPORT, refusal) from refusal
        raise
    if report is not None:
        check_layout(made, report, out / REPORT, asked)
    return made, report


def verify_plan(
    plan: MergePlan,
    out: Path,
    *,
    files: Path | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    report: Mapping[str, Any] | None = None,
) -> Verification:
    """Compares every tensor and file of `out`, published or not, with what `plan` makes of them.

    files: where config.json, the index and the side files lie while OUT is staged; `out` by default.
    threads: workers, torch's own number of threads by default. report: OUT's, where it has one; what another
    loudmerge counted and how it wrote JSON may differ, and is not compared. Memory: a few MB for each worker,
    and the factors of a few sites.
    """
    started = time.monotonic()
    ours = report is not None and report.get("loudmerge") == __version__
    listing = list_out(plan, out, files or out, exact=ours)
    outputs = [(number, plan.outputs[number]) for number in listing.comparable]
    with RawFiles() as raw, _workers(threads) as pool:
        comparison = _Comparison(plan, out, raw)
        jobs = {pool.submit(job): nbytes for job, nbytes in comparison.jobs(outputs)}
        done, total = 0, sum(jobs.values())
        for future in as_completed(jobs):
            comparison.add(*future.result())
            done += jobs[future]
            if progress is not None:
                progress("verify", done, total)
    wrong = comparison.mismatches()
    mismatches = [*listing.mismatches, *wrong]
    if report is not None:
        mismatches += check_status(report)
    if report is not None and ours:
        mismatches += check_fields(plan, report)
        mismatches += check_counts(plan, report, out)
        if not wrong and len(outputs) == len(plan.outputs):
            mismatches += check_measured(plan, report, comparison.merged())
    return Verification(
        len(outputs),
        listing.files,
        tuple(mismatches),
        comparison.delta_kept(),
        time.monotonic() - started,
        details=comparison.details(),
    )


def _assumed(report: Mapping[str, Any] | None, laid: Mapping[str, str]) -> Iterator[str]:
    if report is None:
        said = "".join(f", {name} {value}" for name, value in laid.items() if value != "auto")
        assumed = f"the default options, rounding nearest{said}"
        yield f"{REPORT} is missing: assumed that OUT was merged with {assumed}"
    elif report.get("loudmerge") != __version__:
        yield (
            f"{REPORT} is that of loudmerge {report.get('loudmerge')}, this is {__version__}: what JSON files"
            " say is compared, not their bytes, and of the report only the status"
        )


@contextmanager
def _workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers each compute on one core: parallel over matrices, not inside of one."""
    count = threads or torch.get_num_threads()
    with one_torch_thread():
        pool = ThreadPoolExecutor(count, "verify")
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


_Finding = tuple[int, tuple[Matrix, MatrixResult] | TensorMismatch | None]


class _Comparison:
    """The jobs of a verification, and their findings by output tensor."""

    def __init__(self, plan: MergePlan, out: Path, files: RawFiles) -> None:
        self._plan, self._out, self._files = plan, out, files
        self._factors = FactorCache(plan.sites)
        self._local = threading.local()
        self._results: dict[int, list[tuple[Matrix, MatrixResult]]] = defaultdict(list)
        self._copies: dict[int, TensorMismatch] = {}

    def add(self, number: int, found: tuple[Matrix, MatrixResult] | TensorMismatch | None) -> None:
        """Takes what a job for the plan's output `number` has found."""
        if isinstance(found, TensorMismatch):
            self._copies[number] = found
        elif found is not None:
            self._results[number].append(found)

    def jobs(
        self, outputs: Sequence[tuple[int, OutputTensor]]
    ) -> Iterator[tuple[Callable[[], _Finding], int]]:
        """What to run, with the bytes each reads. Matrices of one site come together: it is read once."""
        recomputed = []
        for number, output in outputs:
            if is_copy(output):
                yield partial(self._compare_copy, number, output), 2 * output.source.nbytes
            else:
                recomputed += matrices(number, output)
        recomputed.sort(key=lambda matrix: min((term.site for term in matrix.terms), default=-1))
        for matrix in recomputed:
            yield partial(self._compare_matrix, matrix), matrix.nbytes

    def _compare_matrix(self, matrix: Matrix) -> _Finding:
        if not hasattr(self._local, "space"):
            self._local.space = Buffers()
        space: Buffers = self._local.space
        result = check_matrix(matrix, self._plan.rounding, self._files, self._factors, self._out, space)
        return matrix.number, (matrix, result)

    def _compare_copy(self, number: int, output: OutputTensor) -> _Finding:
        source, written = output.source, self._out / output.shard
        for position in range(0, source.nbytes, COMPARED_AT_ONCE):
            expected = self._files.read(source.file, source.name, position, COMPARED_AT_ONCE)
            found = self._files.read(written, output.key, position, COMPARED_AT_ONCE)
            if expected != found:
                return number, _copy_mismatch(output, position, expected, found)
        return number, None

    def mismatches(self) -> tuple[TensorMismatch, ...]:
        """In the order of the plan."""
        found = dict(self._copies)
        for number, results in self._results.items():
            wrong = sorted(
                ((matrix, result) for matrix, result in results if not result.ok),
                key=lambda pair: pair[0].index,
            )
            if wrong:
                found[number] = _value_mismatch(self._plan.outputs[number], wrong, len(results))
        return tuple(found[number] for number in sorted(found))

    def delta_kept(self) -> float | None:
        sums = [result.kept for results in self._results.values() for _, result in results]
        expected = sum(pair[1] for pair in sums)
        return sum(pair[0] for pair in sums) / expected if expected else None

    def merged(self) -> tuple[Recomputed, ...]:
        """Every tensor that has an update, in the order of the plan."""
        numbers = (number for number in sorted(self._results) if self._plan.outputs[number].terms)
        return tuple(self._recomputed(number) for number in numbers)

    def details(self) -> tuple[TensorKept, ...]:
        return tuple(TensorKept(one.output.key, one.kept, one_rounding(one.rounded)) for one in self.merged())

    def _recomputed(self, number: int) -> Recomputed:
        results = [result for _, result in self._results[number]]
        along, total = (sum(sums) for sums in zip(*(result.kept for result in results), strict=True))
        rounded = Counter[str]()
        unsettled = 0
        for matrix, result in self._results[number]:
            rounded[result.rounding] += len(matrix.terms)
            unsettled += 0 if result.settled else len(matrix.terms)
        return Recomputed(self._plan.outputs[number], along, total, rounded, unsettled)


def is_copy(output: OutputTensor) -> bool:
    """Whether the tensor's bytes are those of its source."""
    changed = output.terms or output.dora or output.bias or output.token_rows
    return not changed and output.dtype == output.source.dtype


def _copy_mismatch(
    output: OutputTensor, position: int, expected: bytearray, found: bytearray
) -> TensorMismatch:
    byte = position + next(at for at, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    index = _unravel(byte * math.prod(output.shape) // output.source.nbytes, output.shape)
    source = "adapter's" if output.replaced else "base's"
    detail = f"a copy that differs from the {source} from byte {byte}, element {list(index)}, on"
    return TensorMismatch(
        output.key,
        output.shard,
        "bytes",
        detail,
        index=index,
        expert=_expert(output, -1),
        projection=_projection(output.key),
    )


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(at) for at in torch.unravel_index(torch.tensor(flat), tuple(shape)))


def _value_mismatch(
    output: OutputTensor, wrong: Sequence[tuple[Matrix, MatrixResult]], compared: int
) -> TensorMismatch:
    matrix, result = wrong[0]
    count = sum(found.wrong for _, found in wrong)
    worst = max(found.worst for _, found in wrong)
    expert = _expert(output, matrix.index)
    experts = tuple(at for at in (_expert(output, one.index) for one, _ in wrong) if at is not None)
    where = "" if expert is None else f" of expert {expert}"
    index = _position(output, matrix, result.first or (0, 0))
    detail = (
        f"{plural(count, 'wrong element')}, by up to {worst:.4g} units in the last place; the first at "
        f"{list(index)}{where}: found {result.found!r}, expected {result.expected!r}"
    )
    if compared > 1:
        detail += f"; {len(wrong)} of {compared} experts wrong"
    return TensorMismatch(
        output.key,
        output.shard,
        "value",
        detail,
        wrong=count,
        max_ulp=worst,
        index=index,
        expert=expert,
        projection=_projection(output.key),
        experts=experts,
    )


def _position(output: OutputTensor, matrix: Matrix, place: tuple[int, int]) -> tuple[int, ...]:
    inner = output.shape if matrix.index < 0 else output.shape[1:]
    at = _unravel(place[0] * matrix.columns + place[1], inner)
    return at if matrix.index < 0 else (matrix.index, *at)


def _expert(output: OutputTensor, index: int) -> int | None:
    """The expert of a matrix: the fused tensor's index, or the number in the key of an expert of its own."""
    for term in output.terms:
        if term.index == index and term.expert >= 0:
            return term.expert
    if index >= 0:
        return index
    named = _EXPERT.search(output.key)
    return int(named[1]) if named else None


def _projection(key: str) -> str | None:
    """The last name in a key of an expert's tensor: gate_proj, w1, gate_up_proj; None for other tensors."""
    if "experts." not in key:
        return None
    return key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
