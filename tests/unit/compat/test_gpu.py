"""The command of the GPU's lane, as far as no model is needed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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


SLOW = """
import runpy, sys, time
from pathlib import Path
from loudmerge.compat.inside import journey, weights

def write(directory, *_):
    directory.mkdir()
    (directory / "config.json").write_text("{}")

def run(*_, **__):
    print("up", flush=True)
    time.sleep(60)

weights.write_random, journey.run = write, run
runpy.run_module("loudmerge.compat.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_folder_and_a_row_that_says_so(
    tmp_path: Path, sent: signal.Signals
) -> None:
    """129 GB: of a workflow that took too long, say, on a runner whose disk stays."""
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    options = ["--layers=1", "--device=cpu", f"--directory={scratch}", f"--results={results}"]
    command = [sys.executable, "-c", SLOW, *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        assert len(list(scratch.glob("gpu-*/base"))) == 1
        running.send_signal(sent)
        assert running.wait(60) != 0
    assert list(scratch.iterdir()) == []
    (file,) = results.iterdir()
    assert json.loads(file.read_text("utf-8"))["detail"] == "the run did not end: its log says why"


def test_a_model_has_a_layer_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--layers", "0"])
    assert "found 0, expected a number from 1 on" in capsys.readouterr().err
