"""What a trained pair of fused expert LoRA shows of how its lora_B is packed. Pure: arrays in, numbers out.

Training leaves traces that follow the experts, and stand out only where lora_B's columns are grouped as they
were trained:

    norms        an expert that saw more tokens has longer columns; one that saw none has zeros
    directions   the columns of one expert are sums over the same tokens: nearly parallel, or opposite
    pairing      the gradient of B_e is a product with A_e, so where two rows of A_e are alike, so are their
                 columns of B_e. How the rows are packed is known
    crossing     as pairing, between experts: their tokens have much in common

Each is compared with what chance gives, as a z-score: norms and directions with random groupings of the same
columns; pairing and crossing with the same groups beside the rows in random order.

Columns can be alike for another reason than their experts: by their place within the expert, where a LoRA
was extracted by SVD or copied from a dense one, or along the file. That misleads norms and directions. It
does not mislead pairing and crossing, which compare equally grouped columns. So the two kinds are two
witnesses, and a packing is said only where both say it. docs/packing.md has the study that measured them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from loudmerge.errors import plural
from loudmerge.layout import LoraBLayout
from loudmerge.system.arrays import Floats
from loudmerge.system.memory import Array

Places = npt.NDArray[np.int64]

CHANCES = 32
"""Random orders that an observation is compared with."""

PAIRED_ROWS = 512
"""Rows of lora_A, at most, that pairing and crossing look at: those of whole experts, two at least."""

ELEMENTS = 1 << 20
"""Of the intermediate arrays, where several orders are looked at in one step."""

RUNS, RUN = 4, 64
"""Runs of rows of lora_B that are looked at, and the rows of each."""

ROUNDING = 1e-5
"""Cosines of float32 rows under this are rounding errors; those of random rows are above 0.01."""

CLIP = 30.0
"""The most that one statistic of one site can add, in standard deviations: no site outvotes all others."""

SHARPNESS = 0.4
"""What the log-odds that both witnesses are right grow by, per square of what the weaker shows, as chance has
the tail of a normal distribution. Fitted to half of the study."""

MOST_CONFIDENT = 0.99
"""All that the study can show: none of 319 held-out answers is wrong; with 95 % confidence under 1 % are."""

CONFIDENT = 4.0
"""What the weaker witness has to show, in standard deviations of no evidence at all."""

LUCK = 1.75
"""Standard deviations by which sites that are not yet read are allowed to say more than those read: one
witness in 25 says more."""


@dataclass(frozen=True)
class Traces:
    """Z-scores of the columns of one lora_B, grouped as one packing says."""

    norms: float
    directions: float
    pairing: float
    crossing: float


@dataclass(frozen=True)
class SiteTraces:
    """Both packings of one pair. blocks: the one that exact zeros prove, or None; see `_blocks`."""

    rank_major: Traces
    grouped_by_expert: Traces
    blocks: LoraBLayout | None = None

    @property
    def columns(self) -> float:
        """What lora_B alone shows, over 0 for rank_major; its standard deviation is 1 without evidence."""
        major, grouped = self.rank_major, self.grouped_by_expert
        return _added(major.norms - grouped.norms, major.directions - grouped.directions)

    @property
    def pairs(self) -> float:
        """As `columns`, what lora_A and lora_B together show."""
        major, grouped = self.rank_major, self.grouped_by_expert
        return _added(major.pairing - grouped.pairing, major.crossing - grouped.crossing)


@dataclass(frozen=True)
class Verdict:
    """What some sites say together. says: None is no evidence, and then confidence is 0.

    columns, pairs: the two witnesses, over 0 for rank_major, in standard deviations of no evidence.
    blocks: whether exact zeros prove it.
    """

    says: LoraBLayout | None
    confidence: float
    columns: float
    pairs: float
    sites: int
    blocks: bool = False

    def open(self, growth: float) -> bool:
        """Whether growth times as many sites could change what is said.

        No: where each witness shows twice what it has to; where, with LUCK, they still would not show it.
        """
        weaker = _weaker(self.columns, self.pairs)
        if self.says is not None:
            return not self.blocks and weaker < 2 * CONFIDENT
        # A sum of z-scores over the root of their number grows with that root, and so does what is uncertain.
        return weaker * math.sqrt(growth) + LUCK * math.sqrt(growth - 1) >= CONFIDENT

    def to_json(self) -> dict[str, Any]:
        return {
            "says": None if self.says is None else self.says.value,
            "confidence": self.confidence,
            "columns": self.columns,
            "pairs": self.pairs,
            "sites": self.sites,
            "blocks": self.blocks,
        }

    @property
    def detail(self) -> str:
        """In words."""
        sites = plural(self.sites, "site")
        if self.blocks:
            return f"{sites}: exact zeros where gate and up were fused fit no other packing"
        shown = f"{sites}: lora_B's columns {self.columns:+.1f}, A and B together {self.pairs:+.1f}"
        return f"{shown}, in standard deviations; over 0 for rank_major, each over {CONFIDENT:.0f} to count"


def verdict(sites: Sequence[SiteTraces]) -> Verdict:
    """What sites that are packed alike say together."""
    count = len(sites)
    columns = sum(site.columns for site in sites) / math.sqrt(max(count, 1))
    pairs = sum(site.pairs for site in sites) / math.sqrt(max(count, 1))
    proved = {site.blocks for site in sites} - {None}
    leans = LoraBLayout.RANK_MAJOR if pairs > 0 else LoraBLayout.GROUPED_BY_EXPERT
    if proved:
        # No training leaves such zeros under the other packing; pairs that speak against them are a riddle.
        says = proved.pop() if len(proved) == 1 else None
        if says is None or (says is not leans and abs(pairs) > CONFIDENT):
            return Verdict(None, 0.0, columns, pairs, count)
        return Verdict(says, MOST_CONFIDENT, columns, pairs, count, blocks=True)
    weaker = _weaker(columns, pairs)
    if weaker < CONFIDENT:
        return Verdict(None, 0.0, columns, pairs, count)
    return Verdict(leans, confidence(weaker), columns, pairs, count)


def _weaker(columns: float, pairs: float) -> float:
    """What both show, in standard deviations: 0 where they lean to two sides."""
    return min(abs(columns), abs(pairs)) if columns * pairs > 0 else 0.0


def confidence(weaker: float) -> float:
    """The probability that both witnesses are right, by what the weaker shows. See docs/packing.md."""
    return min(MOST_CONFIDENT, 1 / (1 + math.exp(-SHARPNESS * weaker**2)))


def _added(*differences: float) -> float:
    """Two independent z-scores are subtracted in each difference: its variance is 2."""
    return sum(max(-CLIP, min(CLIP, one)) for one in differences) / math.sqrt(2 * len(differences))


def sampled_rows(rows: int) -> tuple[range, ...]:
    """The rows of lora_B that are looked at: all, or RUNS runs from the top of equal parts."""
    if rows <= RUNS * RUN:
        return (range(rows),)
    return tuple(range(start, start + RUN) for start in (rows * run // RUNS for run in range(RUNS)))


@np.errstate(over="ignore", invalid="ignore")
def site_traces(
    rows_of: Callable[[Sequence[int]], Floats], b: Floats, lower: Array, experts: int, rank: int
) -> SiteTraces:
    """Both packings of one pair, compared.

    rows_of: the rows of lora_A of some experts, (experts * rank, a). b: (rows, rank * experts), some rows of
    lora_B. lower: (rows,) bool, which of these are of its lower half. experts, rank: two or more each.
    """
    if not b.any():
        untrained = Traces(0.0, 0.0, 0.0, 0.0)
        return SiteTraces(untrained, untrained)  # every order of such columns is the same
    orders = {packing: order_of(experts, rank, packing).reshape(experts, rank) for packing in LoraBLayout}
    chances = random_orders(experts * rank).reshape(-1, experts, rank)
    norms, units = np.linalg.norm(b, axis=0), _normalized(b, 0)
    columns = _columns(norms, units, np.stack([*orders.values(), *chances]))
    found = {}
    for (norm, direction), (packing, order) in zip(columns, orders.items(), strict=True):
        trained = _most_trained(norms[order], rank)
        rows = rows_of(trained.tolist()).reshape(len(trained), rank, -1)
        found[packing] = Traces(norm, direction, *_pairs(rows, units[:, order[trained]]))
    major, grouped = (found[packing] for packing in LoraBLayout)
    return SiteTraces(major, grouped, _blocks(b, lower, orders))


def order_of(experts: int, rank: int, packing: LoraBLayout) -> Places:
    """lora_B's columns in the order of lora_A's rows: expert by expert."""
    columns = np.arange(experts * rank)
    return columns.reshape(rank, experts).T.reshape(-1) if packing is LoraBLayout.RANK_MAJOR else columns


def _normalized(vectors: Floats, axis: int) -> Floats:
    """Of length 1 along the axis, but for those that are all but 0."""
    lengths = np.linalg.norm(vectors, axis=axis, keepdims=True)
    units: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return units


def _columns(norms: Floats, units: Floats, groupings: Places) -> list[list[float]]:
    """Scores of norms and directions, of all but the last CHANCES of groupings (orders, experts, rank)."""
    across = np.ascontiguousarray(units.T)
    some = _at_a_time(groupings, units.size)
    alignments = np.concatenate([_alignments(across, each) for each in some])
    return _scores(np.stack([_spreads(_ranks(norms)[groupings]), alignments], axis=1))


def _at_a_time(orders: Places, elements: int) -> list[Places]:
    """The orders in parts, where each needs so many elements: one step for all of a small pair."""
    step = max(1, ELEMENTS // max(1, elements))
    return [orders[start : start + step] for start in range(0, len(orders), step)]


def _most_trained(norms: Floats, rank: int) -> Places:
    """The experts with the longest columns, as many as pairing looks at. norms: (experts, rank)."""
    count = max(2, PAIRED_ROWS // rank)
    return np.sort(np.argsort(-np.square(norms).sum(axis=1), kind="stable")[:count])


def _pairs(rows: Floats, columns: Floats) -> list[float]:
    """Scores of pairing and crossing. rows: (experts, rank, a). columns: (rows, experts, rank), units."""
    experts, rank, _ = rows.shape
    units = _normalized(rows.reshape(experts * rank, -1), 1)
    like = units @ units.T
    # Rows that an SVD made are orthogonal: what is left of their products is rounding.
    like[np.abs(like) < ROUNDING] = 0
    columns = columns.reshape(-1, experts * rank)
    likewise = columns.T @ columns
    owner = np.arange(experts).repeat(rank)
    across = np.where(owner[:, None] == owner, np.float32(0), likewise)
    np.fill_diagonal(likewise, 0)
    within = _own(likewise, experts)
    orders = np.concatenate([np.arange(experts * rank)[None], _reassigned(experts, rank)])
    sums = []
    for some in _at_a_time(orders, like.size):
        shuffled = np.stack([like.take(order, 0).take(order, 1) for order in some])
        inside = _total(_own(shuffled, experts) * within)
        shuffled *= across
        sums.append(np.stack([inside, _total(shuffled)], axis=1))
    return _scores(np.concatenate(sums))[0]


def _total(each: Array) -> Array:
    """(orders, …) -> (orders,)."""
    sums: Array = each.reshape(len(each), -1).sum(axis=1)
    return sums


def _own(like: Floats, experts: int) -> Floats:
    """(…, n, n) -> (…, rank, rank, experts): of the rows of one expert each, a view."""
    rank = like.shape[-1] // experts
    apart = like.reshape(*like.shape[:-2], experts, rank, experts, rank)
    return apart.diagonal(axis1=-4, axis2=-2)


def _reassigned(experts: int, rank: int) -> Places:
    """(CHANCES, experts * rank): rows of whole experts in random order, and so the rows of each."""
    whole = random_orders(experts)[:, :, None] * rank
    places = random_orders(experts * rank).reshape(CHANCES, experts, rank).argsort(axis=2)
    return (whole + places).reshape(CHANCES, -1)


def _blocks(b: Floats, lower: Array, orders: Mapping[LoraBLayout, Places]) -> LoraBLayout | None:
    """The one packing in which half of each expert's columns write only upper rows, and half only lower ones.

    So PEFT >= 0.19 fuses gate and up (peft/utils/transformers_weight_conversion.py).
    """
    if b.all():
        return None  # no zeros, so no blocks of them: a tenth of the time
    fits = []
    for packing, order in orders.items():
        first, second = np.array_split(b[:, order], 2, axis=2)
        if first.any() and second.any() and not first[lower].any() and not second[~lower].any():
            fits.append(packing)
    return fits[0] if len(fits) == 1 else None


def _alignments(units: Floats, groupings: Places) -> Array:
    """(orders,): sums of squared cosines. units: (columns, rows). groupings: (orders, groups, n)."""
    members = units.take(groupings, 0)
    cosines = members @ members.swapaxes(2, 3)
    return _total(np.square(cosines, out=cosines))


def _spreads(values: Array) -> Array:
    """(orders, groups, n) -> how far apart the groups' means are: one-way F, up to a monotone function."""
    return _total(np.square(values.mean(axis=2)))


def _ranks(values: Floats) -> Array:
    """Ranks from 0 to 1, centred; equal values share one."""
    ordered = np.sort(values)
    first = np.searchsorted(ordered, values)
    last = np.searchsorted(ordered, values, side="right")
    ranks: Array = (first + last) / (2 * len(values))
    ranks -= ranks.mean()
    return ranks


def _scores(observed: Array) -> list[list[float]]:
    """(orders, statistics) -> z-scores of all but the last CHANCES orders against those.

    0 for what does not depend on the order.
    """
    values = observed.astype(np.float64)
    tested, chance = values[:-CHANCES], values[-CHANCES:]
    deviation = chance.std(axis=0, ddof=1)
    varies = deviation > 1e-6 * np.abs(chance).max(axis=0)
    scores: list[list[float]] = np.divide(
        tested - chance.mean(axis=0), deviation, out=np.zeros_like(tested), where=varies
    ).tolist()
    return scores


@lru_cache(maxsize=16)
def random_orders(count: int) -> Places:
    """(CHANCES, count) permutations, the same on every machine. Only to be read."""
    keys = np.arange(1, CHANCES * count + 1).reshape(CHANCES, count)
    # splitmix64's mixing; that a signed shift keeps the sign does no harm.
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        keys = (keys ^ (keys >> shift)) * factor
    return keys.argsort(axis=1)
