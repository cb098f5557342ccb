"""What is plain goes without torch, and the bytes are the same in both lanes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loudmerge
from loudmerge.arithmetic.kept import Kept
from loudmerge.errors import MergeRefused
from loudmerge.executing import pieces, worker
from loudmerge.executing.lanes import HalfLane, by_sample, is_plain, settled
from loudmerge.executing.pieces import Piece, split
from loudmerge.layout import Axes, Span
from loudmerge.planning.plan import OutputTensor, Term
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    entry,
    expert_tensors,
    fused_lora,
    lora,
    values,
    write_adapter,
    write_base,
)

E, H, I, V = 3, 6, 4, 9  # noqa: E741
ALL = Span(0, 4)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
ROWS = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"
Merge = Callable[..., tuple[Mapping[str, bytes], dict[str, Any], list[str]]]


def halves(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.bfloat16) for key, value in tensors.items()}


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Merges in these lanes: the bytes of the weights, the report, and what the half lane did."""

    def run(
        base: Tensors, adapter: Tensors, *, in_halves: bool, rounding: str, **fields: Any
    ) -> tuple[Mapping[str, bytes], dict[str, Any], list[str]]:
        place = tmp_path / str(in_halves)
        write_base(place / "base", base)
        write_adapter(place / "adapter", adapter, **fields)
        done: list[str] = []
        compute = HalfLane.compute

        def watched(self: HalfLane, piece: Piece, *given: Any) -> Any:
            found = compute(self, piece, *given)
            done.extend([piece.output.key] if found is not None else [])
            return found

        with monkeypatch.context() as patch:
            patch.setattr(worker, "COMPILED_BYTES", 1 if in_halves else 1 << 40)
            patch.setattr(HalfLane, "compute", watched)
            report = loudmerge.merge(
                place / "base", place / "adapter", place / "out", verify=False, rounding=rounding
            )
        files = (place / "out").glob("*.safetensors")
        return {file.name: file.read_bytes() for file in files}, report.to_json(), done

    return run


def in_both(merge: Merge, base: Tensors, adapter: Tensors, rounding: str, **fields: Any) -> list[str]:
    """Merges in both ways, to the same bytes; returns what the half lane did."""
    with_it, first, done = merge(base, adapter, in_halves=True, rounding=rounding, **fields)
    without, second, none = merge(base, adapter, in_halves=False, rounding=rounding, **fields)
    assert (with_it, none) == (without, [])
    assert first["rounding"] == second["rounding"]
    assert first["delta_kept"]["overall"] == pytest.approx(second["delta_kept"]["overall"], rel=1e-5)
    return done


def experts_and_linears() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights = {f"{Q_PROJ}.weight": values(64, H), f"{K_PROJ}.weight": values(64, H, seed=3)}
    base = halves({**expert_tensors(E, H, I), **weights, f"{EMBED}.weight": values(V, H)})
    return base, fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(Q_PROJ, 64, H)


@pytest.mark.parametrize("rounding", ["nearest", "auto"])
@pytest.mark.parametrize("alpha", [4, 5])
def test_lora_on_bfloat16_goes_in_the_half_lane(rounding: str, alpha: int, merge: Merge) -> None:
    base, adapter = experts_and_linears()
    done = in_both(merge, base, adapter, rounding, target_parameters=BOTH, lora_alpha=alpha)
    assert set(done) == {key for key in base if ".experts." in key or key == f"{Q_PROJ}.weight"}


def test_what_else_a_plan_asks_for_goes_in_the_other(merge: Merge) -> None:
    """Rows of tokens, a whole tensor, another dtype, and numbers whose squares float32 has not."""
    base, adapter = experts_and_linears()
    base[f"{K_PROJ}.weight"] = base[f"{K_PROJ}.weight"].float()
    base["lm_head.weight"] = values(V, H, dtype=torch.bfloat16)
    adapter |= lora(K_PROJ, 64, H)
    adapter |= {f"{PREFIX}lm_head.weight": values(V, H, seed=9), ROWS: values(2, H, seed=9)}
    adapter[f"{PREFIX}{EXPERTS}.lora_A.weight"] *= 1e-20
    fields: dict[str, Any] = {
        "target_parameters": BOTH,
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [7, 0],
    }
    done = in_both(merge, base, adapter, "nearest", **fields)
    assert set(done) == {key for key in base if "gate_proj" in key or "up_proj" in key or Q_PROJ in key}


@pytest.mark.parametrize("piece_bytes", [8 << 20, 64 * H * 2])
def test_what_auto_balances_goes_in_the_other(
    piece_bytes: int, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rows that decide are not in the piece."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    small = {name: value * 1e-3 for name, value in lora(Q_PROJ, 200, H).items()}
    base = halves({f"{Q_PROJ}.weight": values(200, H), f"{K_PROJ}.weight": values(200, H, seed=3)})
    done = in_both(merge, base, small | lora(K_PROJ, 200, H), "auto")
    assert set(done) == {f"{K_PROJ}.weight"}


@pytest.mark.parametrize(("value", "alpha"), [(torch.nan, 2), (torch.inf, 2), (3e38, 2e9)])
def test_what_is_not_finite_is_refused_in_the_same_words(value: float, alpha: float, merge: Merge) -> None:
    """The base's own in the half lane; an overflow, whose update is not usual, in the other."""
    base = {f"{Q_PROJ}.weight": values(8, H, dtype=torch.bfloat16)}
    base[f"{Q_PROJ}.weight"][2, 3] = value
    held = {key: torch.full_like(tensor, alpha**3) for key, tensor in lora(Q_PROJ, 8, H).items()}
    said = []
    for in_halves in (True, False):
        with pytest.raises(MergeRefused, match=r"^non-finite") as caught:
            merge(base, held, in_halves=in_halves, rounding="nearest", lora_alpha=alpha)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert f"{Q_PROJ}.weight: found" in said[0]


def test_only_plain_pieces_go_in_the_half_lane() -> None:
    tensor = entry("a", (4, 3), "BF16")
    plain = OutputTensor("a", "f", tensor, "BF16", (4, 3), terms=(Term(0, -1, ALL, -1, Axes.OUT_IN, ALL),))
    special: list[dict[str, Any]] = [
        {"terms": ()},
        {"dtype": "F32"},
        {"source": entry("a", (4, 3), "F16"), "dtype": "F16"},
        {"source": entry("a", (4, 3), "F32")},
        {"dora": tensor},
        {"bias": (tensor, 1.0)},
        {"token_rows": ((0,), tensor)},
        {"replaced": True},
    ]
    assert is_plain(Piece(plain, 0, 0, 4, 3, 0, plain.terms))
    for change in special:
        output = replace(plain, **change)
        assert not is_plain(Piece(output, 0, 0, 4, 3, 0, output.terms)), change


def test_a_plain_merge_imports_no_torch(tmp_path: Path) -> None:
    """It takes a second, in which most merges are refused already."""
    base, adapter = experts_and_linears()
    write_base(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", adapter, target_parameters=BOTH)
    code = (
        "import json, sys\n"
        "import loudmerge\n"
        "from loudmerge.executing import worker\n"
        "worker.COMPILED_BYTES = 1\n"
        "loudmerge.plan('base', 'adapter')\n"
        "found = [name for name in ('torch', 'numba') if name in sys.modules]\n"
        "loudmerge.merge('base', 'adapter', 'out', verify=False, rounding='nearest')\n"
        "print(json.dumps([found, 'torch' in sys.modules, 'numba' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == [[], False, True]


@pytest.mark.parametrize(
    ("asked", "how"),
    [("auto", None), ("nearest", "nearest"), ("peft", "peft"), ("balanced", "stochastic")],
)
def test_rows_of_tokens_belong_to_no_balance(asked: str, how: str | None) -> None:
    rows = ((0,), entry("rows", (1, 3), "BF16"))
    terms = (Term(0, -1, ALL, -1, Axes.OUT_IN, ALL),)
    output = OutputTensor("a", "f", entry("a", (4, 3), "BF16"), "BF16", (4, 3), terms=terms, token_rows=rows)
    piece = Piece(output, 0, 0, 4, 3, 0, terms)
    assert settled(piece, asked) == how
    assert by_sample(piece, Kept(0.5, 1.0)) == "stochastic"
    assert next(split(output)).rows == 4
