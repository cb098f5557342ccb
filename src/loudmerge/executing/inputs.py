"""The files that a merge reads. They have to stay as they are until it is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loudmerge.errors import MergeRefused, Problem
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import CONFIG
from loudmerge.system.tensorfile import State, state_of


class Inputs:
    """The weights and configs of BASE and ADAPTER, as they are when this is made."""

    def __init__(self, plan: MergePlan) -> None:
        configs = {plan.base.path / CONFIG, plan.adapter.path / ADAPTER_CONFIG}
        self._states = {file: _state(file) for file in sorted(plan.inputs | configs)}

    def refuse_changed(self) -> None:
        """Raises MergeRefused `corrupt-file` where one is another file now, or was written to.

        What was merged then is a part of the old one and a part of the new, which no training has made.
        """
        problems = list(self._changed())
        if problems:
            raise MergeRefused(problems)

    def _changed(self) -> Iterator[Problem]:
        for file, before in self._states.items():
            if _state(file) != before:
                yield Problem(
                    "corrupt-file",
                    str(file),
                    "another file, or another size or time of change, than when the merge began",
                    "a file that stays as it is while it is read",
                    "Something replaced or changed it: merge again once that has ended.",
                )


def _state(file: Path) -> State | None:
    """None where there is no such file."""
    try:
        return state_of(file.stat())
    except FileNotFoundError:
        return None
