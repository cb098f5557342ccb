"""merge() and plan(): what a user calls. Plans, executes into a staged directory, verifies, publishes."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from loudmerge.errors import Mismatch
from loudmerge.executing.execute import SMALL_BYTES, execute, shard_files
from loudmerge.executing.inputs import Inputs
from loudmerge.executing.outcome import Outcome, merged_keys
from loudmerge.executing.outpath import refuse_existing, refuse_inputs
from loudmerge.executing.report import (
    MergeReport,
    TensorKept,
    dump,
    merged_report,
    one_rounding,
    planned_report,
)
from loudmerge.executing.resume import Finished, identity
from loudmerge.executing.writer import Staging, edited_json, index_json
from loudmerge.hub.client import directory
from loudmerge.planning.options import Options, Progress, check_options
from loudmerge.planning.plan import MergePlan
from loudmerge.planning.planner import make_plan
from loudmerge.reading.adapter import read_adapter
from loudmerge.reading.cached import notes_on_snapshot
from loudmerge.reading.checkpoint import INDEX, open_checkpoint
from loudmerge.reading.sidefiles import CONFIG, REPORT
from loudmerge.system.device import check_device, found_device
from loudmerge.system.threads import check_threads, cores, one_blas_thread, one_torch_thread

Pathish = str | os.PathLike[str]


def plan(
    base: Pathish,
    adapter: Pathish,
    *,
    out: Pathish | None = None,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    dtype: str = "keep",
    rounding: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,  # noqa: ARG001 - plan() takes what merge() takes
    progress: Progress | None = None,  # noqa: ARG001
) -> MergePlan:
    """What `merge` with the same arguments would do; nothing is written, and of the weights only
    some of the adapter's are read, which tell how its lora_B are packed.

    base, adapter: local directories, or Hub ids (owner/name or owner/name@revision), which are downloaded.
    Raises MergeRefused with every problem found; ValueError for an option's value that does not exist, before
    anything is read; EnvironmentFailed when the Hub cannot be reached.
    """
    options = Options(orientation, lora_b_layout, dtype, rounding)
    check_values(options, device, threads)
    return _plan(base, adapter, None if out is None else Path(out), options, overwrite=overwrite)[0]


def _plan(
    base: Pathish, adapter: Pathish, out: Path | None, options: Options, *, overwrite: bool
) -> tuple[MergePlan, Inputs]:
    """The plan, and its inputs as they were before they were read."""
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    found = directory(base), directory(adapter)
    if out is not None:
        refuse_inputs(out, found)
    inputs = Inputs(*found)
    made = make_plan(open_checkpoint(found[0]), read_adapter(found[1]), options)
    return replace(made, notes=(*made.notes, *notes_on_snapshot(found[0]))), inputs


def check_values(options: Options, device: str, threads: int | None) -> None:
    """Raises ValueError for an argument's value that does not exist. Nothing is read."""
    check_options(options)
    check_device(device)
    check_threads(threads)


def planned(base: Pathish, adapter: Pathish, out: Pathish, **options: Any) -> MergeReport:
    """The report of `plan` with the same arguments: what `merge` would do, and nothing written."""
    started = time.monotonic()
    made = plan(base, adapter, out=out, **options)
    seconds = time.monotonic() - started
    return planned_report(made, Path(out), seconds=seconds, peak_rss_bytes=peak_rss_bytes())


def merge(
    base: Pathish,
    adapter: Pathish,
    out: Pathish,
    *,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    dtype: str = "keep",
    rounding: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    resume: bool = False,
) -> MergeReport:
    """Merges an adapter into a base checkpoint and publishes the result as the directory `out`, in one step.

    base, adapter: local directories, never changed, or Hub ids; see `plan`. rounding: "nearest" rounds W + dW
    once to OUT's dtype; "stochastic" rounds up or down by chance, the same for equal inputs; "balanced" keeps
    each input's update with the least error (`balance.py`); "auto" is "nearest", "balanced" or, for what
    a last layer's MLP writes through, "stochastic" for each matrix but a head, by what the nearest would keep
    of its update (`arithmetic.rounding.chosen`); "peft" rounds dW first where PEFT's merge_and_unload does.
    threads: that compute, default as many as cores (eight at most), or one for an OUT under 64 MiB. verify:
    recompute every tensor by a second path before publishing. progress: called with (stage, bytes done, bytes
    in all). resume: go on from the shards that an interrupted merge of the same inputs into `out` had
    finished; and leave one's own, should this one be.

    Raises MergeRefused when the inputs cannot be merged correctly, and Mismatch when the verification fails:
    `out` does not exist then, or is untouched. OSError and EnvironmentFailed for the disk and the device.
    """
    return merge_named(
        base,
        adapter,
        out,
        None,
        orientation=orientation,
        lora_b_layout=lora_b_layout,
        dtype=dtype,
        rounding=rounding,
        device=device,
        threads=threads,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        resume=resume,
    )


def merge_named(
    base: Pathish,
    adapter: Pathish,
    out: Pathish,
    named: tuple[str, str] | None,
    notes: Sequence[str] = (),
    *,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    resume: bool = False,
    **options: Any,
) -> MergeReport:
    """`merge`, with what its report calls base and adapter; their paths where `named` is None.

    notes: more of them for the report.
    """
    started = time.monotonic()
    asked = Options(**options)
    check_values(asked, device, threads)
    made, inputs = _plan(base, adapter, Path(out), asked, overwrite=overwrite)
    computing, verifying = _threads(made, threads)
    with Staging(Path(out), overwrite=overwrite, resume=resume) as staging:
        finished = Finished(staging.done, identity(made))
        sizes = {shard.path.name: shard.nbytes for shard, _ in shard_files(made, staging.weights)}
        staging.keep_only(finished.shards(staging.weights, sizes))
        # Where torch is not loaded, and nobody's number of threads is at stake, it may not be needed at all.
        with one_blas_thread(), one_torch_thread() if "torch" in sys.modules else nullcontext():
            outcome = execute(
                made,
                staging.weights,
                device=found_device(device),
                threads=computing,
                progress=progress,
                finished=finished,
            )
        _check_applied(made, outcome)
        _write_files(made, staging, inputs)
        if verify:
            _verify(made, staging, verifying, progress, inputs)
        measured = _measured(made, outcome, verified=verify, started=started)
        measured["notes"] += notes
        report = merged_report(made, Path(out), measured, _details(made, outcome), named)
        staging.write_file(REPORT, dump(report))
        staging.publish(sizes)
    return report


def _threads(made: MergePlan, asked: int | None) -> tuple[int, int]:
    """How many compute, and how many verify: by default as many as cores, eight at most, and one more."""
    if asked:
        return asked, asked
    if sum(output.nbytes for output in made.outputs) < SMALL_BYTES:
        return 1, 1
    # While one that verifies waits for the disk, another computes.
    return cores(), cores() + 1


def _check_applied(made: MergePlan, outcome: Outcome) -> None:
    missing = merged_keys(made.outputs) - outcome.terms
    if missing:
        raise AssertionError(f"{len(missing)} planned updates were not applied, the first: {min(missing)}")


def _write_files(made: MergePlan, staging: Staging, inputs: Inputs) -> None:
    inputs.refuse_changed(made)
    for name in made.side_files:
        staging.copy_file(made.base.path / name, name)
    if made.base.index is not None:
        staging.write_file(INDEX, index_json(made.base.index, made.outputs))
    content = (made.base.path / CONFIG).read_bytes()
    staging.write_file(CONFIG, edited_json(content, made.config_edits))
    inputs.refuse_changed(made)


def _verify(
    made: MergePlan, staging: Staging, threads: int, progress: Progress | None, inputs: Inputs
) -> None:
    from loudmerge.verifying.verify import verify_plan

    result = verify_plan(made, staging.weights, files=staging.files, threads=threads, progress=progress)
    inputs.refuse_changed(made)
    if not result.ok:
        raise Mismatch(f"the merge is not published: its verification failed.\n{result.summary()}")


def _measured(made: MergePlan, outcome: Outcome, *, verified: bool, started: float) -> dict[str, Any]:
    least = min(outcome.kept.items(), key=lambda item: item[1].ratio, default=None)
    return {
        "notes": [*made.notes, *outcome.notes],
        "delta_kept": {
            "overall": outcome.overall.ratio,
            "least": None if least is None else {"tensor": least[0], "kept": least[1].ratio},
        },
        "rounding": {how: len(terms) for how, terms in sorted(outcome.rounded.items()) if terms},
        "verified": verified,
        "files": sorted(made.files),
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _details(made: MergePlan, outcome: Outcome) -> list[TensorKept]:
    rounded: dict[str, set[str]] = defaultdict(set)
    for how, terms in outcome.rounded.items():
        for key, _, _ in terms:
            rounded[key].add(how)
    return [
        TensorKept(output.key, outcome.kept[output.key].ratio, one_rounding(rounded[output.key]))
        for output in made.outputs
        if output.key in outcome.kept
    ]


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had, as the operating system says, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike getrusage's figure, this one does not start from that of the process that forked us.
        # Bytes, as the name of a process is in it, of any encoding.
        for line in status.read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
