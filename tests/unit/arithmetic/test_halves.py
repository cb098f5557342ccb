"""Without torch: the bits of the tensor functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loudmerge.arithmetic import kernel, meeting
from loudmerge.arithmetic.compiled import Kernel
from loudmerge.arithmetic.delta import Update, Workspace
from loudmerge.arithmetic.factors import Factors
from loudmerge.arithmetic.halves import HalfUpdate
from loudmerge.arithmetic.sizes import BLOCK_ELEMENTS
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import Term
from loudmerge.system.arrays import Floats


def normal(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@given(
    axes=st.sampled_from(Axes),
    place=st.builds(Span, st.integers(0, 9), st.integers(1, 40), st.sampled_from([1, 2])),
    rank=st.integers(1, 9),
    first=st.integers(0, 60),
    rows=st.integers(1, 50),
    scaling=st.sampled_from([2.0, 0.3]),
    columns=st.sampled_from([8, 512]),
)
def test_it_has_the_bits_of_the_tensor_functions(
    axes: Axes, place: Span, rank: int, first: int, rows: int, scaling: float, columns: int
) -> None:
    """Of any rows of a matrix, also of those that the update has none of; gate and up in turns."""
    inputs = first + rows if axes is Axes.IN_OUT else 30
    found = Factors(normal(1, place.count, rank, seed=1), normal(1, rank, inputs, seed=2), scaling)
    term = Term(0, -1, Span(0, place.count), -1, axes, place)
    weight = torch.from_numpy(normal(rows, 100 if axes is Axes.IN_OUT else inputs, seed=3)).bfloat16()
    tensors, halves = weight.clone(), weight.clone()
    space = np.empty(BLOCK_ELEMENTS, np.float32)
    bits = halves.view(torch.int16).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "SMALL_ELEMENTS", 0)
        patch.setattr(meeting, "BLOCK_COLUMNS", columns)
        kept = HalfUpdate.of(term, found).apply(Kernel(kernel), bits, first, bits, space)
        wanted = Update.of(term, found).apply(
            tensors, first, "nearest", Workspace(torch.device("cpu")), tensors
        )
    assert torch.equal(halves.view(torch.int16), tensors.view(torch.int16))
    assert kept.total == pytest.approx(wanted.total, rel=1e-5)
    assert kept.along == pytest.approx(wanted.along, rel=1e-4, abs=1e-4 * wanted.total)
