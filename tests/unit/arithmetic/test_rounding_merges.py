"""A merge whose roundings are drawn: the same bytes however it is run, and no bit of them is free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loudmerge
from loudmerge.executing import pieces
from loudmerge.verifying import redraw
from loudmerge.verifying.verify import Verification
from tests.unit.builders import lora, values, write_adapter, write_base
from tests.unit.neighbours import neighbours
from tests.unit.reference import build
from tests.unit.synthetic import FAMILIES, Case

INPUTS, OUTPUTS = 48, 150
KEYS = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
SMALL = {"stochastic": "stochastic", "auto": "balanced"}
"""How a small update is rounded by each option."""

NAMED = {family.name: family for family in FAMILIES}
STORED = {
    "per expert": Case(NAMED["qwen3_moe"], fused=("gate_up", "down"), base_dtype="bfloat16"),
    "float16": Case(NAMED["mixtral"], fused=("gate_up", "down"), base_dtype="float16"),
    "swapped": Case(NAMED["qwen3_moe_fused"], fused=("gate_up", "down"), orientation="swapped",
                    peft="0.18.1", base_dtype="bfloat16"),
    "in-out": Case(NAMED["llama4_text"], fused=("gate_up", "down"), base_dtype="bfloat16"),
}  # fmt: skip


class Place:
    """Three matrices in so many shards, with an update that the nearest would swallow the most of."""

    def __init__(self, root: Path, shards: int = 3) -> None:
        self.root, self.base, self.adapter = root, root / f"base-{shards}", root / "adapter"
        names = [f"{key}.weight" for key in KEYS]
        base = {name: (values(OUTPUTS, INPUTS, seed=n) * 0.02).bfloat16() for n, name in enumerate(names)}
        write_base(self.base, base, shards=[names[n::shards] for n in range(shards)])
        pairs: dict[str, Tensor] = {}
        for key in KEYS:
            pairs |= {name: tensor * 2e-3 for name, tensor in lora(key, OUTPUTS, INPUTS).items()}
        write_adapter(self.adapter, pairs)

    def merge(self, name: str, rounding: str, **options: Any) -> dict[str, Tensor]:
        loudmerge.merge(self.base, self.adapter, self.root / name, rounding=rounding, **options)
        return tensors(self.root / name)


def tensors(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= load_file(path)
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def shrink(adapter: Path, factor: float) -> None:
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    save_file({n: t * factor if "lora_B" in n else t for n, t in held.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("rounding", SMALL)
def test_the_same_bytes_for_any_threads_and_any_split_into_shards(rounding: str, tmp_path: Path) -> None:
    wanted = Place(tmp_path).merge("one", rounding, threads=1)
    report = json.loads((tmp_path / "one" / "merge_report.json").read_text())
    assert report["rounding"] == {SMALL[rounding]: len(KEYS)}
    assert equal(Place(tmp_path).merge("two", rounding, threads=2), wanted)
    for shards in (1, 2):
        assert equal(Place(tmp_path, shards).merge(f"shards-{shards}", rounding, threads=2), wanted)


@pytest.mark.parametrize("rounding", SMALL)
def test_the_same_bytes_for_any_pieces(
    rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece holds whole bands of rows, so a band is rounded at once in any of them."""
    place = Place(tmp_path)
    wanted = place.merge("whole", rounding)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 70 * INPUTS * 2)
    found = place.merge("pieces", rounding)
    if rounding == "auto":
        # Its products have the same shapes, too.
        assert equal(found, wanted)
    assert sum(int((found[key] != wanted[key]).sum()) for key in wanted) <= 2


@pytest.mark.parametrize("rounding", SMALL)
def test_a_resumed_merge_writes_what_an_undisturbed_one_does(rounding: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    wanted = place.merge("whole", rounding, threads=1)
    seen: list[str] = []

    def stop(stage: str, *_: object) -> None:
        seen.append(stage)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.merge("resumed", rounding, resume=True, threads=1, progress=stop)
    assert not (tmp_path / "resumed").exists()
    assert equal(place.merge("resumed", rounding, resume=True, threads=1), wanted)
    reports = [
        json.loads((tmp_path / name / "merge_report.json").read_text()) for name in ("whole", "resumed")
    ]
    assert reports[0]["rounding"] == reports[1]["rounding"] == {SMALL[rounding]: len(KEYS)}
    assert reports[0]["delta_kept"] == reports[1]["delta_kept"]


@pytest.mark.parametrize("piece", [16 << 20, 1])
@pytest.mark.parametrize("case", STORED.values(), ids=STORED.keys())
def test_a_balanced_merge_of_any_storage_is_verified(
    case: Case, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    built = build(case, tmp_path)
    shrink(built.adapter, 1e-4)
    out = tmp_path / "out"
    report = loudmerge.merge(built.base, built.adapter, out, verify=False).to_json()
    assert set(report["rounding"]) == {"balanced"}
    found = loudmerge.verify(out, built.base, built.adapter)
    assert found.ok, found.summary()


def test_where_float32_decides_a_step_it_is_verified(tmp_path: Path) -> None:
    """The two products of each element are each other's opposites but for a thousandth."""
    key, outputs, inputs = KEYS[0], 256, 512
    write_base(tmp_path / "base", {f"{key}.weight": (values(outputs, inputs, seed=1) * 0.02).bfloat16()})
    a, b = lora(key, outputs, inputs, rank=1).values()
    pair = dict(zip(lora(key, 1, 1), (torch.cat([a, a]), torch.cat([b, -0.999 * b], dim=1)), strict=True))
    write_adapter(tmp_path / "adapter", pair)
    loudmerge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="balanced")


# --- no bit is free --------------------------------------------------------------------------------


def place_of_one(tmp_path: Path, rounding: str) -> Place:
    """Merged; its tests verify."""
    place = Place(tmp_path, 1)
    place.merge("out", rounding, verify=False)
    return place


def verified(place: Place) -> Verification:
    return loudmerge.verify(place.root / "out", place.base, place.adapter)


@pytest.mark.parametrize("rounding", SMALL)
def test_one_element_at_its_other_neighbour_is_found(rounding: str, tmp_path: Path) -> None:
    """A step that was taken back, the least wrong of all that can be written: each of some."""
    place = place_of_one(tmp_path, rounding)
    path, name = tmp_path / "out" / "model-00001-of-00001.safetensors", f"{KEYS[1]}.weight"
    held, base = load_file(path), tensors(place.base)[name]
    below, above = neighbours(base)
    one_step = (held[name].double() == below) | (held[name].double() == above)
    places = one_step.nonzero()[:: max(1, int(one_step.sum()) // 8)]
    assert len(places) >= 5
    assert verified(place).ok
    for row, column in places.tolist():
        wrong = held[name].clone()
        wrong[row, column] = base[row, column]
        save_file({**held, name: wrong}, path, {"format": "pt"})
        (mismatch,) = verified(place).mismatches
        assert (mismatch.key, mismatch.wrong, mismatch.index) == (name, 1, (row, column))


@pytest.mark.parametrize("rounding", SMALL)
def test_an_element_that_should_have_stayed_is_found(rounding: str, tmp_path: Path) -> None:
    place = place_of_one(tmp_path, rounding)
    path, name = tmp_path / "out" / "model-00001-of-00001.safetensors", f"{KEYS[0]}.weight"
    held, base = load_file(path), tensors(place.base)[name]
    stayed = (held[name] == base).nonzero()
    for row, column in stayed[:: len(stayed) // 6].tolist():
        for other in neighbours(base):
            wrong = held[name].clone()
            wrong[row, column] = other[row, column].item()
            save_file({**held, name: wrong}, path, {"format": "pt"})
            assert [m.index for m in verified(place).mismatches] == [(row, column)]


@pytest.mark.parametrize("rounding", SMALL)
def test_a_matrix_drawn_with_another_key_is_found(
    rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of_one(tmp_path, rounding)
    init = redraw.Redraw.__init__

    def another(self: redraw.Redraw, key: str, matrix: int, *rest: Any) -> None:
        init(self, key.replace("layers.1.", "layers.7."), matrix, *rest)

    monkeypatch.setattr(redraw.Redraw, "__init__", another)
    (mismatch,) = verified(place).mismatches
    assert mismatch.key == f"{KEYS[1]}.weight"
    assert (mismatch.wrong or 0) > 20


def test_a_matrix_rounded_by_chance_is_not_taken_for_a_balanced_one(tmp_path: Path) -> None:
    place = place_of_one(tmp_path, "stochastic")
    report = tmp_path / "out" / "merge_report.json"
    report.write_text(report.read_text().replace('"rounding": "stochastic"', '"rounding": "auto"'))
    assert {mismatch.key for mismatch in verified(place).mismatches} == {f"{key}.weight" for key in KEYS}


@pytest.mark.parametrize(
    ("alpha", "rounding", "kept"),
    [(1e-30, "nearest", 0.0), *((alpha, how, 1.0) for alpha in (4e20, 4e22) for how in ("nearest", "auto"))],
)
def test_what_is_kept_of_updates_whose_squares_no_float32_holds(
    alpha: float, rounding: str, kept: float, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", {f"{KEYS[0]}.weight": values(256, 256).bfloat16()})
    adapter = write_adapter(tmp_path / "adapter", lora(KEYS[0], 256, 256), lora_alpha=alpha)
    report = loudmerge.merge(base, adapter, tmp_path / "out", rounding=rounding).to_json()
    assert report["delta_kept"]["overall"] == pytest.approx(kept, abs=0.01)
