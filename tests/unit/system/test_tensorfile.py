"""One safetensors file: its descriptors are few, closed in the end, and never another file's."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loudmerge
from loudmerge.errors import MergeRefused
from loudmerge.system.tensorfile import OPEN_FILES, Descriptors, TensorEntry, read_header
from loudmerge.system.tensors import TensorReader
from loudmerge.verifying.recompute import RawFiles
from tests.unit.builders import Q_PROJ, lora, values, write_adapter, write_base

COUNT = 3 * OPEN_FILES


@pytest.fixture
def entries(tmp_path: Path) -> list[TensorEntry]:
    """Tensors in files of their own, each filled with its number."""
    found = []
    for number in range(COUNT):
        file = tmp_path / f"{number}.safetensors"
        save_file({"w": torch.full((64,), number, dtype=torch.int32)}, file)
        found.append(read_header(file)[0]["w"])
    return found


def opened_below(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return sorted(Path(link).name for link in links if link.startswith(f"{folder}/"))


def test_a_reader_keeps_a_few_files_open_and_closes_them(entries: list[TensorEntry], tmp_path: Path) -> None:
    with TensorReader() as reader:
        for _ in range(2):
            for number, entry in enumerate(entries):
                assert torch.equal(reader.read(entry), torch.full((64,), number, dtype=torch.int32))
        assert len(opened_below(tmp_path)) == OPEN_FILES
    assert opened_below(tmp_path) == []


def test_a_reader_that_fails_closes_its_files(entries: list[TensorEntry], tmp_path: Path) -> None:
    os.truncate(entries[0].file, 100)
    with pytest.raises(MergeRefused, match=r"^corrupt-file: .*the end of the file"), TensorReader() as reader:
        reader.read(entries[0])
    assert opened_below(tmp_path) == []


def test_what_verifies_keeps_a_few_files_open_and_closes_them(
    entries: list[TensorEntry], tmp_path: Path
) -> None:
    with RawFiles() as files:
        for _ in range(2):
            for number, entry in enumerate(entries):
                assert set(files.read(entry.file, "w", 0, 256)[::4]) == {number}
        assert len(opened_below(tmp_path)) == OPEN_FILES
    assert opened_below(tmp_path) == []


def test_the_file_that_was_used_longest_ago_is_closed(entries: list[TensorEntry], tmp_path: Path) -> None:
    descriptors = Descriptors(2)
    for number in (0, 1, 0, 2):
        with descriptors.use(entries[number].file):
            pass
    assert opened_below(tmp_path) == ["0.safetensors", "2.safetensors"]
    descriptors.close()


def test_a_file_that_is_read_from_stays_open(entries: list[TensorEntry], tmp_path: Path) -> None:
    descriptors = Descriptors(1)
    with descriptors.use(entries[0].file) as first:
        with descriptors.use(entries[1].file) as second, descriptors.use(entries[0].file) as again:
            assert again == first != second
        # Of the two only the other may go: this one still has a reader.
        assert opened_below(tmp_path) == ["0.safetensors"]
        with descriptors.use(entries[2].file):
            assert os.path.samestat(os.fstat(first), entries[0].file.stat())
    assert len(opened_below(tmp_path)) == 1
    descriptors.close()
    assert opened_below(tmp_path) == []


def test_threads_that_share_descriptors_read_each_its_own_file(entries: list[TensorEntry]) -> None:
    """With one file open at a time, every number is reused all the time."""
    descriptors = Descriptors(1)

    def wrong(seed: int) -> int:
        draw, count = random.Random(seed), 0
        for _ in range(400):
            entry = draw.choice(entries)
            with descriptors.use(entry.file) as descriptor:
                found = os.pread(descriptor, 4, entry.start)
            count += int.from_bytes(found, "little") != int(entry.file.stem)
        return count

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wrong, range(8))) == 0
    descriptors.close()


@pytest.mark.parametrize("change", ["replaced", "longer", "touched"])
def test_a_file_that_was_changed_since_it_was_closed_is_refused(
    change: str, entries: list[TensorEntry], tmp_path: Path
) -> None:
    first, stat = entries[0].file, entries[0].file.stat()
    with TensorReader() as reader:
        for entry in entries:
            reader.read(entry)
        if change == "replaced":
            save_file({"w": torch.full((64,), 99, dtype=torch.int32)}, tmp_path / "new")
            (tmp_path / "new").rename(first)
        elif change == "longer":
            first.write_bytes(first.read_bytes() + b" ")
        os.utime(first, ns=(1, 1) if change == "touched" else (stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(MergeRefused) as refusal:
            reader.read(entries[0])
    assert refusal.value.code == "corrupt-file"
    assert refusal.value.where == str(first)
    assert "than when it was first opened" in str(refusal.value)
    assert "run again once that has ended" in refusal.value.hint
    assert opened_below(tmp_path) == []


def test_a_file_that_was_closed_is_opened_again_under_any_other_mode(entries: list[TensorEntry]) -> None:
    """Only what is in it counts."""
    with TensorReader() as reader:
        for entry in entries:
            reader.read(entry)
        entries[0].file.chmod(0o400)
        assert int(reader.read(entries[0])[0]) == 0


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """As `ulimit -n` has it: room for some 40 files beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
@pytest.mark.parametrize("threads", [1, 8])
def test_a_checkpoint_of_more_shards_than_files_may_be_open_is_merged_and_verified(
    threads: int, tmp_path: Path
) -> None:
    keys = [f"{Q_PROJ}.weight", *map(str, range(59))]
    tensors = {keys[0]: values(8, 6), **{key: values(4, seed=int(key)) for key in keys[1:]}}
    base = write_base(tmp_path / "base", tensors, shards=[[key] for key in keys])
    adapter = write_adapter(tmp_path / "adapter", lora(Q_PROJ, 8, 6))
    loudmerge.merge(base, adapter, tmp_path / "out", threads=threads)
    assert loudmerge.verify(tmp_path / "out", base, adapter).ok
