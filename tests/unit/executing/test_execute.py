"""A plan is executed piece by piece: every element once, equal bytes for any number of threads."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loudmerge.arithmetic.kept import Kept
from loudmerge.errors import MergeRefused
from loudmerge.executing import execute as module
from loudmerge.executing import pieces, preflight, worker, writer
from loudmerge.executing.execute import execute
from loudmerge.executing.lanes import Done
from loudmerge.executing.outcome import Outcome, merged_keys
from loudmerge.executing.resume import Finished
from loudmerge.executing.writer import ShardFile
from loudmerge.layout import Axes
from tests.unit.builders import (
    EMBED,
    EXPERTS,
    PREFIX,
    Q_PROJ,
    Tensors,
    expert_tensors,
    fused_lora,
    lora,
    plan_of,
    values,
    write_adapter,
    write_base,
)

E, H, I, V = 3, 6, 4, 9  # noqa: E741
Q = {f"{Q_PROJ}.weight": values(8, H)}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ROWS = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"


class World:
    """Runs a plan into a folder and returns what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(
        self, base: Tensors, adapter: Tensors, *, threads: int = 1, name: str = "out",
        model: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        options = {option: fields.pop(option) for option in ("dtype", "rounding") if option in fields}
        write_base(self.path / "base", base, **(model or {}))
        write_adapter(self.path / "adapter", adapter, **fields)
        plan = plan_of(self.path / "base", self.path / "adapter", **options)
        (self.path / name).mkdir()
        self.progress: list[tuple[str, int, int]] = []
        self.outcome = execute(
            plan,
            self.path / name,
            device="cpu",
            threads=threads,
            progress=lambda *args: self.progress.append(args),
        )
        assert not merged_keys(plan.outputs) - self.outcome.terms
        return load_file(self.path / name / "model.safetensors")

    def refuse(self, *args: Any, **fields: Any) -> MergeRefused:
        with pytest.raises(MergeRefused) as caught:
            self.run(*args, **fields)
        return caught.value


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def update(adapter: Tensors, name: str, scaling: float = 2.0) -> torch.Tensor:
    a, b = adapter[f"{PREFIX}{name}.lora_A.weight"], adapter[f"{PREFIX}{name}.lora_B.weight"]
    return (b.double() @ a.double() * scaling).float()


# --- bytes ---------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYNC_BYTES", 128)
    monkeypatch.setattr(worker, "FACTOR_BYTES", 1)
    for name, size in (("PIECE_BYTES", 64), ("BAND", 1)):
        monkeypatch.setattr(pieces, name, size)


def mixed(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = expert_tensors(E, H, I, dtype=dtype) | {f"{Q_PROJ}.weight": values(64, H, dtype=dtype)}
    return base, fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E) | lora(Q_PROJ, 64, H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_do_not_depend_on_threads_or_pieces(
    dtype: torch.dtype, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = mixed(dtype)
    world.run(base, adapter, target_parameters=BOTH, name="large")
    monkeypatch.setattr(module, "SYNC_BYTES", 128)
    monkeypatch.setattr(worker, "FACTOR_BYTES", 1)
    for name, size in (("PIECE_BYTES", 64), ("BAND", 1)):
        monkeypatch.setattr(pieces, name, size)
    found = {}
    for threads in (1, 2):
        world.run(base, adapter, target_parameters=BOTH, threads=threads, name=str(threads))
        found[threads] = (world.path / str(threads) / "model.safetensors").read_bytes()
    assert found[1] == found[2] == (world.path / "large" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "options", "compiled"),
    [
        (torch.bfloat16, {"rounding": "nearest"}, True),
        (torch.bfloat16, {"rounding": "auto"}, True),
        (torch.bfloat16, {"rounding": "peft"}, False),
        (torch.bfloat16, {"rounding": "nearest", "dtype": "float32"}, False),
        (torch.float16, {"rounding": "nearest"}, False),
    ],
)
def test_much_to_be_computed_has_the_kernel_loaded_while_the_rest_is_copied(
    dtype: torch.dtype, options: dict[str, str], compiled: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is of use. The bytes are the same."""
    base, adapter = mixed(dtype)
    fields: dict[str, Any] = {"target_parameters": BOTH, **options}
    world.run(base, adapter, name="little", **fields)
    loaded = []
    monkeypatch.setattr(worker, "COMPILED_BYTES", 1)
    monkeypatch.setattr(worker, "kernel", lambda: loaded.append(True))
    world.run(base, adapter, name="much", **fields)
    assert loaded == [True] * compiled
    little, much = (world.path / name / "model.safetensors" for name in ("little", "much"))
    assert little.read_bytes() == much.read_bytes()


@pytest.mark.parametrize("axes", list(Axes))
@pytest.mark.usefixtures("small_pieces")
def test_a_fused_tensor_larger_than_a_piece_is_updated_in_all_of_its_matrices(
    axes: Axes, world: World
) -> None:
    base = {f"{EXPERTS}.gate_up_proj": values(E, 2 * I, H), f"{EXPERTS}.down_proj": values(E, H, I)}
    if axes is Axes.IN_OUT:
        base = {key: value.transpose(1, 2).contiguous() for key, value in base.items()}
    adapter = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=E)
    merged = world.run(base, adapter, target_parameters=BOTH)
    for leaf, place in (("gate_up_proj", f"{EXPERTS}.base_layer"), ("down_proj", EXPERTS)):
        a, b = adapter[f"{PREFIX}{place}.lora_A.weight"], adapter[f"{PREFIX}{place}.lora_B.weight"]
        for e in range(E):
            delta = b[:, e::E] @ a[2 * e : 2 * e + 2] * 2.0
            expected = base[f"{EXPERTS}.{leaf}"][e] + (delta if axes is Axes.OUT_IN else delta.T)
            torch.testing.assert_close(merged[f"{EXPERTS}.{leaf}"][e], expected)


@pytest.mark.usefixtures("small_pieces")
def test_what_is_not_merged_is_copied_byte_for_byte(world: World) -> None:
    others = {
        "int": torch.arange(40, dtype=torch.int32).view(5, 8),
        "bool": torch.tensor([True, False, True]),
        "double": values(50, dtype=torch.float64),
        "half": values(30, 3, dtype=torch.float16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flat": torch.zeros(0),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    merged = world.run({**Q, **others}, lora(Q_PROJ, 8, H))
    for key, value in others.items():
        assert (merged[key].dtype, merged[key].shape) == (value.dtype, value.shape)
        assert torch.equal(merged[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), (
            key
        )
    torch.testing.assert_close(
        merged[f"{Q_PROJ}.weight"], Q[f"{Q_PROJ}.weight"] + update(lora(Q_PROJ, 8, H), Q_PROJ)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.usefixtures("small_pieces")
def test_another_dtype_casts_floats_and_copies_the_rest(dtype: str, world: World) -> None:
    base = {
        **Q,
        "int": torch.arange(9),
        "plain": values(7, 5),
        "empty": torch.zeros(0, 4),
        "vector": values(33),
    }
    merged = world.run(base, lora(Q_PROJ, 8, H), dtype=dtype)
    wanted = getattr(torch, dtype)
    for key in ("plain", "empty", "vector"):
        assert torch.equal(merged[key], base[key].to(wanted)), key
    assert torch.equal(merged["int"], base["int"])
    assert merged[f"{Q_PROJ}.weight"].dtype == wanted


def test_the_progress_counts_all_bytes(world: World) -> None:
    world.run({**Q, "int": torch.arange(9)}, lora(Q_PROJ, 8, H))
    total = 8 * H * 4 + 9 * 8
    assert [stage for stage, _, _ in world.progress] == ["merge"] * 2
    assert world.progress[-1] == ("merge", total, total)


def test_the_outcome_is_by_tensor_and_overall(world: World) -> None:
    base, adapter = mixed(torch.bfloat16)
    world.run(base, adapter, target_parameters=BOTH)
    assert set(world.outcome.kept) == set(base)
    assert world.outcome.overall.total == pytest.approx(
        sum(kept.total for kept in world.outcome.kept.values())
    )
    assert 0.5 < world.outcome.overall.ratio < 1.5
    assert Outcome().overall == Kept()


# --- other changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_dora_is_merged_in_either_order_of_the_axes(transposed: bool, world: World) -> None:
    weight, magnitude = Q[f"{Q_PROJ}.weight"], values(8).abs()
    adapter = lora(Q_PROJ, 8, H)
    summed = weight + update(adapter, Q_PROJ)
    expected = magnitude[:, None] * summed / summed.norm(dim=1, keepdim=True)
    base = {f"{Q_PROJ}.weight": weight.T.contiguous() if transposed else weight}
    held = {**adapter, f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": magnitude}
    model = {"model_type": "gpt2" if transposed else "qwen3_moe"}
    run = world.run(base, held, model=model, use_dora=True, fan_in_fan_out=transposed)
    merged = run[f"{Q_PROJ}.weight"]
    torch.testing.assert_close(merged.T if transposed else merged, expected)
    assert world.outcome.overall.ratio == pytest.approx(1, abs=1e-5)


def test_a_lora_bias_is_added_with_its_scaling(world: World) -> None:
    base = {**Q, f"{Q_PROJ}.bias": values(8)}
    held = {**lora(Q_PROJ, 8, H), f"{PREFIX}{Q_PROJ}.lora_B.bias": values(8, seed=9)}
    merged = world.run(base, held, lora_bias=True)
    torch.testing.assert_close(merged[f"{Q_PROJ}.bias"], values(8) + 2.0 * values(8, seed=9))


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.usefixtures("small_pieces")
def test_token_rows_replace_rows(dtype: str, world: World) -> None:
    base, rows = {f"{EMBED}.weight": values(V, H)}, values(2, H, seed=9, dtype=torch.float16)
    merged = world.run(base, {ROWS: rows}, trainable_token_indices=[7, 0], dtype=dtype)[f"{EMBED}.weight"]
    expected = base[f"{EMBED}.weight"].clone()
    expected[[7, 0]] = rows.float()
    assert torch.equal(merged, expected if dtype == "keep" else expected.to(torch.bfloat16))


def test_an_embedding_lora_is_transposed_onto_its_rows(world: World) -> None:
    a, b = values(2, V), values(H, 2)
    held = {f"{PREFIX}{EMBED}.lora_embedding_A": a, f"{PREFIX}{EMBED}.lora_embedding_B": b}
    base = {f"{EMBED}.weight": values(V, H), "lm_head.weight": values(V, H, seed=3)}
    merged = world.run(base, held)
    torch.testing.assert_close(merged[f"{EMBED}.weight"], base[f"{EMBED}.weight"] + 2.0 * (b @ a).T)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_a_tied_models_head_gets_the_update_and_its_embedding_does_not(world: World) -> None:
    base, adapter = {f"{EMBED}.weight": values(V, H)}, lora("lm_head", V, H)
    merged = world.run(base, adapter, model={"tie_word_embeddings": True})
    assert torch.equal(merged[f"{EMBED}.weight"], base[f"{EMBED}.weight"])
    torch.testing.assert_close(merged["lm_head.weight"], base[f"{EMBED}.weight"] + update(adapter, "lm_head"))


def test_a_replacement_takes_the_dtype_of_what_it_replaces(world: World) -> None:
    base = {"lm_head.weight": values(V, H, dtype=torch.bfloat16)}
    new = values(V + 2, H, seed=9)
    held = {f"{PREFIX}lm_head.weight": new, f"{PREFIX}{EMBED}.weight": new.clone()}
    base[f"{EMBED}.weight"] = values(V, H, seed=1)
    merged = world.run(base, held)
    assert torch.equal(merged["lm_head.weight"], new.to(torch.bfloat16))
    assert torch.equal(merged[f"{EMBED}.weight"], new)


# --- refusals ------------------------------------------------------------------------------------


DTYPES = pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")]
)


@DTYPES
@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2), (float("-inf"), 1)])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused(
    value: float, count: int, dtype: torch.dtype, code: str, world: World
) -> None:
    held = {key: tensor.to(dtype) for key, tensor in lora(Q_PROJ, 8, H).items()}
    held[f"{PREFIX}{Q_PROJ}.lora_A.weight"].view(-1)[:count] = value
    error = world.refuse(Q, held)
    assert error.code == "non-finite"
    assert f"{Q_PROJ}.lora_A.weight [2, 6] {code} in adapter_model.safetensors" in error.where
    assert f"found {count} NaN or infinite value{'s' if count > 1 else ''}, expected finite numbers." in str(
        error
    )


@DTYPES
def test_an_adapter_is_looked_at_chunk_by_chunk(
    dtype: torch.dtype, code: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finite is counted over all of them, and zero is only what is zero in all of them."""
    monkeypatch.setattr(preflight, "CHUNK_BYTES", 16)
    held = {key: value.to(dtype) for key, value in lora(Q_PROJ, 8, H).items()}
    held[f"{PREFIX}{Q_PROJ}.lora_A.weight"].view(-1)[torch.tensor([0, 6, 11])] = float("nan")
    assert f"{code} in adapter_model" in str(error := world.refuse(Q, held))
    assert "found 3 NaN or infinite values" in str(error)

    held = {key: torch.zeros_like(value) for key, value in held.items()}
    for value in held.values():
        value.view(-1)[-1] = 1.0
    merged = world.run(Q, held, name="other")
    assert not world.outcome.notes
    torch.testing.assert_close(merged[f"{Q_PROJ}.weight"], Q[f"{Q_PROJ}.weight"] + update(held, Q_PROJ))
    held[f"{PREFIX}{Q_PROJ}.lora_B.weight"] = torch.full_like(held[f"{PREFIX}{Q_PROJ}.lora_B.weight"], -0.0)
    world.run(Q, held, name="third")
    assert world.outcome.notes[0].startswith("1 LoRA pair is zero")


def test_every_tensor_that_is_not_finite_is_named(world: World) -> None:
    held = {key: torch.full_like(value, float("nan")) for key, value in lora(Q_PROJ, 8, H).items()}
    assert len(world.refuse(Q, held).problems) == 2


@pytest.mark.parametrize(
    ("half", "places", "named"),
    [
        ("lora_B", [(slice(None), [2, 8])], "expert 2 of"),  # rank_major: columns 2 and 2 + 6
        ("lora_A", [([4], [1])], "expert 2 of"),
        ("lora_A", [([11], [0]), ([0], [0])], "experts 0, 5 of"),
        ("lora_B", [(slice(None), slice(None))], "experts 0, 1, 2, 3 and 2 more of"),
    ],
)
def test_the_experts_whose_factors_are_not_finite_are_named(
    half: str, places: list[tuple[Any, Any]], named: str, world: World
) -> None:
    held = fused_lora(EXPERTS, [(H, I), (2 * I, H)], experts=6)
    for place in places:
        held[f"{PREFIX}{EXPERTS}.{half}.weight"][place] = float("nan")
    error = world.refuse(expert_tensors(6, H, I), held, target_parameters=BOTH, peft_version="0.19.1")
    (problem,) = error.problems
    assert problem.where.endswith(f"in adapter_model.safetensors, {named} {EXPERTS}.down_proj")


def test_the_marker_says_whose_columns_are_not_finite(world: World) -> None:
    held = fused_lora(EXPERTS, [(H, I)], experts=6)
    held[f"{PREFIX}{EXPERTS}.lora_B.weight"][0, 5] = float("inf")
    fields = {"target_parameters": BOTH[1:], "peft_version": "0.19.1", "lora_B_layout": "grouped_by_expert"}
    assert ", expert 2 of" in world.refuse(expert_tensors(6, H, I), held, **fields).where


def test_a_second_copy_of_a_full_tensor_has_the_same_values(world: World) -> None:
    base = {"lm_head.weight": values(V, H), f"{EMBED}.weight": values(V, H, seed=2)}
    names = [f"{PREFIX}lm_head.weight", f"{PREFIX}lm_head.modules_to_save.weight"]
    merged = world.run(base, {name: values(V, H, seed=9) for name in names}, modules_to_save=["lm_head"])
    assert torch.equal(merged["lm_head.weight"], values(V, H, seed=9))
    held = {name: values(V, H, seed=number) for number, name in enumerate(names)}
    error = world.refuse(base, held, modules_to_save=["lm_head"], name="other")
    assert error.code == "unconsumed-adapter-tensor"
    assert "lm_head.modules_to_save.weight [9, 6] F32 in adapter_model.safetensors: found other" in str(error)


def test_finite_numbers_whose_sum_is_not_are_finite(world: World) -> None:
    held = lora(Q_PROJ, 8, H)
    held[f"{PREFIX}{Q_PROJ}.lora_A.weight"].fill_(3e38)
    held[f"{PREFIX}{Q_PROJ}.lora_B.weight"].zero_()
    assert torch.equal(world.run(Q, held)[f"{Q_PROJ}.weight"], Q[f"{Q_PROJ}.weight"])


def test_a_result_that_its_dtype_cannot_hold_is_refused(world: World) -> None:
    base = {f"{Q_PROJ}.weight": torch.full((8, H), 60000.0, dtype=torch.float16)}
    held = {key: torch.full_like(value, 100.0) for key, value in lora(Q_PROJ, 8, H).items()}
    error = world.refuse(base, held)
    assert error.code == "non-finite"
    assert str(error).startswith(
        f"non-finite: {Q_PROJ}.weight: found 48 values of the result that F16 cannot hold, expected finite"
    )
    assert "--dtype bfloat16 or --dtype float32" in error.hint


def test_the_expert_whose_result_its_dtype_cannot_hold_is_named(world: World) -> None:
    key = f"{EXPERTS}.down_proj"
    base = {key: values(E, H, I), f"{EXPERTS}.gate_up_proj": values(E, 2 * I, H)}
    held = fused_lora(EXPERTS, [(H, I)], experts=E)
    held[f"{PREFIX}{EXPERTS}.lora_B.weight"][:, 1::E] = 1e8
    fields = {"target_parameters": BOTH[1:], "peft_version": "0.19.1", "dtype": "float16"}
    assert str(world.refuse(base, held, **fields)).startswith(f"non-finite: {key}, expert 1: found ")


def test_a_cast_that_overflows_is_refused(world: World) -> None:
    base = {**Q, "scale": torch.tensor([1e6, 1.0])}
    error = world.refuse(base, lora(Q_PROJ, 8, H), dtype="float16")
    assert str(error).startswith("non-finite: scale: found 1 value of the result that F16 cannot hold")


def test_what_the_base_itself_has_is_told_apart(world: World) -> None:
    base = {f"{Q_PROJ}.weight": Q[f"{Q_PROJ}.weight"].clone()}
    base[f"{Q_PROJ}.weight"][0, 0] = float("nan")
    error = world.refuse(base, lora(Q_PROJ, 8, H))
    assert "found 1 NaN or infinite value that the base itself has, expected finite numbers." in str(error)
    assert error.hint == worker.BROKEN
    base[f"{Q_PROJ}.weight"][1, 1] = 3.4e38
    error = world.refuse(base, lora(Q_PROJ, 8, H), name="other", dtype="float16")
    assert "found 2 values of the result that F16 cannot hold, of which the base itself has 1" in str(error)
    assert "--dtype bfloat16 or --dtype float32" in error.hint


def test_what_the_base_has_in_a_tensor_that_is_only_cast_is_kept_without_dtype(world: World) -> None:
    base = {**Q, "scale": torch.tensor([float("inf"), 1.0], dtype=torch.bfloat16)}
    error = world.refuse(base, lora(Q_PROJ, 8, H), dtype="float32")
    assert str(error).startswith("non-finite: scale: found 1 NaN or infinite value that the base itself has")
    assert "Leave out --dtype" in error.hint
    assert world.run(base, lora(Q_PROJ, 8, H), name="other")["scale"].tolist() == [float("inf"), 1.0]


def test_no_wider_dtype_is_named_where_there_is_none(world: World) -> None:
    base = {f"{Q_PROJ}.weight": torch.full((8, H), 3e38)}
    held = {key: torch.full_like(value, 1e19) for key, value in lora(Q_PROJ, 8, H).items()}
    error = world.refuse(base, held)
    assert "found 48 values of the result that F32 cannot hold" in str(error)
    assert "No --dtype has a larger range" in error.hint
    error = world.refuse(
        {**Q, "scale": torch.tensor([3.4e38])}, lora(Q_PROJ, 8, H), name="b", dtype="bfloat16"
    )
    assert "that BF16 cannot hold" in str(error)
    assert "The range of --dtype float32 is a little larger." in error.hint


@pytest.mark.usefixtures("small_pieces")
def test_an_input_that_ends_while_it_is_read_is_corrupt(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {**Q, "z": values(400)})
    plan = plan_of(base, write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H)))
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeRefused, match=r"^corrupt-file: .*found the end of the file at byte \d+"):
        execute(plan, tmp_path / "out", device="cpu", threads=2)


def test_the_disks_error_while_a_shard_is_synced_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write back once, to whoever syncs first."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        world.run(Q, lora(Q_PROJ, 8, H))


def test_a_shard_whose_sync_failed_once_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next sync succeeds: the kernel has told what it had to tell."""
    failures = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def fail_once(_: int) -> None:
        for error in failures:
            raise error

    monkeypatch.setattr(module, "SYNC_BYTES", 1)
    monkeypatch.setattr(writer, "_open_direct", lambda _: writer._CLOSED)
    monkeypatch.setattr(os, "fdatasync", fail_once)
    plan = plan_of(write_base(tmp_path / "base", Q), write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H)))
    (tmp_path / "out").mkdir()
    finished = Finished(tmp_path / "done", "identity")
    with pytest.raises(OSError, match="Input/output error"):
        execute(plan, tmp_path / "out", device="cpu", threads=1, finished=finished)
    assert finished.get("model.safetensors") is None


def test_the_caller_may_stop_a_merge_from_its_progress(tmp_path: Path) -> None:
    plan = plan_of(write_base(tmp_path / "base", Q), write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H)))
    (tmp_path / "out").mkdir()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", device="cpu", threads=2, progress=stop)


def test_no_more_threads_compute_than_were_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    update = worker.Worker._update

    def counted(*arguments: Any) -> Done:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        try:
            return update(*arguments)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(worker.Worker, "_update", counted)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)
    world.run({f"{Q_PROJ}.weight": values(512, H)}, lora(Q_PROJ, 512, H), threads=2)
    assert most == [2]


def test_every_shard_has_its_place_on_the_disk_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", {**Q, "z": values(400)}, shards=[[f"{Q_PROJ}.weight"], ["z"]])
    plan = plan_of(base, write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H)))
    (tmp_path / "out").mkdir()
    begun: list[str] = []

    class Full(ShardFile):
        def allocate(self) -> None:
            begun.append(self.path.name)
            if len(begun) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().allocate()

    monkeypatch.setattr(module, "ShardFile", Full)
    monkeypatch.setattr(worker.Worker, "run", None)
    with pytest.raises(OSError, match="No space left"):
        execute(plan, tmp_path / "out", device="cpu", threads=2)
    assert len(begun) == 2


def test_only_a_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the disk is slower than what is computed, as it is here."""
    keys = [f"{Q_PROJ}.weight", *map(str, range(11))]
    base = write_base(
        tmp_path / "base", {**Q, **{key: values(4) for key in keys[1:]}}, shards=[[key] for key in keys]
    )
    plan = plan_of(base, write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, H)))
    (tmp_path / "out").mkdir()
    held: list[int] = []
    sync = ShardFile.sync

    def slow(self: ShardFile) -> None:
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        held.append(len({link for link in links if link.startswith(str(tmp_path / "out"))}))
        time.sleep(0.01)
        sync(self)

    monkeypatch.setattr(ShardFile, "sync", slow)
    monkeypatch.setattr(module, "OPEN_SHARDS", 3)
    execute(plan, tmp_path / "out", device="cpu", threads=2)
    assert len(held) == 12
    assert 1 <= max(held) <= 3
    assert len(list((tmp_path / "out").iterdir())) == 12


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "how"), [("stochastic", "stochastic"), ("balanced", "balanced"), ("auto", "balanced")]
)
def test_rounding_by_chance_is_the_same_for_any_threads_and_pieces(
    rounding: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = 96, 40
    key = f"{Q_PROJ}.weight"
    base = {key: (values(rows, columns) * 0.02).bfloat16()}
    adapter = {name: tensor * 3e-3 for name, tensor in lora(Q_PROJ, rows, columns).items()}
    found = []
    for number, (threads, piece) in enumerate(((1, 16 << 20), (2, 16 << 20), (2, 10 * columns * 2))):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
        (tmp_path / str(number)).mkdir()
        world = World(tmp_path / str(number))
        found.append(world.run(base, adapter, threads=threads, rounding=rounding)[key])
        assert world.outcome.rounded.keys() == {how}
        assert not torch.equal(found[-1], base[key])
    assert torch.equal(found[0], found[1])
    # The product of another number of rows may differ in its last bit, and decide an element otherwise.
    assert (found[0] != found[2]).sum() <= 1


@pytest.mark.parametrize(
    ("size", "dtype", "how"),
    [(3e-3, "keep", "balanced"), (10.0, "keep", "nearest"), (3e-3, "float32", "nearest")],
)
def test_auto_balances_what_the_nearest_would_swallow(
    size: float, dtype: str, how: str, world: World
) -> None:
    base = {f"{Q_PROJ}.weight": (values(96, 40) * 0.02).bfloat16()}
    adapter = {name: tensor * size for name, tensor in lora(Q_PROJ, 96, 40).items()}
    world.run(base, adapter, rounding="auto", dtype=dtype)
    assert world.outcome.rounded.keys() == {how}
    assert world.outcome.overall.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("held", [1, 300, 10_000])
def test_factors_are_held_for_a_bounded_number_of_bytes(
    held: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pieces that run, and the one that is next; one pair alone may be larger."""
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    base = expert_tensors(E, H, I, layers=len(layers))
    adapter = {k: v for name in layers for k, v in fused_lora(name, [(H, I), (2 * I, H)], experts=E).items()}
    plain = world.run(base, adapter, name="plain", target_parameters=BOTH)

    running: list[pieces.Piece] = []
    sums: list[tuple[int, int]] = []
    prepare, run = worker.Worker.prepare, worker.Worker.run

    def prepared(self: worker.Worker, piece: pieces.Piece) -> worker.Prepared:
        sums.append((len(running), self.factor_bytes([*running, piece])))
        running.append(piece)
        return prepare(self, piece)

    def ran(self: worker.Worker, piece: pieces.Piece, *rest: Any) -> int:
        done = run(self, piece, *rest)
        running.remove(piece)
        return done

    monkeypatch.setattr(worker, "FACTOR_BYTES", held)
    monkeypatch.setattr(worker.Worker, "prepare", prepared)
    monkeypatch.setattr(worker.Worker, "run", ran)
    bounded = world.run(base, adapter, name="bounded", threads=2, target_parameters=BOTH)
    assert all(nbytes <= held or not others for others, nbytes in sums)
    assert len(sums) == 3 * 3 * E
    assert {key: value.tolist() for key, value in bounded.items()} == {
        key: value.tolist() for key, value in plain.items()
    }
