"""An interrupted merge is gone on with: the same bytes, and no finished shard is written twice."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest
import torch

import loudmerge
from loudmerge.errors import EnvironmentFailed, MergeRefused
from loudmerge.executing.writer import ShardFile, Staging
from loudmerge.reading.adapter_config import AUTOMODEL
from tests.unit.builders import Q_PROJ, lora, write_adapter
from tests.unit.conftest import Killed
from tests.unit.places import Place, content, nothing_left, same

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written."""
    names: list[str] = []
    allocate = ShardFile.allocate

    def recording(self: ShardFile) -> None:
        names.append(self.path.name)
        allocate(self)

    monkeypatch.setattr(ShardFile, "allocate", recording)
    return names


def interrupt(place: Place, error: BaseException, **options: Any) -> None:
    """A merge that is interrupted in its second shard: the first has two tensors, of one piece each."""
    pieces = []

    def stop(stage: str, *_: object) -> None:
        pieces.append(stage)
        if len(pieces) == 3:
            raise error

    with pytest.raises(type(error)):
        place.merge(progress=stop, **{"resume": True, **options})


INTERRUPTIONS = [
    KeyboardInterrupt(),
    OSError(errno.ENOSPC, "full"),
    EnvironmentFailed("gone"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_the_next_merge_writes_only_what_is_missing(
    error: BaseException, place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    interrupt(place, error)
    assert opened == [FIRST, SECOND]
    assert (place.staging / "weights" / FIRST).exists()
    place.merge(resume=True, verify=True)
    assert opened == [FIRST, SECOND, SECOND]
    assert same(content(place.out), reference)
    assert not place.staging.exists()


def test_the_report_is_that_of_the_whole_merge(place: Place, reference: dict[str, bytes]) -> None:
    interrupt(place, KeyboardInterrupt())
    place.merge(resume=True)
    found, wanted = (
        json.loads((place.out / "merge_report.json").read_text()),
        json.loads(reference["merge_report.json"]),
    )
    for key in ("counts", "delta_kept", "adapter_tensors", "rounding"):
        assert found[key] == wanted[key]
    assert found["counts"]["dense"] == {"attempted": 1, "applied": 1}


def test_a_merge_that_was_killed_is_gone_on_with(
    place: Place, reference: dict[str, bytes], opened: list[str], killed: Killed
) -> None:
    """Even one that was not told to be resumable: nobody knows beforehand."""
    (moment,) = killed(place, ["verify:1"])
    copy = Place(place.root / moment.replace(":", "-"))
    copy.merge(resume=True, verify=True)
    assert opened == []
    assert same(content(copy.out), reference)


def test_without_resume_an_interruption_leaves_nothing(place: Place) -> None:
    interrupt(place, KeyboardInterrupt(), resume=False)
    assert nothing_left(place)


def test_without_resume_a_merge_starts_over(
    place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    interrupt(place, KeyboardInterrupt())
    place.merge()
    assert opened == [FIRST, SECOND, FIRST, SECOND]
    assert same(content(place.out), reference)


def test_with_nothing_to_go_on_with_a_merge_starts(place: Place, reference: dict[str, bytes]) -> None:
    place.merge(resume=True)
    assert same(content(place.out), reference)


@pytest.mark.parametrize("change", ["adapter", "adapter of the same age", "stamp", "base", "option"])
def test_the_shards_of_another_merge_are_refused(change: str, place: Place) -> None:
    interrupt(place, KeyboardInterrupt())
    options: dict[str, Any] = {}
    if change == "adapter":
        write_adapter(place.adapter, lora("model.layers.0.self_attn.q_proj", 8, 6))
    elif change == "adapter of the same age":
        weights = place.adapter / "adapter_model.safetensors"
        stat = weights.stat()
        write_adapter(place.adapter, {key: -value for key, value in lora(Q_PROJ, 8, 6).items()})
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    elif change == "stamp":
        (place.adapter / AUTOMODEL).write_text('{"paramwrapper_layout": "peft-0.18"}')
    elif change == "base":
        os.utime(place.base / FIRST, ns=(1, 1))
    else:
        options["dtype"] = "bfloat16"
    before = content(place.staging)
    for _ in range(2):
        with pytest.raises(MergeRefused, match="an interrupted merge of other inputs") as caught:
            place.merge(resume=True, **options)
        assert caught.value.code == "out-exists"
        assert "Run without --resume to start over" in str(caught.value)
        assert content(place.staging) == before
    place.merge(**options)
    assert not place.staging.exists()


def test_with_what_was_given_before_a_merge_goes_on_after_a_refusal(
    place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    interrupt(place, KeyboardInterrupt())
    with pytest.raises(MergeRefused, match="or with what was given before"):
        place.merge(resume=True, rounding="nearest")
    place.merge(resume=True)
    assert opened == [FIRST, SECOND, SECOND]
    assert same(content(place.out), reference)


def test_an_out_that_appears_while_a_merge_goes_on_costs_no_finished_shard(
    place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    with pytest.raises(MergeRefused, match=r"^out-exists: "):
        place.merge(resume=True, progress=lambda *_: place.out.mkdir(exist_ok=True))
    place.out.rmdir()
    place.merge(resume=True)
    assert opened == [FIRST, SECOND]
    assert same(content(place.out), reference)


def test_a_shard_that_was_begun_is_written_again(place: Place, reference: dict[str, bytes]) -> None:
    interrupt(place, KeyboardInterrupt())
    (place.staging / "weights" / SECOND).write_bytes(b"half")
    place.merge(resume=True)
    assert same(content(place.out), reference)


@pytest.mark.parametrize("left", ["nothing", "half", "folder"])
def test_a_record_without_its_shard_is_none(
    left: str, place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    interrupt(place, KeyboardInterrupt())
    shard = place.staging / "weights" / FIRST
    if left == "half":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.unlink()
    if left == "folder":
        shard.mkdir()
    place.merge(resume=True)
    assert opened == [FIRST, SECOND, FIRST, SECOND]
    assert same(content(place.out), reference)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe"])
def test_a_record_that_is_damaged_is_none(
    damage: bytes, place: Place, reference: dict[str, bytes], opened: list[str]
) -> None:
    interrupt(place, KeyboardInterrupt())
    (place.staging / "done" / f"{FIRST}.json").write_bytes(damage)
    place.merge(resume=True)
    assert opened == [FIRST, SECOND, FIRST, SECOND]
    assert same(content(place.out), reference)


def test_damage_to_what_says_of_which_merge_it_is_makes_it_another(place: Place) -> None:
    interrupt(place, KeyboardInterrupt())
    (place.staging / "done" / "identity").write_bytes(b"\xff\xfe")
    with pytest.raises(MergeRefused, match=r"out-exists: .*an interrupted merge of other inputs"):
        place.merge(resume=True)


def test_the_records_of_a_merge_that_was_killed_once_it_had_published_are_none(
    place: Place, reference: dict[str, bytes], killed: Killed
) -> None:
    (moment,) = killed(place, ["fsync:16"])
    copy = Place(place.root / moment.replace(":", "-"))
    assert same(content(copy.out), reference)
    assert (copy.staging / "done" / f"{FIRST}.json").exists()
    copy.merge(resume=True, overwrite=True)
    assert same(content(copy.out), reference)


def test_records_that_do_not_say_of_which_merge_they_are_are_none(place: Place) -> None:
    """What says so was removed first, by a merge that was killed while it removed what it had left."""
    interrupt(place, KeyboardInterrupt())
    (place.staging / "done" / "identity").unlink()
    twice = {key: 2 * value for key, value in lora(Q_PROJ, 8, 6).items()}
    write_adapter(place.adapter, twice)
    place.merge(resume=True)
    place.merge(place.root / "reference")
    assert same(content(place.out), content(place.root / "reference"))


def test_a_merge_that_was_killed_while_it_published_is_gone_on_with(
    place: Place, reference: dict[str, bytes], opened: list[str], killed: Killed
) -> None:
    """What it had brought to the weights by then, folders too, is brought anew."""
    (moment,) = killed(place, ["rename:7"])
    copy = Place(place.root / moment.replace(":", "-"))
    assert (copy.staging / "weights" / "chat").is_dir()
    copy.merge(resume=True)
    assert opened == []
    assert same(content(copy.out), reference)


def test_a_shard_that_is_gone_before_out_has_its_name_is_written_by_the_next_merge(
    place: Place, reference: dict[str, bytes], opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = Staging.write_file

    def losing(self: Staging, name: str, data: bytes) -> None:
        (self.weights / FIRST).unlink(missing_ok=True)
        write_file(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write_file", losing)
        with pytest.raises(EnvironmentFailed, match=rf"{FIRST}: found no such file, expected \d+ bytes"):
            place.merge(resume=True)
    assert not place.out.exists()
    place.merge(resume=True)
    assert opened == [FIRST, SECOND, FIRST]
    assert same(content(place.out), reference)


def test_a_finished_shard_that_was_damaged_since_is_found_by_verification(place: Place) -> None:
    interrupt(place, KeyboardInterrupt())
    shard = place.staging / "weights" / FIRST
    data = bytearray(shard.read_bytes())
    data[-30] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(loudmerge.Mismatch):
        place.merge(resume=True, verify=True)
    assert nothing_left(place)


def test_a_refusal_leaves_nothing_even_when_resuming(place: Place) -> None:
    place.poison()
    with pytest.raises(MergeRefused, match="NaN"):
        place.merge(resume=True)
    assert nothing_left(place)


def test_an_out_that_exists_is_refused_and_the_finished_shards_stay(place: Place) -> None:
    interrupt(place, KeyboardInterrupt())
    place.out.mkdir()
    with pytest.raises(MergeRefused):
        place.merge(resume=True)
    assert (place.staging / "done" / f"{FIRST}.json").exists()
