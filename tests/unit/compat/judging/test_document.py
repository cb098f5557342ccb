"""A file is there to its end, as it was, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loudmerge.compat.judging import document


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "one.json"
    assert document.read(file) == {}
    document.write(file, {"é": 1})
    document.write(file, {"é": 2})
    assert document.read(file) == {"é": 2}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_it_is_as_the_umask_has_it(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        document.write(tmp_path / "one.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "one.json").stat().st_mode & 0o777 == mode


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.json"
    document.write(file, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        document.write(file, {"a": 2})
    assert document.read(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", [b"", b'{"a": ', b"[]", b"\xff", b"[" * 100_000])
def test_half_a_document_is_an_error_that_says_so(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "one.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"."):
        document.read(file)
