"""Tools that start once: the shipped drivers' own frame, with a small merge in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loudmerge.conformance.cases import Suite
from loudmerge.conformance.runner import run, run_all
from loudmerge.conformance.server import Served, ServerError

DRIVERS = Path(__file__).parents[3] / "conformance" / "drivers"

DRIVER = f"""
import os, shutil, sys, time
sys.path.insert(0, {str(DRIVERS)!r})
import _driver
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file


def merge(base, adapter, out):
    print("merging")
    held = load_file(Path(base) / "model.safetensors")
    lora = load_file(Path(adapter) / "adapter_model.safetensors")
    if not np.isfinite(lora["q_proj.lora_A"]).all():
        raise ValueError("NaN in lora_A")
    if "SLEEP" in os.environ and not Path(os.environ["SLEEP"]).exists():
        Path(os.environ["SLEEP"]).touch()
        time.sleep(600)
    held["model.q_proj.weight"] += 2 * lora["q_proj.lora_B"] @ lora["q_proj.lora_A"]
    if "DIE" in os.environ and not Path(os.environ["DIE"]).exists():
        Path(os.environ["DIE"]).touch()
        os.kill(os.getppid(), 9)
        time.sleep(600)
    Path(out).mkdir()
    save_file(held, Path(out) / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(Path(base) / name, out)

sys.exit(_driver.main("small", ("numpy",), merge))
"""


def line(folder: Path, text: str = DRIVER) -> str:
    script = folder / "driver.py"
    script.write_text(text)
    return shlex.join((sys.executable, str(script), "--serve"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    tool = Served(line(tmp_path))
    yield tool
    tool.close()


def test_one_process_serves_every_case(served: Served, suite: Suite) -> None:
    import numpy as np

    assert (served.tool, served.versions) == ("small", {"numpy": np.__version__})
    verdicts = run_all(suite.cases, served, suite)
    assert [found.verdict for found in verdicts] == ["right", "right", "refused", "right"]
    assert "merging" in verdicts[2].said
    assert "ValueError: NaN in lora_A" in verdicts[2].said


def test_a_case_that_does_not_end_costs_its_time_and_no_other_case(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", str(tmp_path / "slept"))
    tool = Served(line(tmp_path), limit=5)
    try:
        assert [run(suite.cases[0], tool).verdict for _ in range(2)] == ["timed-out", "right"]
    finally:
        tool.close()


def test_a_tool_that_ends_in_a_case_fails_that_case_and_no_other(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE", str(tmp_path / "died"))
    tool = Served(line(tmp_path))
    try:
        found = [run(suite.cases[0], tool) for _ in range(2)]
    finally:
        tool.close()
    assert [(one.verdict, one.code) for one in found] == [("crashed", -9), ("right", 0)]


HELLO = """print('{"tool": "t", "versions": {}}', flush=True)"""


def test_a_tool_that_ends_between_cases_with_0_did_not_merge(suite: Suite, tmp_path: Path) -> None:
    tool = Served(line(tmp_path, HELLO))
    try:
        found = run(suite.cases[0], tool)
    finally:
        tool.close()
    assert (found.verdict, found.code) == ("crashed", 1)


def test_an_answer_without_a_code_is_an_error(suite: Suite, tmp_path: Path) -> None:
    tool = Served(line(tmp_path, f"{HELLO}; input(); print('{{}}', flush=True); input()"))
    try:
        with pytest.raises(ServerError, match=r"answered {}, expected {"):
            run(suite.cases[0], tool)
    finally:
        tool.close()


@pytest.mark.parametrize("said", ["{}", "[1]", '{"tool": 1, "versions": {}}', '{"tool": "t", "versions": 3}'])
def test_a_tool_that_does_not_say_what_it_is_is_an_error(said: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="expected"):
        Served(line(tmp_path, f"print({said!r}, flush=True); input()"))


def test_a_tool_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"ended with exit code 3"):
        Served(line(tmp_path, "import sys; sys.exit(3)"))


def test_a_tool_that_says_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"wrote b'hello', expected a JSON line"):
        Served(line(tmp_path, "print('hello', flush=True); input()"))
