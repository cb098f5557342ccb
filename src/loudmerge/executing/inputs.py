"""The files that a merge reads. They have to stay as they are until it is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loudmerge.errors import MergeRefused, Problem
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.adapter_config import AUTOMODEL, WEIGHTS
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import CONFIG, walk
from loudmerge.system.tensorfile import State, state_of


class Inputs:
    """The files of BASE and ADAPTER, as they are when this is made: before the first of them is read.

    Raises OSError for a folder of BASE that cannot be read.
    """

    def __init__(self, base: Path, adapter: Path) -> None:
        files = [*walk(base)] if base.is_dir() else []
        files += [adapter / name for name in (ADAPTER_CONFIG, AUTOMODEL, WEIGHTS)]
        self._states = {file: _state(file) for file in files}

    def refuse_changed(self, plan: MergePlan) -> None:
        """Raises MergeRefused `corrupt-file` where one that the plan reads, or copies, is another file now,
        or was written to.

        What was merged then is a part of the old one and a part of the new, which no training has made.
        """
        problems = list(self._changed(plan))
        if problems:
            raise MergeRefused(problems)

    def _changed(self, plan: MergePlan) -> Iterator[Problem]:
        read = {plan.adapter.path / name for name in (ADAPTER_CONFIG, AUTOMODEL)} | plan.inputs
        read |= {plan.base.path / name for name in (CONFIG, *plan.side_files)}
        for file in sorted(read):
            if _state(file) != self._states.get(file):
                yield Problem(
                    "corrupt-file",
                    str(file),
                    "another file, or another size or time of change, than when the merge began",
                    "a file that stays as it is while it is read",
                    "Something replaced or changed it: merge again once that has ended.",
                )


def _state(file: Path) -> State | None:
    """None where there is nothing to be looked at: what needs that file says why."""
    try:
        return state_of(file.stat())
    except OSError:
        return None
