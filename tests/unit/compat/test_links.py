"""Environments share what is the same in them, and stay apart where they differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loudmerge.compat import links

LARGE = os.urandom(links.LEAST_BYTES)
OTHER = LARGE[:-1] + bytes([LARGE[-1] ^ 1])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    contents = {
        "same.so": (LARGE, LARGE),
        "other.so": (LARGE, OTHER),
        "small.py": (b"x", b"x"),
        "own.so": (LARGE,),
    }
    for number, name in enumerate(("one", "two")):
        for file, versions in contents.items():
            place = tmp_path / name / "lib" / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if number < len(versions):
                place.write_bytes(versions[number])
    return tmp_path / "one" / "lib", tmp_path / "two" / "lib"


def test_a_large_file_with_the_same_bytes_is_kept_once(two: tuple[Path, Path]) -> None:
    first, second = two
    links.main([str(second), str(second), str(first), str(first.parent / "missing")])
    assert (second / "same.so").samefile(first / "same.so")
    assert (second / "same.so").read_bytes() == LARGE
    assert links.share(second, [first]) == 0, "once is enough"


def test_what_differs_is_small_or_a_link_stays(two: tuple[Path, Path]) -> None:
    first, second = two
    (second / "link.so").symlink_to("other.so")
    (first / "link.so").write_bytes(OTHER)
    assert links.share(second, [first]) == len(LARGE)
    assert (second / "other.so").read_bytes() == OTHER
    assert (second / "link.so").is_symlink()
    assert not (second / "small.py").samefile(first / "small.py")
    assert sorted(file.name for file in second.iterdir()) == ["link.so", "other.so", "same.so", "small.py"]


def test_source_is_not_shared(two: tuple[Path, Path]) -> None:
    """Its compiled file names its time: with another's time it would be compiled at every import."""
    for lib in two:
        (lib / "large.py").write_bytes(LARGE)
    first, second = two
    assert links.share(second, [first]) == len(LARGE)
    assert not (second / "large.py").samefile(first / "large.py")


def test_a_file_that_may_be_run_is_not_one_that_may_not(two: tuple[Path, Path]) -> None:
    first, second = two
    (second / "same.so").chmod(0o755)
    assert links.share(second, [first]) == 0


def test_replacing_a_shared_file_leaves_the_other_as_it_was(two: tuple[Path, Path]) -> None:
    """As pip does it: the file is removed, and another written."""
    first, second = two
    links.share(second, [first])
    (second / "same.so").unlink()
    (second / "same.so").write_bytes(OTHER)
    assert (first / "same.so").read_bytes() == LARGE


def test_a_file_system_without_hard_links_leaves_every_file(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    first, second = two
    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(PermissionError):
        links.share(second, [first])
    assert (second / "same.so").read_bytes() == LARGE
