"""What only an adapter's weights can show, looked at before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from loudmerge.arithmetic.factors import factors, unpack_lora_b
from loudmerge.errors import MergeRefused, Problem, plural, some
from loudmerge.planning.plan import Site
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.system.arrays import HALF_INFINITY, HALF_SIZE, as_numbers, read_array
from loudmerge.system.memory import Bytes
from loudmerge.system.tensorfile import FileReader, TensorEntry

CHUNK_BYTES = 4 << 20
"""Bytes of a tensor that are looked at at a time: fresh memory for all of it costs more than the look."""

SHOWN_EXPERTS = 4
"""How many experts are named, of those with values that are not finite."""


def check_weights(
    adapter: Adapter, sites: Sequence[Site], reader: FileReader, pool: Executor
) -> tuple[str, ...]:
    """Reads every tensor of the adapter once, in the threads of `pool`; returns what a person should know.

    Raises MergeRefused: `non-finite` for a NaN or an infinity, `unconsumed-adapter-tensor` when the second
    copy of a full tensor is not equal to the first, `unsupported-adapter` for a wrongly scaled conversion.
    """
    problems: list[Problem] = []
    zero = set()
    stacked = {e.name: site for site in sites if site.num_experts > 1 for e in site.pair.entries}
    entries = list(adapter.entries.values())
    for entry, (bad, empty) in zip(entries, pool.map(partial(_look, reader), entries), strict=True):
        if bad:
            problems.append(_non_finite(entry, bad, stacked.get(entry.name), reader))
        elif empty:
            zero.add(entry.name)
    problems += _unequal_copies(adapter, reader)
    problems += _wrong_conversions(adapter.config, sites, reader)
    if problems:
        raise MergeRefused(problems)
    return tuple(_untrained(sites, zero))


def _look(reader: FileReader, entry: TensorEntry) -> tuple[int, bool]:
    """How many of a tensor's values are not finite, and whether all of them are zero."""
    buffer = np.empty(min(entry.nbytes, CHUNK_BYTES), np.uint8)
    bad, zero = 0, True
    for start in range(0, entry.nbytes, CHUNK_BYTES):
        content = buffer[: entry.nbytes - start]
        reader.read_bytes(entry, start, content)
        some, none = _seen(content, entry.dtype)
        bad, zero = bad + some, zero and none
    return bad, zero


def _seen(content: Bytes, code: str) -> tuple[int, bool]:
    """As `_look`, of these bytes of safetensors' dtype `code`."""
    if code == "BF16":
        # By its bits: as float32 it would be twice as much, in fresh memory.
        sizes = content.view(np.uint16) & HALF_SIZE
        most = int(sizes.max(initial=0))
        return int((sizes >= HALF_INFINITY).sum()) if most >= HALF_INFINITY else 0, most == 0
    values = as_numbers(content, code)
    # The sum is not finite when an element is not; it may overflow by itself, so look again then.
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float32)
    bad = 0 if np.isfinite(total) else int((~np.isfinite(values)).sum())
    return bad, bool(total == 0) and not bool(values.any())


def _non_finite(entry: TensorEntry, count: int, site: Site | None, reader: FileReader) -> Problem:
    """site: whose experts' factors are in the tensor, None where it is no fused LoRA."""
    where = str(entry)
    if site is not None:
        where = f"{entry}, {_named(_broken_experts(entry, site, reader))} of {site.parameter}"
    return Problem(
        "non-finite",
        where,
        plural(count, "NaN or infinite value"),
        "finite numbers",
        "The training diverged, or the file is damaged: get it again, or an earlier state of the training.",
    )


def _broken_experts(entry: TensorEntry, site: Site, reader: FileReader) -> list[int]:
    """The experts with a value that is not finite: they have runs of lora_A's rows, or columns of lora_B."""
    broken = ~np.isfinite(read_array(reader, entry))
    if entry is site.pair.a:
        each = broken.reshape(site.num_experts, -1)
    else:
        each = unpack_lora_b(broken, site.num_experts, site.rank, site.lora_b_layout)
        each = each.reshape(site.num_experts, -1)
    return [int(expert) for expert in each.any(axis=1).nonzero()[0]]


def _named(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {some([*map(str, experts)], SHOWN_EXPERTS)}"


def _unequal_copies(adapter: Adapter, reader: FileReader) -> Iterable[Problem]:
    for first, copy in adapter.copies:
        if not np.array_equal(read_array(reader, first), read_array(reader, copy)):
            found = f"other values than {first}"
            yield Problem(
                "unconsumed-adapter-tensor", str(copy), found, "the same bytes", "Save the adapter again."
            )


def _wrong_conversions(config: AdapterConfig, sites: Sequence[Site], reader: FileReader) -> Iterable[Problem]:
    """Per-expert adapters that PEFT >= 0.19 fused on loading: with rslora gate_up counts sqrt(2) times.

    It writes rank 2r and alpha 2 alpha (peft/utils/transformers_weight_conversion.py). Its lora_B has blocks
    for gate and up and exact zeros elsewhere, which training would fill.
    """
    for site in sites if config.use_rslora else ():
        alpha = config.alpha_for(site.parameter, site.rank)
        if not site.num_experts or site.rank != 2 * config.rank or alpha != 2 * config.alpha:
            continue
        left = factors(site, read_array(reader, site.pair.a), read_array(reader, site.pair.b)).left
        rows, rank = left.shape[1] // 2, site.rank // 2
        blocks = not left[:, :rows, rank:].any() and not left[:, rows:, :rank].any()
        if blocks and left.any():
            yield Problem(
                "unsupported-adapter",
                f"{site.pair.b} of {site.parameter}",
                "use_rslora, and gate and up fused by PEFT, which scales them by sqrt(2) too much",
                "the adapter as transformers 4 saved it, one LoRA for each expert's Linear",
                "Merge that one, or set alpha_pattern for this parameter to lora_alpha * sqrt(2).",
            )


def _untrained(sites: Iterable[Site], zero: set[str]) -> Iterable[str]:
    """PEFT loses the LoRA of gate and up when it fuses an adapter that has none on down; its B stays zero."""
    idle = [site.parameter for site in sites if site.pair.b.name in zero or site.pair.a.name in zero]
    if idle:
        are = plural(len(idle), "LoRA pair is", "LoRA pairs are")
        yield f"{are} zero, the first for {idle[0]}: not trained, or lost on the way"
