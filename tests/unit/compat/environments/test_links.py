"""Environments share what is the same in them, and stay apart where they differ."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from loudmerge.compat.environments import links

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


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
RECORD = """\
pkg/__init__.py,sha256=x,1
pkg/large.so,,
pkg/data.txt,,
pkg-1.0.dist-info/METADATA,,
pkg-1.0.dist-info/RECORD,,
../../../bin/pkg,,
"""


def site(environment: Path) -> Path:
    return environment / "lib" / f"python{VERSION}" / "site-packages"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """An environment with one package, as pip leaves it; its files are an hour old."""
    environment = tmp_path / "installed"
    files = {
        "pkg/__init__.py": b"NAME = __file__\n" + b"#" * links.LEAST_BYTES,
        "pkg/large.so": LARGE,
        "pkg/data.txt": b"x",
        "pkg-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: pkg\nVersion: 1.0+cpu\n",
        "pkg-1.0.dist-info/RECORD": RECORD.encode(),
        "../../../bin/pkg": f"#!{environment}/bin/python\nimport pkg\n".encode(),
    }
    for name, content in files.items():
        place = site(environment) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        os.utime(place, (place.stat().st_mtime - 3600,) * 2)
    (environment / "bin" / "pkg").chmod(0o755)
    return environment


def test_a_new_environment_is_seeded_with_what_another_has(installed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert links.seed(new, [tmp_path / "missing", installed], ["pkg==1.0", "other==1", "pkg @ url"]) == {
        "pkg": installed
    }
    assert (site(new) / "pkg" / "large.so").samefile(site(installed) / "pkg" / "large.so")
    for name in ("pkg/__init__.py", "pkg/data.txt", "pkg-1.0.dist-info/METADATA"):
        ours, theirs = site(new) / name, site(installed) / name
        assert ours.read_bytes() == theirs.read_bytes()
        assert not ours.samefile(theirs), "small files and source are edited now and then"
    script = new / "bin" / "pkg"
    assert script.read_text() == f"#!{new}/bin/python\nimport pkg\n"
    assert os.access(script, os.X_OK)
    (found,) = metadata.distributions(name="pkg", path=[str(site(new))])
    assert found.version == "1.0+cpu"


def test_another_version_or_one_that_is_not_whole_is_no_seed(installed: Path, tmp_path: Path) -> None:
    assert links.seed(tmp_path / "new", [installed], ["pkg==1.0.1"]) == {}
    (site(installed) / "pkg" / "data.txt").unlink()
    assert links.seed(tmp_path / "new", [installed], ["pkg==1.0"]) == {}
    assert not (tmp_path / "new").exists()


def test_an_environment_that_has_it_is_left_as_it_is(installed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    links.main([str(new), str(installed), str(new), "pkg==1.0"])
    (site(new) / "pkg" / "data.txt").write_bytes(b"mine")
    links.main([str(new), str(installed), str(new), "pkg==1.0"])
    assert (site(new) / "pkg" / "data.txt").read_bytes() == b"mine"


def test_a_record_that_leads_out_of_its_environment_is_no_seed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    record = site(installed) / "pkg-1.0.dist-info" / "RECORD"
    record.write_text(f"{RECORD}../../../../outside,,\n")
    assert links.seed(tmp_path / "new", [installed], ["pkg==1.0"]) == {}
    assert (tmp_path / "outside").read_bytes() == b"x"


def test_what_is_left_of_an_earlier_try_is_replaced_not_written_into(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(OTHER)
    left = site(tmp_path / "new") / "pkg" / "data.txt"
    left.parent.mkdir(parents=True)
    os.link(tmp_path / "shared", left)
    links.seed(tmp_path / "new", [installed], ["pkg==1.0"])
    assert left.read_bytes() == b"x"
    assert (tmp_path / "shared").read_bytes() == OTHER


def test_seeds_are_copies_where_there_are_no_hard_links(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    links.seed(tmp_path / "new", [installed], ["pkg==1.0"])
    ours = site(tmp_path / "new") / "pkg" / "large.so"
    assert ours.read_bytes() == LARGE
    assert not ours.samefile(site(installed) / "pkg" / "large.so")


def test_python_takes_what_another_environment_compiled(installed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    seeded = links.seed(new, [installed], ["pkg==1.0"])
    assert links.share_bytecode(new, seeded) == 0, "nothing is compiled yet"
    source = site(installed) / "pkg" / "__init__.py"
    made = Path(py_compile.compile(str(source)) or "")
    assert links.share_bytecode(new, seeded) == 1
    ours = Path(importlib.util.cache_from_source(str(site(new) / "pkg" / "__init__.py")))
    assert ours.samefile(made)
    command = [sys.executable, "-v", "-c", "import pkg; print(pkg.NAME)"]
    environ = {"PYTHONPATH": str(site(new))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert f"matches {site(new) / 'pkg' / '__init__.py'}" in done.stderr
    assert done.stdout.strip() == str(site(new) / "pkg" / "__init__.py")


def test_two_threads_may_take_the_same_bytecode(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one cell begin together: each finds that a file is not there yet."""
    new = tmp_path / "new"
    seeded = links.seed(new, [installed], ["pkg==1.0"])
    made = Path(py_compile.compile(str(site(installed) / "pkg" / "__init__.py")) or "")
    content = made.read_bytes()
    assert links.share_bytecode(new, seeded) == 1
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert links.share_bytecode(new, seeded) == 1
    folder = site(new) / "pkg" / "__pycache__"
    assert [file.read_bytes() for file in folder.iterdir()] == [content]


def test_what_was_compiled_of_other_source_is_not_taken(installed: Path, tmp_path: Path) -> None:
    seeded = links.seed(tmp_path / "new", [installed], ["pkg==1.0"])
    source = site(installed) / "pkg" / "__init__.py"
    source.write_bytes(source.read_bytes() + b"#")
    py_compile.compile(str(source))
    assert links.share_bytecode(tmp_path / "new", seeded) == 0
