"""What every driver is: a merge function, as a command or as a server.

    python DRIVER.py BASE ADAPTER OUT     merges once
    python DRIVER.py --serve              a line of JSON for each merge; see loudmerge.conformance.server

Nothing of loudmerge is imported: a driver runs in the environment of the tool it drives.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

Merge = Callable[[str, str, str], None]


def main(tool: str, packages: tuple[str, ...], merge: Merge, answers: TextIO | None = None) -> int:
    """Runs what the arguments ask for; gives the exit code. answers: `standard_output()`, if taken before."""
    if sys.argv[1:] == ["--serve"]:
        return serve(tool, packages, merge, answers or standard_output())
    if len(sys.argv) != 4:
        sys.stderr.write(f"usage: {sys.argv[0]} BASE ADAPTER OUT | --serve\n")
        return 2
    merge(*sys.argv[1:])
    return 0


def standard_output() -> TextIO:
    """Standard output for the answers alone: what libraries print there goes to standard error from now
    on.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(tool: str, packages: tuple[str, ...], merge: Merge, answers: TextIO) -> int:
    """Says what it is, then answers each line."""
    answers.write(json.dumps({"tool": tool, "versions": {name: version(name) for name in packages}}) + "\n")
    for line in sys.stdin:
        code = apart(json.loads(line), merge)
        answers.write(json.dumps({"code": code}) + "\n")
    return 0


def apart(given: dict[str, Any], merge: Merge) -> int:
    """One merge in a process of its own; its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        with Path(given["output"]).open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(attempt(given, merge))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def attempt(given: dict[str, Any], merge: Merge) -> int:
    """The exit code that Python would give: whatever is raised ends the process."""
    code = 0
    try:
        merge(given["base"], given["adapter"], given["out"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the end of a process: the traceback is printed, as Python does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
