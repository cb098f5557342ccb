"""Writes a converted adapter in one step, once a merge would put it where it put the adapter before."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from loudmerge.converting.rewrite import Rewritten
from loudmerge.errors import MergeRefused, Problem
from loudmerge.executing.writer import Staging
from loudmerge.layout import Span
from loudmerge.planning.options import Options
from loudmerge.planning.plan import MergePlan
from loudmerge.planning.planner import make_plan
from loudmerge.reading.adapter import read_adapter
from loudmerge.reading.adapter_config import AUTOMODEL, CONFIG, WEIGHTS
from loudmerge.reading.experts import split_expert_name
from loudmerge.reading.sidefiles import is_weights


@dataclass(frozen=True)
class Expected:
    """What the converted adapter must be to a merge.

    before: the plan of the adapter as it was. read_as: the layout it is in now.
    filled: the experts, by canonical name, whose parameters got updates of zero where they had no LoRA.
    """

    before: MergePlan
    read_as: Options
    filled: Collection[str]

    def check(self, adapter: Path) -> None:
        """Raises MergeRefused where a merge refuses this adapter, AssertionError where it updates else."""
        try:
            after = make_plan(self.before.base, read_adapter(adapter), self.read_as)
        except MergeRefused as refusal:
            raise MergeRefused(
                Problem(
                    "unsupported-adapter",
                    str(self.before.adapter.path),
                    f"an adapter that could not be merged any more: {refusal}",
                    "one that merges as before",
                    "Leave it as it is, or merge it.",
                )
            ) from refusal
        was, now = _updated(self.before), _updated(after)
        wrong = was - now | {one for one in now - was if not self._is_filled(one[0])}
        if wrong:
            raise AssertionError(f"converted, the adapter updates other weights than before: {min(wrong)[0]}")

    def _is_filled(self, key: str) -> bool:
        parts = split_expert_name(self.before.family.canonical(key))
        return parts is not None and parts[0] in self.filled


def _updated(plan: MergePlan) -> set[tuple[str, int, Span]]:
    """Every matrix that has an update, or part of one: its tensor on disk, its place there, its rows."""
    return {(output.key, term.index, term.out) for output in plan.outputs for term in output.terms}


def publish(
    adapter: Path, out: Path, draft: Rewritten, expected: Expected | None, *, overwrite: bool
) -> tuple[str, ...]:
    """Writes OUT, with the other files of the adapter's directory; their names.

    Not with other weights, nor with what NeMo AutoModel says of the layout: both are of the one that it had.
    expected: None without a base.
    """
    others = [
        path
        for path in sorted(adapter.iterdir())
        if path.is_file() and path.name not in (CONFIG, AUTOMODEL) and not is_weights(path.name)
    ]
    with Staging(out, overwrite=overwrite) as staging:
        save_file(draft.tensors, staging.weights / WEIGHTS, metadata={"format": "pt"})
        config = staging.weights / CONFIG
        config.write_bytes((json.dumps(draft.raw, indent=2, sort_keys=False) + "\n").encode())
        if expected is not None:
            expected.check(staging.weights)
        config.rename(staging.files / CONFIG)
        for path in others:
            staging.copy_file(path, path.name)
        staging.publish({WEIGHTS: (staging.weights / WEIGHTS).stat().st_size})
    return tuple(sorted([WEIGHTS, CONFIG, *(path.name for path in others)]))
