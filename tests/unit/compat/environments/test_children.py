"""A command ends with all that it started: after its time, and when the run is interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loudmerge.compat.environments.children import Children, Interrupted

GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
open("pid", "w").write(str(child.pid))
time.sleep({seconds})
"""


MAIN = """
import os, runpy, signal, sys
signal.signal(signal.SIGHUP, {hangup})
sys.argv[1:] = ["--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
finally:
    taken = [callable(signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGHUP)]
    print(taken, file=sys.stderr)
"""


def command(seconds: float) -> list[str]:
    """Starts a process that sleeps on, and is done after so many seconds."""
    return [sys.executable, "-c", GRANDCHILD.format(seconds=seconds)]


def is_alive(pid: int) -> bool:
    """Whether it runs: a killed one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(directory: Path) -> bool:
    """Whether the process that the command started ends."""
    pid = int((directory / "pid").read_text("utf-8"))
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks Linux what runs")


def test_what_a_command_says_is_captured_or_logged(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; print('out'); sys.exit(3)"]
    with Children() as children, (tmp_path / "log").open("w+", encoding="utf-8") as log:
        done = children.run(line, seconds=60, cwd=tmp_path, env=os.environ)
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "")
        assert children.run(line, seconds=60, cwd=tmp_path, env=os.environ, log=log).returncode == 3
        log.seek(0)
        assert log.read() == "out\n"


@pytest.mark.parametrize("seconds", [0, 60])
def test_what_a_command_started_ends_with_it(tmp_path: Path, seconds: int) -> None:
    """Whether it came to its end or was given no more time."""
    with Children() as children, (tmp_path / "log").open("w", encoding="utf-8") as log:
        if seconds:
            with pytest.raises(subprocess.TimeoutExpired):
                children.run(command(seconds), seconds=3, cwd=tmp_path, env=os.environ, log=log)
        else:
            children.run(command(seconds), seconds=60, cwd=tmp_path, env=os.environ, log=log)
        assert ends(tmp_path)


def test_what_runs_when_the_block_ends_is_killed_and_no_more_is_started(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with Children() as children:
            running = pool.submit(children.run, command(60), seconds=60, cwd=tmp_path, env=os.environ)
            while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text("utf-8"):
                time.sleep(0.05)
        with pytest.raises(Interrupted):
            running.result()
    assert ends(tmp_path)
    with pytest.raises(Interrupted):
        children.run(command(0), seconds=60, cwd=tmp_path, env=os.environ)


@pytest.mark.parametrize("module", ["loudmerge.compat.__main__", "loudmerge.compat.bisect"])
@pytest.mark.parametrize(("hangup", "taken"), [("signal.SIG_DFL", True), ("signal.SIG_IGN", False)])
def test_the_commands_end_with_what_they_started_when_they_are_told_to(
    module: str, hangup: str, taken: bool
) -> None:
    """By SIGTERM, and SIGHUP but where nohup has it ignored."""
    code = MAIN.format(module=module, hangup=hangup)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str([True, taken])
