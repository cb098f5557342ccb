"""The second path of `verify`: readers, and the update of a matrix in float64.

Shares no arithmetic and no reader with `delta.py` and `merge.py`, only what keeps files open: the adapter is
read by safetensors' own reader, the base and OUT by positioned reads, and the factors of every expert are
taken from the pair by reshaping it to (experts, rank, a) and (b, rank, experts) or (b, experts, rank).
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loudmerge.errors import EnvironmentFailed
from loudmerge.layout import Axes, LoraBLayout, Span
from loudmerge.planning.plan import OutputTensor, Site, Term
from loudmerge.system.tensorfile import Descriptors

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes that can be merged into; every other one can only be copied."""

KEPT_SITES = 2
"""Sites whose factors stay in memory; the matrices of one site are checked one after another."""


class RawFiles:
    """Bytes of tensors by file and name, by positioned reads and this module's own reading of the headers."""

    def __init__(self) -> None:
        self._files = Descriptors()
        self._headers: dict[Path, dict[str, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> RawFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def read(self, file: Path, name: str, offset: int, nbytes: int) -> bytearray:
        """`nbytes` bytes of the tensor from its byte `offset` on, fewer at its end."""
        start, end = self._span(file, name)
        data = bytearray(max(0, min(nbytes, end - start - offset)))
        self.read_into(file, name, offset, memoryview(data))
        return data

    def read_into(self, file: Path, name: str, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes of the tensor from its byte `offset` on."""
        position = self._span(file, name)[0] + offset
        with self._files.use(file) as descriptor:
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise _changed(file, f"ended at byte {position}")
                view, position = view[count:], position + count

    def _span(self, file: Path, name: str) -> tuple[int, int]:
        """Where the tensor begins and ends in the file, in bytes."""
        with self._lock:
            if file not in self._headers:
                with self._files.use(file) as descriptor:
                    self._headers[file] = _spans(file, descriptor)
            if name not in self._headers[file]:
                raise _changed(file, f"does not hold {name}")
            return self._headers[file][name]


def _spans(file: Path, descriptor: int) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends in the file, in bytes."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
    except ValueError as error:
        raise _changed(file, f"has no header ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: (8 + length + item["data_offsets"][0], 8 + length + item["data_offsets"][1])
        for name, item in header.items()
    }


def _changed(file: Path, found: str) -> EnvironmentFailed:
    """The plan has read the same file, and it was sound."""
    return EnvironmentFailed(f"{file} {found}: it changed while it was verified")


class _Factors(NamedTuple):
    """A pair by expert: a (experts, rank, a), b (experts, b, rank), in the adapter's dtype."""

    a: Tensor
    b: Tensor


class FactorCache:
    """The pairs of the last few sites, read from the adapter's file by safetensors' own reader."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._kept: OrderedDict[int, _Factors] = OrderedDict()
        self._lock = threading.Lock()

    def site(self, term: Term) -> Site:
        """The site that a term belongs to."""
        return self._sites[term.site]

    def patch(self, term: Term) -> Patch:
        """The term as factors in the axes of its matrix on disk, in float64."""
        site = self._sites[term.site]
        factors = self._factors(term.site)
        expert = max(term.expert, 0)
        a, b = factors.a[expert].to(torch.float64), factors.b[expert].to(torch.float64)
        left, right = (b, a) if site.reads_input else (a.T, b.T)
        left = left[term.rows.places] * site.scaling
        if term.axes is Axes.OUT_IN:
            rows, cols = term.out, Span(0, right.shape[1])
        else:
            rows, cols, left, right = Span(0, right.shape[1]), term.out, right.T, left.T
        # Factors in float64 are rounded to float32 first.
        roundings = site.rank + (5 if torch.float64 in (factors.a.dtype, factors.b.dtype) else 3)
        return Patch(rows, cols, left.contiguous(), right.contiguous(), roundings)

    def _factors(self, index: int) -> _Factors:
        with self._lock:
            if index not in self._kept:
                self._kept[index] = _read_factors(self._sites[index])
                if len(self._kept) > KEPT_SITES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(index)
            return self._kept[index]


def _read_factors(site: Site) -> _Factors:
    experts, rank = max(site.num_experts, 1), site.rank
    a, b = read_tensor(site.pair.a.file, site.pair.a.name), read_tensor(site.pair.b.file, site.pair.b.name)
    by_expert = a.reshape(experts, rank, a.shape[1])
    if site.lora_b_layout is LoraBLayout.GROUPED_BY_EXPERT:
        columns = b.reshape(b.shape[0], experts, rank).permute(1, 0, 2)
    else:
        columns = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    return _Factors(by_expert.clone(), columns.clone(memory_format=torch.contiguous_format))


def read_tensor(file: Path, name: str) -> Tensor:
    """One whole tensor by safetensors' own reader."""
    try:
        # Of its backends this one opens a path that is not UTF-8, too.
        with safe_open(file, framework="pt", backend="pread") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except SafetensorError as error:
        raise _changed(file, f"cannot be read ({error})") from error


@dataclass(frozen=True)
class Patch:
    """left (rows.count, rank) @ right (rank, cols.count), added where `rows` and `cols` of the matrix cross.

    roundings: how many float32 roundings the merge's product may meet.
    """

    rows: Span
    cols: Span
    left: Tensor
    right: Tensor
    roundings: int

    def part(self, first: int, last: int) -> tuple[slice, slice]:
        """Which of the patch's rows lie in the matrix's rows first … last - 1, and where in that block."""
        start = max(0, -(-(first - self.rows.start) // self.rows.step))
        stop = min(self.rows.count, -(-(last - self.rows.start) // self.rows.step))
        if stop <= start:
            return slice(0, 0), slice(0, 0)
        at = self.rows.start + start * self.rows.step - first
        return slice(start, stop), Span(at, stop - start, self.rows.step).places

    def touches(self, first: int, last: int) -> bool:
        """Whether the patch has a row in first … last - 1."""
        mine, _ = self.part(first, last)
        return bool(mine.stop > mine.start)

    def covers(self, first: int, last: int, columns: int) -> bool:
        return (
            self.cols == Span(0, columns)
            and self.rows.step == 1
            and (self.rows.start <= first and last <= self.rows.start + self.rows.count)
        )

    def absolute(self) -> Patch:
        """The patch of the absolute values: its product bounds the error of this one's."""
        return Patch(self.rows, self.cols, self.left.abs(), self.right.abs(), self.roundings)

    def magnitude(self, rows: Tensor, cols: Tensor) -> Tensor:
        """sum over the rank of |left||right| at each (row, column) of the matrix; 0 outside the patch."""
        r, inside_rows = _within(rows, self.rows)
        c, inside_cols = _within(cols, self.cols)
        products = self.left[r].abs() * self.right.T[c].abs()
        return products.sum(dim=1) * (inside_rows & inside_cols)


def _within(index: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    at = index - span.start
    place = torch.div(at, span.step, rounding_mode="floor")
    inside = (at >= 0) & (at % span.step == 0) & (place < span.count)
    return torch.where(inside, place, 0), inside


def bias_patch(bias: Tensor, scaling: float) -> Patch:
    """scaling * bias as an update of a column: a bias is verified as a matrix of one column."""
    left = bias.to(torch.float64).view(-1, 1) * scaling
    rows = Span(0, left.shape[0])
    return Patch(rows, Span(0, 1), left, torch.ones(1, 1, dtype=torch.float64), 3)


def delta_block(patches: Sequence[Patch], first: int, last: int, delta: Tensor) -> Tensor:
    """Puts the update of rows first … last - 1 into `delta`, (rows, columns) in float64, and returns it."""
    here = [patch for patch in patches if patch.touches(first, last)]
    if len(here) == 1 and here[0].covers(first, last, delta.shape[1]):
        mine, _ = here[0].part(first, last)
        return torch.mm(here[0].left[mine], here[0].right, out=delta)
    delta.zero_()
    for patch in here:
        mine, there = patch.part(first, last)
        delta[there, patch.cols.places] += torch.einsum("or,ri->oi", patch.left[mine], patch.right)
    return delta


@dataclass(frozen=True)
class Matrix:
    """One matrix of an output tensor: its `number` in the plan, and `index` along the first axis or -1."""

    number: int
    output: OutputTensor
    index: int
    rows: int
    columns: int

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for term in self.output.terms if self.index in (-1, term.index))

    @property
    def nbytes(self) -> int:
        """Bytes read of the base and of OUT."""
        widths = TORCH_DTYPES[self.output.source.dtype].itemsize + TORCH_DTYPES[self.output.dtype].itemsize
        return self.rows * self.columns * widths


def matrices(number: int, output: OutputTensor) -> list[Matrix]:
    """The matrices of an output tensor: one for each expert of a fused one, else the tensor itself."""
    shape = output.shape
    if any(term.index >= 0 for term in output.terms):
        return [Matrix(number, output, index, shape[1], shape[2]) for index in range(shape[0])]
    if 0 in shape:
        return []
    rows = shape[0] if shape else 1
    return [Matrix(number, output, -1, rows, math.prod(shape[1:]))]


class Buffers:
    """Buffers of one thread, reused from block to block: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """The buffer of that name as (rows, columns), content undefined."""
        nbytes = rows * columns * dtype.itemsize
        held = self._held.get(name)
        if held is None or held.numel() < nbytes:
            held = self._held[name] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(rows, columns)
