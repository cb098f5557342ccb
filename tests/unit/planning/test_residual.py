"""A LoRA that holds a part of the base's weight itself is refused; one that was trained beside it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.builders import PREFIX, Tensors, World, values

Beginning = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
"""A and B of a weight, a rank and a scaling."""

OUT, IN, LAYERS = 40, 24, 3
NAMES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
BASE = {f"{name}.weight": values(OUT, IN, seed=layer) for layer, name in enumerate(NAMES)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B as peft/tuners/lora/layer.py has them in `pissa_init`."""
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    roots = torch.diag((sizes[:rank] / scaling).sqrt())
    return roots @ right[:rank], left[:, :rank] @ roots


def olora(weight: Tensor, rank: int, _: float) -> tuple[Tensor, Tensor]:
    """The same of `olora_init`."""
    left, right = torch.linalg.qr(weight)
    return right[:rank].clone(), left[:, :rank].clone()


def corda(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The same of `corda_init`, for inputs of some covariance."""
    inputs = values(IN, 2 * IN, seed=9)
    covariance = inputs @ inputs.T
    left, sizes, right = torch.linalg.svd(weight @ covariance, full_matrices=False)
    roots = torch.diag((sizes[:rank] / scaling).sqrt())
    return roots @ right[:rank] @ torch.linalg.inv(covariance), left[:, :rank] @ roots


BEGINNINGS = [pissa, olora, corda]


def lora(how: Beginning, rank: int = 4, alpha: float = 10, drift: float = 0.0) -> Tensors:
    """An adapter of all layers. drift: what training added to A and B, of their own size."""
    adapter = {}
    for seed, name in enumerate(NAMES):
        for leaf, tensor in zip("AB", how(BASE[f"{name}.weight"], rank, alpha / rank), strict=True):
            moved = values(*tensor.shape, seed=100 + seed)
            moved *= drift * tensor.norm() / moved.norm()
            adapter[f"{PREFIX}{name}.lora_{leaf}.weight"] = (tensor + moved).contiguous()
    return adapter


def fields(rank: int = 4, alpha: float = 10) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "init_lora_weights": True}


@pytest.mark.parametrize("how", BEGINNINGS)
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_an_adapter_with_a_part_of_the_weights_is_refused(world: World, how: Beginning, drift: float) -> None:
    refusal = world.refuse(BASE, lora(how, drift=drift), **fields())
    assert refusal.code == "unsupported-adapter"
    assert f"{NAMES[0]}.lora_A.weight" in refusal.where
    assert f"{NAMES[0]}.weight" in refusal.where
    assert "found a LoRA that holds a part of the weight itself" in str(refusal)
    assert "pissa_converted" in refusal.hint


@pytest.mark.parametrize("how", BEGINNINGS)
def test_on_the_base_without_that_part_it_is_an_ordinary_lora(world: World, how: Beginning) -> None:
    adapter = lora(how, drift=0.2)
    rest = {}
    for name in NAMES:
        a, b = how(BASE[f"{name}.weight"], 4, 2.5)
        rest[f"{name}.weight"] = BASE[f"{name}.weight"] - 2.5 * b @ a
    assert world.plan(rest, adapter, **fields()).counts.dense == LAYERS


@pytest.mark.parametrize("how", BEGINNINGS)
def test_a_converted_adapter_is_an_ordinary_lora(world: World, how: Beginning) -> None:
    """[A; A0] and [B, -B0]: peft/tuners/lora/model.py, `subtract_mutated_init`."""
    began, ended = lora(how), lora(how, drift=0.2)
    adapter = {
        name: torch.cat([tensor, began[name] if "lora_A" in name else -began[name]], int("lora_B" in name))
        for name, tensor in ended.items()
    }
    assert world.plan(BASE, adapter, **fields(8, 20)).counts.dense == LAYERS


def random(scale: float) -> Beginning:
    def factors(weight: Tensor, rank: int, _: float) -> tuple[Tensor, Tensor]:
        seed = int(weight.flatten()[0].abs() * 1e6)
        return values(rank, IN, seed=seed) * scale, values(OUT, rank, seed=seed + 1)

    return factors


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.03, 0.1, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_an_update_beside_the_weight_is_not(world: World, scale: float, rank: int) -> None:
    adapter = lora(random(scale), rank)
    assert world.plan(BASE, adapter, **fields(rank)).counts.dense == LAYERS


def test_a_lora_that_is_zero_is_not(world: World) -> None:
    adapter = {name: torch.zeros_like(tensor) for name, tensor in lora(pissa).items()}
    assert world.plan(BASE, adapter, **fields()).counts.dense == LAYERS


def test_one_number_alone_says_nothing(world: World) -> None:
    """Of rank 1, every update of the right size and sign is the weight in its subspace."""
    adapter = {name: t for name, t in lora(pissa, 1).items() if NAMES[0] in name}
    base = {f"{NAMES[0]}.weight": BASE[f"{NAMES[0]}.weight"]}
    assert world.plan(base, adapter, **fields(1)).counts.dense == 1


def test_a_lora_of_full_rank_is_not_compared(world: World) -> None:
    """As many numbers as rank times rank it does not have: chance makes a few agree."""
    base = {f"{name}.weight": values(1, 2, seed=layer) for layer, name in enumerate(NAMES)}
    adapter = {}
    for name in NAMES:
        adapter[f"{PREFIX}{name}.lora_A.weight"] = torch.eye(4, 2)
        adapter[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(
            [base[f"{name}.weight"] / 2.5, torch.zeros(1, 2)], dim=1
        )
    assert world.plan(base, adapter, **fields()).counts.dense == LAYERS


def test_an_update_of_fewer_directions_than_its_rank_has_no_more_numbers(world: World) -> None:
    """As of constant tensors: W = 1 and B A = 1 agree in one number for each weight, whatever the rank."""
    base = {name: torch.ones_like(tensor) for name, tensor in BASE.items()}
    adapter = {name: torch.full_like(tensor, 0.5) for name, tensor in lora(pissa).items()}
    assert world.plan(base, adapter, **fields(alpha=4)).counts.dense == LAYERS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_compared(world: World, value: float) -> None:
    adapter = {name: torch.full_like(tensor, value) for name, tensor in lora(pissa).items()}
    assert world.plan(BASE, adapter, **fields()).counts.dense == LAYERS
