"""Each expert's factors, of a pair as it lies in the adapter."""

from __future__ import annotations

import numpy as np
import pytest

from loudmerge.arithmetic.factors import factors, unpack_lora_b
from loudmerge.layout import LoraBLayout, Orientation
from loudmerge.planning.plan import Site
from loudmerge.system.arrays import Floats
from tests.unit.builders import EXPERTS, pair
from tests.unit.builders import values as tensor

E, R, OUT, IN = 3, 2, 6, 4


def values(*shape: int) -> Floats:
    return tensor(*shape).numpy()


def site(experts: int, *, reads_input: bool = True, layout: LoraBLayout | None = None) -> Site:
    shapes = ((R * max(experts, 1), IN), (OUT, R * max(experts, 1)))
    orientation = Orientation.STANDARD if experts else None
    return Site(
        pair(EXPERTS, *shapes), f"{EXPERTS}.down_proj", experts, R, 0.5, reads_input, orientation, layout
    )


@pytest.mark.parametrize("layout", list(LoraBLayout))
def test_each_expert_has_the_rows_of_a_and_its_columns_of_b(layout: LoraBLayout) -> None:
    a, b = values(E * R, IN), values(OUT, E * R)
    found = factors(site(E, layout=layout), a, b)
    assert (found.left.shape, found.right.shape, found.scaling) == ((E, OUT, R), (E, R, IN), 0.5)
    for e in range(E):
        columns = b[:, e::E] if layout is LoraBLayout.RANK_MAJOR else b[:, e * R : (e + 1) * R]
        assert np.array_equal(found.left[e], columns)
        assert np.array_equal(found.right[e], a[e * R : (e + 1) * R])


def test_a_pair_that_does_not_read_the_input_is_transposed() -> None:
    a, b = values(E * R, IN), values(OUT, E * R)
    found = factors(site(E, reads_input=False, layout=LoraBLayout.RANK_MAJOR), a, b)
    assert (found.left.shape, found.right.shape) == ((E, IN, R), (E, R, OUT))
    for e in range(E):
        product = b[:, e::E] @ a[e * R : (e + 1) * R]
        assert found.left[e] @ found.right[e] == pytest.approx(product.T, rel=1e-5)


def test_a_dense_pair_is_one_expert() -> None:
    a, b = values(R, IN), values(OUT, R)
    found = factors(site(0), a, b)
    assert np.array_equal(found.left[0] @ found.right[0], b @ a)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_factors_are_float32(dtype: type) -> None:
    found = factors(site(0), values(R, IN).astype(dtype), values(OUT, R).astype(dtype))
    assert found.left.dtype == found.right.dtype == np.float32


def test_both_packings_are_the_same_columns_at_rank_one_and_for_one_expert() -> None:
    for experts, rank in ((1, 6), (6, 1)):
        b = values(OUT, 6)
        both = [unpack_lora_b(b, experts, rank, layout) for layout in LoraBLayout]
        assert np.array_equal(both[0], both[1])
