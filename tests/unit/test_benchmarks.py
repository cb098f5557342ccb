"""The benchmarks report no time of what failed, no inputs that are not whole, and today's figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import merge
from benchmarks.packing import calibrate
from benchmarks.rounding import figures

BENCHMARKS = Path(merge.__file__).parent
FIGURES = BENCHMARKS.parent / "docs" / "figures"


def test_a_command_that_fails_has_no_time() -> None:
    with pytest.raises(SystemExit, match="exit code 3, so there is no time to report"):
        merge.timed([sys.executable, "-c", "raise SystemExit(3)"])


def test_inputs_get_their_names_once_they_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used again with --dir: half an adapter would stay one."""

    def full(path: Path, layers: int) -> None:
        raise OSError(f"{path}: no space left for {layers} layers")

    monkeypatch.setattr(merge, "base_shapes", lambda layers: [("model.norm.weight", (layers,))])
    root = tmp_path / "2-layers"
    monkeypatch.setattr(merge, "build_adapter", full)
    with pytest.raises(OSError, match="no space left"):
        merge.build(root, 2)
    assert not root.exists()
    monkeypatch.setattr(merge, "build_adapter", lambda path, _: path.mkdir())
    merge.build(root, 2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "2-layers",
        "adapter",
        "base",
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_inputs_that_cannot_be_built_end_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="the inputs could not be built: exit code 1"):
        merge.build_apart(tmp_path / "file" / "1-layers", 1)


def test_the_figures_of_the_docs_are_what_the_results_give(tmp_path: Path) -> None:
    """`calibrate report` and `figures report` write them: also what today's code says of a confidence."""
    calibrate.draw(list(calibrate.read(BENCHMARKS / "packing" / "results.csv")), tmp_path / "new")
    drawn = {path.name: path.read_text("utf-8") for path in (tmp_path / "new").iterdir()}
    subjects = figures.read(BENCHMARKS / "rounding" / "results.csv")
    drawn["rounding-kl.svg"] = figures.figure(subjects)
    there = {path.name: path.read_text("utf-8") for path in FIGURES.glob("[pr]*.svg")}
    assert len(there) == 4
    assert [name for name, text in sorted(there.items()) if drawn.get(name) != text] == []
