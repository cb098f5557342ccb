"""A tiny checkout, and wheels of nothing that the real pip finds where an index's would be."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

import loudmerge
from loudmerge.compat.environments.environment import STAMP, Environment, Installer, Stamp, requirements
from loudmerge.compat.inside.cell import source
from loudmerge.compat.judging.cells import Cell
from loudmerge.compat.running.runner import Options
from tests.unit.compat.made import VERSIONS

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1.0"

[tool.loudmerge.pins]
torch = "torch==2.13.0"
"""
BACKEND = """
import os, zipfile

FILES = {
    "METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\nProvides-Extra: dev\\n",
    "WHEEL": "Wheel-Version: 1.0\\nGenerator: hand\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "RECORD": "",
}

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        for file, text in FILES.items():
            wheel.writestr(f"tiny-1.0.dist-info/{file}", text)
    return name
"""
WHEELS = {"torch": ("2.13.0",), "transformers": ("5.5.0",), "peft": ("0.19.1", "0.18.1"), "trl": ("0.25.1",)}

UNIT_TESTS = """
import pytest

def test_passes(): pass

def test_skips(): pytest.skip("nothing to ask")
"""


HELD = "held"
"""Where an environment of `in_place` says what versions it holds."""


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout's root; pip sees the wheels, and no index."""
    root, wheels = tmp_path / "checkout", tmp_path / "wheels"
    (root / "tests" / "unit").mkdir(parents=True)
    wheels.mkdir()
    (root / "pyproject.toml").write_text(PROJECT, "utf-8")
    (root / "backend.py").write_text(BACKEND, "utf-8")
    (root / "tests" / "unit" / "test_tiny.py").write_text(UNIT_TESTS, "utf-8")
    for name, versions in WHEELS.items():
        for version in versions:
            _wheel(wheels, name, version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return root


def _wheel(directory: Path, name: str, version: str) -> None:
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in texts.items():
            wheel.writestr(f"{name}-{version}.dist-info/{file}", text)
        wheel.writestr(f"tiny_{name}.py", "")


def options(root: Path, parts: Sequence[str]) -> Options:
    return Options(root, root / ".compat" / "results", 2, Installer.of(root, {}), source(root), tuple(parts))


def holds(place: Environment, name: str, version: str) -> None:
    """Has the environment of `in_place` say that it holds this version of a package."""
    for other in place.directory.glob(f"{HELD}/{name}-*"):
        shutil.rmtree(other)
    metadata = place.directory / HELD / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")


def in_place(root: Path, cell: Cell) -> None:
    """Makes an environment of the cell's pins: the Python that runs the tests, with loudmerge."""
    place = options(root, ()).environment(cell.name)
    place.python.parent.mkdir(parents=True)
    source = Path(loudmerge.__file__).parents[1]
    versions = {**VERSIONS, **cell.versions, "torch": "2.13.0"}
    for name, version in versions.items():
        holds(place, name, version)
    path = f"{place.directory / HELD}:{source}"
    place.python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n', "utf-8")
    place.python.chmod(0o755)
    stamp = Stamp.of(root, requirements(cell.versions), Installer.of(root, {}))
    versions["python"] = platform.python_version()
    (place.directory / STAMP).write_text(json.dumps({"stamp": asdict(stamp), "versions": versions}), "utf-8")
