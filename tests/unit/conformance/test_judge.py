"""How far an output may be away, and what of its form is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loudmerge.conformance.judge import TOLERANCE, compare

W = torch.linspace(-1, 1, 12).view(3, 4)
UPDATE = torch.linspace(0.02, -0.1, 12).view(3, 4)
KEEP = torch.linspace(0, 1, 5)
BASE, EXPECTED = {"w": W, "keep": KEEP}, {"w": W + UPDATE}


def verdict(out: dict[str, Tensor]) -> str:
    return compare(BASE, out, EXPECTED)[0]


def near(away: float) -> dict[str, Tensor]:
    out = (W + UPDATE).clone()
    out[1, 2] += away
    return {"w": out, "keep": KEEP}


def test_float32_is_measured_by_the_largest_update_not_by_the_weight() -> None:
    largest = float(UPDATE.abs().max())
    assert verdict(near(1e-5 * largest)) == "right"
    assert verdict(near(2e-3 * largest)) == "wrong-silently", "an update rounded to bfloat16"
    assert verdict(near(0.9 * TOLERANCE * largest)) == "right"
    assert verdict(near(1.2 * TOLERANCE * largest)) == "wrong-silently"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_may_be_either_neighbour_and_no_other(dtype: torch.dtype) -> None:
    base = {"w": W.to(dtype), "keep": KEEP.to(dtype)}
    exact = base["w"].double() + UPDATE.double()
    nearest = exact.to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, 9))
    down = torch.nextafter(nearest, torch.full_like(nearest, -9))
    either = torch.where(nearest.double() <= exact, up, down)
    expected = {"w": exact.float()}
    for rounded in (nearest, either):
        assert compare(base, {**base, "w": rounded}, expected)[0] == "right"
    far = torch.nextafter(torch.nextafter(either, either.sign() * 9), either.sign() * 9)
    assert compare(base, {**base, "w": far}, expected)[0] == "wrong-silently"


def test_the_base_is_told_from_other_errors() -> None:
    assert compare(BASE, BASE, EXPECTED) == ("wrong-silently", "w: unchanged, the base's")
    assert compare(BASE, {**BASE, "w": W + 2 * UPDATE}, EXPECTED) == (
        "wrong-silently",
        "w: 1 of its update away",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    assert verdict(near(value)) == "wrong-silently"


def test_another_shape_is_wrong() -> None:
    assert compare(BASE, {"w": W.T, "keep": KEEP}, EXPECTED)[1] == "w: found shape [4, 3], expected [3, 4]"


def test_only_the_first_wrong_tensors_are_named() -> None:
    base = {f"t{n}": torch.zeros(2) for n in range(5)}
    out = {name: tensor + 1 for name, tensor in base.items()}
    assert compare(base, out, {})[1].endswith("t2: changed, though nothing targets it; and 2 more")


def experts(
    module: str, gate: str, up: str, down: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A base with two experts apart, what changes, and the same fused, (E, 2I, H) and (E, H, I)."""
    generator = torch.Generator().manual_seed(0)
    sizes = {gate: (3, 4), up: (3, 4), down: (4, 3)}
    base = {
        f"{module}.experts.{e}.{leaf}.weight": torch.randn(size, generator=generator)
        for e in range(2)
        for leaf, size in sizes.items()
    }
    expected = {name: tensor + 0.5 for name, tensor in base.items()}

    def stacked(leaf: str) -> Tensor:
        return torch.stack([expected[f"{module}.experts.{e}.{leaf}.weight"] for e in range(2)])

    gate_up = torch.cat([stacked(gate), stacked(up)], dim=1)
    fused = {"l.mlp.experts.gate_up_proj": gate_up, "l.mlp.experts.down_proj": stacked(down)}
    return base, expected, fused


@pytest.mark.parametrize(
    ("module", "leaves"),
    [("l.mlp", ("gate_proj", "up_proj", "down_proj")), ("l.block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_fused_experts_are_compared_with_those_apart(module: str, leaves: tuple[str, str, str]) -> None:
    base, expected, fused = experts(module, *leaves)
    verdict, detail = compare(base, fused, expected)
    assert verdict == "other-form"
    assert detail.startswith("l.mlp.experts.down_proj: experts fused, which the base holds apart")
    fused["l.mlp.experts.gate_up_proj"][1, 4] += 1
    verdict, detail = compare(base, fused, expected)
    assert verdict == "wrong-silently"
    assert detail.startswith(f"{module}.experts.1.{leaves[1]}.weight: ")


def test_exchanged_axes_are_another_form_and_compared() -> None:
    weight = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    base, expected = {"w": weight}, {"w": weight + 1}
    assert compare(base, {"w": (weight + 1).mT}, expected)[0] == "other-form"
    assert compare(base, {"w": weight.mT}, expected)[0] == "wrong-silently"
