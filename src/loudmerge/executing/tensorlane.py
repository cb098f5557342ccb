"""Computes any piece by tensors, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from loudmerge.arithmetic.delta import Update, Workspace, dora_weight
from loudmerge.arithmetic.factors import Factors
from loudmerge.arithmetic.kept import Kept
from loudmerge.arithmetic.rounding import Dither, dither_table
from loudmerge.executing.content import Content, Lent
from loudmerge.executing.lanes import Done, by_sample, samples, settled
from loudmerge.executing.pieces import Piece
from loudmerge.layout import Axes
from loudmerge.system.memory import Bytes
from loudmerge.system.tensorfile import FileReader, TensorEntry
from loudmerge.system.tensors import CPU, DTYPES, bytes_of, empty, read_tensor


class TensorLane:
    """Everything that a plan may ask for."""

    def __init__(self, device: str, content: Content, reader: FileReader, rounding: str) -> None:
        self._device = torch.device(device)
        self._content, self._reader, self._rounding = content, reader, rounding
        self._spaces: Lent[Workspace] = Lent(partial(Workspace, self._device))

    def compute(self, piece: Piece, values: Bytes, found: Sequence[Factors]) -> Done:
        """The piece, on the CPU in the place of its `values` where its dtype stays."""
        with self._spaces.one() as space:
            return self._computed(piece, self._tensor(piece, values), found, space)

    def _tensor(self, piece: Piece, content: Bytes) -> Tensor:
        values = bytes_of(content).view(DTYPES[piece.output.source.dtype])
        rows = values.numel() // max(piece.columns, 1)
        return values.view(rows, piece.columns).to(self._device)

    def _computed(self, piece: Piece, values: Tensor, found: Sequence[Factors], space: Workspace) -> Done:
        output, dtype = piece.output, DTYPES[piece.output.dtype]
        rounding = "nearest"
        if output.dora is not None:
            result, kept = self._dora(piece, values, output.dora, *found)
        else:
            result = values
            if values.dtype != dtype:
                result = self._bytes("result", values.numel() * dtype.itemsize).view(dtype)
                result = result.view(values.shape).copy_(values)
            kept, rounding = self._apply_terms(piece, values, result, found, space)
        if output.bias is not None:
            entry, scaling = output.bias
            added = self._read(entry, torch.float32).view_as(values) * scaling
            result = (values.to(torch.float32) + added).to(dtype)
        if output.token_rows is not None:
            self._replace_rows(piece, result, *output.token_rows)
        # The sums over what was merged are finite only if the results are: then they need no second look.
        plain = values.dtype == dtype and not (
            output.replaced or output.bias or output.token_rows or output.dora
        )
        known = plain and math.isfinite(kept.along + kept.total)
        broken = None if known else (~result.isfinite()).cpu().numpy()
        content = result.cpu().reshape(-1).view(torch.uint8).numpy()
        return Done(content, kept, rounding, broken)

    def _apply_terms(
        self, piece: Piece, values: Tensor, result: Tensor, found: Sequence[Factors], space: Workspace
    ) -> tuple[Kept, str]:
        total, dither = Kept(), None
        updates = [Update.of(term, its, self._device) for term, its in zip(piece.terms, found, strict=True)]
        rounding = settled(piece, self._rounding)
        if rounding is None:
            rounding = self._by_sample(piece, values, updates, result.dtype, space)
        if rounding in {"stochastic", "balanced"}:
            dither = Dither(dither_table(self._device), piece.output.key, max(piece.matrix, 0))
        for update in updates:
            total.add(update.apply(values, piece.first, rounding, space, result, dither))
        return total, rounding

    def _by_sample(
        self, piece: Piece, values: Tensor, updates: Sequence[Update], dtype: torch.dtype, space: Workspace
    ) -> str:
        kept = Kept()
        for first, last in samples(piece):
            if piece.rows == piece.output.shape[-2]:
                sample = values[first:last]
            else:
                sample = self._tensor(piece, self._content.sample(piece, values.itemsize, first, last))
            rounded = self._bytes("rounded", sample.numel() * dtype.itemsize).view(dtype).view(sample.shape)
            for update in updates:
                kept.add(update.apply(sample, first, "nearest", space, rounded))
        return by_sample(piece, kept)

    def _replace_rows(
        self, piece: Piece, result: Tensor, indices: tuple[int, ...], entry: TensorEntry
    ) -> None:
        rows = self._read(entry, result.dtype)
        for number, index in enumerate(indices):
            if piece.first <= index < piece.first + piece.rows:
                result[index - piece.first] = rows[number]

    def _dora(self, piece: Piece, values: Tensor, dora: TensorEntry, found: Factors) -> tuple[Tensor, Kept]:
        (term,) = piece.terms
        left, right = (torch.from_numpy(factor[0]).to(self._device) for factor in (found.left, found.right))
        delta = left @ right * found.scaling
        weight = values.to(torch.float32)
        plain = weight if term.axes is Axes.OUT_IN else weight.T
        merged = dora_weight(plain, delta, self._read(dora, torch.float32))
        exact = merged if term.axes is Axes.OUT_IN else merged.T
        result = exact.to(DTYPES[piece.output.dtype])
        wanted = (exact - weight).reshape(-1)
        got = (result.to(torch.float32) - weight).reshape(-1)
        kept = Kept(float(torch.dot(got, wanted)), float(torch.dot(wanted, wanted)))
        return result.contiguous(), kept

    def _read(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        return read_tensor(self._reader, entry).to(self._device, dtype)

    def _bytes(self, name: str, nbytes: int) -> Tensor:
        """The thread's memory of that name; on another device new memory, which torch keeps by itself."""
        return (
            bytes_of(self._content.bytes(name, nbytes))
            if self._device == CPU
            else empty([nbytes], torch.uint8, self._device)
        )
