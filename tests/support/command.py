"""The command line, run to its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loudmerge import cli


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)


def run_inside(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ended:
    """Runs the command in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return Ended(int(end.value.code or 0), *capsys.readouterr())


def run_apart(*arguments: str | Path, before: Callable[[], None] | None = None, **options: Any) -> Ended:
    """Runs the command in a process of its own. before: called in it first. options: subprocess.run's."""
    command = [sys.executable, "-m", "loudmerge", *(str(argument) for argument in arguments)]
    done = subprocess.run(
        command,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=before,
        **options,
    )
    return Ended(done.returncode, done.stdout or "", done.stderr)
