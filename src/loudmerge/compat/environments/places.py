"""Where the runs of a checkout keep what they make. Standard library only.

.compat/env/CELL            its virtual environment
.compat/cells/CELL          what it trained (journey/), and what each part showed (PART.json)
.compat/logs/CELL.txt       what the installer said; CELL-PART.txt: what the part said
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loudmerge.compat.arguments import HOME
from loudmerge.compat.environments.environment import Environment


@dataclass(frozen=True)
class Places:
    """root: the checkout."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / HOME

    def environment(self, cell: str) -> Environment:
        return Environment(self.home / "env" / cell)

    def directory(self, cell: str) -> Path:
        return self.home / "cells" / cell

    def log(self, cell: str, part: str = "") -> Path:
        return self.home / "logs" / (f"{cell}-{part}.txt" if part else f"{cell}.txt")
