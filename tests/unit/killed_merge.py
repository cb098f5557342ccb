"""Merges in child processes that kill themselves at given moments, as each line of stdin orders.

One import of torch serves all orders. Prints, for each moment, what lies in the directory afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loudmerge import verify as _verify  # noqa: F401  (imported once, before the forks)
from loudmerge.merging.merge import merge

COUNTED: dict[str, Any] = {"fsync": os, "rename": Path}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def merge_and_die(root: Path, moment: str, number: int, *, overwrite: bool) -> None:
    """moment: a stage of the progress, or one of COUNTED; number: at which of its calls."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            kill()

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage == moment:
            count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            count()
            return call(*args, **options)

        return wrapper

    if moment in COUNTED:
        setattr(COUNTED[moment], moment, counted(getattr(COUNTED[moment], moment)))
    merge(root / "base", root / "adapter", root / "out", threads=2, overwrite=overwrite, progress=progress)


def look(root: Path) -> dict[str, Any]:
    """Every directory but the inputs that a loader would take for a checkpoint, with its files' sizes."""
    found = {}
    for config in sorted(root.rglob("config.json")):
        folder = config.parent
        if folder not in (root / "base", root / "adapter") and list(folder.glob("*.safetensors")):
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            found[str(folder.relative_to(root))] = sizes
    return found


def run(root: Path, moments: list[str], *, overwrite: bool) -> dict[str, Any]:
    found = {}
    for text in moments:
        moment, number = text.split(":")
        copy = root / text.replace(":", "-")
        copy.mkdir()
        for name in ("base", "adapter", *(["out"] if overwrite else [])):
            shutil.copytree(root / name, copy / name)
        child = os.fork()
        if child == 0:
            try:
                merge_and_die(copy, moment, int(number), overwrite=overwrite)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        found[text] = {"killed": os.WIFSIGNALED(status), "looks": look(copy)}
    return found


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        # Ends this process, should a merge hang.
        signal.alarm(120)
        found = run(Path(order["root"]), order["moments"], overwrite=order["overwrite"])
        signal.alarm(0)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
