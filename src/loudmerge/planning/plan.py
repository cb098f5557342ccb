"""adapter x checkpoint -> MergePlan: every output tensor, every adapter tensor used exactly once.

The plan is a frozen, printable value. What is read to make it, loudmerge.planning.planner says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loudmerge.evidence.decision import Layout
from loudmerge.layout import Axes, LoraBLayout, Orientation, Span
from loudmerge.planning.options import Options
from loudmerge.reading.adapter import Adapter, LoraPair
from loudmerge.reading.checkpoint import INDEX, Checkpoint
from loudmerge.reading.families import Family
from loudmerge.reading.sidefiles import CONFIG, REPORT
from loudmerge.system.tensorfile import ITEM_BYTES, TensorEntry


@dataclass(frozen=True)
class Site:
    """One LoRA pair, with everything that fixes its function.

    parameter: the full name in memory of the parameter it updates.
    num_experts: experts in the pair, 0 for a dense pair. rank: for one expert.
    reads_input: the factors are R = A (rank, in) and L = B (out, rank), so that dW = s * L @ R as a
    Linear's weight (out, in). Else the pair is transposed: R = B^T (rank, in) and L = A^T (out, rank).
    peft_rounds_delta: whether PEFT's merge rounds dW to the weight's dtype before it adds it. For parameters
    and embeddings it does, for Linears it adds the float32 dW (peft/tuners/lora/layer.py, `merge`).
    """

    pair: LoraPair
    parameter: str
    num_experts: int
    rank: int
    scaling: float
    reads_input: bool
    orientation: Orientation | None
    lora_b_layout: LoraBLayout | None
    peft_rounds_delta: bool = True


@dataclass(frozen=True, slots=True)
class Term:
    """One low-rank update of one matrix of one output tensor.

    site: index in the plan's sites. expert: which expert's slices of the pair, -1 for a dense pair.
    rows: which rows of L (out axis) are used.
    index: which matrix along the output tensor's first axis, -1 for the tensor itself.
    axes: the order of that matrix's axes. out: where the rows go along its out axis.
    """

    site: int
    expert: int
    rows: Span
    index: int
    axes: Axes
    out: Span


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of OUT.

    source: the base's tensor; or the adapter's, when `replaced`. dtype: safetensors code in OUT.
    terms: low-rank updates, applied to disjoint parts. dora: the magnitude vector (then one dense term).
    bias: a vector to add, with its scaling. token_rows: (indices, entry) rows to put in place. closing,
    head: as loudmerge.planning.closing says.
    """

    key: str
    shard: str
    source: TensorEntry
    dtype: str
    shape: tuple[int, ...]
    replaced: bool = False
    terms: tuple[Term, ...] = ()
    dora: TensorEntry | None = None
    bias: tuple[TensorEntry, float] | None = None
    token_rows: tuple[tuple[int, ...], TensorEntry] | None = None
    closing: bool = False
    head: bool = False

    @property
    def balanced(self) -> str:
        """What stands for "balanced": rows that are replaced afterwards do not belong to a balance."""
        return "balanced" if self.token_rows is None else "stochastic"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in OUT. A dtype that cannot be computed with is only ever copied."""
        if self.dtype == self.source.dtype:
            return self.source.nbytes
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def touched(self) -> bool:
        """Whether OUT's tensor differs from the base's in more than its dtype."""
        return bool(self.replaced or self.terms or self.bias or self.token_rows)

    @property
    def is_copied(self) -> bool:
        """Whether OUT's tensor is the base's byte for byte."""
        return self.source.dtype == self.dtype and not self.touched


@dataclass(frozen=True)
class Counts:
    """What a merge has to do. expert: per-expert projections, each of gate, up and down for each expert."""

    expert: int
    dense: int
    replaced: int
    copied: int


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will do.

    outputs: every tensor of OUT, in the order of the base's shards and of the tensors in them.
    num_experts: experts of a fused or per-expert module that the adapter touches, None when it touches none.
    config_edits: changes to config.json, by dotted path. notes: what a person should know before merging.
    """

    base: Checkpoint
    adapter: Adapter
    family: Family
    layout: Layout
    options: Options
    rounding: str
    sites: tuple[Site, ...]
    outputs: tuple[OutputTensor, ...]
    counts: Counts
    num_experts: int | None
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def side_files(self) -> tuple[str, ...]:
        """Files that OUT copies byte for byte from the base, as relative paths."""
        return self.base.side_files

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files of OUT."""
        shards = (shard.name for shard in self.base.shards)
        index = () if self.base.index is None else (INDEX,)
        return (*self.side_files, CONFIG, REPORT, *shards, *index)

    @property
    def inputs(self) -> frozenset[Path]:
        """The files of weights that the merge reads, of the base and of the adapter."""
        return frozenset({*self.base.shards, *(entry.file for entry in self.adapter.entries.values())})

    @property
    def consumed(self) -> Counter[str]:
        """How often the plan uses each of the adapter's tensors."""
        used = Counter(entry.name for site in self.sites for entry in site.pair.entries)
        used.update(copy.name for _, copy in self.adapter.copies)
        used.update(entry.name for entry in self.adapter.originals)
        # An embedding, or its rows, may be for two outputs: itself, and the head that is tied to it.
        used.update({output.token_rows[1].name for output in self.outputs if output.token_rows is not None})
        used.update({output.source.name for output in self.outputs if output.replaced})
        return used
