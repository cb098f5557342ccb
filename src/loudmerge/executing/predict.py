"""What a merge would keep of the update and how it would be rounded, from a bounded sample. Writes nothing.

Of each kind of weight some matrices are taken, of each matrix some rows, and these go through the merge's own
code: on them the prediction is exact. Between kinds it is weighed by their sizes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.sizes import BAND
from loudmerge.errors import plural, some
from loudmerge.executing.outcome import Outcome
from loudmerge.executing.pieces import Piece, split
from loudmerge.executing.report import KEPT_WARNING, what_keeps
from loudmerge.executing.worker import Worker
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.names import template
from loudmerge.system.tensorfile import FileReader

MATRICES, EXPERTS = 24, 4
"""Of each kind of weight: how many matrices are taken, and how many with the same LoRA pair, which has to be
read whole."""

RUNS, ROWS = 2, BAND
"""Of each matrix: how many runs of how many rows, each of whole bands."""

T = TypeVar("T")


@dataclass(frozen=True)
class KindKept:
    """What was predicted of all matrices whose tensors' keys differ in indices only.

    kept: <W' - W, dW> / <dW, dW>, as the plan rounds. nearest: the same where all is rounded to the nearest.
    rounding: the sampled matrices by how the merge will round them. zero: whether nothing of what was sampled
    has an update; then both are 1.
    """

    kind: str
    matrices: int
    sampled: int
    kept: float
    nearest: float
    rounding: Mapping[str, int]
    zero: bool = False


@dataclass(frozen=True)
class Prediction:
    """What was predicted of a merge. kept, nearest: as in KindKept. option: the plan's rounding."""

    option: str
    kept: float
    nearest: float
    kinds: tuple[KindKept, ...]

    @property
    def matrices(self) -> int:
        return sum(kind.matrices for kind in self.kinds)

    @property
    def sampled(self) -> int:
        return sum(kind.sampled for kind in self.kinds)

    @property
    def rounding(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for kind in self.kinds:
            found.update(kind.rounding)
        return dict(sorted(found.items()))

    @property
    def warning(self) -> str | None:
        """What a person should know of the update, and of its rounding, before the merge."""
        if idle := [kind.kind for kind in self.kinds if kind.zero]:
            where = some(idle)
            return f"the update is zero in all that was sampled of {where}: not trained, or lost on the way"
        if self.kept < KEPT_WARNING:
            helps = what_keeps(self.option)
            return f"rounding would swallow a part of the update; {helps} keeps it"
        if self.nearest < KEPT_WARNING:
            return (
                f"rounding to the nearest, as other tools do, keeps only {self.nearest:.4f} of the update;"
                " --rounding auto, the default, keeps it"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "sampled": self.sampled,
            "matrices": self.matrices,
            "option": self.option,
            "delta_kept": {"overall": self.kept, "nearest": self.nearest},
            "rounding": self.rounding,
            "kinds": [asdict(kind) for kind in self.kinds],
            "warning": self.warning,
        }

    def lines(self) -> Iterator[str]:
        """Plain lines for a person."""
        yield (
            f"  predicted from a sample, {self.sampled} of {plural(self.matrices, 'matrix', 'matrices')}: "
            f"keeps {self.kept:.4f} of the update by --rounding {self.option}, {self.nearest:.4f} by nearest"
        )
        for kind in self.kinds:
            chosen = ", ".join(f"{count} {how}" for how, count in kind.rounding.items())
            yield f"            {kind.kept:.4f} ({kind.nearest:.4f} by nearest)  {kind.kind}: {chosen}"
        if self.warning:
            yield f"  warning   {self.warning}"


@dataclass(frozen=True)
class _Matrix:
    """One matrix that the plan updates; pieces: all of it."""

    kind: str
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def elements(self) -> int:
        return self.rows * self.pieces[0].columns

    @property
    def site(self) -> int:
        return self.pieces[0].terms[0].site

    def sample(self) -> Iterator[Piece]:
        """Some rows; of DoRA all, since it scales whole rows or columns."""
        first = self.pieces[0]
        if first.output.dora is not None:
            yield from self.pieces
            return
        apart = -(-self.rows // RUNS)
        for start in range(0, self.rows, max(ROWS, apart - apart % BAND)):
            held = min(ROWS, self.rows - start)
            yield first._replace(first=start, rows=held, offset=first.offset + start * first.columns)


def predict(plan: MergePlan) -> Prediction | None:
    """What a merge by this plan would keep; None where it updates no matrix.

    Reads at most RUNS * ROWS rows of MATRICES matrices of each kind of weight, and their LoRA pairs.
    Raises MergeRefused `non-finite` where a sampled result is not finite: so would the merge.
    """
    by_kind: dict[str, list[_Matrix]] = defaultdict(list)
    for matrix in _matrices(plan):
        by_kind[matrix.kind].append(matrix)
    if not by_kind:
        return None
    overall, nearest, kinds = Kept(), Kept(), []
    with FileReader() as reader, ThreadPoolExecutor(1, "loudmerge-factors") as pool:
        trial = _Trial(plan, reader, pool)
        for kind, members in sorted(by_kind.items()):
            found = _Measured()
            for matrix in _chosen(members):
                found.take(trial, matrix)
            kinds.append(found.result(kind, len(members)))
            weight = sum(matrix.elements for matrix in members) / found.elements
            overall.add(Kept(found.kept.along * weight, found.kept.total * weight))
            nearest.add(Kept(found.nearest.along * weight, found.nearest.total * weight))
    return Prediction(plan.rounding, overall.ratio, nearest.ratio, tuple(kinds))


class _Measured:
    """Sums over the sampled matrices of a kind. elements: how many were looked at."""

    def __init__(self) -> None:
        self.kept, self.nearest = Kept(), Kept()
        self.elements = self._matrices = 0
        self._rounding: Counter[str] = Counter()

    def take(self, trial: _Trial, matrix: _Matrix) -> None:
        roundings = set()
        for piece in matrix.sample():
            kept, rounding = trial.measure(piece)
            self.kept.add(kept)
            self.nearest.add(kept if rounding == "nearest" else trial.measure(piece, "nearest")[0])
            self.elements += piece.rows * piece.columns
            roundings.add(rounding)
        self._matrices += 1
        self._rounding.update(roundings)

    def result(self, kind: str, matrices: int) -> KindKept:
        rounding = dict(sorted(self._rounding.items()))
        kept, zero = self.kept, self.kept.total == 0.0
        return KindKept(kind, matrices, self._matrices, kept.ratio, self.nearest.ratio, rounding, zero)


def _matrices(plan: MergePlan) -> Iterator[_Matrix]:
    for output in plan.outputs:
        pieces: dict[int, list[Piece]] = defaultdict(list)
        for piece in split(output) if output.terms else ():
            if piece.terms:
                pieces[piece.matrix].append(piece)
        for found in pieces.values():
            yield _Matrix(template(output.key), tuple(found))


def _chosen(members: Iterable[_Matrix]) -> Iterator[_Matrix]:
    """Some pairs, spread over the layers, and some experts of each: of every pair others."""
    by_site: dict[int, list[_Matrix]] = defaultdict(list)
    for matrix in members:
        by_site[matrix.site].append(matrix)
    sites = [by_site[site] for site in sorted(by_site)]
    each = min(EXPERTS, max(map(len, sites)))
    for number, site in enumerate(_spread(sites, MATRICES // each)):
        turned = site[number % len(site) :] + site[: number % len(site)]
        yield from _spread(turned, EXPERTS)


def _spread(items: Sequence[T], count: int) -> Iterator[T]:
    """`count` of the items at equal distances, all where there are no more."""
    held = min(count, len(items))
    return (items[(2 * number + 1) * len(items) // (2 * held)] for number in range(held))


class _Trial:
    """Computes pieces as `execute` would."""

    def __init__(self, plan: MergePlan, reader: FileReader, pool: Executor) -> None:
        self._plan, self._reader, self._pool = plan, reader, pool
        self._workers: dict[str, Worker] = {}

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
            self._workers[rounding] = Worker(plan, self._reader, "cpu", (), self._pool)
        return self._workers[rounding]
