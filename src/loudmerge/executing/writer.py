"""The only module that writes OUT's weights and gives it its name: a staged directory, durable files.

While a merge runs, its files lie in two directories inside `.OUT.loudmerge-staging` beside OUT: weights
without a config, and the other files without weights. Neither looks like a checkpoint. Once all are
complete and verified they are brought together and renamed to OUT.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from loudmerge.errors import EnvironmentFailed, MergeRefused, is_out_of_memory
from loudmerge.executing.outpath import make_parents, own_directory, refuse_existing, remove_parents
from loudmerge.planning.plan import OutputTensor
from loudmerge.reading.checkpoint import INDEX
from loudmerge.reading.sidefiles import CONFIG
from loudmerge.system import jsonfile
from loudmerge.system.memory import Bytes

_PAGE = 4096
"""Alignment, in bytes, of a direct write: of its place in the file, its length and its address in memory."""

_NAME_BYTES = 255
"""What file systems take for a name (NAME_MAX)."""

_CLOSED = -1
"""In a descriptor's place where there is none: what is written to it fails, and hits no other file."""

_INTERRUPTIONS = (OSError, EnvironmentFailed, KeyboardInterrupt)
"""What says nothing against the shards that are finished, beside a lack of memory."""


class Staging:
    """The staged directory of one merge. Leaving it without `publish` removes it.

    resume: what an interrupted merge left is kept to go on from; and should this one be interrupted (by the
    disk, the user, a lack of memory) or refused its OUT, so is what it leaves.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool = False) -> None:
        self.out = out.absolute()
        self._overwrite = overwrite
        self._resume = resume
        self.root = self.out.parent / _staged_name(self.out.name)
        self.weights = self.root / "weights"
        self.files = self.root / "files"
        self.done = self.root / "done"
        self._replaced = self.root / "replaced"
        self._discarded = self.root / "discarded"
        self._parents: list[Path] = []
        self._lock = -1

    def __enter__(self) -> Staging:
        self._parents = make_parents(self.out)
        try:
            self._lock = self._take_lock()
        except OSError:  # Not where another holds the lock: then all of this is that other's.
            remove_parents([self.root, *self._parents])
            raise
        try:
            self._recover()
            refuse_existing(self.out, overwrite=self._overwrite)
            for left_over in (self.files,) if self._resume else (self.files, self.weights, self.done):
                # A merge that was killed left these; its lock is gone, so nobody writes them any more.
                shutil.rmtree(left_over, ignore_errors=True)
            for directory in (self.files, self.weights, self.done):
                os.close(own_directory(directory))
        except BaseException:
            self._leave(keep=self._resume)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nor does a refusal of OUT, or to go on with other inputs.
        harmless = isinstance(error, MergeRefused) and error.code == "out-exists"
        interrupted = error is not None and (isinstance(error, _INTERRUPTIONS) or is_out_of_memory(error))
        self._leave(keep=self._resume and (harmless or interrupted))

    def _leave(self, *, keep: bool) -> None:
        try:
            # First: where this fails, or is interrupted, the old OUT stays for the next merge to put back.
            self._settle()
            if not keep or not self.weights.is_dir():  # There is nothing to go on from once it is published.
                shutil.rmtree(self.root, ignore_errors=True)
                remove_parents(self._parents)
        finally:
            os.close(self._lock)

    def _take_lock(self) -> int:
        descriptor = own_directory(self.root)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the directory since it was opened.
            free = self.root.exists() and os.path.samestat(os.fstat(descriptor), self.root.lstat())
        except BlockingIOError:
            free = False
        except OSError:
            os.close(descriptor)
            raise
        if free:
            return descriptor
        os.close(descriptor)
        raise EnvironmentFailed(
            f"another merge writes {self.out}: it holds {self.root}. Wait for it, or take another OUT."
        )

    def _recover(self) -> None:
        """Puts back, or removes, an older OUT that a killed merge had moved aside."""
        self._settle()
        if os.path.lexists(self._discarded):
            try:
                _remove(self._discarded)
            except OSError as error:
                raise EnvironmentFailed(
                    f"{self._discarded}: what is left of an OUT that was replaced cannot be removed "
                    f"({error}). Remove it by hand."
                ) from error

    def _settle(self) -> None:
        """Puts back an older OUT that was moved aside and not yet replaced; one that was, is to be removed.

        It is renamed before: what an interrupted removal leaves of it is never taken for an OUT to put back.
        """
        if os.path.lexists(self._replaced):
            self._replaced.rename(self._discarded if os.path.lexists(self.out) else self.out)

    def keep_only(self, shards: Collection[str]) -> None:
        """Removes all else from the weights: shards that were begun, and what a killed `publish` brought."""
        for path in self.weights.iterdir():
            if path.name not in shards:
                _remove(path)

    def write_file(self, name: str, content: bytes) -> None:
        """Writes one of the files that hold no weights."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def copy_file(self, source: Path, name: str) -> None:
        """Copies a file that holds no weights, byte for byte."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)

    def publish(self, sizes: Mapping[str, int]) -> None:
        """Makes every file durable and renames the directory to OUT, replacing an older OUT if allowed.

        sizes: of each weight file, in bytes. Raises EnvironmentFailed when one is not there in full.
        Whatever ends this before OUT has its name, leaving the staged directory puts the older OUT back.
        """
        self._check(sizes)
        _sync_tree(self.files)
        _sync_tree(self.weights)
        for path in sorted(self.files.iterdir(), key=_last_config):
            path.rename(self.weights / path.name)
        _sync(self.weights)
        refuse_existing(self.out, overwrite=self._overwrite)
        if os.path.lexists(self.out):
            self.out.rename(self._replaced)
        self.weights.rename(self.out)
        _sync(self.out.parent)

    def _check(self, sizes: Mapping[str, int]) -> None:
        """Raises when weights are not there, or would be replaced: verification may be off, and is over."""
        for name, nbytes in sizes.items():
            path = self.weights / name
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            if found != f"{nbytes} bytes":
                raise EnvironmentFailed(
                    f"{path}: found {found}, expected {nbytes} bytes. Something else changed it. Merge again."
                )
        for path in self.files.iterdir():
            if os.path.lexists(self.weights / path.name):
                raise AssertionError(f"{path.name} would replace a weight file of that name")


def _staged_name(out: str) -> str:
    """The name of the staged directory: by a hash where that of an OUT would be too long with ours added."""
    staged = f".{out}.loudmerge-staging"
    name = os.fsencode(out)
    if len(name) <= _NAME_BYTES < len(os.fsencode(staged)):
        return f".{hashlib.sha256(name).hexdigest()}.loudmerge-staging"
    return staged


class ShardFile:
    """One safetensors file that is being written, at positions known beforehand. Its size is `nbytes`.

    `allocate` makes the file; it is open for writing only as a context manager, until it is closed.

    What is aligned to pages goes straight to the disk (O_DIRECT) where the file system can: a copy in the
    page cache, which nobody reads before the merge is done, would cost more than the update itself.
    """

    def __init__(self, path: Path, outputs: Sequence[OutputTensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._header, self._starts, self.nbytes = _layout(outputs, metadata)
        self._descriptor = self._direct = _CLOSED

    def allocate(self) -> None:
        """Makes the file. A full disk shows now, not at the end; and blocks that exist are written faster."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _reserve(descriptor, self.nbytes)
        except OSError as error:
            wanted = f"{error.strerror}, {self.nbytes} bytes wanted"
            raise OSError(error.errno, wanted, str(self.path)) from error
        finally:
            os.close(descriptor)

    @property
    def direct(self) -> bool:
        """Whether all but what is not aligned to pages goes past the page cache."""
        return self._direct != _CLOSED

    def write(self, key: str, offset: int, content: Bytes) -> None:
        """Writes the bytes `offset` bytes into the tensor `key`."""
        view, position = content.data, self._starts[key] + offset
        if self.direct and not (position | view.nbytes | content.ctypes.data) % _PAGE:
            written = _write_direct(self._direct, view, position)
            view, position = view[written:], position + written
        _write_all(self._descriptor, view, position)

    def sync(self) -> None:
        """Sends what was written to the disk, and gives its memory back to be used for what comes next."""
        (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes it, if it is open."""
        held = {self._descriptor, self._direct} - {_CLOSED}
        self._descriptor = self._direct = _CLOSED
        for descriptor in held:
            os.close(descriptor)

    def __enter__(self) -> ShardFile:
        self._descriptor = os.open(self.path, os.O_WRONLY)
        try:
            # Not before: the error of a write back is reported to the descriptor that is open, and synced.
            _write_all(self._descriptor, memoryview(self._header), 0)
            self._direct = _open_direct(self.path)
        except OSError:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def index_json(index: Mapping[str, Any], outputs: Sequence[OutputTensor]) -> bytes:
    """model.safetensors.index.json of OUT: the base's, with OUT's keys; total_size is in bytes."""
    weight_map = {output.key: output.shard for output in outputs}
    ordered = {key: weight_map[key] for key in index["weight_map"]}
    ordered.update(weight_map)
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(output.nbytes for output in outputs)
    return jsonfile.dump({**index, "metadata": metadata, "weight_map": ordered})


def edited_json(content: bytes, edits: Mapping[str, Any]) -> bytes:
    """A JSON file with some values changed, by dotted path; the same bytes when there are no edits."""
    if not edits:
        return content
    value = json.loads(content)
    for path, new in edits.items():
        *parents, last = path.split(".")
        place = value
        for parent in parents:
            place = place[parent]
        place[last] = new
    return jsonfile.dump(value)


def _layout(
    outputs: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header, each tensor's start in the file, and the file's size, in bytes.

    Tensors of whole pages come first and start on a page; the others follow, wide dtypes first, as
    safetensors' own writer has them, so that each starts at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for output in sorted(outputs, key=_place):
        end = position + output.nbytes
        header[output.key] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    start = 8 + len(text)
    starts = {output.key: start + header[output.key]["data_offsets"][0] for output in outputs}
    return len(text).to_bytes(8, "little") + text, starts, start + position


def _place(output: OutputTensor) -> tuple[bool, int]:
    count = max(math.prod(output.shape), 1)
    return output.nbytes % _PAGE != 0, -(output.nbytes // count)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Blocks for a new file; where macOS or the file system cannot, its size alone."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        else:
            return
    os.ftruncate(descriptor, nbytes)


def _open_direct(path: Path) -> int:
    """A second descriptor that writes past the page cache, or _CLOSED where file system or macOS cannot."""
    if not hasattr(os, "O_DIRECT"):
        return _CLOSED
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _CLOSED


def _write_direct(descriptor: int, view: memoryview, position: int) -> int:
    """The bytes written: none where the file system wants another alignment than a page's."""
    try:
        return os.pwrite(descriptor, view, position)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written


def _remove(path: Path) -> None:
    """Removes a directory with what it holds, or a file; a link itself, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _last_config(path: Path) -> tuple[int, str]:
    order = {INDEX: 1, CONFIG: 2}
    return order.get(path.name, 0), path.name


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
