"""A run that is ended leaves no row of an earlier one that would pass for its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loudmerge
from loudmerge.compat.inside.cell import source
from loudmerge.compat.judging.cells import Matrix
from loudmerge.compat.judging.result import FAILED, NOT_RUN, CellResult, Tests
from loudmerge.compat.running import runner
from tests.unit.compat import checkout
from tests.unit.compat.environments.test_children import is_alive
from tests.unit.compat.local_index import ask
from tests.unit.compat.made import EXPECT, VERSIONS, cell, result

ONE, TWO = cell("one"), cell("two", versions={**VERSIONS, "peft": "0.18.1"})

TOML = f"""{EXPECT}
[lanes]
released = [
    {{ name = "one", transformers = "5.5.0", peft = "0.19.1", trl = "0.25.1", path = "per-expert" }},
    {{ name = "two", transformers = "5.5.0", peft = "0.18.1", trl = "0.25.1", path = "per-expert" }},
]
latest = [{{ name = "latest", path = "per-expert" }}]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return checkout.make(tmp_path, monkeypatch)


SLOW = """
import os, pathlib, time

def test_slow():
    pathlib.Path(os.environ["CELL"]).write_text(str(os.getpid()))
    time.sleep(60 if os.environ["CELL"] == "two" else 0)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_row_is_written_when_its_last_part_has_run(root: Path, sent: signal.Signals) -> None:
    """And not before: what an earlier run left says nothing of this one, whoever ends it in between.

    A part that runs is ended.
    """
    (root / "tests" / "unit" / "test_tiny.py").write_text(SLOW, "utf-8")
    (root / "matrix.toml").write_text(TOML, "utf-8")
    results = checkout.options(root, ()).results
    results.mkdir(parents=True)
    for each in (ONE, TWO):
        checkout.in_place(root, each)
        python = checkout.options(root, ()).environment(each.name).python
        python.write_text(python.read_text("utf-8").replace("PYTHONPATH", f"CELL={each.name} PYTHONPATH"))
        row = result(cell=each.name, versions={**each.versions, "torch": "2.13.0"}, source=source(root))
        (results / f"{each.name}.json").write_text(json.dumps(row.to_json()), "utf-8")
    environ = {**os.environ, "PYTHONPATH": str(Path(loudmerge.__file__).parents[1])}
    command = [sys.executable, "-m", "loudmerge.compat", "-j", "2", "--parts", "tests"]
    with subprocess.Popen(command, cwd=root, env=environ, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("one: tests done"):
                break
        until = time.monotonic() + 30
        while time.monotonic() < until and (
            rows_of(results)["one"].status == NOT_RUN or not (root / "two").is_file()
        ):
            time.sleep(0.05)
        running.send_signal(sent)
        running.stderr.read()
        assert running.wait(60) != 0
    assert not is_alive(int((root / "two").read_text("utf-8")))
    found = rows_of(results)
    assert (found["one"].status, found["one"].tests) == (FAILED, Tests(1, 0, 0))
    assert (found["two"].status, found["two"].detail) == (
        NOT_RUN,
        "asked for, and the run has not come to its end",
    )
    assert not (checkout.options(root, ()).directory("two") / "tests.json").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["one", "latest"])
def test_an_installer_ends_with_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, sent: signal.Signals
) -> None:
    """One that fills an environment, or says what is newest, of an index that does not answer.

    The environment is none that counts, and nothing of what was unpacked is left.
    """
    (root / "matrix.toml").write_text(TOML, "utf-8")
    scratch = root / "scratch"
    scratch.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        ask(monkeypatch, f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        source = str(Path(loudmerge.__file__).parents[1])
        environ = {**os.environ, "PYTHONPATH": source, "TMPDIR": str(scratch), "PIP_RETRIES": "0"}
        environ["PIP_DEFAULT_TIMEOUT"] = "40"
        command = [sys.executable, "-m", "loudmerge.compat", name, "--parts", "tests"]
        with subprocess.Popen(command, cwd=root, env=environ, stderr=subprocess.DEVNULL) as running:
            pip, _ = index.accept()
            with pip:
                running.send_signal(sent)
                assert running.wait(20) != 0
                pip.settimeout(20)
                while pip.recv(1 << 16):
                    """What it asked for; then it is gone."""
    options = checkout.options(root, ())
    assert list(scratch.iterdir()) == []
    assert options.environment(name).stamped() == {}
    assert rows_of(options.results)[name].status == NOT_RUN


def rows_of(results: Path) -> dict[str, CellResult]:
    documents = [json.loads(file.read_text("utf-8")) for file in results.glob("[!.]*.json")]
    return {document["cell"]: CellResult.from_json(document) for document in documents}


@pytest.mark.parametrize("stage", ["_resolve", "_prepare"])
def test_a_run_that_ends_before_a_cell_has_run_leaves_no_earlier_row(
    root: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of no cell that was asked for; once it is known, nor of the one that runs for it."""
    options = checkout.options(root, ("tests",))
    for name in ("one", "two", "latest"):
        row = result(cell=name, versions={**VERSIONS, "torch": "2.13.0"}, source=source(root))
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{name}.json").write_text(json.dumps(row.to_json()), "utf-8")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, stage, interrupt)
    matrix = Matrix((ONE, TWO, cell("latest", lane="latest", versions={})))
    with pytest.raises(KeyboardInterrupt):
        runner.run(matrix, ["latest"], options, lambda _: None)
    ended = {name for name, row in rows_of(options.results).items() if row.status == NOT_RUN}
    assert ended == ({"latest"} if stage == "_resolve" else {"latest", "one"})
