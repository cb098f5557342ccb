"""Debian's chromium without a window: what a page looks like, and where its elements lie."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.unit.compat import png

NAMES = ("chromium", "chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--force-color-profile=srgb"),
    "--force-device-scale-factor=1",
    # The frame's page is a file, which may look into another file only so.
    "--allow-file-access-from-files",
)


@dataclass(frozen=True)
class Browser:
    """command: chromium's. directory: where its profile and the frames are written."""

    command: str
    directory: Path

    def picture(self, page: Path, width: int, height: int, *, dark: bool) -> png.Picture:
        """The page's top in a viewport of this size."""
        file = self.directory / f"{page.stem}-{width}-{dark}.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        frame = self._frame([(page, width)], height, "")
        self._run(scheme, f"--window-size={width},{height}", f"--screenshot={file}", frame.as_uri())
        return png.read(file)

    def measure(self, frames: Sequence[tuple[Path, int]], script: str, height: int = 800) -> list[Any]:
        """What the script, a function of a page's document, returns for each page at its width."""
        frame = self._frame(frames, height, script)
        dom = self._run("--window-size=1280,800", "--dump-dom", frame.as_uri())
        found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom
        measured = json.loads(html.unescape(found[1]))
        assert isinstance(measured, list)
        return measured

    def _frame(self, frames: Sequence[tuple[Path, int]], height: int, script: str) -> Path:
        """A page of pages: chromium's own window cannot be as narrow as a phone's."""
        parts = [
            "<!doctype html><meta charset=utf-8><style>body{margin:0}iframe{border:0;display:block}</style>"
        ]
        parts += [
            f'<iframe src="{page.as_uri()}" width={width} height={height}></iframe>' for page, width in frames
        ]
        if script:
            parts.append(
                '<pre id="measured"></pre><script>onload = () => {'
                "const found = [...document.querySelectorAll('iframe')].map(frame => "
                f"({script})(frame.contentDocument));"
                "document.getElementById('measured').textContent = JSON.stringify(found);}</script>"
            )
        file = self.directory / "frame.html"
        file.write_text("\n".join(parts), "utf-8")
        return file

    def _run(self, *arguments: str) -> str:
        command = [self.command, *FLAGS, f"--user-data-dir={self.directory / 'profile'}", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


def find(directory: Path) -> Browser:
    """LOUDMERGE_CHROMIUM's or the one on PATH; skips the test where there is none."""
    chosen = os.environ.get("LOUDMERGE_CHROMIUM")
    found = [path for name in ([chosen] if chosen else NAMES) if (path := shutil.which(name))]
    if chosen and not found:
        pytest.fail(f"LOUDMERGE_CHROMIUM: found no command {chosen}")
    if not found:
        pytest.skip("no chromium on PATH: apt-get install chromium, or set LOUDMERGE_CHROMIUM")
    return Browser(found[0], directory)
