"""The command of the GPU's lane, as far as no model is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loudmerge.compat import gpu
from tests.unit.compat.made import result


def test_the_row_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run leaves is the row that was there."""
    file = tmp_path / "results" / "one.json"
    said = gpu._leave(file.parent, result())
    assert said == file.read_text("utf-8")
    assert json.loads(said) == result().to_json()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        gpu._leave(file.parent, result(seconds=1.0))
    assert file.read_text("utf-8") == said


def test_a_model_has_a_layer_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--layers", "0"])
    assert "found 0, expected at least 1" in capsys.readouterr().err
