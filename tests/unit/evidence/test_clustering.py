"""What a pair's weights show of how its lora_B is packed: numbers of tensors that were made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from loudmerge.evidence.clustering import (
    CHANCES,
    CLIP,
    CONFIDENT,
    MOST_CONFIDENT,
    SiteTraces,
    Traces,
    confidence,
    order_of,
    random_orders,
    sampled_rows,
    site_traces,
    verdict,
)
from loudmerge.layout import LoraBLayout
from loudmerge.system.arrays import Floats

MAJOR, GROUPED = LoraBLayout
BOTH = pytest.mark.parametrize("packing", list(LoraBLayout))
SIZES = pytest.mark.parametrize(("experts", "rank"), [(8, 8), (4, 16), (32, 4), (6, 10), (2, 2), (3, 64)])


def fresh(experts: int, rank: int, into: int = 64, seed: int = 0) -> Tensor:
    """lora_A as PEFT makes it, (experts, rank, into)."""
    draw = torch.Generator().manual_seed(seed)
    rows: Tensor = (torch.rand(experts, rank, into, generator=draw) * 2 - 1) * into**-0.5
    return rows


def normal(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def packed(b: Tensor, packing: LoraBLayout) -> Tensor:
    """(experts, out, rank) -> (out, experts * rank), as it lies in a file."""
    return b.permute((1, 2, 0) if packing is MAJOR else (1, 0, 2)).flatten(1)


def looked_at(a: Tensor, b: Tensor, packing: LoraBLayout) -> SiteTraces:
    """a: (experts, rank, into), b: (experts, out, rank)."""
    return traces(a, packed(b, packing))


def traces(a: Tensor, b: Tensor) -> SiteTraces:
    def rows_of(experts: Sequence[int]) -> Floats:
        return a[list(experts)].flatten(0, 1).numpy()

    lower = np.arange(len(b)) >= (len(b) + 1) // 2
    return site_traces(rows_of, b.numpy(), lower, a.shape[0], a.shape[1])


def one_step(experts: int, rank: int, out: int = 48, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """A, and the B that one step of gradient descent from zero makes of it: B_e = sum of g (A_e x)^T."""
    a = fresh(experts, rank)
    mean = normal(a.shape[2], seed=2)
    x = mean + normal(experts, tokens, a.shape[2], seed=3)
    g = normal(out, seed=4) + normal(experts, tokens, out, seed=5)
    return a, torch.einsum("eto,eti,eri->eor", g, x, a)


@BOTH
@SIZES
def test_a_file_is_read_in_the_order_of_lora_as_rows(packing: LoraBLayout, experts: int, rank: int) -> None:
    b = normal(experts, 5, rank)
    order = order_of(experts, rank, packing)
    assert np.array_equal(packed(b, packing).numpy()[:, order], packed(b, GROUPED))


@BOTH
@pytest.mark.parametrize(("experts", "rank"), [(8, 8), (4, 16), (32, 8), (6, 12), (16, 16)])
def test_a_step_of_gradient_descent_leaves_traces_of_its_packing(
    packing: LoraBLayout, experts: int, rank: int
) -> None:
    found = verdict([looked_at(*one_step(experts, rank), packing)] * 4)
    assert found.says is packing
    assert found.confidence >= 0.99
    sign = 1 if packing is MAJOR else -1
    assert sign * found.columns > CONFIDENT < sign * found.pairs


@SIZES
def test_the_two_packings_are_judged_alike(experts: int, rank: int) -> None:
    """The true reading of the same training scores the same, whichever it is; columns but for chance."""
    a, b = one_step(experts, rank)
    one, other = looked_at(a, b, MAJOR).rank_major, looked_at(a, b, GROUPED).grouped_by_expert
    assert one.pairing == pytest.approx(other.pairing, abs=1e-3)
    assert one.crossing == pytest.approx(other.crossing, abs=1e-3)
    assert one.directions == pytest.approx(other.directions, rel=0.5, abs=2)


FAKES: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda e, r: normal(e, 48, r),
    "zero": lambda e, r: torch.zeros(e, 48, r),
    "equal norms": lambda e, r: torch.nn.functional.normalize(normal(e, 48, r), dim=1),
    "norms by place": lambda e, r: normal(e, 48, r) * torch.linspace(3, 0.5, r),
    "directions by place": lambda e, r: normal(1, 48, r) + normal(e, 48, r, seed=9),
    "experts alike, untrained": lambda e, r: normal(e, 48, 1) * normal(e, 1, r, seed=8),
    "few columns": lambda e, r: normal(e, 48, r) * (normal(e, 1, r, seed=7) > 1.5),
}


@BOTH
@pytest.mark.parametrize("kind", FAKES)
@pytest.mark.parametrize(("experts", "rank"), [(8, 8), (4, 16), (32, 4), (6, 10)])
def test_an_adapter_that_nobody_trained_is_no_evidence(
    kind: str, experts: int, rank: int, packing: LoraBLayout
) -> None:
    sites = [looked_at(fresh(experts, rank, seed=n), FAKES[kind](experts, rank), packing) for n in range(4)]
    assert verdict(sites).says is None


def test_of_a_lora_b_of_zeros_nothing_more_is_read() -> None:
    b, lower = np.zeros((8, 16), np.float32), np.arange(8) >= 4
    found = site_traces(lambda each: pytest.fail(f"lora_A of {each}"), b, lower, 4, 4)
    assert (found.columns, found.pairs, found.blocks) == (0, 0, None)


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (8, 0)])
def test_factors_without_numbers_are_no_evidence(rows: int, width: int) -> None:
    def ones(*shape: int) -> Floats:
        return np.ones(shape, np.float32)

    found = site_traces(lambda each: ones(len(each) * 4, width), ones(rows, 16), np.zeros(rows, bool), 4, 4)
    assert verdict([found]).says is None


@BOTH
def test_places_mislead_the_columns_and_not_the_pairs(packing: LoraBLayout) -> None:
    """With as many experts as ranks, places are the other packing's experts."""
    found = looked_at(fresh(8, 8), FAKES["directions by place"](8, 8), packing)
    wrong = -1 if packing is MAJOR else 1
    assert wrong * found.columns > 3 * CONFIDENT
    assert abs(found.pairs) < CONFIDENT


@BOTH
def test_exact_zeros_of_fused_projections_are_proof(packing: LoraBLayout) -> None:
    gate, up = normal(4, 10, 3), normal(4, 10, 3, seed=2)
    idle = torch.zeros(4, 10, 3)
    b = torch.cat([torch.cat([gate, idle], 2), torch.cat([idle, up], 2)], 1)
    found = looked_at(fresh(4, 6), b, packing)
    assert found.blocks is packing
    said = verdict([found])
    assert (said.says, said.confidence, said.blocks) == (packing, MOST_CONFIDENT, True)
    assert said.detail == "1 site: exact zeros where gate and up were fused fit no other packing"


def test_half_of_the_zeros_is_no_proof() -> None:
    """A gate alone, or zeros that any columns have, are not what two fused projections leave."""
    gate, idle = normal(4, 10, 3), torch.zeros(4, 10, 3)
    alone = torch.cat([torch.cat([gate, idle], 2), torch.cat([idle, idle], 2)], 1)
    assert looked_at(fresh(4, 6), alone, MAJOR).blocks is None
    upper = torch.cat([normal(4, 10, 6), torch.zeros(4, 10, 6)], 1)
    assert looked_at(fresh(4, 6), upper, MAJOR).blocks is None


def test_zeros_that_fit_both_packings_are_no_proof() -> None:
    """Of two experts of rank 4 the first column and the last are of the same half in either packing."""
    b = torch.zeros(4, 8)
    b[:2, 0] = 1.0
    b[2:, 7] = 1.0
    assert traces(fresh(2, 4), b).blocks is None


def site(columns: float, pairs: float, blocks: LoraBLayout | None = None) -> SiteTraces:
    """A site whose two witnesses show so much."""
    major = Traces(columns, columns, pairs, pairs)
    return SiteTraces(major, Traces(0.0, 0.0, 0.0, 0.0), blocks)


def test_a_sites_witnesses_have_the_spread_of_one_z_score() -> None:
    assert site(3.0, -2.0).columns == pytest.approx(3.0)
    assert site(3.0, -2.0).pairs == pytest.approx(-2.0)


def test_no_statistic_of_a_site_counts_more_than_its_limit() -> None:
    assert site(1e6, -1e6).columns == pytest.approx(CLIP)
    assert site(1e6, -1e6).pairs == pytest.approx(-CLIP)


def test_sites_add_up() -> None:
    assert verdict([site(3.0, 2.5)]).says is None
    many = verdict([site(3.0, 2.5)] * 4)
    assert (many.says, many.columns, many.pairs, many.sites) == (MAJOR, 6.0, 5.0, 4)


@pytest.mark.parametrize(
    ("columns", "pairs", "says"),
    [
        (CONFIDENT, CONFIDENT, MAJOR),
        (-20.0, -CONFIDENT, GROUPED),
        (20.0, CONFIDENT - 0.1, None),
        (CONFIDENT - 0.1, 20.0, None),
        (20.0, -20.0, None),
        (0.0, 0.0, None),
    ],
)
def test_both_witnesses_have_to_say_it(columns: float, pairs: float, says: LoraBLayout | None) -> None:
    found = verdict([site(columns, pairs)])
    assert found.says is says
    assert (found.confidence > 0) is (says is not None)


@pytest.mark.parametrize(
    ("found", "growth", "open_"),
    [
        ((8.0, 8.0), 8, False),
        ((8.0, 7.9), 8, True),
        ((-30.0, -8.0), 8, False),
        ((0.0, 0.0), 8, True),
        ((8.0, -8.0), 8, True),
        ((8.0, -8.0), 4, False),
        ((20.0, 0.4), 4, False),
        ((-20.0, -0.6), 4, True),
        ((3.0, 1.5), 2, False),
        ((3.0, 1.7), 2, True),
    ],
)
def test_it_is_open_unless_settled_or_out_of_reach(
    found: tuple[float, float], growth: float, open_: bool
) -> None:
    assert verdict([site(*found)]).open(growth) is open_


def test_zeros_that_prove_it_settle_it() -> None:
    assert not verdict([site(0.0, 0.0, MAJOR)]).open(8)


def test_rounding_of_orthogonal_rows_is_not_likeness() -> None:
    """The experts' rows of an SVD are orthogonal, but for the last bit."""
    a = torch.linalg.qr(normal(8, 64, 8).double()).Q.transpose(1, 2).float()
    found = looked_at(a, torch.linalg.qr(normal(8, 48, 8, seed=2)).Q, MAJOR)
    assert {found.rank_major.pairing, found.grouped_by_expert.pairing} == {0.0}


def test_no_site_is_no_evidence() -> None:
    assert verdict([]).says is None


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ([site(-9.0, 0.0, MAJOR)], MAJOR),
        ([site(0.0, 9.0, MAJOR), site(0.0, 9.0)], MAJOR),
        ([site(0.0, -9.0, MAJOR)], None),
        ([site(9.0, 9.0, MAJOR), site(9.0, 9.0, GROUPED)], None),
    ],
    ids=["zeros alone", "of one site", "against the pairs", "of both packings"],
)
def test_zeros_decide_unless_something_contradicts_them(
    sites: list[SiteTraces], says: LoraBLayout | None
) -> None:
    assert verdict(sites).says is says


def test_confidence_grows_with_the_weaker_witness_and_ends_below_one() -> None:
    steps = [confidence(weaker) for weaker in (0.0, 1.0, 2.0, 3.0)]
    assert steps[0] == 0.5
    assert steps == sorted(steps)
    assert confidence(100.0) == MOST_CONFIDENT
    assert confidence(CONFIDENT) >= 0.99


@pytest.mark.parametrize("count", [2, 7, 64])
def test_random_orders_are_permutations_that_differ(count: int) -> None:
    orders = random_orders(count)
    assert orders.shape == (CHANCES, count)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (CHANCES, 1)))
    assert len({tuple(order.tolist()) for order in orders}) > (1 if count == 2 else CHANCES * 0.9)


def test_random_orders_are_the_same_everywhere() -> None:
    """They come from integers alone: `verify`, on another machine, has to reach the same verdict."""
    assert random_orders(8)[0].tolist() == [6, 2, 3, 1, 5, 4, 7, 0]


@pytest.mark.parametrize("rows", [1, 48, 256, 257, 1536, 5000])
def test_rows_of_both_halves_are_looked_at_and_not_too_many(rows: int) -> None:
    runs = sampled_rows(rows)
    chosen = [row for run in runs for row in run]
    assert len(set(chosen)) == len(chosen) == min(rows, 256)
    assert max(chosen) < rows
    lower = sum(row >= (rows + 1) // 2 for row in chosen)
    assert abs(lower - len(chosen) // 2) <= 1


def test_rows_of_a_few_experts_are_asked_for_and_those_that_were_trained_most() -> None:
    asked: list[list[int]] = []
    a, b = fresh(64, 32), normal(64, 20, 32)
    b[::2] *= 100

    def rows_of(experts: Sequence[int]) -> Floats:
        asked.append(list(experts))
        return a[list(experts)].flatten(0, 1).numpy()

    site_traces(rows_of, packed(b, GROUPED).numpy(), np.arange(20) >= 10, 64, 32)
    assert [len(experts) for experts in asked] == [16, 16]
    assert set(asked[1]) <= set(range(0, 64, 2))
