"""Wheels of what is installed here, made from its files: pip can install them elsewhere without an index."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import loudmerge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).parents[3]
PURE = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def project() -> dict[str, Any]:
    """The `[project]` of this checkout's pyproject.toml."""
    text = CHECKOUT.joinpath("pyproject.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)["project"]
    return found


def wanted(extra: str) -> list[Requirement]:
    """What loudmerge with this extra needs here."""
    found = [*project()["dependencies"], *project()["optional-dependencies"][extra]]
    return [need for need in map(Requirement, found) if need.marker is None or need.marker.evaluate()]


def closure(needs: Sequence[Requirement]) -> Iterator[str]:
    """The names of all that is needed, each once."""
    todo, seen = [need.name for need in needs], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        yield name
        further = [Requirement(text) for text in metadata.requires(name) or ()]
        todo += [one.name for one in further if one.marker is None or one.marker.evaluate({"extra": ""})]


def repack(name: str, house: Path) -> None:
    """A wheel of an installed distribution."""
    found = metadata.distribution(name)
    files = [file for file in found.files or () if ".." not in file.parts and "__pycache__" not in file.parts]
    info = {name: found.read_text(name) or "" for name in ("METADATA", "WHEEL")}
    code = {file.as_posix(): file.read_binary() for file in files if ".dist-info" not in file.parts[0]}
    tags = [line.partition(": ")[2] for line in info["WHEEL"].splitlines() if line.startswith("Tag: ")]
    stem = f"{canonicalize_name(name).replace('-', '_')}-{found.version}"
    _write(house, stem, code, info, _together(tags))


def _together(tags: Sequence[str]) -> str:
    """Tags as a wheel's file name has them: `py2-none-any` and `py3-none-any` are `py2.py3-none-any`."""
    parts = zip(*(tag.split("-") for tag in tags), strict=True)
    return "-".join(".".join(dict.fromkeys(part)) for part in parts)


def own(house: Path) -> Path:
    """A wheel of this checkout's loudmerge, with the metadata of its pyproject.toml."""
    package = CHECKOUT / "src" / "loudmerge"
    files = {
        f"loudmerge/{file.relative_to(package).as_posix()}": file.read_bytes()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    lines = ["Metadata-Version: 2.1", "Name: loudmerge", f"Version: {loudmerge.__version__}"]
    lines += [f"Requires-Dist: {need}" for need in project()["dependencies"]]
    for extra, needs in project()["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for need in map(Requirement, needs):
            marker = f'({need.marker}) and extra == "{extra}"' if need.marker else f'extra == "{extra}"'
            need.marker = None
            lines.append(f"Requires-Dist: {need} ; {marker}")
    info = {"METADATA": "\n".join(lines) + "\n", "WHEEL": PURE}
    return _write(house, f"loudmerge-{loudmerge.__version__}", files, info, "py3-none-any")


def _write(house: Path, stem: str, files: Mapping[str, bytes], info: Mapping[str, str], tag: str) -> Path:
    house.mkdir(parents=True, exist_ok=True)
    content = dict(files) | {f"{stem}.dist-info/{name}": text.encode() for name, text in info.items()}
    wheel = house / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr(f"{stem}.dist-info/RECORD", _record(content, stem))
    return wheel


def _record(content: Mapping[str, bytes], stem: str) -> str:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    for name, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(data)])
    rows.writerow([f"{stem}.dist-info/RECORD", "", ""])
    return buffer.getvalue()
