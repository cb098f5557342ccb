"""The whole street on a model that fits a laptop: train, merge, verify, compare. Offline, nothing mocked."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loudmerge.demo import training
from loudmerge.errors import MergeRefused, Problem
from loudmerge.system.threads import one_torch_thread

if TYPE_CHECKING:
    from loudmerge.comparing.compare import Comparison
    from loudmerge.demo.training import Trained
    from loudmerge.executing.report import MergeReport
    from loudmerge.verifying.verify import Verification

PROVES_SOMETHING = 0.1
"""Least KL(base || trained), nats a token: an update so large that a merge without it is seen at once."""

MERGED = "merged"


@dataclass(frozen=True)
class DemoResult:
    """What each step returned. directory: holds base/, adapter/ and merged/. seconds: of the whole demo."""

    directory: Path
    trained: Trained
    merge: MergeReport
    verification: Verification
    comparison: Comparison
    seconds: float

    @property
    def ok(self) -> bool:
        """The training changed the model, and the merged model is the trained one."""
        return self.learned and self.verification.ok and self.comparison.ok

    @property
    def learned(self) -> bool:
        """Whether the trained model differs enough from the base for the comparison to prove something."""
        return self.comparison.kl_base_trained >= PROVES_SOMETHING and not self.comparison.inconclusive

    def to_json(self) -> dict[str, object]:
        """A JSON object: the three steps' own documents, and the training's figures."""
        return {
            "schema": 1,
            "status": "ok" if self.ok else "mismatch",
            "directory": str(self.directory),
            "versions": dict(self.trained.versions),
            "training": {"losses": list(self.trained.losses), "targets": list(self.trained.targets)},
            "merge": self.merge.to_json(),
            "verify": self.verification.to_json(),
            "compare": self.comparison.to_json(),
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """Some lines for a person."""
        losses = self.trained.losses
        names = ", ".join(f"{name} {version}" for name, version in self.trained.versions.items())
        lines = [
            f"trained: LoRA on {', '.join(self.trained.targets)}",
            f"  {len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}; {names}",
            self.merge.summary(),
            self.verification.summary(),
            self.comparison.summary(),
        ]
        if not self.learned:
            lines.append(
                f"The training changed too little to prove anything: KL base || trained is "
                f"{self.comparison.kl_base_trained:.2e}, expected at least {PROVES_SOMETHING}."
            )
        lines.append(f"{'ok' if self.ok else 'not ok'} in {self.seconds:.0f} s. Files: {self.directory}")
        return "\n".join(lines)


def run(
    directory: Path | None = None, *, progress: Callable[[str, int, int], None] | None = None
) -> DemoResult:
    """Trains a tiny Qwen3-MoE adapter with the installed libraries, then merges, verifies and compares it.

    directory: gets base/, adapter/ and merged/, none of which may be there; by default a new temporary
    directory. It is kept either way. progress: called by the merge with (stage, bytes done, bytes in all).
    Raises MergeRefused (`out-exists`), and EnvironmentFailed when a package of the extra `demo` is missing.
    """
    started = time.monotonic()
    where = Path(tempfile.mkdtemp(prefix="loudmerge-demo-")) if directory is None else directory
    _refuse_existing(where)
    with one_torch_thread():
        trained = training.train(where)
        # Not before the packages were found to be there: these import some of them.
        from loudmerge.comparing.compare import compare
        from loudmerge.merging.merge import merge
        from loudmerge.verifying.verify import verify

        base, adapter, out = trained.base, trained.adapter, where / MERGED
        report = merge(base, adapter, out, progress=progress)
        verification = verify(out, base, adapter)
        comparison = compare(out, base, adapter)
    return DemoResult(where, trained, report, verification, comparison, time.monotonic() - started)


def _refuse_existing(directory: Path) -> None:
    names = (training.BASE, training.ADAPTER, MERGED)
    found = [path for path in (directory / name for name in names) if path.exists()]
    if found:
        hint = "Name a new directory, or delete what an earlier demo left."
        raise MergeRefused(
            [Problem("out-exists", str(p), "a file or directory", "nothing", hint) for p in found]
        )
