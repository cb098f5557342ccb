"""One run at a time in a checkout: all of them make and use the same environments. Standard library only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loudmerge.errors import EnvironmentFailed

LOCK = "lock"


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """For the time of the block, nobody else runs in `home`: the system lets go of its lock however it ends.

    The commands that Children runs have it, too: one that outlives a run that was killed goes on in `home`.
    Raises EnvironmentFailed where somebody does.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = f"{home}: a run of the matrix, or a bisection, is in this checkout"
            left = "or what one that was killed had started"
            raise EnvironmentFailed(f"{said}, {left}. Wait for its end, or use another one.") from error
        os.set_inheritable(file.fileno(), True)
        yield
