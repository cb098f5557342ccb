"""OUT is there complete or not at all, whatever happens to the merge."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loudmerge
from loudmerge.errors import EnvironmentFailed, MergeRefused
from loudmerge.executing.writer import ShardFile, Staging
from loudmerge.system.memory import Bytes
from tests.unit.builders import Q_PROJ
from tests.unit.conftest import Killed
from tests.unit.places import (
    ENTRIES,
    VARYING,
    Place,
    content,
    make_old,
    nothing_left,
    same,
)

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

    def damaged(self: ShardFile, key: str, offset: int, content: Bytes) -> None:
        write(self, key, offset, ~content if key.startswith(Q_PROJ) else content)

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


Strike = Callable[[int, Path], BaseException | None]


def striking(patch: pytest.MonkeyPatch, strike: Strike, *, after: bool) -> list[Path]:
    """Renames end with what `strike` says of (number, target), instead of or after their work: targets."""
    rename = Path.rename
    targets: list[Path] = []

    def call(source: Path, target: Path) -> Path:
        error = strike(len(targets), target)
        targets.append(target)
        if error is not None and not after:
            raise error
        done = rename(source, target)
        if error is not None:
            raise error
        return done

    patch.setattr(Path, "rename", call)
    return targets


def at_number(wanted: int, error: BaseException | None) -> Strike:
    return lambda number, _: error if number == wanted else None


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_whichever_rename_is_interrupted_the_old_out_or_the_new_stands(
    error: BaseException,
    after: bool,
    resume: bool,
    place: Place,
    reference: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = make_old(place)
    with monkeypatch.context() as patch:
        targets = striking(patch, at_number(-1, None), after=after)
        place.merge(overwrite=True)
    replaced, published = (targets.index(path) for path in (place.staging / "replaced", place.out))
    assert replaced + 1 == published
    for at in range(replaced - 1, len(targets)):
        shutil.rmtree(place.out)
        assert make_old(place) == old
        with monkeypatch.context() as patch:
            striking(patch, at_number(at, error), after=after)
            with pytest.raises(type(error)):
                place.merge(overwrite=True, resume=resume)
        new = at >= published + (not after)
        assert same(content(place.out), reference) if new else content(place.out) == old, at
        if not resume and at <= published:
            assert not place.staging.exists(), at
        place.merge(overwrite=True, resume=resume)
        assert same(content(place.out), reference)
        assert not place.staging.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_an_out_that_even_interrupted_twice_was_not_put_back_is_put_back_by_the_next_merge(
    resume: bool, place: Place, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the descriptor that holds the lock is closed: a notebook lives on."""
    with monkeypatch.context() as patch:
        striking(patch, lambda _, to: KeyboardInterrupt() if to == place.out else None, after=False)
        with pytest.raises(KeyboardInterrupt):
            place.merge(overwrite=True, resume=resume)
    assert not place.out.exists()
    assert content(place.staging / "replaced") == old
    place.poison()
    with pytest.raises(MergeRefused, match=r"^non-finite: "):
        place.merge(overwrite=True)
    assert content(place.out) == old
    assert not place.staging.exists()


def test_an_old_out_that_cannot_be_put_back_is_not_removed(
    place: Place, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full = OSError(errno.EIO, "Input/output error")
        striking(patch, lambda _, to: full if to == place.out else None, after=False)
        for _ in range(2):  # the merge, and the next one, which tries to put it back
            with pytest.raises(OSError, match="Input/output error"):
                place.merge(overwrite=True)
            assert content(place.staging / "replaced") == old
    with Staging(place.out, overwrite=True):
        assert content(place.out) == old
    assert content(place.out) == old


def test_what_an_interrupted_removal_leaves_of_an_old_out_is_not_put_back(
    place: Place, old: dict[str, bytes], reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new OUT may have been moved elsewhere by the time the next merge begins."""
    rmtree = shutil.rmtree

    def removing(path: Path, **options: Any) -> None:
        if path == place.staging:
            next(path.rglob("old.safetensors")).unlink()
            raise KeyboardInterrupt
        rmtree(path, **options)

    assert "old.safetensors" in old
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removing)
        with pytest.raises(KeyboardInterrupt):
            place.merge(overwrite=True)
    assert same(content(place.out), reference)
    place.out.rename(place.root / "elsewhere")
    place.merge()
    assert same(content(place.out), reference)
    assert not place.staging.exists()


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
