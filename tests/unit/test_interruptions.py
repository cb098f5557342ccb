"""OUT is there complete or not at all, whatever happens to the merge."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import loudmerge
from loudmerge.errors import EnvironmentFailed
from loudmerge.writer import ShardFile, Staging
from tests.unit.builders import Q_PROJ
from tests.unit.conftest import Killed
from tests.unit.places import (
    ENTRIES,
    VARYING,
    Place,
    content,
    make_old,
    make_place,
    nothing_left,
    same,
    undisturbed,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(make_place(tmp_path_factory.mktemp("reference")))


@pytest.fixture
def old(place: Place) -> dict[str, bytes]:
    return make_old(place)


STEPS = {
    "fsync": os, "fdatasync": os, "rename": Path, "pwrite": os, "posix_fallocate": os, "copyfile": shutil,
}  # fmt: skip


def failing(patch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> list[int]:
    """Makes call number `at` of a function fail; the list's length is the number of calls."""
    calls: list[int] = []
    original = getattr(STEPS[name], name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            raise error
        return original(*args, **options)

    patch.setattr(STEPS[name], name, call)
    return calls


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_merge_that_fails_in_any_step_leaves_nothing_and_the_next_succeeds(
    name: str,
    error: BaseException,
    place: Place,
    reference: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        calls = failing(patch, name, 0, error)
        place.merge()
        number = len(calls)
    assert number > 0
    shutil.rmtree(place.out)
    for at in range(1, number + 1):
        with monkeypatch.context() as patch:
            failing(patch, name, at, error)
            with pytest.raises(type(error)):
                place.merge()
        if name == "fsync" and at == number:
            # The name is given: what failed is to make that durable, and what is there is complete.
            assert same(content(place.out), reference)
            shutil.rmtree(place.out)
        assert nothing_left(place), (name, at)
    place.merge()
    assert same(content(place.out), reference)


@pytest.mark.parametrize("stage", ["merge", "verify"])
def test_a_caller_that_stops_a_merge_leaves_nothing(stage: str, place: Place) -> None:
    def stop(found: str, *_: object) -> None:
        if found == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.merge(verify=True, progress=stop)
    assert nothing_left(place)


def test_a_merge_that_fails_verification_is_not_published(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardFile.write

    def damaged(self: ShardFile, key: str, offset: int, data: torch.Tensor) -> None:
        write(self, key, offset, data * 2 if key.startswith(Q_PROJ) else data)

    monkeypatch.setattr(ShardFile, "write", damaged)
    with pytest.raises(loudmerge.Mismatch, match="the merge is not published: its verification failed"):
        place.merge(verify=True)
    assert nothing_left(place)


def test_a_killed_merge_leaves_nothing_that_looks_like_a_checkpoint(
    place: Place, reference: dict[str, bytes], killed: Killed
) -> None:
    """While it merges and verifies there is none; while it publishes, what there is is complete."""
    sizes = {name: len(data) for name, data in reference.items() if name not in VARYING and "/" not in name}
    early = ["merge:1", "merge:2", "merge:3", "verify:1", "verify:2", "rename:1", "rename:5"]
    late = ["fsync:1", "fsync:4", "fsync:9", "rename:7", "rename:9", "fsync:11"]
    for moment, found in killed(place, early + late).items():
        assert found["killed"], moment
        if moment in early:
            assert found["looks"] == {}, moment
        for folder, held in found["looks"].items():
            assert {name: held[name] for name in sizes} == sizes, (moment, folder)
        copy = Place(place.root / moment.replace(":", "-"))
        if copy.out.exists():
            assert same(content(copy.out), reference), moment
        else:
            copy.merge()
            assert same(content(copy.out), reference), moment
            assert not copy.staging.exists()


def test_a_killed_merge_that_overwrites_leaves_the_old_out_or_the_new(
    place: Place, old: dict[str, bytes], reference: dict[str, bytes], killed: Killed
) -> None:
    # The old OUT moves aside in the ninth renaming, the new one takes its name in the tenth.
    moments = ["merge:2", "verify:1", "fsync:3", "rename:7", "rename:8", "rename:9", "rename:10"]
    for moment, found in killed(place, moments, overwrite=True).items():
        assert found["killed"], moment
        copy = Place(place.root / moment.replace(":", "-"))
        there = copy.out if copy.out.exists() else copy.staging / "replaced"
        assert content(there) == old, moment
        copy.merge(overwrite=True)
        assert same(content(copy.out), reference), moment
        assert not copy.staging.exists()


# --- two merges at once --------------------------------------------------------------------------


def test_a_second_merge_into_the_same_out_fails_and_does_not_disturb_the_first(place: Place) -> None:
    tried: list[str] = []

    def second(stage: str, *_: object) -> None:
        if stage == "merge" and not tried:
            tried.append(stage)
            with pytest.raises(
                EnvironmentFailed, match=r"another merge writes .*/out: it holds .*loudmerge-staging"
            ):
                place.merge()

    place.merge(verify=True, progress=second)
    assert tried
    assert sorted(content(place.out)) == ENTRIES


def test_merges_into_different_outs_do_not_meet(place: Place) -> None:
    with Staging(place.root / "one", overwrite=False), Staging(place.root / "two", overwrite=False):
        place.merge()


def test_a_lock_on_a_directory_that_is_gone_is_no_lock(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another merge ended and removed the directory before this one had locked it; a third made its own."""
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        shutil.rmtree(place.staging)
        (place.staging / "weights").mkdir(parents=True)
        (place.staging / "weights" / "of-another").write_text("x")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(EnvironmentFailed, match="another merge"), Staging(place.out, overwrite=False):
        pass
    assert (place.staging / "weights" / "of-another").is_file()


def test_the_locks_descriptor_is_closed_when_another_holds_it(place: Place) -> None:
    with Staging(place.out, overwrite=False):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(EnvironmentFailed), Staging(place.out, overwrite=False):
            pass
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_a_killed_merge_left_is_removed(place: Place, reference: dict[str, bytes]) -> None:
    for name in ("weights", "files"):
        (place.staging / name).mkdir(parents=True)
        (place.staging / name / "left.safetensors").write_bytes(b"half")
    place.merge()
    assert same(content(place.out), reference)
    assert not place.staging.exists()
