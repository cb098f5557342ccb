"""What is kept of an update."""

from __future__ import annotations

from dataclasses import dataclass

Sums = tuple[float, float]
"""<W' - W, dW> and <dW, dW>."""


@dataclass
class Kept:
    """Sums for delta_kept: <W' - W, dW> and <dW, dW> over what was merged."""

    along: float = 0.0
    total: float = 0.0

    def add(self, other: Kept) -> None:
        self.along += other.along
        self.total += other.total

    @property
    def ratio(self) -> float:
        """1 where the file holds the whole update, 0 where rounding swallowed it; 1 for no update at all."""
        return self.along / self.total if self.total else 1.0
