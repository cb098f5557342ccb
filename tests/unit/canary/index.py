"""A package index on the local server, with wheels and sdists of a small package."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass

import pytest

from tests.support.upstream_server import UpstreamServer, tarball
from tests.unit.canary.world import PATH

PACKAGE = "zoo-pkg"

# A backend inside the sdist, which needs nothing: pip asks it for the metadata.
BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(directory, settings=None):
    place = pathlib.Path(directory, "zoo_pkg-{version}.dist-info")
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\\nName: zoo-pkg\\nVersion: {version}\\n")
    return place.name

def build_wheel(*arguments, **options):
    raise RuntimeError("nothing is to be built")
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@dataclass(frozen=True)
class Index:
    """The index. `offer_*` publish a release whose PATH holds `text`."""

    server: UpstreamServer

    @property
    def url(self) -> str:
        return f"{self.server.url}/files/simple"

    def offer_wheel(self, version: str, text: str, path: str = PATH, *, yanked: bool = False) -> None:
        buffer = io.BytesIO()
        info = f"zoo_pkg-{version}.dist-info"
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(path, text)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        self.offer(f"zoo_pkg-{version}-py3-none-any.whl", buffer.getvalue(), yanked=yanked)

    def offer_sdist(self, version: str, files: dict[str, str]) -> None:
        metadata = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n"
        backend = BACKEND.replace("{version}", version)
        tree = {"PKG-INFO": metadata, "pyproject.toml": PROJECT, "backend.py": backend, **files}
        content = tarball({f"zoo_pkg-{version}/{path}": text for path, text in tree.items()})
        self.offer(f"zoo_pkg-{version}.tar.gz", content)

    def offer(self, name: str, content: bytes, *, yanked: bool = False) -> None:
        """Publishes a file, and puts it on the package's page with its hash."""
        self.server.files[f"archives/{name}"] = content
        digest = hashlib.sha256(content).hexdigest()
        page = self.server.files.get(f"simple/{PACKAGE}/", b"<!DOCTYPE html>\n")
        mark = ' data-yanked="broken"' if yanked else ""
        link = f'<a href="/files/archives/{name}#sha256={digest}"{mark}>{name}</a>\n'
        self.server.files[f"simple/{PACKAGE}/"] = page + link.encode()

    def downloads(self) -> list[str]:
        """The archives that were asked for, in order."""
        return [path.rpartition("/")[2] for path in self.server.paths() if "/archives/" in path]


def use_index(monkeypatch: pytest.MonkeyPatch, server: UpstreamServer) -> Index:
    """Makes pip ask this index and nothing else."""
    index = Index(server)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    return index
