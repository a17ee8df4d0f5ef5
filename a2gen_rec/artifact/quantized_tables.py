"""Embedding tables for serving: quantized by row; a batch dequantizes only the rows that it looks up.

A row of int8 codes has one float16 scale and no offset: embedding rows are roughly symmetric, and a float16 offset
would enlarge a table of width 32 by 6 %. With fbgemm's two float32 values (``FloatToFused8BitRowwiseQuantized``) it
would take 31 % of its float32 size instead of 27 %.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from a2gen_rec.errors import UserError

TableDtype = Literal["int8", "fp16", "fp32"]
_CHUNK = 2**18
"""Rows quantized at a time, so that a huge table needs no second float32 copy."""


_FP16_MAX = torch.finfo(torch.float16).max
_MAX_MAGNITUDE: dict[TableDtype, float] = {
    "int8": 127 * _FP16_MAX,
    "fp16": _FP16_MAX,
    "fp32": torch.finfo(torch.float32).max,
}
"""Largest magnitude that a storage format represents; larger values would become infinite, or NaN."""


class QuantizedTable(nn.Module):
    """One table in its storage format.

    Args:
        values: [rows, dim] int8 codes, float16 or float32.
        scale: [rows] float16 scales of int8 codes, otherwise None.
    """

    values: Tensor
    scale: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the float32 values [n, dim] of the rows ``ids`` [n]."""
        rows = self.values.index_select(0, ids).float()
        return rows if self.scale is None else rows.mul_(self.scale.index_select(0, ids).float()[:, None])

    def new_empty(self, rows: int) -> "QuantizedTable":
        """Return an uninitialized table of ``rows`` rows in the same format, to be filled by :meth:`set_rows`."""
        values = self.values.new_empty(rows, self.values.shape[1])
        return QuantizedTable(values, None if self.scale is None else self.scale.new_empty(rows))

    def set_rows(self, first: int, end: int, rows: "QuantizedTable") -> None:
        """Copy the rows of another table to rows ``first`` up to ``end``.

        Raises:
            ValueError: The tables have different formats.
        """
        if rows.values.dtype != self.values.dtype or (rows.scale is None) != (self.scale is None):
            raise ValueError("tables have different storage formats")
        self.values[first:end] = rows.values
        if self.scale is not None and rows.scale is not None:
            self.scale[first:end] = rows.scale


def check_representable(name: str, weight: Tensor, dtype: TableDtype) -> None:
    """Check that the values of the table ``name`` [rows, dim] are finite and in the range of ``dtype``.

    Raises:
        UserError: A value is NaN, infinite or too large.
    """
    peaks = torch.cat([part.abs().amax(1) for part in weight.split(_CHUNK)])  # NaN if a value of the row is
    for limit, reason in (
        (_MAX_MAGNITUDE["fp32"], "are not finite; the training has diverged"),
        (_MAX_MAGNITUDE[dtype], f"exceed {_MAX_MAGNITUDE[dtype]:g}, the limit of {dtype}; export with --dtype fp32"),
    ):
        rows = (~(peaks <= limit)).nonzero().squeeze(1)
        if len(rows):
            raise UserError(f"table {name!r}: {len(rows)} of {len(weight)} rows {reason} (first: row {int(rows[0])})")


def quantize_rows(weight: Tensor, dtype: TableDtype) -> QuantizedTable:
    """Quantize a table [rows, dim] of float values to ``dtype``.

    int8 codes are -127 .. 127; the scale maps the row's largest magnitude to 127. The error of a value is thus at most
    about half of 1/127 of that magnitude.
    """
    if dtype == "fp32":
        return QuantizedTable(weight.float().contiguous())
    if dtype == "fp16":
        return QuantizedTable(weight.half().contiguous())
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float16)
    for first in range(0, len(weight), _CHUNK):
        part = weight[first : first + _CHUNK].float()
        # The scale is rounded first, so that the codes compensate; rows of zeros or below float16 range have scale 0.
        scale = (part.abs().amax(1) / 127).half()
        steps = part / scale.float().clamp(min=torch.finfo(torch.float16).smallest_normal / 2**10)[:, None]
        codes[first : first + _CHUNK] = steps.round().clamp(-127, 127).to(torch.int8)
        scales[first : first + _CHUNK] = scale
    return QuantizedTable(codes, scales)


class QuantizedEmbeddings(nn.Module):
    """All tables of a model, in place of its ``EmbeddingCollection``: concatenated into one table, so that a batch
    looks up all of its ids at once.

    Args:
        rows: Number of rows of each table that is looked up by id; at least one table.
        read_table: Returns the table of a name. All tables have the same format and width.
        full_tables: Name -> [rows, dim] of the tables that every batch reads in full.

    Raises:
        ValueError: The tables have different formats.
    """

    def __init__(
        self, rows: Mapping[str, int], read_table: Callable[[str], QuantizedTable], full_tables: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        ends = list(itertools.accumulate(rows.values()))
        self.first = dict(zip(rows, [0, *ends[:-1]], strict=True))
        for name, end in zip(rows, ends, strict=True):  # one at a time in memory, in addition to the concatenated table
            part = read_table(name)
            if not self.first[name]:
                self.table = part.new_empty(ends[-1])
            self.table.set_rows(self.first[name], end, part)
        self.full_tables = {
            name: JaggedTensor(table, lengths=torch.tensor([len(table)])) for name, table in full_tables.items()
        }

    def permute_rows(self, name: str, rows: Tensor) -> None:
        """Move each row of a table to row ``rows`` [table rows], a permutation."""
        first = self.first[name]
        for stored in (self.table.values, self.table.scale):
            if stored is not None:
                part = stored[first : first + len(rows)]
                part[rows] = part.clone()

    def forward(self, sparse: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Return the looked-up rows of every table, in the order of the ids."""
        counts = sparse.length_per_key()
        parts = zip(sparse.keys(), counts, sparse.values().split(counts), sparse.lengths().split(1), strict=True)
        queried = [part for part in parts if part[0] in self.first]
        first = np.repeat([self.first[name] for name, *_ in queried], [count for _, count, *_ in queried])
        rows = self.table(torch.cat([ids for _, _, ids, _ in queried]) + torch.from_numpy(first))
        looked_up = dict(self.full_tables)
        for (name, _, _, length), values in zip(queried, rows.split([count for _, count, *_ in queried]), strict=True):
            looked_up[name] = JaggedTensor(values, lengths=length)
        return looked_up
