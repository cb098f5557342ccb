"""OUT is complete, durable, and takes no name that is another's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge.errors import EnvironmentFailed, MergeRefused
from loudmerge.executing.outpath import refuse_existing, refuse_inputs
from loudmerge.executing.writer import (
    ShardFile,
    Staging,
    edited_json,
    index_json,
)
from loudmerge.planning.plan import OutputTensor
from loudmerge.system.memory import LARGE_BYTES, Bytes, buffer
from tests.unit.builders import entry, values
from tests.unit.places import (
    ENTRIES,
    Place,
    content,
    nothing_left,
    same,
)

# --- OUT -----------------------------------------------------------------------------------------


def test_out_has_every_file_and_nothing_is_left_beside_it(place: Place) -> None:
    before = content(place.base), content(place.adapter)
    place.merge(verify=True)
    assert sorted(content(place.out)) == ENTRIES
    assert sorted(path.name for path in place.root.iterdir()) == ["adapter", "base", "out"]
    assert (content(place.base), content(place.adapter)) == before


def test_the_parents_of_out_are_made(place: Place) -> None:
    place.merge(place.root / "a" / "b" / "out")
    assert (place.root / "a" / "b" / "out" / "config.json").is_file()


def test_a_merge_that_fails_leaves_no_parents_of_out_that_it_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.root / "a").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Staging, "publish", full)
    with pytest.raises(OSError, match="full"):
        place.merge(place.root / "a" / "b" / "c" / "out")
    assert list((place.root / "a").iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 240, "x" * 255, "ü" * 127])
def test_out_may_have_any_name_that_a_file_may_have(name: str, place: Place) -> None:
    out = place.root / "a" / name
    with pytest.raises(KeyboardInterrupt):
        place.merge(out, resume=True, progress=interrupted)
    assert not out.exists()
    place.merge(out, resume=True, verify=True)
    assert [path.name for path in (place.root / "a").iterdir()] == [name]
    assert sorted(content(out)) == ENTRIES


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_outs_with_long_names_do_not_meet(place: Place) -> None:
    outs = [place.root / ("x" * 250 + end) for end in "ab"]
    with Staging(outs[0], overwrite=False), Staging(outs[1], overwrite=False):
        pass


def test_an_out_whose_name_no_file_may_have_fails_at_once_and_leaves_nothing(place: Place) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
        place.merge(place.root / "a" / "b" / ("x" * 256), progress=lambda *_: pytest.fail("it was begun"))
    assert nothing_left(place)


def test_out_may_be_a_relative_path(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    place.merge(Path("out"))
    assert sorted(content(place.out)) == ENTRIES


def test_names_that_are_not_utf_8_are_merged_and_verified(place: Place) -> None:
    name = os.fsdecode(b"caf\xe9")
    base, adapter, out = (place.root / f"{kind}-{name}" for kind in ("base", "adapter", "out"))
    (place.base / f"{name}.txt").write_text("side")
    place.base.rename(base)
    place.adapter.rename(adapter)
    loudmerge.merge(base, adapter, out)
    assert (out / f"{name}.txt").read_text() == "side"
    report = json.loads((out / "merge_report.json").read_bytes())
    assert report["base"]["path"] == str(base)
    assert f"{name}.txt" in report["files"]
    assert loudmerge.verify(out, base, adapter).ok


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)]
)
def test_modes_follow_the_umask(
    mask: int, file_mode: int, folder_mode: int, place: Place, umask: Callable[[int], None]
) -> None:
    (place.base / "LICENSE").chmod(0o400)
    umask(mask)
    place.merge()
    for path in [place.out, *place.out.rglob("*")]:
        wanted = folder_mode if path.is_dir() else file_mode
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_every_file_and_folder_is_on_the_disk_before_out_has_its_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded(descriptor: int) -> None:
        calls.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        calls.append(("rename", str(target)))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", renamed)
    place.merge()
    published = calls.index(("rename", str(place.out)))
    before = {Path(path).name for kind, path in calls[:published] if kind == "fsync"}
    assert before >= {Path(name).name for name in ENTRIES} | {"chat", "weights"}
    assert ("fsync", str(place.root)) in calls[published:]


def test_weights_are_on_the_disk_before_they_look_like_a_checkpoint(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut while gigabytes are synced must not leave a config beside shards that are not written."""
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        if source.name == "config.json":
            assert {name for name in ENTRIES if name.endswith(".safetensors")} <= set(synced)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", renamed)
    place.merge()


@pytest.mark.parametrize("metadata", [{"format": "pt", "made": "ü"}, None])
def test_the_metadata_of_a_shard_is_kept_and_says_its_format(
    metadata: dict[str, str] | None, place: Place
) -> None:
    for shard in place.base.glob("*.safetensors"):
        save_file(load_file(shard), shard, metadata=metadata)
    place.merge(verify=True)
    for shard in place.out.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == (metadata or {"format": "pt"})


@pytest.mark.parametrize("found", ["no such file", "2 bytes"])
def test_out_is_not_published_without_all_of_its_weights(found: str, place: Place) -> None:
    with Staging(place.out, overwrite=False) as staging:
        (staging.weights / "a").write_bytes(b"aaa")
        if found == "2 bytes":
            (staging.weights / "b").write_bytes(b"bb")
        with pytest.raises(EnvironmentFailed, match=f"weights/b: found {found}, expected 3 bytes"):
            staging.publish({"a": 3, "b": 3})
    assert nothing_left(place)


def test_a_file_that_is_kept_never_replaces_weights_of_that_name(place: Place) -> None:
    with Staging(place.out, overwrite=False) as staging:
        (staging.weights / "a").write_bytes(b"merged")
        staging.write_file("a", b"kept")
        with pytest.raises(AssertionError, match="a would replace a weight file of that name"):
            staging.publish({"a": 6})
    assert nothing_left(place)


# --- names that are taken ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_an_out_that_exists_is_refused_and_untouched(kind: str, place: Place) -> None:
    if kind == "folder":
        place.out.mkdir()
    elif kind == "file":
        place.out.write_text("mine")
    else:
        place.out.symlink_to(place.base if kind == "link" else place.root / "gone")
    before = content(place.base)
    with pytest.raises(
        MergeRefused, match=r"^out-exists: .*out: found something of that name, expected a name"
    ) as e:
        place.merge()
    assert "--overwrite to replace it once the new one is complete" in e.value.hint
    assert os.path.lexists(place.out)
    assert content(place.base) == before


def test_a_file_system_without_locks_is_a_failure_of_the_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, _: int) -> None:
        opened.append(descriptor)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    opened: list[int] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available"), Staging(place.out / "a", overwrite=False):
        pass
    assert nothing_left(place)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [".", "weights", "files", "done"])
def test_a_link_in_the_place_of_a_staged_directory_is_not_followed(
    name: str, resume: bool, place: Place
) -> None:
    victim = place.root / "victim"
    for inner in ("weights", "files", "done"):
        (victim / inner).mkdir(parents=True)
        (victim / inner / "precious").write_text("mine")
    (victim / "precious").write_text("mine")
    before = content(victim)
    link = place.staging / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(EnvironmentFailed, match=rf"^{link}: found a link or a file.* Remove it, or take"):
        place.merge(resume=resume)
    assert content(victim) == before
    assert not place.out.exists()
    if name == ".":
        assert link.readlink() == victim


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_staged_directory_is_named_and_left(kind: str, place: Place) -> None:
    if kind == "file":
        place.staging.write_text("mine")
    else:
        place.staging.symlink_to(place.root / "gone")
    with pytest.raises(EnvironmentFailed, match=rf"^{place.staging}: found a link or a file"):
        place.merge()
    assert os.path.lexists(place.staging)
    assert not (place.root / "gone").exists()


def test_an_out_that_appears_during_the_merge_is_not_replaced(place: Place) -> None:
    def appear(*_: object) -> None:
        place.out.mkdir(exist_ok=True)

    with pytest.raises(MergeRefused, match=r"^out-exists: "):
        place.merge(progress=appear)
    assert list(place.out.iterdir()) == []
    assert not place.staging.exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("where", ["{}", "{}/inside", "{}/in/side", ".", "{}/../{}", "link", "link/inside"])
def test_an_out_that_is_holds_or_lies_in_an_input_is_refused(
    where: str, which: str, overwrite: bool, place: Place
) -> None:
    (place.root / "link").symlink_to(place.root / which)
    before = content(place.root)
    with pytest.raises(MergeRefused, match=r"^out-exists: "):
        place.merge(place.root / where.format(which, which), overwrite=overwrite)
    assert content(place.root) == before


def test_the_input_that_out_would_touch_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        MergeRefused, match=r"found a directory that is, holds or lies in the input .*/base, expected"
    ):
        refuse_inputs(tmp_path / "base", [tmp_path / "other", tmp_path / "base"])
    refuse_inputs(tmp_path / "base-2", [tmp_path / "base"])
    refuse_existing(tmp_path / "free", overwrite=False)
    refuse_existing(tmp_path, overwrite=True)


# --- overwriting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../work", "/", "~"])
def test_the_directory_one_stands_in_the_home_and_what_holds_them_are_not_replaced(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OUT that is empty, from an unset variable, is the current directory."""
    for directory in ("work", "home"):
        (place.root / directory).mkdir()
        (place.root / directory / "mine.txt").write_text("mine")
    monkeypatch.chdir(place.root / "work")
    monkeypatch.setenv("HOME", str(place.root / "home"))
    before = content(place.root)
    with pytest.raises(
        MergeRefused, match=r"^out-exists: .* that is or holds the (current|home) directory /"
    ):
        place.merge(Path(name).expanduser(), overwrite=True)
    assert content(place.root) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_mount_point_is_refused_before_anything_is_merged(
    overwrite: bool, place: Place, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's volume. It could not be renamed: that showed when all was merged."""
    monkeypatch.setattr("os.path.ismount", lambda path: path == place.out)
    with pytest.raises(
        MergeRefused, match=rf"^out-exists: .*a mount point, which .*a folder in it: {place.out}/merged\.$"
    ):
        loudmerge.plan(place.base, place.adapter, out=place.out, overwrite=overwrite)
    assert content(place.out) == old


def test_overwriting_replaces_out_only_when_the_new_one_is_complete(
    place: Place, old: dict[str, bytes], reference: dict[str, bytes]
) -> None:
    stages = set()

    def watch(stage: str, *_: object) -> None:
        stages.add(stage)
        assert content(place.out) == old

    place.merge(overwrite=True, verify=True, progress=watch)
    assert stages == {"merge", "verify"}
    assert same(content(place.out), reference)
    assert not place.staging.exists()


def test_a_merge_that_is_refused_while_it_runs_keeps_the_old_out(place: Place, old: dict[str, bytes]) -> None:
    place.poison()
    with pytest.raises(MergeRefused, match=r"^non-finite: "):
        place.merge(overwrite=True)
    assert content(place.out) == old
    assert not place.staging.exists()


def test_a_rename_that_fails_puts_the_old_out_back(
    place: Place, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name == "weights":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="cross-device"):
        place.merge(overwrite=True)
    assert content(place.out) == old
    assert not place.staging.exists()


def interrupted_between_the_renames(place: Place) -> None:
    """A merge was killed after it had moved the old OUT aside, before the new one had its name."""
    place.staging.mkdir()
    place.out.rename(place.staging / "replaced")


def test_an_old_out_that_a_killed_merge_had_moved_aside_is_not_lost(
    place: Place, old: dict[str, bytes]
) -> None:
    interrupted_between_the_renames(place)
    place.poison()
    with pytest.raises(MergeRefused, match=r"^non-finite: "):
        place.merge(overwrite=True)
    assert content(place.out) == old


def test_an_old_out_that_was_moved_aside_is_not_replaced_unasked(place: Place, old: dict[str, bytes]) -> None:
    interrupted_between_the_renames(place)
    with pytest.raises(MergeRefused, match=r"^out-exists: "):
        place.merge(overwrite=False)
    assert content(place.out) == old
    assert not place.staging.exists()


@pytest.mark.usefixtures("old")
def test_what_a_killed_merge_had_moved_aside_is_no_obstacle(
    place: Place, reference: dict[str, bytes]
) -> None:
    interrupted_between_the_renames(place)
    place.out.mkdir()
    (place.out / "newer").write_text("newer")
    place.merge(overwrite=True)
    assert same(content(place.out), reference)
    assert not place.staging.exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_old_out_of_any_kind_that_was_moved_aside_is_removed_and_no_link_is_followed(
    kind: str, resume: bool, place: Place, old: dict[str, bytes], reference: dict[str, bytes]
) -> None:
    """A merge was killed when the new OUT had its name, before the old one was removed."""
    place.staging.mkdir()
    replaced = place.staging / "replaced"
    if kind == "file":
        replaced.write_text("mine")
    else:
        place.out.rename(place.root / "elsewhere")
        replaced.symlink_to(place.root / ("elsewhere" if kind == "link" else "gone"))
        place.out.mkdir()
    place.merge(overwrite=True, resume=resume)
    assert same(content(place.out), reference)
    assert not place.staging.exists()
    if kind != "file":
        assert content(place.root / "elsewhere") == old


@pytest.mark.usefixtures("old")
def test_what_cannot_be_removed_of_an_old_out_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in it is read-only, say. Python's own error has the last name only."""
    (place.staging / "discarded").mkdir(parents=True)
    rmtree = shutil.rmtree

    def refuse(path: Path, **options: Any) -> None:
        if path.name == "discarded":
            raise PermissionError(errno.EACCES, "Permission denied", "x")
        rmtree(path, **options)

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(EnvironmentFailed, match=r"/discarded: what is left .*'x'\)\. Remove it by hand"):
        place.merge(overwrite=True)


# --- shards and JSON -----------------------------------------------------------------------------


def outputs() -> list[OutputTensor]:
    return [
        OutputTensor("a", "f", entry("a", (2, 3)), "F32", (2, 3)),
        OutputTensor("empty", "f", entry("empty", (0, 3)), "F32", (0, 3)),
        OutputTensor("ü", "f", entry("ü", (5,)), "BF16", (5,)),
    ]


def allocated(path: Path, tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> ShardFile:
    shard = ShardFile(path, tensors, metadata)
    shard.allocate()
    assert path.stat().st_size == shard.nbytes
    return shard


def test_a_shard_is_written_at_places_known_beforehand_in_any_order(tmp_path: Path) -> None:
    a, b = values(2, 3), values(5).to(torch.bfloat16)
    with allocated(tmp_path / "f.safetensors", outputs(), {"format": "pt"}) as shard:
        shard.write("ü", 4, raw(b[2:]))
        shard.write("a", 12, raw(a[1]))
        shard.write("empty", 0, raw(torch.zeros(0, 3)))
        shard.write("a", 0, raw(a[0]))
        shard.write("ü", 0, raw(b[:2]))
        shard.sync()
    with safe_open(tmp_path / "f.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert list(opened.offset_keys()) == ["empty", "a", "ü"]
        assert torch.equal(opened.get_tensor("a"), a)
        assert torch.equal(opened.get_tensor("ü"), b)
    length = int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % 8 == 0


PAGES = (
    OutputTensor("norm", "f", entry("norm", (6,)), "BF16", (6,)),
    OutputTensor("pages", "f", entry("pages", (2, 1024)), "F32", (2, 1024)),
    OutputTensor("odd", "f", entry("odd", (3,)), "F32", (3,)),
)


def raw(tensor: torch.Tensor) -> Bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def aligned_buffer() -> Bytes:
    return buffer(LARGE_BYTES)[:8192]


def write_pages(path: Path) -> dict[str, torch.Tensor]:
    tensors = {"norm": values(6).to(torch.bfloat16), "pages": values(2, 1024), "odd": values(3)}
    aligned = aligned_buffer()
    aligned[:] = raw(tensors["pages"])
    with allocated(path, PAGES, {}) as shard:
        shard.write("pages", 0, aligned[:4096])
        shard.write("pages", 4096, aligned[4096:])
        shard.write("norm", 0, raw(tensors["norm"]))
        shard.write("odd", 0, raw(tensors["odd"]))
    return tensors


def check_pages(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as opened:
        assert list(opened.offset_keys()) == ["pages", "odd", "norm"]
        assert all(torch.equal(opened.get_tensor(key), tensor) for key, tensor in tensors.items())


def test_whole_pages_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[int] = []
    written: list[tuple[int, int]] = []
    open_, pwrite = os.open, os.pwrite

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        # Any file system will do here: the flag is taken off again.
        descriptor = open_(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def writing(descriptor: int, data: memoryview, position: int) -> int:
        if descriptor in direct:
            written.append((data.nbytes, position % 4096))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    check_pages(tmp_path / "f", write_pages(tmp_path / "f"))
    assert written == [(4096, 0), (4096, 0)]


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(call, errno.EINVAL, monkeypatch)
    check_pages(tmp_path / "f", write_pages(tmp_path / "f"))


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_an_error_of_the_disk_is_no_lack_of_direct_writes(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(call, errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_pages(tmp_path / "f")


def test_a_system_without_linux_calls_gets_the_portable_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS is, whose Python has none of these."""
    for name in ("O_DIRECT", "posix_fallocate", "fdatasync", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    check_pages(tmp_path / "f", write_pages(tmp_path / "f"))
    with allocated(tmp_path / "g", PAGES, {}) as shard:
        shard.sync()
    assert len(synced) == 1


def refuse_direct(call: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct descriptors cannot be opened, or not written to."""
    direct: list[int] = []
    open_, pwrite = os.open, os.pwrite

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and call == "open":
            raise OSError(code, os.strerror(code))
        descriptor = open_(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def writing(descriptor: int, data: memoryview, position: int) -> int:
        if descriptor in direct:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)


def test_a_shard_without_metadata_has_none(tmp_path: Path) -> None:
    with allocated(tmp_path / "f.safetensors", outputs(), {}):
        pass
    with safe_open(tmp_path / "f.safetensors", framework="pt") as opened:
        assert opened.metadata() is None


def test_a_shard_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        ShardFile(tmp_path / "f", outputs(), {}).allocate()
    assert (tmp_path / "f").read_text() == "mine"


def test_a_disk_without_room_for_a_shard_is_said_to_be_so_with_its_path_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    shard = ShardFile(tmp_path / "f", outputs(), {})
    with pytest.raises(
        OSError, match=rf"No space left on device, {shard.nbytes} bytes wanted: '{shard.path}'"
    ):
        shard.allocate()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_blocks_gets_the_size_alone(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    check_pages(tmp_path / "f", write_pages(tmp_path / "f"))


def test_a_shard_that_is_closed_is_written_to_no_more(tmp_path: Path) -> None:
    """Its descriptors' numbers may be another file's by then."""
    with allocated(tmp_path / "f", PAGES, {}) as shard:
        shard.close()
        before = (tmp_path / "f").read_bytes()
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            shard.write("pages", 0, aligned_buffer())
    assert (tmp_path / "f").read_bytes() == before


def test_a_write_that_is_cut_short_is_continued(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:7], at))
    place.merge(verify=True)
    assert sorted(content(place.out)) == ENTRIES


def test_the_index_keeps_the_bases_order_and_counts_bytes() -> None:
    index = {
        "weight_map": {"ü": "old", "a": "old", "empty": "old"},
        "metadata": {"total_size": 1, "x": 2},
        "y": 3,
    }
    added = [*outputs(), OutputTensor("new", "g", entry("new", (1,)), "F32", (1,))]
    found = json.loads(index_json(index, added))
    assert list(found["weight_map"].items()) == [("ü", "f"), ("a", "f"), ("empty", "f"), ("new", "g")]
    assert found["metadata"] == {"total_size": 24 + 10 + 4, "x": 2}
    assert found["y"] == 3
    assert json.loads(index_json({"weight_map": {}}, added))["metadata"] == {"total_size": 38}


def test_a_json_file_without_edits_is_the_same_bytes() -> None:
    assert edited_json(b'{ "a":1}', {}) == b'{ "a":1}'


def test_edits_change_values_by_dotted_path_and_keep_the_order() -> None:
    found = edited_json('{"b": {"c": 1, "d": "ü"}, "a": 1}'.encode(), {"b.c": 2, "a": False, "new": [1]})
    assert found.decode().startswith('{\n  "b": {\n    "c": 2,\n    "d": "ü"')
    assert json.loads(found) == {"b": {"c": 2, "d": "ü"}, "a": False, "new": [1]}
