"""A package index in a directory, with wheels of packages that hold nothing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


@dataclass(frozen=True)
class LocalIndex:
    """pip is pointed at it by `use`."""

    directory: Path

    def offer(
        self, package: str, version: str, *, yanked: bool = False, python: str = "", padding: int = 0
    ) -> None:
        """Publishes a release. python: its Requires-Python. padding: bytes of nothing in its wheel."""
        page = self.directory / "simple" / package / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        wheel = page.with_name(f"{package}-{version}-py3-none-any.whl")
        info = f"{package}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
            archive.writestr(f"{package}.bin", bytes(padding))
        said = (' data-yanked="broken"' if yanked else "") + (
            f' data-requires-python="{python}"' if python else ""
        )
        before = page.read_text("utf-8") if page.exists() else "<!DOCTYPE html>\n"
        page.write_text(f'{before}<a href="{wheel.name}"{said}>{wheel.name}</a>\n', "utf-8")

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes pip ask this index and nothing else."""
        ask(monkeypatch, (self.directory / "simple").as_uri())

    @contextmanager
    def served(self) -> Iterator[str]:
        """The index's address on this machine."""
        handler = partial(_Quiet, directory=str(self.directory))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/simple"
            finally:
                server.shutdown()
                thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Makes pip ask the index at this address and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", url)
